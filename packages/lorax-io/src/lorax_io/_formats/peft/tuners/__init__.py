"""The kinds of adapters that both PEFT and `lorax` support: a module and a row here for each."""

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

# Matches the key at the end of the name of any factor; what precedes the match is the module.
_MARKS = sorted({mark for tuner in TUNERS.values() for mark in tuner.marks}, reverse=True)
FACTOR = re.compile(rf"\.({'|'.join(map(re.escape, _MARKS))})$")


def tuner_of(weight: Any) -> Tuner | None:
    """The tuner that writes an adapter; None if PEFT does not support its kind."""
    return next((tuner for tuner in TUNERS.values() if tuner.writes(weight)), None)
