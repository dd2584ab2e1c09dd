"""Runs a module's loop over equal layers as one `jax.lax.scan` over their stacked parameters.

The module's own forward pass still calls each layer in turn. The first call of each kind of layer
records its arguments. Once all kinds were called, the scan runs. All layers but the last return
placeholders, which only the next layer may use; the last one returns the scan's result.
"""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import torch
from torch import nn
from torch.utils import _pytree

from .._errors import ScanError
from ._between import Between, BetweenRefused, LayerIndex
from ._equal import index_names
from ._layers import Run, named_module


@contextlib.contextmanager
def scanned(
    module: nn.Module, runs: Sequence[Run], arrays: Mapping[str, Any], env: Any
) -> Generator[None]:
    """Scans the layers of these runs in calls of the module inside this block.

    Args:
        module: the module, whose attributes are changed; the caller must restore them.
        runs: the runs of its layers.
        arrays: the stacked tensors, by name.
        env: the torchax environment.
    """
    if not runs:
        yield
        return
    loops = [_Loop(module, run, arrays, env) for run in runs]
    with BetweenRefused():
        yield
    for loop in loops:
        loop.check_done()


class _Alone(nn.Module):
    """A layer with its original `forward`, which `_Loop` replaces, for `functional_call`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._forward = layer.forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._forward(*args, **kwargs)


class _Call:
    """The arguments of a layer, and which of them is the previous layer's result."""

    def __init__(self, args: Any, kwargs: Any, before: Any) -> None:
        leaves, self.structure = _pytree.tree_flatten((args, kwargs))
        self.kwargs = kwargs
        # The first layer has no previous one: its first tensor is carried through the layers.
        self.carry = next(
            (
                k
                for k, leaf in enumerate(leaves)
                if _is_tensor(leaf) and (before is None or leaf is before)
            ),
            None,
        )
        self.rest = [leaf if k != self.carry else None for k, leaf in enumerate(leaves)]
        self.x = None if self.carry is None else leaves[self.carry]

    def with_x(self, x: Any) -> Any:
        """The arguments, with another tensor in place of the carried one."""
        leaves = [x if k == self.carry else leaf for k, leaf in enumerate(self.rest)]
        return _pytree.tree_unflatten(leaves, self.structure)


