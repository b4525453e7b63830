"""Masks and label maps of pictures on the token grids of layers.

They are constant over a run, so they are worked out on the CPU once for each layout: there are few of them, and not
every device has what they take (Apple GPUs pool only sizes that divide).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

Grid = tuple[int, int]  # rows, columns

NO_LABEL = -1  # of tokens that are no part of a picture


class TokenLayout(NamedTuple):
    """Where the picture's tokens lie among all tokens of a layer; equal layouts share what is worked out for them.

    Attributes:
        grid: (rows, columns) of the picture's tokens.
        start: which token is the first of the picture; its tokens follow each other row by row.
        tokens: how many there are, the picture's and all others.
    """

    grid: Grid
    start: int
    tokens: int

    def on_all_tokens(self, of_picture: torch.Tensor, others: float) -> torch.Tensor:
        """Values of the picture's tokens, [n, rows * columns], as values of all tokens; the others get `others`."""
        after = self.tokens - self.start - of_picture.shape[-1]
        return F.pad(of_picture, (self.start, after), value=others)


def token_mask(mask: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Which tokens of a grid a mask, [b 1 H W] on the CPU, offers: [b, rows * columns], bool.

    Nearest-neighbour; a mask so small that this leaves no token at a coarse layer offers every token that it touches.
    """
    tokens = (F.interpolate(mask, grid, mode="nearest") > 0.5).flatten(1)
    touched = (F.adaptive_max_pool2d(mask, grid) > 0.5).flatten(1)
    return torch.where(tokens.any(dim=1, keepdim=True), tokens, touched)


def inner_tokens(grid: Grid, edges: tuple[int, int]) -> torch.Tensor:
    """Which tokens of a grid are none of some rows and columns at each edge, [1, rows * columns], bool, on the CPU."""
    (rows, columns), (down, across) = grid, edges
    inner = torch.zeros(1, rows, columns, dtype=torch.bool)
    inner[:, down : rows - down, across : columns - across] = True
    return inner.flatten(1)


def token_coverage(mask: torch.Tensor, grid: Grid) -> torch.Tensor:
    """How much of each token of a grid a soft mask, [b 1 H W] on the CPU, covers: [b, rows * columns], 0 to 1."""
    return F.adaptive_avg_pool2d(mask, grid).flatten(1)


def label_tokens(labels: torch.Tensor, grid: Grid) -> torch.Tensor:
    """The label of each token of a grid by nearest neighbour, [n H W] on the CPU -> [n, rows * columns]."""
    return F.interpolate(labels[:, None].float(), grid, mode="nearest").long().flatten(1)


def touched_tokens(labels: torch.Tensor, label: int, grid: Grid) -> torch.Tensor:
    """Which tokens of a grid a label has any pixel in, [n H W] on the CPU -> [n, rows * columns], bool."""
    return F.adaptive_max_pool2d((labels == label)[:, None].float(), grid).flatten(1) > 0
