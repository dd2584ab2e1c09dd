"""How a function uses each of its weights: the roles of a weight's axes, found in the jaxpr.

Nothing is computed. A value is described by the weights that it shows: for each of its axes, which
axes of a weight run along it. Transposes, reshapes and slices move these marks. Element-wise
functions keep them, linear or not: where `lora` cannot follow a function, it materializes the
weight, and the adapter still works. Where a marked value meets another one in a product, a
convolution or a lookup, the axes that are summed over or indexed are inputs of the weight, and the
axes that are kept are its outputs.

Data is marked as well, to distinguish a product with data from one with a constant or with another
weight, and a bias, which is added to something larger, from a weight that is a sum of others.

Of several uses of a weight, the strongest decides (`Strength`), and among equals the first. A use
whose result goes into the weight itself, such as a norm that divides it, decides only if there is
no other.
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
    """Returns the roles of the weights of a function.

    Args:
        jaxpr: the function as a closed jaxpr.
        kinds: for each constant and then each input: a weight's name, `DATA`, or None for neither.
    """
    return _walked(_compat.open_jaxpr(jaxpr)[0], kinds).roles()


def beside_data(jaxpr: Any, kinds: Sequence[Any]) -> Callable[[Any], bool]:
    """Returns a predicate: whether an equation of a function joins weights with data.

    The function is walked on the first call of the predicate, since most functions never need it.

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
