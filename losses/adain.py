"""Adaptive instance normalisation of latents (paper section 3.4): colours and contrast of the reference."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from .precision import at_least_fp32

EPS = 1e-6  # on the picture's std only, as in the authors' release


class ChannelStats(NamedTuple):
    """Mean and unbiased standard deviation of each channel, [b or 1, c, 1, 1], or of each at each pixel, [b c h w]."""

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
    return _restyled(latent, channel_stats(latent, weight), reference)


def _restyled(latent: torch.Tensor, own: ChannelStats, reference: ChannelStats) -> torch.Tensor:
    return (latent - own.mean) / (own.std + EPS) * reference.std + reference.mean


def adain_by_place(
    latent: torch.Tensor,
    references: Sequence[ChannelStats],
    counts: Sequence[float],
    coverage: torch.Tensor,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """`adain` where each reference counts at some pixels only; pixels at which none does stay as they are.

    What a reference is to change has the statistics of the pixels that it covers. Where several count, statistics are
    those of their pixels pooled by share, the latent's and the references' alike.

    Args:
        latent, weight: as in `adain`.
        references: statistics of each.
        counts: how many pixels each counts as, above 0.
        coverage: how much each counts at each pixel, [references, b or 1, 1, h, w] with values in 0..1.
    """
    shares = torch.stack([count * covered for count, covered in zip(counts, coverage, strict=True)])
    total = shares.sum(dim=0)
    shares = shares / torch.where(total > 0, total, 1)
    own = [channel_stats(latent, _of_area(covered if weight is None else covered * weight)) for covered in coverage]
    moved = _restyled(latent, _pooled(own, shares), _pooled(references, shares))
    return torch.lerp(latent, moved, coverage.sum(dim=0).clamp(max=1))


def _of_area(weight: torch.Tensor) -> torch.Tensor:
    """Weights that are nowhere above 0 made 1, and others brought to a largest one of 1, [b 1 h w]."""
    largest = weight.amax(dim=(-2, -1), keepdim=True)
    return torch.where(largest > 0, weight / largest, 1.0)


def _pooled(stats: Sequence[ChannelStats], shares: torch.Tensor) -> ChannelStats:
    """Statistics at each pixel of several things pooled by share, [things, b or 1, 1, h, w] -> [b c h w]."""
    mean = sum(share * one.mean for share, one in zip(shares, stats, strict=True))
    squares = (share * (one.std**2 + (one.mean - mean) ** 2) for share, one in zip(shares, stats, strict=True))
    return ChannelStats(mean, sum(squares).sqrt())


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
