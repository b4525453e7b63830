"""Optimisation mode: the latent itself is optimised, without any denoising step (paper algorithm 1).

It runs as a sampler of ComfyUI, so that loading, conditions, previews, progress and Cancel are those of any sampler.
"""

import math
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy import model_management
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ..attention import conditioning
from ..attention.architectures import overwrites_activations
from ..attention.frames import without_frame
from ..attention.gradient import differentiable, ready_for_gradients
from ..attention.hooks import ModelHooks
from ..attention.layers import list_layers
from ..attention.reference import Reference, check_channels, check_image_latent
from ..attention.regions import Regions
from ..losses.precision import at_least_fp32
from .checks import check_picture, check_references
from .loss_scale import LossScale
from .objective import Objective
from .run import RunLog, report
from .settings import GuidanceSettings

TRAINING_STEPS = 1000  # timesteps the models were trained with
LR_SCHEDULES = ("constant", "cosine")
STARTS = ("noise", "latent")


@dataclass(frozen=True, kw_only=True)
class OptimiseSettings:
    """What the artist can set beside `GuidanceSettings`.

    Attributes:
        steps: noise levels visited, from high to low, 1 to 1000.
        start_from: `noise` for textures, `latent` to change a picture.
        lr_schedule: `constant` as in the paper; `cosine` falls to near 0, which leaves less jitter.

    Raises:
        ValueError: names the setting, what was given and what is allowed.
    """

    steps: int = 200
    start_from: str = "noise"
    lr_schedule: str = "constant"

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= TRAINING_STEPS:
            raise ValueError(f"steps: {self.steps} is not allowed; use 1 to {TRAINING_STEPS}")
        if self.start_from not in STARTS:
            raise ValueError(f"start_from: {self.start_from} is not allowed; use one of {', '.join(STARTS)}")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(f"lr_schedule: {self.lr_schedule} is not allowed; use one of {', '.join(LR_SCHEDULES)}")

    def learning_rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by at a step, counted from 0."""
        if self.lr_schedule == "constant":
            return 1.0
        return 0.5 * (1 + math.cos(math.pi * step / self.steps))


def optimise_sigmas(model_sampling: torch.nn.Module, steps: int) -> torch.Tensor:
    """The noise levels visited, from high to low, [steps], float32.

    For discrete models these are the sigmas of the timesteps t = k * (1000 // steps) + 1 of the paper's release; models
    with another table of sigmas (flow models) are read at the same fraction of it.
    """
    table = model_sampling.sigmas.float().cpu()
    timesteps = torch.arange(steps - 1, -1, -1) * (TRAINING_STEPS // steps) + 1
    index = timesteps * len(table) // TRAINING_STEPS
    return table[index.clamp(max=len(table) - 1)]


class OptimiseSampler(comfy.samplers.Sampler):
    """Adam on the latent over falling noise levels; one Adam state lives through the run."""

    def __init__(
        self,
        *,
        style: Reference,
        content: Reference | None,
        regions: Regions | None,
        settings: GuidanceSettings,
        optimise: OptimiseSettings,
    ) -> None:
        self.style = style
        self.content = content
        self.regions = regions
        self.settings = settings
        self.optimise = optimise

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> torch.Tensor:
        """Called by the guider (model_wrap) with everything loaded.

        Args:
            sigmas: from `optimise_sigmas`.
            noise: standard normal, [b c h w].
            latent_image: the latent to start from, model scale.
            denoise_mask: 1 where the latent may change.

        Returns:
            The optimised latent in model scale, of the noise's shape.
        """
        model: BaseModel = model_wrap.inner_model
        start = noise if self.optimise.start_from == "noise" else latent_image
        conds = conditioning.from_guider(model_wrap)
        with differentiable(model):
            start = without_frame(at_least_fp32(start).clone())
            latent = without_frame(at_least_fp32(latent_image).clone())
            movable = None if denoise_mask is None else without_frame(denoise_mask.to(start).clone())
            if movable is not None:
                start = start * movable + latent * (1 - movable)
            objective = Objective(
                model,
                list_layers(model.diffusion_model),
                style=self.style,
                content=self.content,
                settings=self.settings,
                conds=conds,
                latent=latent,
                denoise_mask=movable,
                regions=self.regions,
            )
        hooks = ModelHooks(model, conds, extra_args["model_options"])
        return self.descend(objective, start, sigmas.tolist(), movable, callback, hooks).reshape(noise.shape)

    def descend(
        self,
        objective: Objective,
        start: torch.Tensor,
        sigmas: list[float],
        movable: torch.Tensor | None = None,
        callback: Any = None,
        hooks: ModelHooks | None = None,
    ) -> torch.Tensor:
        """Adam from `start` (model space, clean); `callback` is ComfyUI's, with the latent as its preview."""
        log = RunLog()
        loss_scale = LossScale(
            objective.model.get_dtype_inference(), overwrites_activations(objective.model.diffusion_model)
        )
        with torch.inference_mode(False):
            z = start.clone().requires_grad_()
        optimiser = torch.optim.Adam([z], lr=self.settings.learning_rate)
        for step, sigma in enumerate(sigmas):
            if hooks is not None:
                hooks.apply(sigma)
            optimiser.param_groups[0]["lr"] = self.settings.learning_rate * self.optimise.learning_rate_factor(step)
            with log.timed(), differentiable(objective.model):
                log.losses += self._step(objective, z, optimiser, z.new_tensor(sigma), loss_scale, movable)
            if callback is not None:
                callback(step, z.detach(), z.detach(), len(sigmas))
        report(objective, self.settings, log)
        return z.detach()

    def _step(
        self,
        objective: Objective,
        z: torch.Tensor,
        optimiser: torch.optim.Optimizer,
        sigma: torch.Tensor,
        loss_scale: LossScale,
        movable: torch.Tensor | None,
    ) -> list[float]:
        """`iterations` of Adam on z at one noise level; the total loss of each."""
        scale = objective.model.model_sampling.calculate_input(sigma, z.new_ones(1, 1, 1, 1))
        targets = objective.targets(objective.offer(sigma, generator=None))
        totals = []
        for _ in range(self.settings.iterations):
            model_management.throw_exception_if_processing_interrupted()
            z.grad, losses = loss_scale.gradient(lambda z: objective.losses(z / scale, targets), z)
            if movable is not None:
                z.grad = z.grad * (movable > 0)
            optimiser.step()
            totals.append(losses.total.item())
        return totals


def optimise_latent(
    model: ModelPatcher,
    sampler: OptimiseSampler,
    *,
    latent_image: torch.Tensor,
    noise: torch.Tensor,
    cond: conditioning.Conditioning,
    denoise_mask: torch.Tensor | None = None,
    callback: Any = None,
) -> torch.Tensor:
    """Run the optimisation mode on a latent.

    Args:
        model: the model whose attention is read; it is not changed.
        sampler: references and settings.
        latent_image, noise: [b c h w], the latent as a LATENT socket carries it, and standard normal noise.
        cond: text condition of all passes.
        denoise_mask: 1 where the latent may change.
        callback: ComfyUI's, called after each step.

    Returns:
        The optimised latent, [b c h w], as a LATENT socket carries it.

    Raises:
        ValueError: a reference or latent that does not fit; nothing has been loaded then.
    """
    check_image_latent("latent_image", latent_image)
    check_channels("latent_image", latent_image, model.get_model_object("latent_format").latent_channels)
    check_references(model, sampler.style, sampler.content, sampler.regions)
    check_picture(latent_image.shape, sampler.content, sampler.regions)
    guider = comfy.samplers.CFGGuider(ready_for_gradients(model))
    guider.set_conds(cond, cond)
    sigmas = optimise_sigmas(model.get_model_object("model_sampling"), sampler.optimise.steps)
    return guider.sample(noise, latent_image, sampler, sigmas, denoise_mask, callback)
