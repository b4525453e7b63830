"""Adaptive instance normalisation of latents (paper section 3.4): colours and contrast of the reference."""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .precision import at_least_fp32

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


def adain_latent(
    latent: torch.Tensor, reference: torch.Tensor, strength: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Blend a latent with its AdaIN towards a reference.

    Args:
        latent: [b c h w], or with the frame of models that know time [b c 1 h w].
        reference: [n c H W] or [n c 1 H W], of any size; all its pixels count together.
        strength: 0 keeps the latent, 1 takes the statistics over fully.
        mask: where to change it, [1 or b, 1, H, W] with values in 0..1 at any resolution; None everywhere.

    Returns:
        The changed latent, in the latent's shape and dtype.
    """
    picture, offered = (at_least_fp32(x).reshape(*x.shape[:2], *x.shape[-2:]) for x in (latent, reference))
    pooled = offered.to(picture).transpose(0, 1).flatten(1)[None, :, None]  # [1 c 1 (n h w)]
    moved = adain(picture, channel_stats(pooled))
    amount = torch.tensor(strength)
    if mask is not None:
        amount = strength * F.interpolate(mask.to(picture), picture.shape[-2:], mode="bilinear")
    return torch.lerp(picture, moved, amount.to(picture)).reshape(latent.shape).to(latent.dtype)
