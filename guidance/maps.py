"""Masks and label maps of the picture, as each window and layer of a run needs them: each worked out once."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ..attention.tokens import Grid, TokenLayout, label_tokens, token_coverage, token_mask
from ..losses.distillation import QueryGroup
from ..losses.precision import at_least_fp32
from .windows import Layout, Window

Coverage = torch.Tensor | None  # [b or 1, t]; None is everywhere

EVEN = 0.5  # of the hold on the content's edges, the share that is the same at all places


class PictureMaps:
    """Remembers what a label map and content masks come to in windows and layers."""

    NOTHING = object()
    """A coverage: the mask lies beside the window."""

    def __init__(self, labels: torch.Tensor | None, label_count: int, device: torch.device) -> None:
        """
        Args:
            labels: with regions, the label map of the picture, [1 or b, H, W] at any resolution.
            label_count: how many labels there are; tokens that are no part of the picture get the next number.
            device: of the picture.
        """
        self._labels = labels
        self._others = label_count
        self._device = device
        self._groups: dict[tuple, Sequence[QueryGroup]] = {}
        self._coverage: dict[tuple, Coverage | object] = {}
        self._edges: dict[tuple, torch.Tensor] = {}

    def groups(self, layout: Layout, window: Window, tokens: TokenLayout) -> Sequence[QueryGroup]:
        """The tokens of a window in a layer by their label."""
        key = (layout.height, layout.width, window, tokens)
        if key not in self._groups:
            labels = tokens.on_all_tokens(label_tokens(layout.of_map(window, self._labels), tokens.grid), self._others)
            self._groups[key] = [
                QueryGroup(
                    slice(None) if len(labels) == 1 else slice(item, item + 1),
                    (of_item == label).nonzero()[:, 0].to(self._device),
                    label,
                )
                for item, of_item in enumerate(labels)
                for label in of_item.unique().tolist()
            ]
        return self._groups[key]

    def coverage(
        self,
        part: int,
        mask: torch.Tensor | None,
        target_mask: torch.Tensor | None,
        layout: Layout,
        window: Window,
        tokens: TokenLayout,
    ) -> Coverage | object:
        """How much each token of a window in a layer is held by a content part.

        Args:
            part: its number.
            mask, target_mask: its masks, see `content_coverage`.

        Returns:
            [n or 1, t], None for all alike, or `NOTHING`. Tokens that are no part of the picture count fully.
        """
        if mask is None and target_mask is None:
            return None
        key = (part, layout.height, layout.width, window, tokens)
        if key not in self._coverage:
            of_window = (None if m is None else layout.of_map(window, m) for m in (mask, target_mask))
            held = content_coverage(*of_window, tokens.grid)
            covered = tokens.on_all_tokens(held, 1.0).to(self._device) if held.any() else self.NOTHING
            self._coverage[key] = covered
        return self._coverage[key]

    def edges(
        self, part: int, edges: torch.Tensor, layout: Layout, window: Window, tokens: TokenLayout
    ) -> torch.Tensor:
        """How firmly each token of a window in a layer is held by a content part's edges.

        Args:
            part: its number.
            edges: from `edge_weights`, of the whole picture.

        Returns:
            [b, t]; tokens that are no part of the picture are held as a place of the mean is.
        """
        key = (part, layout.height, layout.width, window, tokens)
        if key not in self._edges:
            of_picture = token_coverage(window.of(edges), tokens.grid)
            self._edges[key] = tokens.on_all_tokens(of_picture, 1.0).to(self._device)
        return self._edges[key]


def content_coverage(mask: torch.Tensor | None, target_mask: torch.Tensor | None, grid: Grid) -> Coverage:
    """How much each token of a grid is held by a content reference, which lies on the picture as its mask does.

    Args:
        mask: which of the reference is offered, [n or 1, 1, H, W] on the CPU at any resolution; None is all.
        target_mask: where in the picture it counts, the same for a batch of pictures.

    Returns:
        [n or b or 1, rows * columns] with values in 0..1; None where both are everywhere.
    """
    offered = None if mask is None else token_mask(mask, grid).float()
    if target_mask is None:
        return offered
    covered = token_coverage(target_mask, grid)
    return covered if offered is None else offered * covered


def edge_weights(latent: torch.Tensor, coverage: Coverage) -> torch.Tensor:
    """How firmly each place of a content picture is held for its edges, of mean 1.

    A share `EVEN` is spread evenly, the rest goes by the gradient of the latent: central differences, of length over
    both directions and all channels. A picture without edges is held evenly.

    Args:
        latent: of the content, model scale, [n c h w] on the CPU.
        coverage: how much each latent pixel counts in the mean, [n or b or 1, h * w]; None is all alike.

    Returns:
        [n or b, 1, h, w] in fp32 or better.
    """
    padded = F.pad(at_least_fp32(latent), (1, 1, 1, 1), mode="replicate")
    across = padded[:, :, 1:-1, 2:] - padded[:, :, 1:-1, :-2]
    down = padded[:, :, 2:, 1:-1] - padded[:, :, :-2, 1:-1]
    steepness = (across**2 + down**2).sum(dim=1, keepdim=True).sqrt() / 2
    counts = torch.ones_like(steepness) if coverage is None else coverage.reshape(-1, 1, *latent.shape[-2:])
    mean = (counts * steepness).sum(dim=(2, 3), keepdim=True) / counts.sum(dim=(2, 3), keepdim=True)
    return torch.where(mean > 0, EVEN + (1 - EVEN) * steepness / mean, 1.0)
