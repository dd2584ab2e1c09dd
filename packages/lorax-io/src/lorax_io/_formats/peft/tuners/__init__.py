"""The kinds of adapters that PEFT and the core both have; a further one is a module and a row."""

import re
from typing import Any

from .adalora import Adalora
from .delora import Delora
from .gralora import Gralora
from .ia3 import IA3
from .loha import Loha
from .lokr import Lokr
from .lora import Lora
from .miss import Miss
from .oft import Oft
from .tokens import Tokens
from .tuner import Module as Module, Scaling as Scaling, Tuner as Tuner
from .vera import Vera

TUNERS: dict[str, Tuner] = {
    tuner.peft_type: tuner
    for tuner in (
        *(Lora(), Adalora(), IA3(), Loha(), Lokr()),
        *(Vera(), Oft(), Delora(), Miss(), Gralora(), Tokens()),
    )
}

# A tensor of any of them: the module, and the key in it.
_MARKS = sorted({mark for tuner in TUNERS.values() for mark in tuner.marks}, reverse=True)
FACTOR = re.compile(rf"\.({'|'.join(map(re.escape, _MARKS))})$")


def tuner_of(weight: Any) -> Tuner | None:
    """The tuner that writes an adapter; None where PEFT has none."""
    return next((tuner for tuner in TUNERS.values() if tuner.writes(weight)), None)
