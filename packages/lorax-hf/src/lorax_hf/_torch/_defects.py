"""Known defects of PyTorch models in JAX that are not fixed here, with remedies."""

from .._defects import Defect, Finding

DEFECTS: tuple[Defect, ...] = (
    Defect(
        Finding(
            ("flaubert", "fsmt", "jetmoe", "led", "xlm"),
            "its forward pass has Python control flow that depends on the values of arrays, "
            "which cannot be traced",
            "use a model of another type, or a subclass whose forward pass does not",
        ),
        lambda: True,
        lambda config: True,
    ),
)
