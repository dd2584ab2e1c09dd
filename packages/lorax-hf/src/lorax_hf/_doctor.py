"""`doctor`: the known defects that affect a model."""

import importlib.metadata
import warnings
from typing import Any

from ._defects import Defect, DefectWarning, Finding
from ._library import installed_parts, part_of


def doctor(model: Any = None) -> list[Finding]:
    """Lists known defects of the installed transformers and JAX.

    Args:
        model: a PyTorch module, a Flax model, or the config of one, to list only the defects that
            affect it. By default all are listed.

    Returns:
        The findings, each with its remedy; empty if none is known.

    Example:
        >>> import lorax_hf, transformers
        >>> [finding.problem for finding in lorax_hf.doctor(transformers.GPT2Config())]
        []
        >>> any("electra" in finding.models for finding in lorax_hf.doctor())
        True
    """
    parts = installed_parts() if model is None else [part_of(model)]
    config = None if model is None else parts[0].config_of(model)
    return [
        defect.finding
        for part in parts
        for defect in part.DEFECTS
        if defect.is_there() and (model is None or _concerns(defect, config))
    ]


def _concerns(defect: Defect, config: Any) -> bool:
    kind = getattr(config, "model_type", None)
    return kind in defect.finding.models and defect.concerns(config)


def warn_of_defects(model: Any) -> None:
    """Warns about each defect that affects a model."""
    for finding in doctor(model):
        versions = [
            f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "jax")
        ]
        warnings.warn(
            f"{finding.problem} ({', '.join(versions)}): {finding.remedy}.",
            DefectWarning,
            stacklevel=3,
        )
