"""One guided run: what happens to the picture after each sampler step (paper algorithm 2)."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch

from ..attention.frames import without_frame
from ..attention.gradient import differentiable
from ..attention.hooks import ModelHooks
from ..attention.layers import describe_layers
from ..attention.noise import NoiseLevel, StepNoise, smallest_level
from ..losses.precision import at_least_fp32
from .curve import falls
from .descent import Iteration, Observer, observe, within
from .loss_scale import LossScale
from .objective import Objective
from .settings import GuidanceSettings, NoiseRange
from .spread import Spread
from .update import Piece, Update, pictures_together, pieces_of_batch, pieces_of_windows
from .windows import Layout, Window, WindowAverage, Windows, distilled_at_once, whole


@dataclass
class RunLog:
    """What a run did, as an observer of its iterations: all of them, and the seconds spent on each update.

    Attributes:
        observer: is told as well.
    """

    observer: Observer | None = None
    iterations: list[Iteration] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def __call__(self, iteration: Iteration) -> None:
        """Note an iteration."""
        self.iterations.append(iteration)
        if self.observer is not None:
            self.observer(iteration)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Notes how long an update takes."""
        started = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - started)

    def report(self, objective: Objective) -> None:
        """Log what the run did in one line.

        The loss is taken at another noise level at each step, so it need not fall over the run; within a step it does.
        So the line tells of that first, for style and content apart.
        """
        if not self.iterations:
            logging.info("Attention distillation: no step was guided; see iterations, the percents and the noise mask")
            return
        last = [found for found in self.iterations if found.step == self.iterations[-1].step]
        fell = "" if len(last) == 1 else f", {last[0].total:.4f} -> {last[-1].total:.4f} within the last update"
        logging.info(
            "Attention distillation: layers %s of %d, %d updates of %d iterations, %.2f s each; %s; style loss %.4f, "
            "content loss %.4f at the end%s",
            describe_layers(objective.layers), len(objective.all_layers), len(self.seconds), len(last),
            sum(self.seconds) / len(self.seconds),
            ", ".join(f"{name} {fall}" for name, fall in falls(self.iterations).items()),
            last[-1].style, last[-1].content, fell,
        )  # fmt: skip


