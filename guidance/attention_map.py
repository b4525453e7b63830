"""The attention map: where each place of a finished picture takes its look from.

The picture's queries look at the reference's keys as guidance makes them look. What they find there are not values but
colours: the place that a token has on its reference, painted with a chart, or a picture that belongs to the reference.
It runs as a sampler of ComfyUI that makes no step, so that loading, conditions and Cancel are those of any sampler.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import comfy.sample
import comfy.samplers
import torch
import torch.nn.functional as F
from comfy import model_management
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ..attention import conditioning
from ..attention.bank import TokenBank, TokenPool
from ..attention.capture import LayerFeatures, capture_features
from ..attention.conditioning import Cond, Conditioning
from ..attention.frames import without_frame
from ..attention.hooks import ModelHooks
from ..attention.hypernetworks import Patches, hypernetworks
from ..attention.layers import AttentionLayer, describe_layers, list_layers
from ..attention.lookup import Found, look_up
from ..attention.noise import NoiseLevel, Purpose
from ..attention.reader import ReferenceReader
from ..attention.reference import Reference
from ..attention.tokens import TokenLayout
from ..losses.precision import at_least_fp32
from .charts import chart
from .checks import check_reference, check_target_masks
from .injection import take_injection_off
from .patch import take_guidance_off
from .target_masks import Places, TargetMasks
from .windows import whole

MEAN = "mean"  # of all layers, in place of the number of one
SOME = 1e-12  # of attention; less is none
COLOURS = slice(1, 4)  # of a token's values: the first says that it has a place, then come chart and picture


def select_layer(text: str, style: Reference, count: int) -> tuple[int, ...]:
    """Read the `layer` setting: `mean` is all layers of the reference, else it is the index of one of them.

    Args:
        text: what the user wrote.
        style: whose layers may be looked at.
        count: how many self-attention layers the model has.

    Raises:
        ValueError: the text cannot be read, or the guidance would not look at this layer.
    """
    word = text.strip().lower()
    if word == MEAN:
        return style.layers
    if not word.isdecimal():
        raise ValueError(f"layer: cannot read {text!r}; write {MEAN}, or the index of one layer such as 12")
    if int(word) >= count:
        raise ValueError(
            f"layer: layer {int(word)} does not exist; this model has {count} self-attention layers, 0 to {count - 1}"
        )
    if int(word) not in style.layers:
        raise ValueError(
            f"layer: layer {int(word)} is not one of those that the reference was captured on, "
            f"{describe_layers(style.layers)}; write one of these, or change layers on the Capture node"
        )
    return (int(word),)


def check_belonging(image: torch.Tensor, style: Reference) -> None:
    """Refuse pictures that are neither one nor as many as the style has.

    Raises:
        ValueError: names both counts.
    """
    pictures = sum(part.latent.shape[0] for part in style.parts)
    if image.shape[0] not in (1, pictures):
        raise ValueError(f"image: {image.shape[0]} pictures for {pictures} style pictures; give one, or one for each")


@dataclass(frozen=True)
class Belongings:
    """What the tokens of a reference carry: the colours of charts, and pixels of pictures that belong to it.

    Attributes:
        charts: of each active part, the numbers of its pictures' charts.
        images: of each active part, pictures of its pictures' size, [n H W 3]; None carries none.
        pixels: picture pixels to a latent pixel.
    """

    charts: Sequence[range]
    images: Sequence[torch.Tensor] | None = field(repr=False)
    pixels: int

    @classmethod
    def of(cls, style: Reference, image: torch.Tensor | None, pixels: int) -> "Belongings":
        """image: one for all pictures of the style, or one for each in pooled order, [n H W 3] of any size."""
        counts = [part.latent.shape[0] for part in style.active_parts]
        charts = [range(sum(counts[:i]), sum(counts[: i + 1])) for i in range(len(counts))]
        if image is None:
            return cls(charts, None, pixels)
        every = [part.latent.shape[0] for part in style.parts]
        of_parts = zip(style.parts, image.expand(sum(every), -1, -1, -1).split(every), strict=True)
        return cls(
            charts,
            [_resized(own, [pixels * n for n in part.latent.shape[-2:]]) for part, own in of_parts if part.weight > 0],
            pixels,
        )

    @property
    def count(self) -> int:
        """How many charts there are."""
        return self.charts[-1].stop

    def side(self, layer: AttentionLayer) -> int:
        """How many pixels wide and high a token of a layer is."""
        return self.pixels * 2**layer.halvings

    def values(self, part: int, layer: AttentionLayer, features: LayerFeatures) -> torch.Tensor:
        """What each token of a part carries in a layer, [n 1 t d]: 1 for a place, its colour, and its pixels.

        Tokens that are no part of the picture carry nothing but zeros.
        """
        rows, columns = features.grid
        colours = torch.stack([chart(number, self.count, rows, columns) for number in self.charts[part]]).flatten(1, 2)
        carried = [torch.ones_like(colours[..., :1]), colours]
        if self.images is not None:
            carried.append(_blocks(self.images[part], rows, columns, self.side(layer)))
        on_all = features.layout.on_all_tokens(torch.cat(carried, dim=-1).transpose(1, 2), 0.0)
        return on_all.transpose(1, 2)[:, None].to(features.k.device)

    def legend(self, style: Reference) -> torch.Tensor:
        """The charts as pictures, one for each picture of the style, of the first one's size, [n H W 3]."""
        height, width = (self.pixels * n for n in style.active_parts[0].latent.shape[-2:])
        return torch.stack([chart(number, self.count, height, width) for number in range(self.count)])


