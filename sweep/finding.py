"""What a trial finds out about a model."""

import dataclasses


@dataclasses.dataclass
class Finding:
    """One row of the table."""

    title: str
    fault: str = ""  # the stage that failed, and the error
    forward: float | None = None  # relative error, JAX against torch
    weights: int = 0  # that a product, look-up or convolution uses
    factored: int = 0
    built: dict[str, str] = dataclasses.field(default_factory=dict[str, str])  # with the reason
    unlike: dict[str, str] = dataclasses.field(default_factory=dict[str, str])  # axes, by the trace
    merged: float | None = None  # adapted against merged
    peft: float | None = None  # adapted in JAX against PEFT on torch, from the saved folder
    no_peft: str = ""  # why PEFT has no such adapter
    # Modules that PEFT is compared without, and why.
    left_out: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    seconds: float = 0.0
