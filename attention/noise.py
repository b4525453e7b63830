"""Noise levels, and the noise that references get.

A *noise level* knows both spaces: a sampler's state x lives in k-diffusion space, the model is shown z = scale * x in
model space, where learning rates and AdaIN are meant.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import torch
from comfy import model_management
from comfy.model_base import BaseModel
from comfy.model_sampling import CONST


def smallest_level(model: BaseModel) -> float:
    """The noise level below which no state is treated.

    Models that predict noise or velocity were trained down to their smallest sigma: a finished picture (sigma 0) is
    treated there. Flow models end at sigma 0 itself, and are treated there.
    """
    sampling = model.model_sampling
    return 0.0 if isinstance(sampling, CONST) else float(sampling.sigma_min)


@dataclass(frozen=True)
class NoiseLevel:
    """A noise level of a model.

    Attributes:
        sigma: in k-diffusion space; what passes are made at.
        sigmas: the same as a scalar tensor on the picture's device, in its dtype.
        scale: model space is scale times k-diffusion space, [1, 1, 1, 1].
    """

    sigma: float
    sigmas: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def of(cls, model: BaseModel, sigma: float, like: torch.Tensor, smallest: float | None = None) -> "NoiseLevel":
        """The level at which a state is treated.

        Args:
            like: gives device and dtype of the picture.
            smallest: `smallest_level` of the model, for callers that keep it: to read it is to wait for the device.
        """
        sigma = max(sigma, smallest_level(model) if smallest is None else smallest)
        level = like.new_full((), sigma)
        return cls(sigma, level, model.model_sampling.calculate_input(level, like.new_ones(1, 1, 1, 1)))


class Purpose(IntEnum):
    """What a reference is noised for: three independent draws (paper algorithm 2)."""

    ADAIN = 0
    STYLE = 1
    CONTENT = 2


def noise_seed(numbers: Sequence[int]) -> int:
    """A seed made of several numbers; any other number gives other noise (a mixing after Steele's splitmix64)."""
    mixed = 0x5AD
    for number in numbers:
        mixed = (mixed ^ number) * 0x9E3779B97F4A7C15 % 2**64
        mixed ^= mixed >> 32
    return mixed % 2**63


@dataclass(frozen=True)
class StepNoise:
    """The noise of the references at one step: each draw has a seed of its own, so that a step can be repeated.

    Attributes:
        seed: of the run; it also makes the sampler's initial noise, which these never equal.
        guidance: which guidance this is, where several are in a row, from 0.
        step: which step of the sampler, from 0.
    """

    seed: int
    guidance: int = 0
    step: int = 0

    def draw(self, latent: torch.Tensor, purpose: Purpose, part: int) -> torch.Tensor:
        """Standard normal noise like a part's latent; made on the CPU in fp32: a seed means the same everywhere."""
        seed = noise_seed((self.seed, self.guidance, self.step, part, purpose))
        generator = torch.Generator("cpu").manual_seed(seed)
        drawn = torch.randn(latent.shape, generator=generator, dtype=torch.float32)
        return model_management.cast_to_device(drawn, latent.device, latent.dtype)  # does not wait for the device
