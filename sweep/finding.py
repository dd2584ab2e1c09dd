"""The results of one model's trial."""

import dataclasses


@dataclasses.dataclass
class Finding:
    """One row of the table."""

    title: str
    fault: str = ""  # the stage that failed, and the error
    forward: float | None = None  # relative error, JAX against torch
    weights: int = 0  # number of weights that a product, lookup or convolution uses
    factored: int = 0
    materialized: dict[str, str] = dataclasses.field(
        default_factory=dict[str, str]
    )  # with the reason
    # Weights whose axes differ between `lorax_hf.spec` and `infer_spec`.
    axes_differ: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    merged: float | None = None  # relative error, adapted against merged
    peft: float | None = None  # relative error, JAX against PEFT on torch, from the saved folder
    not_in_peft: str = ""  # why PEFT does not load the adapter
    # Modules that are excluded from the comparison with PEFT, and why.
    left_out: dict[str, str] = dataclasses.field(default_factory=dict[str, str])
    seconds: float = 0.0
