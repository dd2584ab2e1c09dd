"""The errors and warnings of Lorax.

There is an error class for each case that a caller may want to catch separately. Each message says
what happened (path, primitive, shapes), why, and what to do. It ends with the address of its
section in the documentation.
"""

# The same as in `[project.urls]`; `nox -s release-check` compares them.
DOCUMENTATION = "https://OWNER.github.io/lorax/"

_PACKAGES = ("lorax", "lorax_hf", "lorax_io")


def remedies(category: type) -> str:
    """Returns a pointer to the documentation of an error or warning class."""
    # A user's subclass has the address of the class of Lorax that it derives from.
    ours = next(c for c in category.__mro__ if c.__module__.partition(".")[0] in _PACKAGES)
    return f"See {DOCUMENTATION}troubleshooting/#{ours.__name__.lower()}"


class LoraxError(Exception):
    """Base class of every error that Lorax raises.

    The address of its documentation is a note (`__notes__`), so that it ends the traceback and is
    not repeated in messages that quote another.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.add_note(remedies(type(self)))


class LoraxWarning(UserWarning):
    """Base class of every warning of Lorax; its text ends with the documentation's address."""

    def __str__(self) -> str:
        return f"{super().__str__()}\n{remedies(type(self))}"


class ArgumentError(LoraxError, ValueError, TypeError):
    """An argument of a wrong type or value, or a combination of arguments that is not allowed.

    It is a `ValueError` and a `TypeError`, so that code that catches either one works.
    """


class SlotError(LoraxError, IndexError):
    """A slot that a bank of adapters does not have."""


class MissingPackageError(LoraxError, ImportError):
    """An optional package is not installed, or its version does not work with this one."""


class CheckError(LoraxError, AssertionError):
    """A check of `lorax.testing` failed; the message says which one, with the numbers."""


class SpecError(LoraxError, ValueError):
    """A spec that does not fit the parameters it was given for."""


class PairError(LoraxError, TypeError):
    """Something other than a matching pair `(frozen, tunable)` where one was expected."""


class MaterializeError(LoraxError):
    """An adapted weight would have to be materialized, and `on_materialize="error"` forbids it."""


class UnusedAdapterError(LoraxError):
    """An adapter that no result depends on, and `on_unused="error"` forbids it."""


class MaterializeWarning(LoraxWarning):
    """An adapted weight is materialized because no rule covers the way it is used."""


class UnusedAdapterWarning(LoraxWarning):
    """An adapter that no result depends on: its factors get zero gradients and train nothing."""


class UnadaptedWarning(LoraxWarning):
    """Weights that `infer_spec` leaves without an adapter, each with the reason and the remedy."""


class UnquantizedWarning(LoraxWarning):
    """Weights that `quantize` leaves as they are, each with the reason and the remedy."""


class RankWarning(LoraxWarning):
    """A rank larger than that of the matrix it adapts: the adapter has more numbers than it."""


def a_kind(value: object) -> str:
    """Returns the class name of a value with its article, for messages."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOaeio' else 'a'} {name}"
