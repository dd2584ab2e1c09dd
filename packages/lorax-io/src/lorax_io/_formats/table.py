"""The table of formats, on which opening, converting and messages are based.

A new format is a module and a row here. The first row that recognizes a file reads it.
"""

from . import diffusers, keras, kohya, mlx, native, original, torchtune, tunix
from .format import Format
from .peft import folder as peft

FORMATS: dict[str, Format] = {
    row.name: row
    for row in (
        native.FORMAT,
        keras.FORMAT,
        tunix.FORMAT,
        mlx.FORMAT,
        torchtune.FORMAT,
        peft.FORMAT,
        kohya.FORMAT,
        original.FORMAT,
        diffusers.FORMAT,
    )
}
