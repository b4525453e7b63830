"""The settings of guided sampling and of KV injection, and their allowed values."""

import math
from dataclasses import dataclass

import torch

from ..attention.gradient import MEMORY
from ..attention.inputs import check_number
from ..losses.content import CONTENT_LOSSES

MAX_FRAMES = 4.0
MAX_STRENGTH, MAX_NEGATIVE_STRENGTH = 5.0, 20.0  # of KV injection
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
        frames: weight of the frame before in what each frame of the batch looks at; 0 makes each picture for itself.
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
    frames: float = 0.0

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
        self._require("frames", 0 <= self.frames <= MAX_FRAMES, f"0 to {MAX_FRAMES:g}")

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


@dataclass(frozen=True, kw_only=True)
class InjectionSettings:
    """What the artist can set of KV injection.

    Attributes:
        strength: how far each layer's output goes from its own to what the reference gives: 0 keeps its own, 1 takes
            the reference's, above 1 it goes on in that direction.
        start_percent, end_percent: the part of the sampling range with injection, 0 = pure noise, 1 = finished.
        negative_strength: s of s * (injected - plain), which is added to what the sampler is told; both are
            predictions for the text of `conditioning.of_sampler`, one with strength 1, the other with 0.

    Raises:
        ValueError: names the setting, what was given and what is allowed.
    """

    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0
    negative_strength: float = 0.0

    def __post_init__(self) -> None:
        check_number("strength", self.strength, 0, MAX_STRENGTH)
        check_number("start_percent", self.start_percent, 0, 1)
        check_number("end_percent", self.end_percent, self.start_percent, 1)
        check_number("negative_strength", self.negative_strength, 0, MAX_NEGATIVE_STRENGTH)

    @property
    def is_off(self) -> bool:
        """True where the result is exactly that of the model as it was."""
        return self.strength == self.negative_strength == 0 or self.start_percent == self.end_percent


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
