"""Optimisation mode: the latent itself is optimised, without any denoising step (paper algorithm 1).

It runs as a sampler of ComfyUI, so that loading, conditions, previews, progress and Cancel are those of any sampler.
"""

from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

from ..attention import conditioning
from ..attention.frames import without_frame
from ..attention.gradient import MULTIGPU, differentiable, ready_for_gradients
from ..attention.hooks import ModelHooks
from ..attention.hypernetworks import hypernetworks
from ..attention.layers import list_layers
from ..attention.noise import NoiseLevel, smallest_level
from ..attention.reference import Reference
from ..attention.regions import Regions
from ..losses.precision import at_least_fp32
from ..tiling.rolling import of_model as rolling_of
from .checks import check_run
from .descent import Descent, Observer, observe, within
from .injection import is_injected
from .loss_scale import LossScale
from .motion import Motion
from .objective import Objective
from .patch import is_guided
from .run import RunLog
from .sequence import motion_of, noise_along
from .settings import GuidanceSettings

TRAINING_STEPS = 1000  # timesteps the models were trained with
STARTS = ("noise", "latent")


@dataclass(frozen=True, kw_only=True)
class OptimiseSettings:
    """What the artist can set beside `GuidanceSettings`.

    Attributes:
        steps: noise levels visited, from high to low, 1 to 1000.
        start_from: `noise` for textures, `latent` to change a picture.

    Raises:
        ValueError: names the setting, what was given and what is allowed.
    """

    steps: int = 200
    start_from: str = "noise"

    def __post_init__(self) -> None:
        if not 1 <= self.steps <= TRAINING_STEPS:
            raise ValueError(f"steps: {self.steps} is not allowed; use 1 to {TRAINING_STEPS}")
        if self.start_from not in STARTS:
            raise ValueError(f"start_from: {self.start_from} is not allowed; use one of {', '.join(STARTS)}")


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
        observer: Observer | None = None,
    ) -> None:
        """observer: told of each iteration, beside the log."""
        self.style = style
        self.content = content
        self.regions = regions
        self.settings = settings
        self.optimise = optimise
        self.observer = observer

    def sample(
        self, model_wrap, sigmas, extra_args, callback, noise, latent_image=None, denoise_mask=None, disable_pbar=False
    ) -> torch.Tensor:
        """Called by the guider (model_wrap) with everything loaded.

        Args:
            sigmas: from `optimise_sigmas`.
            noise: standard normal, [b c h w].
            latent_image: the latent to start from, model scale.
            denoise_mask: how far the latent may change, 0 to 1.

        Returns:
            The optimised latent in model scale, of the noise's shape.
        """
        model: BaseModel = model_wrap.inner_model
        motion = motion_of(self.settings, self.content, latent_image)
        start = noise_along(motion, noise) if self.optimise.start_from == "noise" else latent_image
        conds = conditioning.of_sampler(model_wrap.conds)
        with differentiable(model):
            start = without_frame(at_least_fp32(start).clone())
            latent = without_frame(at_least_fp32(latent_image).clone())
            movable = None if denoise_mask is None else without_frame(denoise_mask.to(start).clone())
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
                patches=hypernetworks(extra_args["model_options"]),
                rolling=rolling_of(model_wrap.model_patcher),
                motion=motion,
            )
            movable = within(movable, objective.reach(*start.shape[-2:]), start)
            if movable is not None:
                start = start * movable + latent * (1 - movable)
        hooks = ModelHooks(model, conds, extra_args["model_options"])
        return self.descend(objective, start, sigmas.tolist(), movable, callback, hooks, motion).reshape(noise.shape)

    def descend(
        self,
        objective: Objective,
        start: torch.Tensor,
        sigmas: list[float],
        movable: torch.Tensor | None = None,
        callback: Any = None,
        hooks: ModelHooks | None = None,
        motion: Motion | None = None,
    ) -> torch.Tensor:
        """Adam from `start` (model space, clean); `callback` is ComfyUI's, with the latent as its preview.

        Where the content moves, what each step has made of a frame is drawn to what it has made of the one before; not
        where styles have places of their own, which what moves may leave.
        """
        model, log = objective.model, RunLog(self.observer)
        smallest = smallest_level(model)
        with torch.inference_mode(False):
            descent = Descent(
                start.clone().requires_grad_(),
                learning_rate=self.settings.learning_rate,
                gradient=LossScale.of(model),
                movable=movable,
            )
        for step, sigma in enumerate(sigmas):
            if hooks is not None:
                hooks.apply(sigma)
            descent.learning_rate = self.settings.learning_rate_at(step / len(sigmas))
            with log.timed(), differentiable(*objective.modules):
                level = NoiseLevel.of(model, sigma, start, smallest)
                targets = objective.targets(objective.offer(level, noise=None))
                found = descent.iterate(objective, targets, self.settings.iterations)
                if found:
                    observe(log, step, sigma, [found], len(start))
            if motion is not None and not objective.has_places:
                descent.hold(motion, start, self.settings.frames / (1 + self.settings.frames))
            if callback is not None:
                callback(step, descent.z.detach(), descent.z.detach(), len(sigmas))
        log.report(objective)
        return descent.z.detach()


def optimise_latent(
    model: ModelPatcher,
    sampler: OptimiseSampler,
    *,
    latent_image: torch.Tensor,
    noise: torch.Tensor,
    cond: conditioning.Conditioning,
    denoise_mask: torch.Tensor | None = None,
    callback: Any = None,
    seed: int | None = None,
) -> torch.Tensor:
    """Run the optimisation mode on a latent.

    Args:
        model: the model whose attention is read; it is not changed.
        sampler: references and settings.
        latent_image, noise: [b c h w], the latent as a LATENT socket carries it, and standard normal noise.
        cond: text condition of all passes.
        denoise_mask: how far the latent may change, 0 to 1.
        callback: ComfyUI's, called after each step.
        seed: for what other nodes have put on the model; the run itself draws no noise.

    Returns:
        The optimised latent, [b c h w], as a LATENT socket carries it, on the device where ComfyUI keeps those.

    Raises:
        ValueError: a reference or latent that does not fit; nothing has been loaded then.
    """
    if is_guided(model):
        raise ValueError(
            "model: it has guidance on it (Apply AD Guidance), which this node does by itself; connect the model from "
            "before that node"
        )
    if is_injected(model):
        raise ValueError(
            "model: Inject Reference KV has no effect on this node, which makes no denoising step; connect the model "
            "from before that node"
        )
    check_run(
        model,
        {"positive": conditioning.from_socket(cond)},
        latent_image,
        denoise_mask,
        style=sampler.style,
        content=sampler.content,
        settings=sampler.settings,
        regions=sampler.regions,
    )
    prepared = ready_for_gradients(model, memory=sampler.settings.memory)
    prepared.remove_additional_models(MULTIGPU)  # one Adam for the whole run: copies on other devices have no part
    return comfy.sample.sample_custom(
        prepared,
        noise,
        1.0,
        sampler,
        optimise_sigmas(model.get_model_object("model_sampling"), sampler.optimise.steps),
        cond,
        cond,
        latent_image,
        noise_mask=denoise_mask,
        callback=callback,
        seed=seed,
    )
