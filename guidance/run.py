"""One guided run: what happens to the picture after each sampler step (paper algorithm 2)."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from comfy import model_management

from ..attention.architectures import overwrites_activations
from ..attention.frames import without_frame
from ..attention.gradient import differentiable
from ..attention.hooks import ModelHooks
from ..attention.layers import describe_layers
from ..losses.adain import adain
from ..losses.precision import at_least_fp32
from .loss_scale import LossScale
from .objective import Objective, Targets
from .settings import GuidanceSettings, NoiseRange
from .windows import Layout, WindowAverage, Windows, chunks, cut, distilled_at_once, whole


def reference_generator(seed: int | None) -> torch.Generator:
    """The run's own source of reference noise, on the CPU so that a seed means the same on every machine.

    The seed is mixed, because the sampler's own seed makes the initial noise: the same numbers must not come twice.
    """
    return torch.Generator("cpu").manual_seed(((seed or 0) + 0x5AD) * 0x9E3779B97F4A7C15 % 2**63)


@dataclass
class RunLog:
    """What a run did: total losses in order, seconds spent on each update."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Notes how long an update takes."""
        started = time.perf_counter()
        yield
        self.seconds.append(time.perf_counter() - started)


class GuidedRun:
    """Guidance for one call of a sampler."""

    def __init__(
        self,
        objective: Objective,
        settings: GuidanceSettings,
        generator: torch.Generator,
        windows: Windows | None = None,
        hooks: ModelHooks | None = None,
    ) -> None:
        """
        Args:
            objective: made for this run's picture.
            settings: learning rate, iterations, AdaIN and the range of guidance.
            generator: draws the noise of the references, see `reference_generator`.
            windows: distil a picture larger than one window in windows; None distils it as a whole.
            hooks: what changes the model's weights during sampling.
        """
        self.objective = objective
        self.model = objective.model
        self.settings = settings
        self.generator = generator
        self.windows = windows
        self.hooks = hooks
        self.log = RunLog()
        self._loss_scale = LossScale(
            self.model.get_dtype_inference(), overwrites_activations(self.model.diffusion_model)
        )
        self._range = NoiseRange.of(self.model.model_sampling, settings.start_percent, settings.end_percent)

    def is_active(self, sigma: float) -> bool:
        """Whether a state at this noise level is guided."""
        return not self.settings.is_off and sigma in self._range

    def update(self, x: torch.Tensor, sigma: float, movable: torch.Tensor | None = None) -> torch.Tensor:
        """The picture after AdaIN and `iterations` Adam steps.

        Args:
            x: the sampler's state, [b c h w] or [b c 1 h w] in k-diffusion space.
            sigma: its noise level; 0 is treated at the model's smallest.
            movable: for inpainting, 1 where AdaIN takes the picture's statistics, [b or 1, 1 or c, (1,) h, w].

        Returns:
            The updated state, an ordinary tensor like x. x itself is not changed.

        Raises:
            ValueError: the picture has changed its size, and a content reference must have the same.
        """
        if self.objective.content and x.shape[-2:] != self.objective.shape[-2:]:
            raise ValueError(
                f"content: the sampler has changed the picture's size from {list(self.objective.shape[-2:])} to "
                f"{list(x.shape[-2:])} (height and width in latent pixels), which a content reference cannot follow; "
                "use a sampler that keeps the size"
            )
        if self.hooks is not None:
            self.hooks.apply(sigma)
        with self.log.timed(), differentiable(self.model):
            movable = None if movable is None else without_frame(movable)
            z = self._optimise(without_frame(at_least_fp32(x).clone()), sigma, movable)
        return z.to(x.dtype).reshape(x.shape)

    def _optimise(self, x: torch.Tensor, sigma: float, movable: torch.Tensor | None) -> torch.Tensor:
        sampling = self.model.model_sampling
        level = x.new_tensor(max(sigma, float(sampling.sigma_min)))
        scale = sampling.calculate_input(level, x.new_ones(1, 1, 1, 1))  # model space z = scale * x
        z = scale * x
        stats = self.objective.style_stats(level, self.generator) if self.settings.adain else None
        offer = self.objective.offer(level, self.generator)
        weight = None if movable is None else movable.to(z)[:, :1].expand(z.shape[0], -1, -1, -1)
        layout = self._layout(z)
        windows = [window for window in layout.windows if weight is None or window.of(weight).any()]
        average, losses = WindowAverage(z), [0.0] * self.settings.iterations
        for some in chunks(windows, self._at_once(z, layout)):
            part = cut(z, some)
            if stats is not None:
                part = adain(part, stats, None if weight is None else _pixels_that_count(cut(weight, some)))
            part, of_part = self._distil(part, scale, self.objective.targets(offer, layout, some))
            average.add(some, part)
            losses = [loss + own / len(windows) for loss, own in zip(losses, of_part, strict=True)]
        self.log.losses += losses
        return average.over(z) / scale

    def _layout(self, z: torch.Tensor) -> Layout:
        if self.windows is None:
            return whole(*z.shape[-2:])
        return self.windows.place(*z.shape[-2:], self.model.latent_format.spacial_downscale_ratio)

    def _at_once(self, z: torch.Tensor, layout: Layout) -> int:
        if layout.is_whole:
            return 1
        return distilled_at_once(self.model, z, layout.windows[0], self.windows.at_once)

    def _distil(self, z: torch.Tensor, scale: torch.Tensor, targets: Targets) -> tuple[torch.Tensor, list[float]]:
        """A fresh Adam on windows in model space, [(windows b) c h w]; also their summed loss at each iteration."""
        z = z.requires_grad_()
        optimiser = torch.optim.Adam([z], lr=self.settings.learning_rate)
        totals = []
        for _ in range(self.settings.iterations):
            model_management.throw_exception_if_processing_interrupted()
            z.grad, losses = self._loss_scale.gradient(lambda z: self.objective.losses(z / scale, targets), z)
            optimiser.step()
            totals.append(losses.total.item())
        return z.detach(), totals

    def report(self) -> None:
        """One line on the run for the console."""
        report(self.objective, self.settings, self.log)


def _pixels_that_count(weight: torch.Tensor) -> torch.Tensor:
    """Weights for statistics, [b 1 h w]: a picture in which nothing may move counts as a whole, not as nothing."""
    return torch.where(weight.flatten(1).any(dim=1)[:, None, None, None], weight, torch.ones_like(weight))


def report(objective: Objective, settings: GuidanceSettings, log: RunLog) -> None:
    """Log what a run did in one line."""
    if not log.losses:
        logging.info("Attention distillation: no step was guided; see iterations, start_percent and end_percent")
        return
    logging.info(
        "Attention distillation: layers %s of %d, %d updates of %d iterations, loss %.4f -> %.4f, %.2f s per step",
        describe_layers(objective.layers), len(objective.all_layers), len(log.seconds), settings.iterations,
        log.losses[0], log.losses[-1], sum(log.seconds) / len(log.seconds),
    )  # fmt: skip
