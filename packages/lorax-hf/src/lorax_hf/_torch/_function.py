"""A PyTorch module as a pure function of its parameters."""

import copy
import threading
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from lorax import ArgumentError, QuantizedWeight

from ._arrays import in_jax, numpy_of, out_of_jax
from ._blame import errors_named
from ._changes import warn_of_changes, warn_of_derived
from ._environment import environment
from ._host import turn_off_host_choices
from ._layers import members_of, runs_of, stacked, unstacked
from ._modes import running
from ._quantized import refuse_quantized
from ._restore import restored
from ._scan import scanned
from ._state import State, state_of, without_weights
from ._wrappers import warn_of_backward_hooks


class ModuleFunction:
    """A module as a pure function of its parameters: `fn(params, *args, **kwargs)`.

    Attributes:
        module: a copy of the module without weights.
        runs: the layers that are scanned.
        members: for each of the function's parameters, the names of the module's parameters that it
            holds: itself, or those that it stacks.
        buffers: the tensors that are not parameters, as NumPy arrays by name; they are constants.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        train: bool = False,
        dtype: Any = None,
        scan_layers: bool | Collection[str] = False,
    ) -> None:
        refuse_quantized(module)
        warn_of_backward_hooks(module)
        environment()
        state = state_of(module)
        self.runs = runs_of(module, scan_layers)
        self.members = members_of(state.parameters, self.runs)
        constants = members_of(state.buffers, self.runs)
        self.buffers = stacked(_buffers(module, state, dtype), constants, np.stack)
        self._all = {**constants, **self.members}
        self._stacks = {name for name, parts in self._all.items() if parts != (name,)}
        self._shapes = {
            name: _shape(state.parameters[parts[0]], 0 if parts == (name,) else len(parts))
            for name, parts in self.members.items()
        }
        self._derived = {name for name, tensor in state.buffers.items() if tensor.requires_grad}
        self._originals = {
            name: weakref.ref(parameter) for name, parameter in state.parameters.items()
        }
        self.module = without_weights(module, state).train(train)
        self.__name__ = type(module).__name__
        self._inner = ""  # the prefix of the original module within `self.module`, see `around`
        self.programs: dict[Any, Any] = {}  # of `generate`
        self._lock = threading.RLock()
        _without_cache(self.module)
        if train:
            turn_off_host_choices(self.module)

    def __call__(
        self, params: Any, /, *args: Any, rng: jax.Array | None = None, **kwargs: Any
    ) -> Any:
        """Calls the module with these parameters; the module itself is not changed.

        Args:
            params: the parameters, by name.
            *args: the module's arguments, with JAX arrays in place of tensors.
            rng: the key for random numbers, such as those of dropout.
            **kwargs: the module's keyword arguments.

        Returns:
            The module's outputs, with JAX arrays in place of tensors.
        """
        self._check(params)
        env = environment()
        runs, arrays = self.runs, {**self.buffers, **params}
        if self._inner:  # as for `generate`, whose cache needs every layer by itself
            runs, arrays = [], unstacked(arrays, self._all)
        stacks = {name: arrays.pop(name) for name in self._stacks & arrays.keys()}
        arrays = {f"{self._inner}{name}": jnp.asarray(x) for name, x in arrays.items()}
        state = {name: env.j2t_iso(array) for name, array in arrays.items()}
        given = dict(state)
        with (
            self._lock,
            restored(self.module),
            errors_named(self.module),
            running(env, self.__name__, rng, self._values(state)),
            scanned(self.module, runs, stacks, env),
            warnings.catch_warnings(),
        ):
            # PyTorch's integers have 64 bits, which JAX has only under `jax_enable_x64`.
            warnings.filterwarnings("ignore", "Explicitly requested dtype", UserWarning)
            args, kwargs = in_jax(env, args), in_jax(env, kwargs)
            returned = torch.func.functional_call(
                self.module, state, args, kwargs, tie_weights=True
            )
            output = out_of_jax(returned)
            changed = {name for name in arrays if state[name] is not given[name]}
            derived = {f"{self._inner}{name}" for name in self._derived} & arrays.keys()
        warn_of_changes(self.module, arrays, state)
        warn_of_derived(self.module, derived - changed)
        return output

    def _values(self, state: Mapping[str, torch.Tensor]) -> dict[int, torch.Tensor]:
        """The values of parameters, by the ids of the parameters they replace."""
        values: dict[int, torch.Tensor] = {}
        copies = dict(self.module.named_parameters())
        for name, original in self._originals.items():
            value = state.get(f"{self._inner}{name}")
            for parameter in (copies.get(f"{self._inner}{name}"), original()):
                if value is not None and parameter is not None:
                    values[id(parameter)] = value
        return values

    def around(self, wrap: Callable[[torch.nn.Module], torch.nn.Module]) -> "ModuleFunction":
        """The function of a module that wraps this one as `model`, with the same parameters."""
        outer = copy.copy(self)
        outer.module = wrap(self.module).train(self.module.training)
        outer._inner = f"{self._inner}model."
        return outer

    def _check(self, params: Any) -> None:
        if not isinstance(params, Mapping):
            raise ArgumentError(
                f"{self.__name__} takes a dict of parameters by name, as `from_torch` returns it, "
                f"not {type(params).__name__}."
            )
        missing, unknown = self.members.keys() - params.keys(), params.keys() - self.members.keys()
        if missing or unknown:
            problems = [f"lacks {_some(missing)}"] if missing else []
            problems += [f"has {_some(unknown)}, which the module does not have"] if unknown else []
            raise ArgumentError(
                f"the dict of parameters of {self.__name__} {' and '.join(problems)}."
            )
        if wrong := [name for name in params if jnp.shape(params[name]) != self._shapes[name]]:
            raise ArgumentError(
                f"`{wrong[0]}` of {self.__name__} has the shape {self._shapes[wrong[0]]}, but its "
                f"array has {jnp.shape(params[wrong[0]])}."
            )
        if quantized := [name for name in params if isinstance(params[name], QuantizedWeight)]:
            raise ArgumentError(
                f"{self.__name__} takes arrays, and {_some(quantized)} "
                f"{'are' if quantized[1:] else 'is'} quantized. `lorax.lora(fn)` takes such a tree "
                "as the frozen part of the pair; to call `fn` itself, pass `lorax.dequantize(...)` "
                "of it."
            )


def _shape(tensor: torch.Tensor, layers: int) -> tuple[int, ...]:
    """The shape of a parameter, or of a stack of those of several layers."""
    return (*((layers,) if layers else ()), *tensor.shape)


def _some(names: Collection[str]) -> str:
    first = ", ".join(f"`{name}`" for name in sorted(names)[:3])
    return first + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _buffers(module: torch.nn.Module, state: State, dtype: Any) -> dict[str, np.ndarray[Any, Any]]:
    """The buffers as NumPy arrays; persistent ones are cast to `dtype`, as parameters are."""
    fixed = {
        f"{prefix}.{name}" if prefix else name
        for prefix, owner in module.named_modules()
        for name in owner._non_persistent_buffers_set
    }
    fixed |= state.buffers.keys() - dict(module.named_buffers()).keys()  # plain attributes
    buffers: dict[str, np.ndarray[Any, Any]] = {}
    for name, tensor in state.buffers.items():
        if tensor.device.type == "meta":  # `spec` traces such modules, for the axes alone
            tensor = torch.zeros_like(tensor, device="cpu")
        buffers[name] = numpy_of(tensor, None if name in fixed else dtype)
    return buffers


def _without_cache(module: torch.nn.Module) -> None:
    """Makes transformers models return no cache unless the call has `use_cache=True`."""
    for owner in module.modules():
        config: Any = getattr(owner, "config", None)
        if getattr(config, "use_cache", None):
            config.use_cache = False
