"""What Lorax raises and warns with.

An error class exists where a caller may want to catch that case alone; each message says what
happened (path, primitive, shapes), why, and what to do.
"""


class LoraxError(Exception):
    """Base class of every error that Lorax raises on purpose."""


class SpecError(LoraxError, ValueError):
    """A spec that does not fit the parameters it was given for."""


class PairError(LoraxError, TypeError):
    """Something other than a matching pair `(frozen, tunable)` where one was expected."""


class MaterializeError(LoraxError):
    """An adapted weight would have to be materialized, and `on_materialize="error"` forbids it."""


class UnusedAdapterError(LoraxError):
    """An adapter that no result depends on, and `on_unused="error"` forbids it."""


class MaterializeWarning(UserWarning):
    """An adapted weight is materialized because no rule covers the way it is used."""


class UnusedAdapterWarning(UserWarning):
    """An adapter that no result depends on: its factors get zero gradients and train nothing."""


class UnadaptedWarning(UserWarning):
    """Weights that `infer_spec` leaves without an adapter, each with the reason and the remedy."""


class UnquantizedWarning(UserWarning):
    """Weights that `quantize` leaves as they are, each with the reason and the remedy."""


class RankWarning(UserWarning):
    """A rank larger than that of the matrix it adapts: the adapter has more numbers than it."""


def a_kind(value: object) -> str:
    """The class of a value with its article, for messages."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIO' else 'a'} {name}"