def _resized(image: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """[n H W c] in another size; exactly itself in its own."""
    if tuple(size) == tuple(image.shape[1:3]):
        return image.float()
    return F.interpolate(image.movedim(-1, 1).float(), size, mode="bilinear", antialias=True).movedim(1, -1)


def _blocks(image: torch.Tensor, rows: int, columns: int, side: int) -> torch.Tensor:
    """A picture cut into the squares of its tokens, [n H W 3] -> [n, rows * columns, side * side * 3].

    Tokens that hang over the edge have the edge's pixels there.
    """
    below, right = rows * side - image.shape[1], columns * side - image.shape[2]
    whole = F.pad(image.movedim(-1, 1), (0, right, 0, below), mode="replicate").movedim(1, -1)
    return whole.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3).flatten(3).flatten(1, 2)


def _joined(blocks: torch.Tensor, grid: tuple[int, int], side: int, size: Sequence[int]) -> torch.Tensor:
    """Squares put together to a picture, [b, tokens, side * side * c] -> [b H W c]; the reverse of `_blocks`."""
    squares = blocks.unflatten(1, grid).unflatten(-1, (side, side, -1))
    return squares.transpose(2, 3).flatten(3, 4).flatten(1, 2)[:, : size[0], : size[1]]


class _Look(comfy.samplers.Sampler):
    """Reads where the queries of a finished picture look; makes no step.

    Attributes:
        found: of each layer, what each of the picture's tokens finds, once it has run.
    """

    def __init__(self, style: Reference, layers: Sequence[int], belongings: Belongings) -> None:
        self._style = style
        self._layers = layers
        self._belongings = belongings
        self.found: list[tuple[AttentionLayer, Found]] = []

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> torch.Tensor:
        """Called by the guider (model_wrap) with everything loaded; latent_image: the picture, model scale."""
        model: BaseModel = model_wrap.inner_model
        conds = conditioning.of_sampler(model_wrap.conds)
        latent = without_frame(at_least_fp32(latent_image))
        level = NoiseLevel.of(model, 0.0, latent)
        ModelHooks(model, conds, extra_args["model_options"]).apply(level.sigma)
        self._look(model, conds, latent, level, hypernetworks(extra_args["model_options"]))
        return latent_image

    @torch.no_grad()
    def _look(
        self, model: BaseModel, conds: Sequence[Cond], latent: torch.Tensor, level: NoiseLevel, patches: Patches
    ) -> None:
        """Picture and references are shown clean: so a picture that is its own reference finds itself."""
        every = list_layers(model.diffusion_model)
        reader = ReferenceReader(model, every, self._style, conds, latent, patches=patches)
        offered = reader.read(level, None, Purpose.STYLE)
        own = conditioning.of_passes(model, conds, self._style.conditioning)
        shown = conditioning.shown_beside(conds)
        encoded = conditioning.encode(model, own, latent, size=latent.shape[-2:], beside=shown)
        picture = capture_features(
            model,
            latent / level.scale,
            level.sigmas,
            conditioning.for_pass(encoded, level.sigma, latent.shape[0]),
            [every[index] for index in self._layers],
            patches,
        )
        targets = TargetMasks.of(self._style, latent.device)
        layout = whole(*latent.shape[-2:])
        pool = TokenPool(self._style.active_parts, in_shares=self._style.in_shares)
        keys, carried = pool.banks(offered), pool.banks(self._carrying(offered, every))
        for index, features in picture.items():
            count = features.grid[0] * features.grid[1]
            q = features.q[:, :, features.start : features.start + count]
            if targets is None:
                found = _find(q, keys[index], carried[index])
            else:
                tokens = TokenLayout(features.grid, 0, count)
                places = targets.places(layout, layout.windows[0], tokens, tuple(keys[index].counts))
                found = _find_in_places(q, keys[index], carried[index], places)
            self.found.append((every[index], found))

    def _carrying(
        self, offered: Sequence[Mapping[int, LayerFeatures]], every: Sequence[AttentionLayer]
    ) -> list[dict[int, LayerFeatures]]:
        """The features of each part, with what tokens carry in place of their values."""
        return [
            {
                index: replace(of_layer, v=self._belongings.values(part, every[index], of_layer))
                for index, of_layer in features.items()
            }
            for part, features in enumerate(offered)
        ]


