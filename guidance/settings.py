"""The settings of guided sampling and their allowed values."""

import math
from dataclasses import dataclass

import torch

from ..attention.gradient import MEMORY
from ..losses.content import CONTENT_LOSSES

LR_SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class GuidanceSettings:
    """What the artist can set, the same for the guider, the KSampler node and the MODEL patch.

    Attributes:
        learning_rate: Adam's step: how far a latent element moves per iteration, in model-space latent units.
        iterations: optimisation steps after each sampler step; 0 leaves the sampler alone.
        adain: give the latent the reference's mean and contrast before the iterations.
        content_weight: weight of the content loss against the style loss.
        attention_scale: factor on the picture's queries when they look at the style reference.
        content_loss: which features hold the content.
        start_percent, end_percent: the part of the sampling range with guidance, 0 = pure noise, 1 = finished.
        lr_schedule: `constant` as in the paper; `linear` and `cosine` fall to near 0, which leaves less jitter.
        memory: `fast` keeps all for the backward, `small` runs blocks again in it, `auto` does so where it must. The
            picture is the same.

    Raises:
        ValueError: names the setting, what was given and what is allowed.
    """

    learning_rate: float = 0.015
    iterations: int = 2
    adain: bool = True
    content_weight: float = 0.25
    attention_scale: float = 1.0
    content_loss: str = "query"
    start_percent: float = 0.0
    end_percent: float = 1.0
    lr_schedule: str = "constant"
    memory: str = "auto"

    def __post_init__(self) -> None:
        self._require("learning_rate", self.learning_rate > 0, "a number above 0")
        self._require("iterations", self.iterations >= 0, "0 or more")
        self._require("content_weight", self.content_weight >= 0, "0 or more")
        self._require("attention_scale", self.attention_scale > 0, "a number above 0")
        self._require("content_loss", self.content_loss in CONTENT_LOSSES, f"one of {', '.join(CONTENT_LOSSES)}")
        self._require("start_percent", 0 <= self.start_percent <= 1, "0 to 1")
        self._require(
            "end_percent",
            self.start_percent <= self.end_percent <= 1,
            f"{self.start_percent} (start_percent) to 1",
        )
        self._require("lr_schedule", self.lr_schedule in LR_SCHEDULES, f"one of {', '.join(LR_SCHEDULES)}")
        self._require("memory", self.memory in MEMORY, f"one of {', '.join(MEMORY)}")

    def _require(self, name: str, holds: bool, allowed: str) -> None:
        value = getattr(self, name)
        if not holds or (isinstance(value, float) and not math.isfinite(value)):
            raise ValueError(f"{name}: {value} is not allowed; use {allowed}")

    def learning_rate_at(self, progress: float) -> float:
        """The learning rate when a share of the guided steps, 0 to below 1, is done."""
        factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
        return self.learning_rate * factor[self.lr_schedule]

    @property
    def is_off(self) -> bool:
        """True where the result is exactly the unguided one."""
        return self.iterations == 0 or self.start_percent == self.end_percent


@dataclass(frozen=True)
class NoiseRange:
    """The noise levels that lie between two percentages of a sampling range, [low, high] in k-diffusion space."""

    low: float
    high: float

    @classmethod
    def of(cls, model_sampling: torch.nn.Module, start_percent: float, end_percent: float) -> "NoiseRange":
        """A finished picture (sigma 0) counts as inside a range that ends at 1."""
        low = -1.0 if end_percent == 1 else float(model_sampling.percent_to_sigma(end_percent))
        return cls(low, float(model_sampling.percent_to_sigma(start_percent)))

    def __contains__(self, sigma: float) -> bool:
        return self.low < sigma <= self.high
