"""The kinds of adapters that PEFT and the core both have; a further one is a module and a row."""

import re
from typing import Any

from .adalora import Adalora
from .ia3 import IA3
from .loha import Loha
from .lokr import Lokr
from .lora import Lora
from .tuner import Module as Module, Scaling as Scaling, Tuner as Tuner

TUNERS: dict[str, Tuner] = {
    tuner.peft_type: tuner for tuner in (Lora(), Adalora(), IA3(), Loha(), Lokr())
}

# A tensor of any of them: the module, and the key in it.
_MARKS = sorted({mark for tuner in TUNERS.values() for mark in tuner.marks}, reverse=True)
FACTOR = re.compile(rf"\.({'|'.join(map(re.escape, _MARKS))})$")


def tuner_of(weight: Any) -> Tuner | None:
    """The tuner that writes an adapter; None where PEFT has none."""
    return next((tuner for tuner in TUNERS.values() if tuner.writes(weight)), None)
