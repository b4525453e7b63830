"""References: the pictures whose attention guides.

Nothing is computed when a reference is made. Its features are captured at the noise level of each step, inside the
sampling loop.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from comfy.latent_formats import LatentFormat

from .conditioning import Conditioning
from .frames import without_frame
from .regions import Regions

BALANCES = ("amount", "share")
"""What weights mean: how often tokens count, or the share of attention that each reference receives."""
LEAST_WEIGHT = -1.0


@dataclass(frozen=True)
class ReferencePart:
    """What one Capture node was given.

    Attributes:
        latent: VAE-encoded pictures of one size, [n c h w], as the LATENT socket carries them (not yet scaled); given
            as [n c 1 h w] they lose their frame.
        layers: indices of the layers it takes part in, ascending.
        weight: how often its tokens count; w adds log w to their attention logits. In shares, of attention; below 0 the
            picture is pushed away from it.
        mask: only what is masked is offered, [n or 1, 1, H, W] with values in 0..1 at any resolution, on the
            CPU.
        conditioning: text condition of its passes; None takes the sampler's.
        target_mask: where in the picture being made it counts, and how much, [b or 1, 1, H, W] with values in 0..1 at
            any resolution, on the CPU; None is everywhere.
        balance: what its weight means; see `Reference.in_shares`.
    """

    latent: torch.Tensor
    layers: tuple[int, ...]
    weight: float = 1.0
    mask: torch.Tensor | None = None
    conditioning: Conditioning | None = None
    target_mask: torch.Tensor | None = None
    balance: str = BALANCES[0]

    def __post_init__(self) -> None:
        check_image_latent("latent", self.latent)
        object.__setattr__(self, "latent", without_frame(self.latent))
        check_weight(self.weight, self.balance)
        if self.mask is not None:
            mask = check_reference_mask(self.mask, self.latent.shape[0])
            object.__setattr__(self, "mask", mask.to("cpu", torch.float32))  # see .tokens
        if self.target_mask is not None:
            target = check_target_mask(self.target_mask)
            object.__setattr__(self, "target_mask", target.to("cpu", torch.float32).clamp(0, 1))


@dataclass(frozen=True)
class Reference:
    """An AD_REFERENCE: one or more parts whose tokens are pooled."""

    parts: tuple[ReferencePart, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers that any part of a weight above 0 takes part in, ascending."""
        return tuple(sorted({index for part in self.parts if part.weight > 0 for index in part.layers}))

    @property
    def active_parts(self) -> tuple[ReferencePart, ...]:
        """Parts whose weight is not 0."""
        return tuple(part for part in self.parts if part.weight != 0)

    @property
    def in_shares(self) -> bool:
        """Whether weights are shares of attention: for all parts, as soon as one says so."""
        return any(part.balance == "share" for part in self.parts)

    @property
    def has_target_masks(self) -> bool:
        """Whether any part counts in some of the picture only."""
        return any(part.target_mask is not None for part in self.active_parts)

    @property
    def conditioning(self) -> Conditioning | None:
        """The first text condition any part brought along."""
        return next((part.conditioning for part in self.active_parts if part.conditioning is not None), None)

    def pooled_with(self, other: "Reference") -> "Reference":
        """Both references as one; `other` comes first."""
        return Reference(other.parts + self.parts)


def check_image_latent(name: str, latent: torch.Tensor) -> None:
    """Refuse latents that are not finite pictures, [b c h w] or [b c 1 h w], of at least one pixel.

    Raises:
        ValueError: names the input, what it was given and what is allowed.
    """
    if latent.is_nested or not (latent.ndim == 4 or (latent.ndim == 5 and latent.shape[2] == 1)):
        shape = "a nested latent" if latent.is_nested else f"shape {list(latent.shape)}"
        raise ValueError(
            f"{name}: {shape} is not a picture; video and audio latents are not supported, use [b, c, h, w]"
        )
    if 0 in latent.shape:
        raise ValueError(
            f"{name}: shape {list(latent.shape)} holds no picture; use at least one picture of at least one pixel"
        )
    if not torch.isfinite(latent).all():
        raise ValueError(f"{name}: the latent holds NaN or infinite values; all values must be finite")


def check_channels(name: str, latent: torch.Tensor, channels: int) -> None:
    """Refuse a latent that was encoded for another kind of model.

    Raises:
        ValueError: names the input and both channel counts.
    """
    if latent.shape[1] != channels:
        raise ValueError(
            f"{name}: the latent has {latent.shape[1]} channels, this model works on {channels}; "
            "encode the picture with the VAE that belongs to the model"
        )


def check_frame(name: str, latent: torch.Tensor, latent_format: LatentFormat) -> None:
    """Refuse a video of one frame for a model that knows no time: as many channels do not make it that model's latent.

    The other way round, ComfyUI adds the frame, and other nodes may have taken it away: a warning tells of it.

    Args:
        latent: [b c h w] or [b c 1 h w].

    Raises:
        ValueError: names the input and its shape.
    """
    knows_time = latent_format.latent_dimensions == 3
    if latent.ndim == 5 and not knows_time:
        raise ValueError(
            f"{name}: shape {list(latent.shape)} is a video of one frame, this model's latents are [b, c, h, w]; "
            "encode the picture with the VAE that belongs to the model"
        )
    if latent.ndim == 4 and knows_time and latent.any():
        logging.warning(
            "Attention distillation: %s: shape %s has no frame, which the VAE of this model gives; it is taken for "
            "this model's own", name, list(latent.shape),
        )  # fmt: skip


