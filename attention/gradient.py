"""Make a ComfyUI model differentiable with respect to its input, for the time of a pass.

ComfyUI loads models and runs nodes under torch.inference_mode(), so weights are inference tensors, and autograd refuses
to save those for backward. Inside `differentiable` each of them is replaced by an ordinary tensor over the same memory:
nothing is copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from comfy import model_management
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

KEY = "attention_distillation_full_load"


def ready_for_gradients(model: ModelPatcher) -> ModelPatcher:
    """A clone of the model that ComfyUI loads as a whole. The model itself is not changed.

    With dynamic VRAM, weights may be evicted between forward and backward, and gradients would be silently wrong: the
    clone then stands on a copy without it.
    """
    clone = model.get_non_dynamic_delegate() if model.is_dynamic() else model.clone()
    clone.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, KEY)
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _load_fully)
    return clone


def _load_fully(executor: WrapperExecutor, model, noise_shape, conds, model_options=None, **kwargs):
    """Weights that are cast into a shared buffer layer by layer (low VRAM) are gone by the time of the backward."""
    return executor(model, noise_shape, conds, model_options=model_options, **{**kwargs, "force_full_load": True})


@contextmanager
def differentiable(model: torch.nn.Module) -> Iterator[None]:
    """Leave inference mode, enable gradients, and let the model's weights take part in them.

    The original parameters and buffers are back in place on every exit, errors included. Weights themselves get no
    gradient.
    """
    replaced: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    with torch.inference_mode(False), torch.enable_grad(), _kernels_with_backward():
        try:
            for module in model.modules():
                for name, parameter in module._parameters.items():
                    if _needs_alias(parameter):
                        replaced.append((module._parameters, name, parameter))
                        module._parameters[name] = torch.nn.Parameter(_alias(parameter), requires_grad=False)
                for name, buffer in module._buffers.items():
                    if _needs_alias(buffer):
                        replaced.append((module._buffers, name, buffer))
                        module._buffers[name] = _alias(buffer)
            yield
        finally:
            for owner, name, tensor in replaced:
                owner[name] = tensor


@contextmanager
def _kernels_with_backward() -> Iterator[None]:
    """ComfyUI's flag for its own training: rotary positions and norms are then computed by kernels with a backward."""
    before = model_management.in_training
    model_management.in_training = True
    try:
        yield
    finally:
        model_management.in_training = before


def _needs_alias(tensor: torch.Tensor | None) -> bool:
    """Quantised tensor subclasses are left alone: they are unpacked into ordinary tensors where they are used."""
    return tensor is not None and tensor.is_inference() and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor over the memory of an inference tensor."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
