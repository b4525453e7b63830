"""Where in the picture each style reference counts, as every window and layer needs it: each worked out once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from comfy.model_base import BaseModel
from comfy.patcher_extension import WrapperExecutor

from ..attention.bank import TokenBank
from ..attention.layers import AttentionLayer
from ..attention.reference import Reference
from ..attention.tokens import TokenLayout, token_coverage
from ..losses.distillation import QueryGroup, region_target
from .windows import Layout, Window, whole


@dataclass(frozen=True)
class PartGroup:
    """Tokens of the picture at which the same parts count.

    Attributes:
        items: which pictures of the batch.
        tokens: numbers of the tokens.
        parts: numbers of the parts, ascending.
        log_share: log of how much each part counts at each token, [tokens parts]; None where they count alike.
    """

    items: slice
    tokens: torch.Tensor
    parts: tuple[int, ...]
    log_share: torch.Tensor | None


@dataclass(frozen=True)
class Places:
    """Where the parts of a style count in one window and layer.

    Attributes:
        groups: tokens at which no part counts are in none.
        weight: how much each token is guided at all, [b or 1, t].
    """

    groups: Sequence[PartGroup]
    weight: torch.Tensor

    def target(self, q: torch.Tensor, bank: TokenBank, attention_scale: float = 1.0) -> torch.Tensor:
        """What the layer would put out where parts count, 0 elsewhere, [b heads t d]; see `distillation_target`."""
        return region_target(q, self.query_groups, self.offers(bank), attention_scale=attention_scale)

    @property
    def query_groups(self) -> list[QueryGroup]:
        """The groups with their numbers as labels."""
        return [QueryGroup(group.items, group.tokens, number) for number, group in enumerate(self.groups)]

    def offers(self, bank: TokenBank) -> list[TokenBank]:
        """What the tokens of each group look at."""
        return [bank.of_parts(group.parts, group.log_share) for group in self.groups]


class TargetMasks:
    """The target masks of a style's parts on token grids and on latent pixels.

    A part counts at a token by the share of it that its mask covers. Where several do, their tokens are pooled, each
    weighed by that share; the loss counts by their sum, at most 1. A part of negative weight guides nothing by itself.
    """

    @classmethod
    def of(cls, style: Reference, device: torch.device) -> "TargetMasks | None":
        """Those of a style's active parts; None where all count everywhere."""
        if not style.has_target_masks:
            return None
        masks = [part.target_mask for part in style.active_parts]
        return cls(masks, [part.weight > 0 for part in style.active_parts], device)

    def __init__(self, masks: Sequence[torch.Tensor | None], guides: Sequence[bool], device: torch.device) -> None:
        """
        Args:
            masks: of each active part, [b or 1, 1, H, W] on the CPU with values in 0..1; None is everywhere.
            guides: which of them have a weight above 0.
            device: of the picture.
        """
        self._masks = masks
        self._guides = guides
        self._device = device
        self._items = max((len(mask) for mask in masks if mask is not None), default=1)
        self._places: dict[tuple, Places] = {}
        self._pixels: dict[tuple[int, int], torch.Tensor] = {}

    def on_pixels(self, height: int, width: int) -> torch.Tensor:
        """How much each part that guides counts at each latent pixel of the picture, [parts, b or 1, 1, h, w]."""
        size = (height, width)
        if size not in self._pixels:
            masks = [mask for mask, guides in zip(self._masks, self._guides, strict=True) if guides]
            covered = (torch.ones(1, 1, *size) if m is None else F.adaptive_avg_pool2d(m, size) for m in masks)
            self._pixels[size] = torch.stack([c.expand(self._items, -1, -1, -1) for c in covered]).to(self._device)
        return self._pixels[size]

    def places(self, layout: Layout, window: Window, tokens: TokenLayout, parts: Sequence[int]) -> Places:
        """Where some parts count among the tokens of a window in a layer.

        Args:
            parts: numbers of those that take part in the layer, ascending.
        """
        key = (layout.height, layout.width, window, tokens, tuple(parts))
        if key not in self._places:
            coverage = torch.stack([self._on_tokens(self._masks[part], layout, window, tokens) for part in parts])
            weight = coverage[[self._guides[part] for part in parts]].sum(dim=0).clamp(max=1)
            coverage = coverage * (weight > 0)
            self._places[key] = Places(
                [group for item in range(self._items) for group in self._groups(coverage[:, item], item, parts)],
                weight.to(self._device),
            )
        return self._places[key]

    def _on_tokens(
        self, mask: torch.Tensor | None, layout: Layout, window: Window, tokens: TokenLayout
    ) -> torch.Tensor:
        """How much a part counts at each token, [items, t]; at tokens without a place, such as text, its mean."""
        if mask is None:
            return torch.ones(self._items, tokens.tokens)
        of_picture = token_coverage(layout.of_map(window, mask), tokens.grid)
        on_all = of_picture.mean(dim=1, keepdim=True).repeat(1, tokens.tokens)
        on_all[:, tokens.start : tokens.start + of_picture.shape[1]] = of_picture
        return on_all.expand(self._items, -1)

    def _groups(self, coverage: torch.Tensor, item: int, parts: Sequence[int]) -> list[PartGroup]:
        """The tokens of one picture by the parts that count at them; coverage: [parts, t]."""
        items = slice(None) if self._items == 1 else slice(item, item + 1)
        there, groups = coverage > 0, []
        for counted in there.unique(dim=1).T:
            if not counted.any():
                continue
            tokens = (there == counted[:, None]).all(dim=0).nonzero()[:, 0]
            share = coverage[counted][:, tokens].T
            alike = bool((share == share[:, :1]).all())
            groups.append(
                PartGroup(
                    items,
                    tokens.to(self._device),
                    tuple(part for part, counts in zip(parts, counted.tolist(), strict=True) if counts),
                    None if alike else share.log().to(self._device),
                )
            )
        return groups


