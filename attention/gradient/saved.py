"""What autograd saves of a forward pass, where the plain way does not do.

The blocks of FLUX and Chroma add to their input in place (`img += ...`), after autograd has saved it. Here each saved
tensor is kept as it is, and copied only when something is about to overwrite it. torch's own
`allow_mutation_on_saved_tensors` does the same through a dispatch mode, which also catches what happens inside the
tensor classes of other packs and breaks them (GGUF). This one sees only calls of torch's functions.

Quantised weights are saved packed, and unpacked for the backward alone: some layouts multiply one way round only, and
others would quantise the gradient.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from comfy.model_base import BaseModel
from comfy.quant_ops import QuantizedTensor
from torch.overrides import TorchFunctionMode

from ..architectures import overwrites_activations


def saved_activations(model: BaseModel) -> AbstractContextManager:
    """Keep what autograd saves of the model's forward passes fit for its backward; around both of them."""
    overwrites = overwrites_activations(model.diffusion_model)
    if overwrites or any(isinstance(weight, QuantizedTensor) for weight in model.parameters()):
        return _kept(overwrites)
    return contextlib.nullcontext()


@contextlib.contextmanager
def _kept(overwrites: bool) -> Iterator["Kept"]:
    kept = Kept()
    watching = kept.watching() if overwrites else contextlib.nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack), watching:
        yield kept


class _Saved:
    """A tensor as autograd saved it; a copy once something has been about to overwrite it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor
        self.version: int | None = tensor._version  # None: a copy, which nobody else holds


class Kept:
    """The tensors that autograd has saved, by the memory that they lie in. Only autograd itself holds them."""

    def __init__(self) -> None:
        self._by_memory: dict[int, weakref.WeakValueDictionary[tuple, _Saved]] = {}
        self.copied_bytes = 0

    def watching(self) -> AbstractContextManager:
        """Around code that overwrites: what has been saved is copied before."""
        return _CopyBeforeOverwriting(self)

    def pack(self, tensor: torch.Tensor) -> _Saved:
        """Note a tensor that autograd saves."""
        with torch._C.DisableTorchFunctionSubclass():
            of_memory = self._by_memory.setdefault(_memory(tensor), weakref.WeakValueDictionary())
            key = (tensor.storage_offset(), tensor.size(), tensor.stride(), tensor.dtype, tensor._version)
            saved = of_memory.get(key)
            if saved is None:  # detached: it must not hold the graph that is to hold it
                saved = _Saved(torch.Tensor.detach(tensor) if tensor.requires_grad else tensor)
                of_memory[key] = saved
            return saved

    def unpack(self, saved: _Saved) -> torch.Tensor:
        """The tensor as it was; a quantised weight as an ordinary tensor.

        Raises:
            RuntimeError: it has been overwritten unseen.
        """
        if saved.version is not None and saved.tensor._version != saved.version:
            raise RuntimeError(
                "Attention distillation: an activation was overwritten in a way that the pack cannot see, so gradients "
                "would be wrong. Another node changes the model's blocks; take it away."
            )
        return saved.tensor.dequantize() if isinstance(saved.tensor, QuantizedTensor) else saved.tensor

    def overwriting(self, tensor: torch.Tensor) -> None:
        """Copy what has been saved of a tensor's memory, before it is overwritten."""
        for saved in list(self._by_memory.pop(_memory(tensor), {}).values()):
            with torch.no_grad(), torch._C.DisableTorchFunctionSubclass():
                saved.tensor, saved.version = torch.Tensor.clone(saved.tensor), None
            self.copied_bytes += saved.tensor.nbytes


def no_backward(_forgotten: Any) -> torch.Tensor:
    """In place of `unpack`, where what autograd saves is only looked at."""
    raise AssertionError("this pass has no backward")


def _memory(tensor: torch.Tensor) -> int:
    """Which memory a tensor lies in; a saved tensor keeps it from being given to another."""
    return torch.Tensor.untyped_storage(tensor)._cdata


class _CopyBeforeOverwriting(TorchFunctionMode):
    """Looks at each call of a torch function for tensors that it is going to overwrite."""

    def __init__(self, kept: Kept) -> None:
        super().__init__()
        self._kept = kept

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        for tensor in overwritten(func, args, kwargs or {}):
            self._kept.overwriting(tensor)
        return func(*args, **(kwargs or {}))


def overwritten(func: Callable, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[torch.Tensor]:
    """The tensors that a call of a torch function overwrites, by its schema or by torch's rules for names."""
    schema = getattr(func, "_schema", None)
    if schema is not None:
        for place, argument in enumerate(schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                yield from _tensors(args[place] if place < len(args) else kwargs.get(argument.name))
        return
    name = getattr(func, "__name__", "")
    in_place = name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if in_place or kwargs.get("inplace"):
        yield from _tensors(args[0] if args else kwargs.get("input"))
    yield from _tensors(kwargs.get("out"))


def _tensors(value: Any) -> Iterable[torch.Tensor]:
    """The tensor, or those of a list of tensors."""
    values = value if isinstance(value, list | tuple) else [value]
    return [each for each in values if isinstance(each, torch.Tensor)]
