"""Adaptive instance normalisation of latents (paper section 3.4): colours and contrast of the reference."""

from typing import NamedTuple

import torch

EPS = 1e-6  # on the picture's std only, as in the authors' release


class ChannelStats(NamedTuple):
    """Mean and unbiased standard deviation of each channel, [b or 1, c, 1, 1]."""

    mean: torch.Tensor
    std: torch.Tensor


def channel_stats(latent: torch.Tensor, weight: torch.Tensor | None = None) -> ChannelStats:
    """Statistics of each sample and channel over its pixels.

    A weight counts a pixel that many times: weight 2 gives what two copies of the pixel would give, so a mask
    of zeros and ones gives the statistics of the masked pixels. A single pixel has std 0.

    Args:
        latent: [b c h w], fp32 or better.
        weight: [b or 1, 1, h, w], non-negative, not all zero; None counts every pixel once.
    """
    if weight is None:
        weight = torch.ones_like(latent[:, :1])
    count = weight.sum(dim=(-2, -1), keepdim=True)
    mean = (weight * latent).sum(dim=(-2, -1), keepdim=True) / count
    squares = (weight * (latent - mean) ** 2).sum(dim=(-2, -1), keepdim=True)
    return ChannelStats(mean, (squares / (count - 1).clamp(min=1)).sqrt())


def adain(latent: torch.Tensor, reference: ChannelStats, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Give each channel of the latent the mean and std of the reference.

    Args:
        latent: [b c h w], fp32 or better, in the same space as the reference's statistics.
        reference: statistics of the reference, [1 or b, c, 1, 1].
        weight: which pixels of `latent` its own statistics are taken over, as in `channel_stats`.
    """
    own = channel_stats(latent, weight)
    return (latent - own.mean) / (own.std + EPS) * reference.std + reference.mean
