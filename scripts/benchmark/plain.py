"""tests/plain_method.py, the plain transcription of the method, on a loaded model: all else is held against it."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from types import ModuleType
from typing import Any

import torch
from comfy.model_base import BaseModel
from host.comfy_env import CHECKOUT
from torch import Tensor, nn

CHOSEN = 6
"""Layers, from the last: what `auto` stands for in a UNet."""


def plain_method() -> ModuleType:
    """The module, which stands with the tests."""
    name = "plain_method"
    if name not in sys.modules:
        spec = spec_from_file_location(name, CHECKOUT / "tests" / f"{name}.py")
        sys.modules[name] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def chosen_layers(unet: nn.Module) -> tuple[int, ...]:
    """The last self-attention layers of a UNet, by their order."""
    count = sum(name.endswith(".attn1") for name, _ in unet.named_modules())
    return tuple(range(count))[-CHOSEN:]


class AsPlainMethod(nn.Module):
    """A UNet as the plain method calls it, whatever its device and what it takes beside text."""

    def __init__(self, unet: nn.Module, conds: Mapping[str, Any]) -> None:
        """
        Args:
            unet: ComfyUI's.
            conds: what `apply_model` takes beside the latent.
        """
        super().__init__()
        self.unet, self._y = unet, conds.get("y")

    def forward(self, z: Tensor, times: Tensor, context: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """[b c h w]; all in the number format of z."""
        beside: dict[str, Any] = {"transformer_options": transformer_options}
        if self._y is not None:
            beside["y"] = self._y.to(z.dtype)
        return self.unet(z, times.to(z.device), context=context, **beside)


@dataclass(frozen=True)
class PlainProgram:
    """The plain method with the benchmark's settings, on a model whose weights can take part in autograd.

    Attributes:
        model: ComfyUI's, loaded.
        conds: what its `apply_model` takes, of one and the same prompt everywhere.
        reference: the style reference's latent as a VAE gives it, [1 c h w]; all is computed in its number format.
        seed: of the run.
        learning_rate, iterations, cfg: as the nodes have them.
    """

    model: BaseModel
    conds: Mapping[str, Any]
    reference: Tensor
    seed: int
    learning_rate: float
    iterations: int
    cfg: float

    @property
    def _unet(self) -> AsPlainMethod:
        return AsPlainMethod(self.model.diffusion_model, self.conds)

    @property
    def _sigmas(self) -> Tensor:
        return self.model.model_sampling.sigmas.cpu()

    def _settings(self, iterations: int = 1, adain: bool = False) -> Any:
        half = self.reference.dtype != torch.float32  # where Adam's own epsilon would be 0
        return plain_method().Settings(
            chosen_layers(self.model.diffusion_model), self.learning_rate, iterations, adain,
            adam_epsilon=1e-6 if half else 1e-8,
        )  # fmt: skip

    def _step(self, z: Tensor, sigma: float, number: int, iterations: int, adain: bool) -> Any:
        plain, device = plain_method(), z.device
        settings = self._settings(iterations, adain)
        drawn = plain.draw_noises(self.seed, number, [plain.Reference(self.reference.cpu())], None, settings)
        noises = plain.Noises([n.to(device) for n in drawn.adain], [n.to(device) for n in drawn.style], None)
        context, references = self.conds["c_crossattn"], [plain.Reference(self.reference)]
        with device:
            return plain.guided_step(self._unet, z, sigma, self._sigmas, context, references, noises, settings)

    def gradient(self, z: Tensor, sigma: float) -> Tensor:
        """Of the loss of z, [1 c h w] in model space."""
        return self._step(z, sigma, 0, 1, adain=False).gradient

    def iterate(self, z: Tensor, sigma: float) -> Callable[[], None]:
        """One iteration on z, to be called again and again: gradient and Adam, with the reference read already."""
        plain, unet = plain_method(), self._unet
        settings, z = self._settings(), z.to(self.reference)
        references, context = [plain.Reference(self.reference)], self.conds["c_crossattn"]
        with torch.no_grad(), z.device:
            style = [plain.features(unet, z, plain.timestep_of(sigma, self._sigmas), context)]
        z = z.clone().requires_grad_()
        adam = torch.optim.Adam([z], lr=self.learning_rate, eps=settings.adam_epsilon)

        def iteration() -> None:
            with z.device:
                live = plain.features(unet, z, plain.timestep_of(sigma, self._sigmas), context)
                z.grad = None
                plain.feature_loss(live, style, None, references, settings, z).backward()
                adam.step()

        return iteration

    def run(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        """As `plain_method.run`, whose noises stay on the processor: [1 c h w] in k-diffusion space."""
        plain, levels, unet, sigma_max = plain_method(), sigmas.tolist(), self._unet, float(self._sigmas[-1])
        x, context = noise.to(self.reference) * math.sqrt(1 + levels[0] ** 2), self.conds["c_crossattn"]
        assert math.isclose(levels[0], sigma_max, rel_tol=1e-5)
        for number, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
            with x.device:
                denoised = plain.denoise(unet, x, sigma, self._sigmas, self.cfg, context, context)
            x = x + (x - denoised) / sigma * (sigma_next - sigma)
            scale = math.sqrt(max(sigma_next, float(self._sigmas[0])) ** 2 + 1)
            x = self._step(x / scale, sigma_next, number, self.iterations, adain=True).after * scale
        return x
