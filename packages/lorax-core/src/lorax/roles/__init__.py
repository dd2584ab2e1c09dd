"""How a function uses each of its weights: the roles of a weight's axes, read off the jaxpr.

Nothing is computed. A value is known by the weights that it shows: for each of its axes, which axes
of the weight run along it. Transposes, reshapes and slices move these marks. Element-wise functions
keep them, linear or not: what `lora` cannot follow it materializes, and the adapter still works.
Where a marked value meets another one in a product, a convolution or a look-up, the axes that are
summed over or indexed are the weight's inputs, and those that are kept are its outputs.

Data is marked too, so a product with data can be distinguished from one with a constant or with
another weight, and a bias, which is added to something larger, from a weight that is a sum of
others.

Of several uses of a weight the strongest counts (`Strength`), and of equals the first. A use whose
result goes into the weight itself, such as a norm that divides it, counts if there is no other.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from .. import _compat
from . import (
    control_flow as control_flow,
    lookups as lookups,
    products as products,
    structural as structural,
)
from .values import CONSTANT, DATA as DATA, whole
from .walk import Roles as Roles, Walk, shape_of


def find_roles(jaxpr: Any, kinds: Sequence[Any]) -> Roles:
    """The roles of the weights of a function.

    Args:
        jaxpr: the function as a closed jaxpr.
        kinds: what each of its constants and then of its inputs is: a weight by its name, `DATA`,
            or None for neither.
    """
    return _walked(_compat.open_jaxpr(jaxpr)[0], kinds).roles()


def beside_data(jaxpr: Any, kinds: Sequence[Any]) -> Callable[[Any], bool]:
    """Whether an equation of a function puts weights beside data, as a concatenation does.

    The function is walked when that is asked first, for most never ask.

    Args:
        jaxpr: as for `find_roles`.
        kinds: as for `find_roles`.
    """
    body, _ = _compat.open_jaxpr(jaxpr)
    equations = functools.cache(lambda: _walked(body, kinds).beside_data)
    return lambda eqn: id(eqn) in equations()


def _walked(body: Any, kinds: Sequence[Any]) -> Walk:
    walk = Walk()
    walk.run(
        body,
        [
            CONSTANT if kind is None else whole(kind, shape_of(v))
            for kind, v in zip(kinds, (*body.constvars, *body.invars), strict=True)
        ],
    )
    return walk
