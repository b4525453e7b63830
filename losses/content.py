"""The content loss: the picture keeps the structure of a content reference (paper section 3.3, equation 4)."""

import torch

from .precision import at_least_fp32


def query_loss(q: torch.Tensor, q_c: torch.Tensor) -> torch.Tensor:
    """mean | q - Q_c | of one layer.

    Args:
        q: queries of the picture, [b heads t d]; carries the gradient.
        q_c: queries of the content reference, same shape, detached.

    Returns:
        A scalar in fp32 or better.
    """
    return (at_least_fp32(q) - at_least_fp32(q_c.detach())).abs().mean()
