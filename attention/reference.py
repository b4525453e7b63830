"""References: the pictures whose attention guides, and what is kept of them at one noise level.

Nothing is computed when a reference is made. Its features are captured at the noise level of each step, inside the
sampling loop.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .capture import LayerFeatures
from .conditioning import Conditioning
from .frames import without_frame
from .regions import Regions, label_tokens, touched_tokens

NO_LABEL = -1  # of tokens that are no part of a picture


@dataclass(frozen=True)
class ReferencePart:
    """What one Capture node was given.

    Attributes:
        latent: VAE-encoded pictures of one size, [n c h w], as the LATENT socket carries them (not yet scaled); given
            as [n c 1 h w] they lose their frame.
        layers: indices of the layers it takes part in, ascending.
        weight: how often its tokens count; w adds log w to their attention logits.
        mask: only what is masked is offered, [n or 1, 1, H, W] with values in 0..1 at any resolution.
        conditioning: text condition of its passes; None takes the sampler's.
    """

    latent: torch.Tensor
    layers: tuple[int, ...]
    weight: float = 1.0
    mask: torch.Tensor | None = None
    conditioning: Conditioning | None = None

    def __post_init__(self) -> None:
        check_image_latent("latent", self.latent)
        object.__setattr__(self, "latent", without_frame(self.latent))
        if not (math.isfinite(self.weight) and self.weight >= 0):
            raise ValueError(f"weight: {self.weight} is not allowed; use 0 or more")
        if self.mask is not None:
            object.__setattr__(self, "mask", _checked_mask(self.mask, self.latent.shape[0]))


@dataclass(frozen=True)
class Reference:
    """An AD_REFERENCE: one or more parts whose tokens are pooled."""

    parts: tuple[ReferencePart, ...]

    @property
    def layers(self) -> tuple[int, ...]:
        """All layers any part takes part in, ascending."""
        return tuple(sorted({index for part in self.active_parts for index in part.layers}))

    @property
    def active_parts(self) -> tuple[ReferencePart, ...]:
        """Parts whose weight is not 0."""
        return tuple(part for part in self.parts if part.weight > 0)

    @property
    def conditioning(self) -> Conditioning | None:
        """The first text condition any part brought along."""
        return next((part.conditioning for part in self.active_parts if part.conditioning is not None), None)

    def pooled_with(self, other: "Reference") -> "Reference":
        """Both references as one; `other` comes first."""
        return Reference(other.parts + self.parts)


def check_image_latent(name: str, latent: torch.Tensor) -> None:
    """Refuse latents that are not finite pictures.

    Raises:
        ValueError: names the input, what it was given and what is allowed.
    """
    if latent.is_nested or not (latent.ndim == 4 or (latent.ndim == 5 and latent.shape[2] == 1)):
        shape = "a nested latent" if latent.is_nested else f"shape {list(latent.shape)}"
        raise ValueError(
            f"{name}: {shape} is not a picture; video and audio latents are not supported, use [b, c, h, w]"
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


def _checked_mask(mask: torch.Tensor, batch: int) -> torch.Tensor:
    """A MASK ([H W] or [b H W]) or an already checked one as [b or 1, 1, H, W]."""
    mask = mask.reshape(-1, 1, *mask.shape[-2:])
    if mask.shape[0] not in (1, batch):
        raise ValueError(f"mask: {mask.shape[0]} masks for {batch} pictures; give one mask, or one for each picture")
    if not (mask > 0.5).flatten(1).any(dim=1).all():
        raise ValueError("mask: the mask is empty; paint at least some of the picture (values above 0.5)")
    return mask


def check_regions(style: Reference, regions: Regions) -> None:
    """Refuse label images that do not fit the style's pictures.

    Raises:
        ValueError: names both counts.
    """
    pictures = sum(part.latent.shape[0] for part in style.parts)
    if regions.reference.shape[0] not in (1, pictures):
        raise ValueError(
            f"regions: {regions.reference.shape[0]} reference label images for {pictures} style pictures; "
            "give one, or one for each"
        )


def part_labels(style: Reference, regions: Regions, device: torch.device) -> list[torch.Tensor]:
    """The reference label map of each active part, [n H W]: maps belong to pictures in pooled order."""
    pictures = sum(part.latent.shape[0] for part in style.parts)
    maps = regions.reference.to(device).expand(pictures, -1, -1).split([part.latent.shape[0] for part in style.parts])
    return [of_part for part, of_part in zip(style.parts, maps, strict=True) if part.weight > 0]


@dataclass(frozen=True)
class TokenBank:
    """Keys and values that the picture's queries may look at in one layer.

    Attributes:
        k, v: [1, heads, tokens, d], tokens of all parts one after the other.
        log_weight: [tokens], or None where every part has weight 1.
        allowed: with regions, which tokens a target token of each label may attend to, [labels + 1, tokens], bool; the
            last row is for tokens that are no part of the picture, such as text.
    """

    k: torch.Tensor
    v: torch.Tensor
    log_weight: torch.Tensor | None
    allowed: torch.Tensor | None = None


def token_mask(mask: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
    """Which tokens of a layer's grid are offered, [b, rows * columns], bool.

    Nearest-neighbour; a mask so small that this leaves no token at a coarse layer offers every token that it touches.
    """
    tokens = (F.interpolate(mask, grid, mode="nearest") > 0.5).flatten(1)
    touched = (F.adaptive_max_pool2d(mask, grid) > 0.5).flatten(1)
    return torch.where(tokens.any(dim=1, keepdim=True), tokens, touched)


def build_bank(
    captured: Sequence[tuple[ReferencePart, Mapping[int, LayerFeatures]]],
    labels: Sequence[torch.Tensor] | None = None,
    label_count: int = 0,
) -> dict[int, TokenBank]:
    """Pool the parts' tokens layer by layer.

    Args:
        captured: each active part with its features at one noise level.
        labels: with regions, the label map of each of these parts, [n or 1, H, W].
        label_count: how many labels there are.

    Returns:
        One bank for each layer that any part takes part in.
    """
    weighted = any(part.weight != 1 for part, _ in captured)
    pools: dict[int, list[tuple[torch.Tensor, torch.Tensor, float]]] = {}
    for part, features in captured:
        for index in part.layers:
            pools.setdefault(index, []).append((*_offered(part, features[index]), math.log(part.weight)))
    return {
        index: TokenBank(
            k=torch.cat([k for k, _, _ in pool], dim=-2),
            v=torch.cat([v for _, v, _ in pool], dim=-2),
            log_weight=torch.cat([k.new_full(k.shape[-2:-1], log_w) for k, _, log_w in pool]) if weighted else None,
            allowed=None if labels is None else _allowed(index, captured, labels, label_count),
        )
        for index, pool in sorted(pools.items())
    }


def _allowed(
    index: int,
    captured: Sequence[tuple[ReferencePart, Mapping[int, LayerFeatures]]],
    labels: Sequence[torch.Tensor],
    label_count: int,
) -> torch.Tensor:
    """Which pooled tokens of a layer belong to each label, [labels + 1, tokens], bool; never an empty row.

    By nearest neighbour. A label that this leaves without tokens at a coarse layer has those that it touches; where
    a mask has taken these away too, all tokens. Tokens that are no part of a picture, such as text, belong to every
    label, and have a last row of their own, with all tokens.
    """
    nearest, touched, others = [], [], []
    for (part, features), label_map in zip(captured, labels, strict=True):
        if index in part.layers:
            of_layer = features[index]
            grid, n = of_layer.grid, of_layer.k.shape[0]
            keep = _kept(part, of_layer)
            of_part = of_layer.on_all_tokens(label_tokens(label_map, grid), NO_LABEL).expand(n, -1).flatten()[keep]
            nearest.append(torch.stack([of_part == label for label in range(label_count)]))
            touching = [
                of_layer.on_all_tokens(touched_tokens(label_map, label, grid), False) for label in range(label_count)
            ]
            touched.append(torch.stack([tokens.expand(n, -1).flatten()[keep] for tokens in touching]))
            others.append(of_part == NO_LABEL)
    allowed, fallback = torch.cat(nearest, dim=1), torch.cat(touched, dim=1)
    allowed = torch.where(allowed.any(dim=1, keepdim=True), allowed, fallback)
    allowed = torch.where(allowed.any(dim=1, keepdim=True), allowed, torch.ones_like(allowed))
    return torch.cat([allowed | torch.cat(others), torch.ones_like(allowed[:1])])


def _offered(part: ReferencePart, features: LayerFeatures) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of a part's offered tokens, [1, heads, tokens, d]; pictures of a batch one after the other."""
    k, v = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (features.k, features.v))  # [(b t) heads d]
    keep = _kept(part, features)
    return k[keep].transpose(0, 1)[None], v[keep].transpose(0, 1)[None]


def _kept(part: ReferencePart, features: LayerFeatures) -> torch.Tensor | slice:
    """Picks a part's offered tokens out of all of them, [n * tokens].

    A mask is about tokens of the picture: those of the text are always offered.
    """
    kept = features.seen
    if part.mask is not None:
        of_picture = token_mask(part.mask.to(features.k.device), features.grid)
        masked = features.on_all_tokens(of_picture, True).expand(features.k.shape[0], -1)
        kept = masked if kept is None else masked & kept
    return slice(None) if kept is None else kept.flatten()
