"""The one rule about number formats: losses and statistics are computed in fp32 or better."""

import torch


def at_least_fp32(tensor: torch.Tensor) -> torch.Tensor:
    """Half-precision tensors become fp32; fp32 and fp64 stay what they are. Any shape."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