def check_mask(name: str, mask: torch.Tensor, batch: int) -> torch.Tensor:
    """A MASK as [b or 1, 1, H, W].

    Args:
        mask: [H W], [b H W] or [b 1 H W].
        batch: how many pictures it is for.

    Raises:
        ValueError: names the input, what it was given and what is allowed.
    """
    if mask.ndim not in (2, 3) and not (mask.ndim == 4 and mask.shape[1] == 1):
        raise ValueError(
            f"{name}: shape {list(mask.shape)} is not a mask; use [height, width] or [batch, height, width]"
        )
    count = 1 if mask.ndim == 2 else mask.shape[0]
    if count not in (1, batch):
        raise ValueError(f"{name}: {count} masks for {batch} pictures; give one mask, or one for each picture")
    if 0 in mask.shape:
        raise ValueError(f"{name}: shape {list(mask.shape)} holds no mask; use at least one pixel")
    if not torch.isfinite(mask).all():
        raise ValueError(f"{name}: the mask holds NaN or infinite values; all values must be finite")
    return mask.reshape(count, 1, *mask.shape[-2:])


def warn_of_mask(name: str, latent: Mapping[str, Any]) -> None:
    """Say that the noise mask of a LATENT has no part where its picture is only looked at."""
    if latent.get("noise_mask") is not None:
        logging.warning("Attention distillation: %s: its noise mask is ignored, the whole picture counts", name)


def warn_of_empty_mask(name: str, mask: torch.Tensor | None) -> None:
    """Say that a mask lets nothing change: Load Image gives such a one of a picture that nobody painted on.

    Args:
        name: of the mask, for people.
        mask: in any shape; None changes everything.
    """
    if mask is not None and not (mask > 0).any():
        logging.warning(
            "Attention distillation: %s is empty, so the picture stays as it is; paint where it may change", name
        )


def check_weight(weight: float, balance: str) -> None:
    """Refuse a weight of a reference that is no number of tokens, or no share.

    Raises:
        ValueError: says what is allowed.
    """
    if balance not in BALANCES:
        raise ValueError(f"balance: {balance} is not allowed; use one of {', '.join(BALANCES)}")
    if math.isfinite(weight) and weight >= (LEAST_WEIGHT if balance == "share" else 0):
        return
    allowed = f"{LEAST_WEIGHT:g} or more" if balance == "share" else "0 or more, or below 0 with balance share"
    raise ValueError(f"weight: {weight} is not allowed; use {allowed}")


def check_reference_mask(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """The mask of a reference as [b or 1, 1, H, W]; it must leave something of each picture.

    Raises:
        ValueError: says what it was given and what is allowed.
    """
    mask = check_mask("mask", mask, batch)
    if not (mask > 0.5).flatten(1).any(dim=1).all():
        raise ValueError("mask: the mask is empty; paint at least some of the picture (values above 0.5)")
    return mask


def check_target_mask(mask: torch.Tensor) -> torch.Tensor:
    """Where in the picture a reference counts, as [b, 1, H, W]; the batch of the picture is not known yet.

    Raises:
        ValueError: says what it was given and what is allowed.
    """
    mask = check_mask("target_mask", mask, mask.shape[:1].numel())
    if not (mask > 0).any():
        raise ValueError("target_mask: the mask is empty; paint where in the picture this reference counts")
    return mask


def check_regions(style: Reference, regions: Regions) -> None:
    """Refuse label images that do not fit the style's pictures, or that say a second time where a style goes.

    Raises:
        ValueError: names both counts, or what to take away.
    """
    if style.has_target_masks:
        raise ValueError(
            "regions: the style has a target_mask (Capture Reference Attention), and both say where a style goes; take "
            "one of the two away"
        )
    if any(part.weight < 0 for part in style.active_parts):
        raise ValueError(
            "regions: the style has a reference of negative weight, which no region can ask for; take one of the two "
            "away"
        )
    pictures = sum(part.latent.shape[0] for part in style.parts)
    if regions.reference.shape[0] not in (1, pictures):
        raise ValueError(
            f"regions: {regions.reference.shape[0]} reference label images for {pictures} style pictures; "
            "give one, or one for each"
        )


def part_labels(style: Reference, regions: Regions) -> list[torch.Tensor]:
    """The reference label map of each active part, [n H W]: maps belong to pictures in pooled order."""
    pictures = sum(part.latent.shape[0] for part in style.parts)
    maps = regions.reference.expand(pictures, -1, -1).split([part.latent.shape[0] for part in style.parts])
    return [of_part for part, of_part in zip(style.parts, maps, strict=True) if part.weight != 0]
