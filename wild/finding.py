"""The results of one model's trial."""

import dataclasses


@dataclasses.dataclass
class Finding:
    """The results of one model's trial.

    Weights are parameters with two or more axes that reach a product, a convolution or a lookup, or
    that have an adapter.

    Attributes:
        title: of the model.
        version: the distribution and its version.
        weights: the number of weights.
        factored: the number of adapted weights that are never materialized.
        materialized: the adapted weights that are materialized, with the reason.
        left_out: the weights that `infer_spec` reports as left out, with the reason.
        unreported: the weights that reach a product and are left out without a report.
        unchanged: the adapted weights whose factors a training step does not change.
        error: the largest error of values and gradients, relative to the merged model.
        trace: the trace time of the adapted model, divided by that of the plain model.
        fault: the stage that failed and its error, if any.
    """

    title: str
    version: str = ""
    weights: int = 0
    factored: int = 0
    materialized: dict[str, str] = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)
    unreported: list[str] = dataclasses.field(default_factory=list)
    unchanged: list[str] = dataclasses.field(default_factory=list)
    error: float | None = None
    trace: float | None = None
    fault: str | None = None