class GuidedRun:
    """Guidance for one call of a sampler."""

    def __init__(
        self,
        objective: Objective,
        settings: GuidanceSettings,
        noise: StepNoise,
        sigmas: Sequence[float],
        windows: Windows | None = None,
        hooks: ModelHooks | None = None,
        observer: Observer | None = None,
        check_size: Callable[[torch.Size], None] | None = None,
        spread: Spread | None = None,
    ) -> None:
        """
        Args:
            objective: made for this run's picture.
            settings: learning rate, iterations, AdaIN and the range of guidance.
            noise: of the references, at step 0.
            sigmas: the noise levels that the sampler goes through, the initial one included.
            windows: distil a picture larger than one window in windows; None distils it as a whole.
            hooks: what changes the model's weights during sampling.
            observer: told of each iteration, beside the log.
            check_size: asked whether a picture that a sampler has made larger may be cut into windows.
            spread: over which copies of the model the work goes, `objective` first; None is the model alone.
        """
        self.objective = objective
        self.model = objective.model
        self.settings = settings
        self.noise = noise
        self.windows = windows
        self.hooks = hooks
        self.log = RunLog(observer)
        self.step = -1
        self._check_size = check_size
        self._spread = Spread(objective) if spread is None else spread
        self._gradients = [LossScale.of(one.model) for one in self._spread.objectives]
        self._smallest = smallest_level(self.model)
        self._may_move: tuple[torch.Tensor | None, Layout, Sequence[Window]] | None = None
        self._range = NoiseRange.of(self.model.model_sampling, settings.start_percent, settings.end_percent)
        self._guided_levels = [sigma for sigma in sigmas[1:] if self._is_guided(sigma)]

    def reached(self, sigma: float) -> bool:
        """To be called once for each state that the sampler reaches: counts the step, and says whether it is guided."""
        self.step += 1
        return self._is_guided(sigma)

    def _is_guided(self, sigma: float) -> bool:
        return not self.settings.is_off and sigma in self._range

    def update(self, x: torch.Tensor, sigma: float, movable: torch.Tensor | None = None) -> torch.Tensor:
        """The picture after AdaIN and `iterations` Adam steps.

        Args:
            x: the sampler's state, [b c h w] or [b c 1 h w] in k-diffusion space.
            sigma: its noise level; see `NoiseLevel.of` for 0.
            movable: for inpainting, how far each element may move, 0 to 1, [b or 1, 1 or c, (1,) h, w]; by that share
                a pixel counts in the picture's statistics, too.

        Returns:
            The updated state, an ordinary tensor like x. x itself is not changed.

        Raises:
            ValueError: the picture has changed its size, and a content reference must have the same.
        """
        if self.objective.content.parts and x.shape[-2:] != self.objective.shape[-2:]:
            raise ValueError(
                f"content: the sampler has changed the picture's size from {list(self.objective.shape[-2:])} to "
                f"{list(x.shape[-2:])} (height and width in latent pixels), which a content reference cannot follow; "
                "use a sampler that keeps the size"
            )
        if self._check_size is not None and x.shape[-2:] != self.objective.shape[-2:] and not self._layout(x).is_whole:
            self._check_size(x.shape)
        if self.hooks is not None:
            self.hooks.apply(sigma)
        with self.log.timed(), differentiable(*self._spread.modules):
            z = self._distilled(without_frame(at_least_fp32(x).clone()), sigma, movable)
        return z.to(x.dtype).reshape(x.shape)

    def _distilled(self, x: torch.Tensor, sigma: float, movable: torch.Tensor | None) -> torch.Tensor:
        level = NoiseLevel.of(self.model, sigma, x, self._smallest)
        noise = replace(self.noise, step=self.step)
        z = level.scale * x
        stats = self.objective.statistics(level, noise) if self.settings.adain else None
        offer = self._spread.offer(level, noise)
        layout = self._layout(z)
        painted = None if movable is None else without_frame(movable).to(z).expand_as(z)
        moves = within(painted, self.objective.reach(*z.shape[-2:]), z)
        windows = layout.windows if moves is None else self._windows_that_move(layout, moves, movable)
        update = Update(
            self._spread, self._gradients, offer, z, layout, stats, painted, moves,
            self.settings.learning_rate_at(self._progress(sigma)), self.settings.iterations,
        )  # fmt: skip
        average, found = WindowAverage(z), []
        for piece, result in update.made(self._pieces(z, layout, windows)):
            found.append(result.found)
            average.add(piece.windows, result.z, piece.items)
        if found:
            observe(self.log, self.step, level.sigma, found, len(windows) * len(z))
        return average.over(z) / level.scale

    def _windows_that_move(self, layout: Layout, moves: torch.Tensor, movable: torch.Tensor | None) -> Sequence[Window]:
        """Those in which anything may move: asked of the device once for each mask, of which most runs have one.

        Args:
            moves: how far each element may.
            movable: the noise mask that this comes from, by which it is known again.
        """
        if self._may_move is None or self._may_move[0] is not movable or self._may_move[1] != layout:
            any_moves = torch.stack([window.of(moves).any() for window in layout.windows]).tolist()
            windows = [window for window, moved in zip(layout.windows, any_moves, strict=True) if moved]
            self._may_move = (movable, layout, windows)
        return self._may_move[2]

    def _progress(self, sigma: float) -> float:
        """The share of the guided noise levels above this one."""
        above = sum(level > sigma * (1 + 1e-5) for level in self._guided_levels)
        return min(above / max(1, len(self._guided_levels)), 1.0)

    def _layout(self, z: torch.Tensor) -> Layout:
        if self.windows is None:
            return whole(*z.shape[-2:])
        return self.windows.place(*z.shape[-2:], self.model.latent_format.spacial_downscale_ratio)

    def _pieces(self, z: torch.Tensor, layout: Layout, windows: Sequence[Window]) -> list[Piece]:
        """What goes through a model together: as much as fits on each device, and some for each of them."""
        workers = len(self._spread)
        if not layout.is_whole:
            of_devices = zip(self._spread.objectives, self._spread.devices, strict=True)
            at_once = min(
                distilled_at_once(one.model, z, layout.windows[0], self.windows.at_once, device)
                for one, device in of_devices
            )
            return pieces_of_windows(windows, at_once, workers)
        return pieces_of_batch(windows, len(z), pictures_together(self.settings, len(z), workers)) if windows else []

    def report(self) -> None:
        """One line on the run for the console."""
        self.log.report(self.objective)
