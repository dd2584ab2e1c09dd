"""A PyTorch module as rows."""

import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import torch
from torch.nn.utils.parametrize import ParametrizationList

from lorax import ArgumentError, Axes, LoraSpec, SpecError, UnadaptedWarning, infer_spec

from .._ends import HEADS, TOKEN_TABLES
from .._errors import ModuleWarning
from .._rows import Described, Row, ends_in
from ._arrays import dtype_of
from ._function import ModuleFunction
from ._layers import Run, Stack, inside, members_of, runs_in
from ._quantized import refuse_quantized
from ._state import state_of, tied_names
from ._targets import DEFAULT_TARGETS
from ._weights import Weight, order_of, weight_of
from ._wrappers import unwrapped

# Names of modules or classes of attention, and of feed-forward networks. If both contain a weight,
# the innermost decides.
_ATTENTION = re.compile(r"att(n|ention)", re.IGNORECASE)
_MLP = re.compile(
    r"mlp|ffn|feed_?forward|feedforward|expert|moe|intermediate|^fc_?\d|^fc_in|^fc_out|^lin\d"
    r"|^(output|ff|wi|wo|wi_\d|w\d|densereludense)$",
    re.IGNORECASE,
)


def described(model: Any, params: Any = None) -> Described:
    """A module, its function, or the module of a config, as rows."""
    module = module_of(model)
    refuse_quantized(module)
    _refuse_adapters_of_peft(module)
    runs = model.runs if isinstance(model, ModuleFunction) else runs_in(module, params or ())
    tensors = state_of(module).parameters
    members = members_of(tensors, runs)
    shapes = {name: _shape(tensors, name, parts) for name, parts in members.items()}
    if params is not None and set(params) != set(shapes):
        raise SpecError("`params` are not those of the module: their names differ.")
    kind = getattr(getattr(module, "config", None), "model_type", None)
    subject = "this module" if kind is None else f"the type {kind!r}"
    return Described(
        list(map(_Rows(module, kind, runs).row, members.items())),
        shapes if params is None else params,
        _inference(module, runs, shapes),
        "" if kind in DEFAULT_TARGETS else f"PEFT has no default for {subject}",
    )


def _refuse_adapters_of_peft(module: torch.nn.Module) -> None:
    """Raises `SpecError` if a module has adapters of PEFT, whose weights would be targets too."""
    for name, owner in module.named_modules():
        if any(f"{cls.__module__}.".startswith("peft.") for cls in type(owner).__mro__):
            where = f"`{name}`" if name else "the module"
            raise SpecError(
                f"{where} is a {type(owner).__name__} of PEFT: the module already has adapters. "
                "Pass the model from before `get_peft_model`, or the result of "
                "`merge_and_unload`. To continue the training of a saved adapter, read it with "
                "`lorax_io.load_peft`."
            )


def module_of(model: Any) -> torch.nn.Module:
    """The module of a function, of a config, or itself."""
    if isinstance(model, ModuleFunction):
        return model.module
    return unwrapped(model) if isinstance(model, torch.nn.Module) else of_config(model)


def _shape(tensors: Mapping[str, Any], name: str, parts: tuple[str, ...]) -> Any:
    tensor = tensors[parts[0]]
    stack = () if parts == (name,) else (len(parts),)
    return jax.ShapeDtypeStruct((*stack, *tensor.shape), dtype_of(tensor))


def of_config(config: Any) -> torch.nn.Module:
    """The module of a config of transformers, without memory for its weights."""
    import transformers

    with torch.device("meta"):
        for name in config.architectures or ():
            if hasattr(transformers, name):
                return getattr(transformers, name)(config)
        model = transformers.AutoModel.from_config(config)
    if config.architectures:
        warnings.warn(
            f"transformers has no class {config.architectures[0]}, which the config names: a "
            f"{type(model).__name__} is built. For a class of your own, pass a module.",
            ModuleWarning,
            stacklevel=5,
        )
    return model