def _find(q: torch.Tensor, keys: TokenBank, carried: TokenBank) -> Found:
    """What queries, [b heads t d], find among keys, of what their tokens carry in place of values."""
    values = carried.v[0, 0]
    return look_up(q, keys, values, values[:, 0] > 0)


def _find_in_places(q: torch.Tensor, keys: TokenBank, carried: TokenBank, places: Places) -> Found:
    """The same where each part counts at some tokens only: as much as it does, and nothing where none counts."""
    size, like = (q.shape[0], q.shape[2]), {"device": q.device, "dtype": at_least_fp32(q).dtype}
    found = Found(torch.zeros(*size, carried.v.shape[-1], **like), torch.zeros(size, **like), torch.zeros(size, **like))
    for group in places.groups:
        bank = keys.of_parts(group.parts, group.log_share)
        of_group = _find(q[group.items][:, :, group.tokens], bank, carried.of_parts(group.parts))
        for of_all, some in zip(found, of_group, strict=True):
            of_all[group.items, group.tokens] = some
    weight = places.weight.to(**like)
    return Found(found.values * weight[..., None], found.share * weight, found.certainty * weight)


def attention_map(
    model: ModelPatcher,
    style: Reference,
    latent: torch.Tensor,
    *,
    cond: Conditioning,
    layer: str = MEAN,
    image: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each place of a finished picture takes its look from.

    In one layer, the mean over heads of the attention says how much a token of the picture looks at each token of the
    pooled references; its colour is the mean of their charts' colours by that, its brightness the square root of
    `Found.certainty`. Of several layers, colours and certainties are averaged, pixel by pixel. References of negative
    weight give nothing, and are left out.

    Args:
        model: guidance or KV injection on it is left out of account; it is not changed.
        style: the references.
        latent: finished pictures, [b c h w] or [b c 1 h w], as the LATENT socket carries them.
        cond: text condition, for references that brought none.
        layer: see `select_layer`.
        image: pictures that belong to the style's, [n H W 3], see `check_belonging`.

    Returns:
        The map, [b H W 3] in 0..1, in the pixels of the pictures; and `image` carried through the same attention, of
        the same size. Without an image the charts, [n H W 3]: which colour stands for which place.

    Raises:
        ValueError: names the input, what it was given and what is allowed; nothing has been loaded then.
    """
    check_reference("style", style, model)
    check_target_masks("style", style, latent.shape[0])
    style = Reference(tuple(replace(part, weight=max(0.0, part.weight)) for part in style.parts))
    layers = select_layer(layer, style, len(list_layers(model.model.diffusion_model)))
    if image is not None:
        check_belonging(image, style)
    pixels = model.get_model_object("latent_format").spacial_downscale_ratio
    belongings = Belongings.of(style, image, pixels)
    look = _Look(style, layers, belongings)
    plain = take_injection_off(take_guidance_off(model))
    comfy.sample.sample_custom(
        plain, torch.zeros_like(latent), 1.0, look, torch.zeros(1), cond, cond, latent, disable_pbar=True
    )
    size = [pixels * n for n in latent.shape[-2:]]
    colours, carried, certainty = _averaged([_painted(*found, belongings, size) for found in look.found])
    device = model_management.intermediate_device()
    painted = (colours * certainty.sqrt()).to(device)
    return painted, belongings.legend(style).to(device) if image is None else carried.to(device)


class _Painted(NamedTuple):
    """What one layer finds, on pixels: [b H W 3], but share and certainty [b H W 1]; see `Found`."""

    share: torch.Tensor
    colours: torch.Tensor
    carried: torch.Tensor
    certainty: torch.Tensor


def _painted(layer: AttentionLayer, found: Found, belongings: Belongings, size: Sequence[int]) -> _Painted:
    """What a layer finds as squares of its tokens on a picture of a size in pixels."""
    side, grid = belongings.side(layer), layer.grid(*(n // belongings.pixels for n in size))

    def evenly(tokens: torch.Tensor) -> torch.Tensor:
        return _joined(tokens[:, :, None].expand(-1, -1, side**2, -1).flatten(2), grid, side, size)

    blocks = found.values[..., COLOURS.stop :]
    return _Painted(
        evenly(found.share[..., None]),
        evenly(found.values[..., COLOURS]),
        _joined(blocks, grid, side, size) if blocks.shape[-1] else torch.zeros(()),
        evenly(found.certainty[..., None]),
    )


def _averaged(of_layers: Sequence[_Painted]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Colours and carried pictures over all layers by the attention that they have on places; and the certainty."""
    share, colours, carried, certainty = (sum(of_all) for of_all in zip(*of_layers, strict=True))
    share = share.clamp_min(SOME)
    return colours / share, carried / share, certainty / len(of_layers)
