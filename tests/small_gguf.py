"""A stand-in for the tensors and layers of a GGUF pack: packed weights in a Tensor subclass, unpacked where used.

As there, every tensor of a file is of the subclass, the small ones unpacked; its constructor needs keyword arguments
that torch knows nothing of, `clone` and `detach` return the tensor itself, and `shape` is that of the unpacked weight.
"""

from typing import Any

import comfy.ops
import torch
import torch.nn.functional as F

BLOCK = 32  # weights that share a scale


class PackedTensor(torch.Tensor):
    """Bytes of a weight, with what it needs to be unpacked."""

    def __new__(cls, *args: Any, kind: str, whole: torch.Size, **kwargs: Any) -> "PackedTensor":
        return super().__new__(cls, *args, **kwargs)

    def __init__(self, *args: Any, kind: str, whole: torch.Size, **kwargs: Any) -> None:
        super().__init__()
        self.kind = kind
        self.whole = whole

    def to(self, *args: Any, **kwargs: Any) -> "PackedTensor":
        new = super().to(*args, **kwargs)
        new.kind, new.whole = getattr(self, "kind", None), getattr(self, "whole", new.size())
        return new

    def clone(self, *args: Any, **kwargs: Any) -> "PackedTensor":
        return self

    def detach(self, *args: Any, **kwargs: Any) -> "PackedTensor":
        return self

    @property
    def shape(self) -> torch.Size:
        return getattr(self, "whole", None) or self.size()


def packed(weight: torch.Tensor, quantise: bool) -> PackedTensor:
    """8 bits for each number and one scale for each block, or as it is."""
    if not quantise:
        return PackedTensor(weight, kind="F32", whole=weight.shape)
    blocks = weight.reshape(-1, BLOCK)
    scale = (blocks.abs().amax(dim=1, keepdim=True) / 127).clamp(min=1e-8).half()
    numbers = (blocks / scale).round().clamp(-127, 127).to(torch.int8)
    return PackedTensor(
        torch.cat([scale.view(torch.uint8), numbers.view(torch.uint8)], 1), kind="Q8", whole=weight.shape
    )


def unpacked(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """An ordinary tensor."""
    if getattr(tensor, "kind", None) == "Q8":
        shape, data = tensor.whole, tensor.view(torch.uint8)
        scale, numbers = data[:, :2].contiguous().view(torch.float16), data[:, 2:].contiguous().view(torch.int8)
        tensor = (scale.to(dtype) * numbers.to(dtype)).reshape(shape)
    else:
        tensor = tensor.to(dtype)
    return torch.Tensor(tensor) if isinstance(tensor, PackedTensor) else tensor


class _Layer(torch.nn.Module):
    """Takes its tensors from a file as they are, and unpacks them in each forward pass."""

    comfy_cast_weights = True

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: Any) -> None:
        for name in ("weight", "bias"):
            if prefix + name in state_dict:
                self._parameters[name] = torch.nn.Parameter(state_dict[prefix + name], requires_grad=False)

    def _unpacked(self, like: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        weights = (None if tensor is None else tensor.to(like.device) for tensor in (self.weight, self.bias))
        return tuple(None if tensor is None else unpacked(tensor, like.dtype) for tensor in weights)


class Ops(comfy.ops.manual_cast):
    """ComfyUI's layers over packed weights, as `custom_operations` of a model."""

    class Linear(_Layer, comfy.ops.manual_cast.Linear):
        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            return F.linear(input, *self._unpacked(input))

    class Conv2d(_Layer, comfy.ops.manual_cast.Conv2d):
        def forward_comfy_cast_weights(self, input: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return self._conv_forward(input, *self._unpacked(input))

    class LayerNorm(_Layer, comfy.ops.manual_cast.LayerNorm):
        """Its weights are not packed: ComfyUI's own code runs, and its output is of the subclass."""

        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            out = super().forward_comfy_cast_weights(input)
            return torch.Tensor(out) if isinstance(out, PackedTensor) else out

    class GroupNorm(_Layer, comfy.ops.manual_cast.GroupNorm):
        def forward_comfy_cast_weights(self, input: torch.Tensor) -> torch.Tensor:
            out = super().forward_comfy_cast_weights(input)
            return torch.Tensor(out) if isinstance(out, PackedTensor) else out


def pack_weights(network: torch.nn.Module) -> dict[str, PackedTensor]:
    """The state dict of a network as a GGUF file has it: weights of linear layers packed."""
    linear = {f"{name}.weight" for name, module in network.named_modules() if isinstance(module, torch.nn.Linear)}
    return {
        name: packed(tensor.float(), name in linear and tensor[0].numel() % BLOCK == 0)
        for name, tensor in network.state_dict().items()
    }
