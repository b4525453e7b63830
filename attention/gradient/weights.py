"""Let a model's weights take part in autograd, for the time of a pass.

ComfyUI loads models and runs nodes under torch.inference_mode(), so weights are inference tensors, and autograd refuses
to save those for backward. Inside `differentiable` each of them is replaced by an ordinary tensor over the same memory:
nothing is copied.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from comfy import model_management
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..architectures import blocks_of_fused_kernels
from .kernels import without_fused_kernels
from .streamed import fetched_by_us, streamed


@contextmanager
def differentiable(*networks: torch.nn.Module) -> Iterator[None]:
    """Leave inference mode, enable gradients, and let the weights of networks take part in them.

    The original parameters, buffers and other tensors of the modules are back in place on every exit, errors included.
    Weights themselves get no gradient. Those that are not on the device are fetched for each call of their layer.
    """
    replaced: list[tuple[MutableMapping[str, Any], str, torch.Tensor]] = []
    with gradients_on(), _kernels_with_backward():
        try:
            for module in (module for network in networks for module in network.modules()):
                for owner in (module._parameters, module._buffers, module.__dict__):
                    for name, tensor in list(owner.items()):
                        if isinstance(tensor, torch.Tensor) and _needs_alias(tensor):
                            replaced.append((owner, name, tensor))
                            owner[name] = _alias(tensor)
            fused = [block for network in networks for block in blocks_of_fused_kernels(network)]
            with fetched_by_us(streamed(*networks)), without_fused_kernels(fused):
                yield
        finally:
            for owner, name, tensor in replaced:
                owner[name] = tensor


@contextmanager
def gradients_on() -> Iterator[None]:
    """Leave inference mode and enable gradients, in this thread: all that one needs that works in `differentiable`."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


@contextmanager
def _kernels_with_backward() -> Iterator[None]:
    """ComfyUI's flag for its own training: rotary positions and norms are then computed by kernels with a backward.

    The flag belongs to the process, and ComfyUI has no narrower one. That is safe here: it only chooses between two
    ways to compute the same, ComfyUI runs one prompt at a time, and it is set between two calls of the model in the
    sampling loop, so nothing else computes meanwhile: the threads of MultiGPU CFG Split have all handed over their part
    of a call before it returns, and those that share the work here are done before this ends. What it was before comes
    back on every exit.
    """
    before = model_management.in_training
    model_management.in_training = True
    try:
        yield
    finally:
        model_management.in_training = before


def _needs_alias(tensor: torch.Tensor) -> bool:
    """Autograd cannot save inference tensors; and weights that ask for a gradient would make it save too much."""
    return tensor.is_inference() or tensor.requires_grad or any(map(_needs_alias, _inner(tensor).values()))


def _inner(tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """By attribute, the tensors that a tensor subclass without memory of its own is made of (a quantised weight)."""
    if not is_traceable_wrapper_subclass(tensor):
        return {}
    return {name: getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]}


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor over the memory of another, of the same class and with the same attributes.

    Classes of other packs are not asked: neither their constructors nor their methods are called.
    """
    inner = {name: _alias(of_it) for name, of_it in _inner(tensor).items()}
    with torch._C.DisableTorchFunctionSubclass():
        size, stride = torch.Tensor.size(tensor), torch.Tensor.stride(tensor)
        if inner:
            context = tensor.__tensor_flatten__()[1]
            alias = type(tensor).__tensor_unflatten__(inner, context, size, stride)
        else:
            alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            alias.set_(torch.Tensor.untyped_storage(tensor), torch.Tensor.storage_offset(tensor), size, stride)
            alias = _of_class(alias, type(tensor))
    attributes = getattr(tensor, "__dict__", {})
    alias.__dict__.update({name: value for name, value in attributes.items() if name not in {*alias.__dict__, *inner}})
    return alias


def _of_class(tensor: torch.Tensor, kind: type[torch.Tensor]) -> torch.Tensor:
    if kind is torch.Tensor:
        return tensor
    if kind is torch.nn.Parameter:
        return torch.nn.Parameter(tensor, requires_grad=False)
    return tensor.as_subclass(kind)
