"""One guided run: what happens to the picture after each sampler step (paper algorithm 2)."""

import logging
import time
from dataclasses import dataclass, field

import torch
from comfy import model_management

from ..attention.gradient import differentiable
from ..attention.layers import describe_layers
from ..losses.adain import adain
from ..losses.precision import at_least_fp32
from .loss_scale import LossScale
from .objective import Objective
from .settings import GuidanceSettings


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


class GuidedRun:
    """Guidance for one call of a sampler."""

    def __init__(self, objective: Objective, settings: GuidanceSettings, generator: torch.Generator) -> None:
        """
        Args:
            objective: made for this run's picture.
            settings: learning rate, iterations, AdaIN and the range of guidance.
            generator: draws the noise of the references, see `reference_generator`.
        """
        self.objective = objective
        self.model = objective.model
        self.settings = settings
        self.generator = generator
        self.log = RunLog()
        self._loss_scale = LossScale(self.model.get_dtype_inference())
        sampling = self.model.model_sampling
        self._first_sigma = float(sampling.percent_to_sigma(settings.start_percent))
        # A finished picture (sigma 0) counts as inside a range that ends at 1.
        self._last_sigma = -1.0 if settings.end_percent == 1 else float(sampling.percent_to_sigma(settings.end_percent))

    def is_active(self, sigma: float) -> bool:
        """Whether a state at this noise level is guided."""
        return not self.settings.is_off and self._last_sigma < sigma <= self._first_sigma

    def update(self, x: torch.Tensor, sigma: float, movable: torch.Tensor | None = None) -> torch.Tensor:
        """The picture after AdaIN and `iterations` Adam steps.

        Args:
            x: the sampler's state, [b c h w] in k-diffusion space.
            sigma: its noise level; 0 is treated at the model's smallest.
            movable: for inpainting, 1 where AdaIN takes the picture's statistics, [b or 1, 1 or c, h, w].

        Returns:
            The updated state, an ordinary tensor like x. x itself is not changed.
        """
        started = time.perf_counter()
        with differentiable(self.model):
            z = self._optimise(at_least_fp32(x).clone(), sigma, movable)
        self.log.seconds.append(time.perf_counter() - started)
        return z.to(x.dtype)

    def _optimise(self, x: torch.Tensor, sigma: float, movable: torch.Tensor | None) -> torch.Tensor:
        sampling = self.model.model_sampling
        level = x.new_tensor(max(sigma, float(sampling.sigma_min)))
        scale = sampling.calculate_input(level, x.new_ones(1, 1, 1, 1))  # model space z = scale * x
        z = scale * x
        if self.settings.adain:
            weight = None if movable is None else movable.to(z)[:, :1]
            z = adain(z, self.objective.style_stats(level, self.generator), weight)
        targets = self.objective.targets(level, self.generator)
        z.requires_grad_()
        optimiser = torch.optim.Adam([z], lr=self.settings.learning_rate)
        for _ in range(self.settings.iterations):
            model_management.throw_exception_if_processing_interrupted()
            z.grad, losses = self._loss_scale.gradient(lambda z: self.objective.losses(z / scale, targets), z)
            optimiser.step()
            self.log.losses.append(losses.total.item())
        return z.detach() / scale

    def report(self) -> None:
        """One line on the run for the console."""
        if not self.log.losses:
            logging.info("Attention distillation: no sampler step lies between start_percent and end_percent")
            return
        logging.info(
            "Attention distillation: layers %s of %d, %d updates of %d iterations, loss %.4f -> %.4f, %.2f s per step",
            describe_layers(self.objective.layers), len(self.objective.all_layers), len(self.log.seconds),
            self.settings.iterations, self.log.losses[0], self.log.losses[-1],
            sum(self.log.seconds) / len(self.log.seconds),
        )  # fmt: skip
