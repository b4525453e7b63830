"""One update of the picture: the pieces that it is distilled in, each with an Adam of its own."""

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..attention.devices import on_device
from ..losses.adain import ChannelStats
from .descent import Descent, Found, masked
from .loss_scale import LossScale
from .settings import GuidanceSettings
from .spread import Spread
from .targets import Offer
from .windows import ALL, Layout, Window, chunks, cut


class Piece(NamedTuple):
    """What is distilled in one pass.

    Attributes:
        windows: some of the picture's.
        items: which pictures of the batch.
    """

    windows: Sequence[Window]
    items: slice = ALL


class Distilled(NamedTuple):
    """What becomes of a piece.

    Attributes:
        z: its windows, as `cut` puts them together.
        found: its iterations.
        loss_scale: the value that `LossScale` has come to.
    """

    z: torch.Tensor
    found: list[Found]
    loss_scale: float


def pieces_of_windows(windows: Sequence[Window], at_once: int, workers: int) -> list[Piece]:
    """At most `at_once` windows together, fewer where some workers would have none."""
    return [Piece(some) for some in chunks(windows, max(1, min(at_once, math.ceil(len(windows) / workers))))]


def pictures_together(settings: GuidanceSettings, batch: int, workers: int) -> int:
    """How many pictures of a batch go through a model together: all frames, since each looks at the one before."""
    return batch if settings.frames > 0 else math.ceil(batch / workers)


def pieces_of_batch(windows: Sequence[Window], batch: int, together: int) -> list[Piece]:
    """So many pictures of a batch together."""
    if together == batch:
        return [Piece(windows)]
    return [Piece(windows, slice(start, min(start + together, batch))) for start in range(0, batch, together)]


@dataclass(frozen=True)
class Update:
    """All that an update of the picture takes.

    Attributes:
        spread: the model, and its copies.
        gradients: of each of them; the value of the first lives through the run.
        offer: what the references offer; a copy has it copied, which costs less than to read them once more.
        z: the picture, [b c h w] in model space.
        layout: how windows lie on it.
        stats: for AdaIN; None leaves that out.
        painted: the share by which a noise mask lets each element move, as z; None lets all move.
        moves: the same with the reach of the references.
        learning_rate: of its iterations.
        iterations: how many.
    """

    spread: Spread
    gradients: Sequence[LossScale]
    offer: Offer
    z: torch.Tensor
    layout: Layout
    stats: Sequence[ChannelStats] | None
    painted: torch.Tensor | None
    moves: torch.Tensor | None
    learning_rate: float
    iterations: int

    def made(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, Distilled]]:
        """Each piece and what becomes of it, in their order; as many at a time as there are copies.

        All of a time begin with one loss scale. Where a piece has had to change it, those after it are made again from
        there: so the result is the one of a single device, whichever copy is done first.
        """
        copied = (on_device(self.offer, device) for device in self.spread.devices[1 : len(pieces)])
        distilled = functools.partial(self._distilled, [self.offer, *copied])
        done = 0
        while done < len(pieces):
            some = pieces[done : done + len(self.spread)]
            scale = self.gradients[0].value
            for gradient in self.gradients:
                gradient.value = scale
            results = self.spread.each(distilled, [(piece, self._recoloured(piece)) for piece in some])
            for piece, result in zip(some, results, strict=True):
                yield piece, result
                done += 1
                self.gradients[0].value = result.loss_scale
                if result.loss_scale != scale:
                    break

    def _recoloured(self, piece: Piece) -> torch.Tensor:
        """A piece of the picture after AdaIN, which is each picture's and window's own."""
        part = cut(self.z, piece.windows)
        if self.stats is not None:
            may_change = None if self.painted is None else cut(self.painted, piece.windows)
            weight = None if may_change is None else _pixels_that_count(may_change[:, :1])
            of_style = self.spread.objectives[0].recoloured(part, self.stats, self.layout, piece.windows, weight)
            part = masked(part, of_style, may_change)
        return part if piece.items == ALL else part.unflatten(0, (len(piece.windows), -1))[:, piece.items].flatten(0, 1)

    def _distilled(self, offers: Sequence[Offer], copy: int, begun: tuple[Piece, torch.Tensor]) -> Distilled:
        """What one copy of the model makes of a piece, which it is given after AdaIN."""
        (piece, part), device = begun, self.spread.devices[copy]
        objective, gradient = self.spread.objectives[copy], self.gradients[copy]
        may_move = None if self.moves is None else on_device(cut(self.moves[piece.items], piece.windows), device)
        z = on_device(part, device).requires_grad_()
        descent = Descent(z, learning_rate=self.learning_rate, gradient=gradient, movable=may_move)
        targets = objective.targets(offers[copy], self.layout, piece.windows, piece.items)
        found = descent.iterate(objective, targets, self.iterations)
        return Distilled(descent.z.detach(), found, gradient.value)


def _pixels_that_count(weight: torch.Tensor) -> torch.Tensor:
    """Weights for statistics, [b 1 h w]: a picture in which nothing may move counts as a whole, not as nothing."""
    return torch.where(weight.flatten(1).any(dim=1)[:, None, None, None], weight, torch.ones_like(weight))
