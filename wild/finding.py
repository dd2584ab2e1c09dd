"""What a trial finds out about one model."""

import dataclasses


@dataclasses.dataclass
class Finding:
    """What a trial found.

    Weights are parameters of two or more axes that take part in a product, a convolution or a
    look-up, or that have an adapter.

    Attributes:
        title: of the model.
        version: the distribution and its version.
        weights: how many there are.
        factored: how many are adapted, and never built.
        materialized: the adapted weights that are built, and the reason.
        left_out: the weights that `infer_spec` names as left out, and the reason.
        unsaid: the weights that reach a product, are left out, and are not named.
        still: the adapted weights of which a step of training changes no factor.
        error: the largest relative error of value and gradients beside the merged model.
        trace: the time to trace ours over that of the plain model.
        fault: what went wrong, if anything.
    """

    title: str
    version: str = ""
    weights: int = 0
    factored: int = 0
    materialized: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    unsaid: list[str] = dataclasses.field(default_factory=list)
    still: list[str] = dataclasses.field(default_factory=list)
    error: float | None = None
    trace: float | None = None
    fault: str | None = None