class _Loop:
    """One run of layers, within one call of the module."""

    def __init__(self, module: nn.Module, run: Run, arrays: Mapping[str, Any], env: Any) -> None:
        self.run, self.env = run, env
        layers = list(module.get_submodule(run.owner).children())
        self.layers = [layers[number] for number in run.numbers]
        self.alone = [_Alone(layer) for layer in self.layers[: run.period]]
        self.arrays = tuple(_of_stack(f"{stack.name}.", arrays) for stack in run.stacks)
        self._begin()
        for place, layer in enumerate(self.layers):
            layer.forward = lambda *args, _place=place, **kwargs: self._call(_place, args, kwargs)
        twins = self.layers[run.period : 2 * run.period]
        for layer, twin in zip(self.layers[: run.period], twins, strict=True):
            for owner, name in index_names(layer, twin, run.period):
                label = f"{owner}.{name}" if owner else name
                setattr(layer.get_submodule(owner), name, LayerIndex(label))

    @property
    def x(self) -> Any:
        """The input of the first layer."""
        return self.calls[0].x

    def _begin(self) -> None:
        self.calls: list[_Call] = []  # of one layer of each kind
        self.returns: list[Callable[[Any], Any]] = []  # from the carried result to all results
        self.done = 0
        self.before: Any = None
        self.result: Any = None

    def check_done(self) -> None:
        """Raises if only some of the layers were called."""
        if self.done:
            raise self._error(self.done, "is not called, and those before it are")

    def _call(self, place: int, args: Any, kwargs: Any) -> Any:
        """What a layer returns to the module: a placeholder, or the scan's result at the end."""
        if place != self.done:
            raise self._error(place, f"is called before layer {self.run.numbers[self.done]}")
        call = _Call(args, kwargs, self.before)
        if call.x is None:
            raise self._error(place, "does not take what the layer before it returns")
        kind, period = place % self.run.period, self.run.period
        if place < period:
            self.calls.append(call)
            if place < period - 1:
                self._find_returns(kind)
            else:
                self.result = self._scan()
        else:
            self._check_alike(place, call)
        value = self.result
        if place < len(self.layers) - 1:
            value = self.before = Between.of(tuple(self.x.shape), self.x.dtype)
        returned = self.returns[kind](value)
        self.done += 1
        if self.done == len(self.layers):
            self._begin()  # A module may run its layers several times.
        return returned

    def _scan(self) -> Any:
        keys = self._keys()

        def body(x: jax.Array, step: Any) -> Any:
            arrays, key = step
            for kind in range(self.run.period):
                own = None if key is None else jax.random.fold_in(key, kind)
                x = self._layer(kind, x, arrays[kind], own)
            return x, None

        last, _ = jax.lax.scan(body, self.x.jax(), (self.arrays, keys))
        return self.env.j2t_iso(last)

    def _find_returns(self, kind: int) -> None:
        """Records the structure of a layer's results, by tracing it without computing anything."""
        arrays = {name: array[0] for name, array in self.arrays[kind].items()}
        jax.eval_shape(partial(self._layer, kind, key=self._key()), self.x.jax(), arrays=arrays)

    def _layer(self, kind: int, x: jax.Array, arrays: Mapping[str, Any], key: Any) -> jax.Array:
        """One layer on `x`, with these arrays for its tensors."""
        args, kwargs = self.calls[kind].with_x(self.env.j2t_iso(x))
        state = {name: self.env.j2t_iso(array) for name, array in arrays.items()}
        with self._drawing_from(key):
            returned = torch.func.functional_call(self.alone[kind], state, args, kwargs)
        (first, *others), structure = _pytree.tree_flatten(returned)
        if not _is_tensor(first):
            raise self._error(kind, f"returns a {type(first).__name__}, not a tensor")
        # An argument that a layer only passes on is returned; other results stay in the scan.
        others = [self._outside(kind, leaf) for leaf in others]
        back = lambda value: _pytree.tree_unflatten([value, *others], structure)  # noqa: E731
        self.returns[kind:] = [back]
        return first.jax()

    def _outside(self, kind: int, leaf: Any) -> Any:
        if not _is_tensor(leaf):
            return leaf
        given = (each for each in self.calls[kind].rest if _is_same(each, leaf))
        return next(given, Between.of(tuple(leaf.shape), leaf.dtype))

    def _check_alike(self, place: int, call: _Call) -> None:
        kind = place % self.run.period
        first = self.calls[kind]
        if (call.structure, call.carry) == (first.structure, first.carry):
            if all(map(_is_same, call.rest, first.rest)):
                return
        named = [
            f"`{name}`"
            for name, value in call.kwargs.items()
            if not _is_alike(value, first.kwargs.get(name), call.x)
        ]
        names = ", ".join(named) or "arguments"
        raise self._error(
            place, f"is called with other {names} than layer {self.run.numbers[kind]}"
        )

    def _key(self) -> Any:
        """The key of a layer's random numbers, if the module has one."""
        content = self.env._property.content
        return None if content.prng is None else content.get_and_rotate_prng_key()

    def _keys(self) -> Any:
        key = self._key()
        return None if key is None else jax.random.split(key, self.run.times)

    @contextlib.contextmanager
    def _drawing_from(self, key: Any) -> Generator[None]:
        content = self.env._property.content
        before, content.prng = content.prng, key
        try:
            yield
        finally:
            content.prng = before

    def _error(self, place: int, problem: str) -> Exception:
        return ScanError(
            f"layer {self.run.numbers[place]} of {named_module(self.run.owner)} {problem}, so the "
            "layers cannot be scanned. Create the function without `scan_layers`, or pass only "
            "the other lists of layers as `scan_layers`."
        )


def _of_stack(prefix: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {
        f"layer.{name.removeprefix(prefix)}": array
        for name, array in arrays.items()
        if name.startswith(prefix)
    }


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_same(one: Any, other: Any) -> bool:
    """Whether two arguments are the same array, or equal Python values."""
    if _is_tensor(one) and _is_tensor(other):
        return one is other or getattr(one, "_elem", one) is getattr(other, "_elem", other)
    if _is_tensor(one) or _is_tensor(other):
        return False
    return one is other or (type(one) is type(other) and bool(one == other))


def _is_alike(one: Any, other: Any, x: Any) -> bool:
    """Whether an argument is the same in two calls, or is the carried tensor."""
    (ones, structure), (others, expected) = map(_pytree.tree_flatten, (one, other))
    same = (_is_same(*pair) or pair[0] is x for pair in zip(ones, others, strict=False))
    return structure == expected and all(same)
