"""Make a ComfyUI model differentiable with respect to its input, for the time of a pass.

ComfyUI loads models and runs nodes under torch.inference_mode(), so weights are inference tensors, and autograd refuses
to save those for backward. Inside `differentiable` each of them is replaced by an ordinary tensor over the same memory:
nothing is copied.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def differentiable(model: torch.nn.Module) -> Iterator[None]:
    """Leave inference mode, enable gradients, and let the model's weights take part in them.

    The original parameters and buffers are back in place on every exit, errors included. Weights themselves get no
    gradient.
    """
    replaced: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    with torch.inference_mode(False), torch.enable_grad():
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


def _needs_alias(tensor: torch.Tensor | None) -> bool:
    """Quantised tensor subclasses are left alone: they are unpacked into ordinary tensors where they are used."""
    return tensor is not None and tensor.is_inference() and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """An ordinary tensor over the memory of an inference tensor."""
    alias = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    return alias.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())