class _Rows:
    """Makes the rows of a module from properties that are computed once for all of them."""

    def __init__(self, module: torch.nn.Module, kind: str | None, runs: Sequence[Run]) -> None:
        self.module = module
        self.stacks = [stack for run in runs for stack in run.stacks]
        self.by_name = dict(module.named_modules())
        self.tied = tied_names(module)
        self.head = self._name_of("get_output_embeddings")
        self.table = self._name_of("get_input_embeddings")
        self.kind = kind

    def row(self, item: tuple[str, tuple[str, ...]]) -> Row:
        """The row of a parameter, which may be stacked."""
        path, parts = item
        row = self._row(parts[0])
        stack = next((each for each in self.stacks if path.startswith(f"{each.name}.")), None)
        return row if stack is None else _stacked(row, path, stack)

    def _row(self, path: str) -> Row:
        module, _, name = path.rpartition(".")
        owner = self.by_name[module]
        shape = tuple(getattr(owner, name).shape)
        weight = weight_of(owner, name)
        if weight is None:
            torch_name: dict[str, Any] = {"type": "Tensor", "module": module, "parameter": name}
            if len(shape) == 2:
                torch_name |= {"type": "Parameter", "order": order_of(owner, name)}
            unsure = sum(size > 1 for size in shape) > 1
            words = frozenset(self._words_of_parametrized(module)) if unsure else frozenset()
            return Row(path, module, shape, None, torch_name, words, unsure, type(owner).__name__)
        torch_name = {**weight.torch_name, "module": module}
        if weight.kind == "embedding" and path in self.tied:
            torch_name["tied"] = True
        words = frozenset(self._words(module, weight))
        return Row(path, module, shape, weight.axes, torch_name, words, False, type(owner).__name__)

    def _words_of_parametrized(self, module: str) -> Iterator[str]:
        """The words of a linear layer, for the parameters that its weight is computed from."""
        name, _, weight = module.rpartition(".parametrizations.")
        if isinstance(self.by_name[module], ParametrizationList) and weight == "weight":
            if isinstance(self.by_name[name], torch.nn.Linear):
                yield from self._words(name, Weight("linear", Axes((), (1,), (0,)), {}))

    def _words(self, module: str, weight: Weight) -> Iterator[str]:
        if weight.kind in ("embedding",):
            if module == self.table or ends_in(TOKEN_TABLES, module):
                yield "embeddings"
            return
        if self._by_default(module):
            yield "default"
        if weight.kind == "experts":
            yield "experts"
        is_head = module == self.head or ends_in(HEADS, module)
        if weight.kind == "linear" and not is_head:
            yield "all-linear"
        if not is_head and (part := self._part(module)):
            yield part

    def _by_default(self, module: str) -> bool:
        targets = DEFAULT_TARGETS.get(self.kind or "", ())
        if isinstance(targets, str):
            return re.fullmatch(targets, module) is not None
        return ends_in(targets, module)

    def _part(self, module: str) -> str | None:
        """The innermost of "attention" and "mlp" that contains a module; None if neither does."""
        parts = module.split(".")
        for end in range(len(parts), 0, -1):
            owner = self.by_name[".".join(parts[:end])]
            if end < len(parts) and owner is self.module:
                break
            names = [parts[end - 1]]
            if end < len(parts):  # the module's own class, such as `nn.Linear`, says nothing
                names.append(type(owner).__name__)
            if any(map(_ATTENTION.search, names)):
                return "attention"
            if any(map(_MLP.search, names)):
                return "mlp"
        return None

    def _name_of(self, method: str) -> str | None:
        try:
            embedding = getattr(self.module, method)()
        except (AttributeError, NotImplementedError):
            return None
        return next((name for name, owner in self.by_name.items() if owner is embedding), None)


def _stacked(row: Row, path: str, stack: Stack) -> Row:
    """The row of a stack, from that of one layer's parameter: the axis of layers comes first."""
    layer = stack.layers[0]
    torch_name: dict[str, Any] = {
        **row.torch_name,
        "shared_axes": [-1, *row.torch_name.get("shared_axes", ())],
    }
    for name in ("in_axes", "out_axes", "shared_axes"):
        if name in torch_name:
            torch_name[name] = [axis + 1 for axis in torch_name[name]]
    if "channel_axis" in torch_name:
        torch_name["channel_axis"] += 1
    torch_name["module"] = f"{inside(stack.owner)}{{}}{row.module.removeprefix(layer)}"
    if stack.numbers != range(len(stack.numbers)):
        torch_name["numbers"] = list(stack.numbers)
    return row._replace(
        path=path,
        module=f"{stack.name}{row.module.removeprefix(layer)}",
        shape=(len(stack.numbers), *row.shape),
        axes=None if row.axes is None else _behind(row.axes),
        torch_name=torch_name,
    )


def _behind(axes: Axes) -> Axes:
    """The roles of axes with a shared axis added in front."""
    shared, inputs, outputs = (tuple(axis + 1 for axis in role) for role in axes)
    return Axes((0, *shared), inputs, outputs)


def _inference(
    module: torch.nn.Module, runs: Sequence[Run], shapes: Mapping[str, Any]
) -> Callable[[Sequence[str], Any], Mapping[str, Axes]]:
    """A function that finds the axes of weights by tracing the module with example inputs."""

    def infer(paths: Sequence[str], inputs: Any) -> Mapping[str, Axes]:
        args, kwargs = ((), inputs) if isinstance(inputs, Mapping) else (inputs, {})
        if not isinstance(args, tuple):
            raise ArgumentError(
                "spec: `inputs` must be a tuple or a dict: the arguments of a call of the module."
            )
        fn = ModuleFunction(module, scan_layers={run.owner for run in runs})
        # Only arrays: a traced function cannot return the module's other outputs.
        call = lambda params, *args, **kwargs: jax.tree.leaves(fn(params, *args, **kwargs))  # noqa: E731
        with warnings.catch_warnings():
            # Weights that are left out have no axes; `spec` reports these if they are targeted.
            warnings.simplefilter("ignore", UnadaptedWarning)
            specs = infer_spec(call, dict(shapes), *args, rank=1, skip_small=False, **kwargs)
        return {
            path: leaf.axes(path, shapes[path].ndim)
            for path in paths
            if isinstance(leaf := specs[path], LoraSpec)
        }

    return infer