class CallAreas:
    """Which part of the picture each condition of a model call is for.

    A wrapper around calls of the model on its conditions (CALC_COND_BATCH): ComfyUI itself tells a call only which
    conditions it is made for.
    """

    def __init__(self, style: Reference) -> None:
        """style: has target masks."""
        self._style = style
        self._targets: dict[torch.device, TargetMasks] = {}
        self._layouts: Mapping[object, Layout] = {}

    def __call__(
        self,
        executor: WrapperExecutor,
        model: BaseModel,
        conds: list[list[dict[str, Any]] | None],
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any],
    ) -> list[torch.Tensor]:
        """x: the whole picture, [b c h w]."""
        size = x.shape[-2:]
        self._layouts = {cond["uuid"]: _area(cond.get("area"), *size) for of_kind in conds for cond in of_kind or ()}
        return executor(model, conds, x, timestep, model_options)

    def given(
        self, q: torch.Tensor, bank: TokenBank, layer: AttentionLayer, transformer_options: Mapping[str, Any]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer of a model call would put out where references count, and how much they do.

        Args:
            q: queries of the call, [b heads t d]; its conditions one after the other along the batch.
            transformer_options: of the call.

        Returns:
            [b heads t d], and [b t].

        Raises:
            ValueError: the layer has other tokens than its picture.
        """
        if q.device not in self._targets:  # there are several with MultiGPU CFG Split, each in a thread
            self._targets[q.device] = TargetMasks.of(self._style, q.device)
        on_device = self._targets[q.device]
        layouts = [self._layouts[cond] for cond in transformer_options["uuids"]]
        targets, weights = [], []
        for layout, queries in zip(layouts, q.chunk(len(layouts)), strict=True):
            window = layout.windows[0]
            grid = layer.grid(window.height, window.width)
            tokens = TokenLayout(grid, layer.picture_start(q.shape[-2], grid), q.shape[-2])
            if tokens.start < 0 or (not layer.joint and grid[0] * grid[1] != tokens.tokens):
                raise ValueError(
                    "style: its target_mask cannot be laid on the model's attention, which another node merges or "
                    "tiles (such as ToMePatchModel or HyperTile); take one of the two away"
                )
            places = on_device.places(layout, window, tokens, tuple(bank.counts))
            targets.append(places.target(queries, bank))
            weights.append(places.weight.expand(len(queries), -1))
        return torch.cat(targets), torch.cat(weights)


def _area(area: Sequence[int] | None, height: int, width: int) -> Layout:
    """A part of a picture as a layout of one window; area: lengths, then starts, of all axes, as ComfyUI writes it."""
    if area is None:
        return whole(height, width)
    rows, columns, y, x = *area[: len(area) // 2][-2:], *area[-2:]
    return Layout(height, width, (Window(y, x, min(rows, height - y), min(columns, width - x)),))
