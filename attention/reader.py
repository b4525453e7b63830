"""Reads what references offer at a noise level: their features, and the statistics that AdaIN takes.

A reader knows a model, the parts of a reference and their text conditions. It has no settings and no gradient:
guidance, optimisation and KV injection all read through it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from comfy.model_base import BaseModel

from ..losses.adain import ChannelStats, channel_stats
from ..tiling.circular import not_wrapped
from . import conditioning
from .capture import LayerFeatures, capture_features
from .conditioning import Area
from .frames import as_model_takes, without_frame
from .hypernetworks import Patches
from .layers import AttentionLayer
from .noise import NoiseLevel, Purpose, StepNoise
from .reference import Reference, ReferencePart
from .tokens import token_mask

# Latent pixels at an edge whose tokens hold much of what the padding of convolutions brings in; at least one token in
# each layer. Measured as the difference that wrapping makes to keys and values, see docs/architectures.md.
EDGE = 4
EDGE_SHARE = 8  # an edge is no wider than this part of a side, or one token: of small references enough must be left
PIXELS_OF_A_SHARE = 4096  # as which a reference counts in statistics, however large, where weights are shares


@dataclass(frozen=True)
class PreparedPart:
    """A reference part on the model's device, ready for passes.

    Attributes:
        part: as it came.
        latent: in the model's scale (process_latent_in applied), [n c h w], on the picture's device, in its dtype.
        conds: its text conditions as the model encodes them.
        copies: how often each picture goes through the model, so that batches are alike.
        pixel_weight: how much each latent pixel counts in statistics, [n 1 h w].
        pixel_count: how many latent pixels that makes.
    """

    part: ReferencePart
    latent: torch.Tensor
    conds: Sequence[conditioning.Cond] = field(repr=False)
    copies: int
    pixel_weight: torch.Tensor = field(repr=False)
    pixel_count: float


class ReferenceReader:
    """Reads a reference. Must be made and used where its model can run: see `differentiable` for gradients after it."""

    def __init__(
        self,
        model: BaseModel,
        layers: Sequence[AttentionLayer],
        reference: Reference | None,
        conds: Sequence[conditioning.Cond],
        picture: torch.Tensor,
        *,
        copies_of: int | None = None,
        patches: Patches | None = None,
        noise_along: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """
        Args:
            model: ComfyUI's model, loaded.
            layers: all self-attention layers of the model.
            reference: its parts of weight 0 are left out; None has no parts.
            conds: the sampler's text conditions, for parts that brought none.
            picture: the latent being made, [b c h w]; gives size, device and dtype.
            copies_of: each part is repeated to this batch, where it must be alike to the picture's; None does not.
            patches: hypernetworks on the model.
            noise_along: the pictures of a part are frames of one picture: makes their noise of what is drawn for each.
        """
        self._model = model
        self._layers = layers
        self._patches = patches
        self._noise_along = noise_along
        parts = () if reference is None else reference.active_parts
        largest = max((part.weight for part in parts), default=1.0)
        self._in_shares = reference is not None and reference.in_shares
        self.parts = [self._prepare(part, conds, picture, copies_of, max(0.0, part.weight / largest)) for part in parts]

    def _prepare(
        self,
        part: ReferencePart,
        conds: Sequence[conditioning.Cond],
        picture: torch.Tensor,
        batch: int | None,
        weight: float,
    ) -> PreparedPart:
        latent = self._model.process_latent_in(as_model_takes(self._model, part.latent.to(picture).clone()))
        latent = without_frame(latent)
        counts = torch.ones(1, 1, *latent.shape[-2:])
        if part.mask is not None:
            counts = token_mask(part.mask, latent.shape[-2:]).reshape(-1, 1, *latent.shape[-2:]).float()
        counts = counts.expand(latent.shape[0], -1, -1, -1)
        if self._in_shares:
            counts = counts * (PIXELS_OF_A_SHARE / counts.sum())
        copies = 1 if batch is None else batch // latent.shape[0]
        own = conditioning.of_passes(self._model, conds, part.conditioning)
        encoded = conditioning.encode(self._model, own, latent.repeat(copies, 1, 1, 1), size=picture.shape[-2:])
        pixels = weight * counts
        return PreparedPart(part, latent, encoded, copies, pixels.to(latent), float(pixels.sum()))

    def shown(self, number: int, level: NoiseLevel, noise: StepNoise | None, purpose: Purpose) -> torch.Tensor:
        """A part's latent as the model is shown it, [n * copies, c, h, w] in k-diffusion space.

        Without noise it is shown clean, as the optimisation mode does.
        """
        prepared = self.parts[number]
        latent = prepared.latent
        if noise is None:
            x = latent / level.scale
        else:
            drawn = noise.draw(latent, purpose, number)
            if self._noise_along is not None and len(latent) > 1:
                drawn[:1] = noise.draw(latent[:1], purpose, number)  # as it would get alone
                drawn = self._noise_along(drawn)
            x = self._model.model_sampling.noise_scaling(level.sigmas, drawn, latent)
        return x.repeat(prepared.copies, 1, 1, 1)

    @torch.no_grad()
    def features(
        self,
        number: int,
        x: torch.Tensor,
        level: NoiseLevel,
        areas: Sequence[Area | None] = (None,),
        offset: Sequence[int] = (0, 0),
        items: slice = slice(None),
    ) -> dict[int, LayerFeatures]:
        """Features of a part by layer.

        Args:
            number: which part.
            x: from `shown`, or windows of it one after the other along the batch.
            areas: of these windows; None is the whole picture.
            offset: how far the model is shown it rolled, see `capture_features`.
            items: which of the pictures that `shown` gives x is of.
        """
        prepared = self.parts[number]
        batch = prepared.copies * len(prepared.latent)
        conds = conditioning.for_pass(prepared.conds, level.sigma, batch, areas, items)
        layers = [self._layers[index] for index in prepared.part.layers]
        return capture_features(self._model, x, level.sigmas, conds, layers, self._patches, offset=offset)

    @torch.no_grad()
    def read(
        self, level: NoiseLevel, noise: StepNoise | None, purpose: Purpose, numbers: Sequence[int] | None = None
    ) -> list[dict[int, LayerFeatures]]:
        """Features of every part, by layer. Where the picture is a tile, parts are not: their edges do not meet.

        A UNet pads them with zeros then. In a picture of its own size that is how a border looks, but a tile has none:
        there such tokens would be taken for a look of the reference, a grey one, and `edges` says where they are.

        Args:
            numbers: of some parts alone.
        """
        numbers = range(len(self.parts)) if numbers is None else numbers
        shown = ((number, self.shown(number, level, noise, purpose)) for number in numbers)
        with not_wrapped(self._model.diffusion_model) as wrapped:
            read = [self.features(number, x, level) for number, x in shown]
        if not any(wrapped):
            return read
        return [{index: self._with_edges(index, f, wrapped) for index, f in of_part.items()} for of_part in read]

    def _with_edges(self, index: int, features: LayerFeatures, wrapped: Sequence[bool]) -> LayerFeatures:
        """Features of a layer that say how wide edges are along axes that the picture joins; never all of it."""
        of_layer = max(1, EDGE >> self._layers[index].halvings)
        widths = (min(of_layer, max(1, side // EDGE_SHARE), (side - 1) // 2) for side in features.grid)
        return replace(features, edges=tuple(n if joined else 0 for n, joined in zip(widths, wrapped, strict=True)))

    @torch.no_grad()
    def statistics(self, level: NoiseLevel, noise: StepNoise) -> ChannelStats:
        """AdaIN statistics of the noised references over all their pixels together, model space."""
        pixels, weights = zip(*self._noised_pixels(level, noise), strict=True)
        return channel_stats(torch.cat(pixels, dim=-1), torch.cat(weights, dim=-1))

    @torch.no_grad()
    def statistics_of_parts(self, level: NoiseLevel, noise: StepNoise) -> list[ChannelStats]:
        """The same of each part alone, of those that count in it."""
        parts = zip(self.parts, self._noised_pixels(level, noise), strict=True)
        return [channel_stats(*pixels) for prepared, pixels in parts if prepared.pixel_count > 0]

    def _noised_pixels(self, level: NoiseLevel, noise: StepNoise) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each part all pixels in a row and how much each counts, [1 c 1 pixels] and [1 1 1 pixels]."""
        for number, prepared in enumerate(self.parts):
            z = level.scale * self.shown(number, level, noise, Purpose.ADAIN)
            weight = prepared.pixel_weight.expand_as(z[:, :1])
            yield z.transpose(0, 1).flatten(1)[None, :, None], weight.flatten()[None, None, None]
