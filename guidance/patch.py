"""Put guidance on a model: the one implementation under the guider, the KSampler node and the MODEL patch."""

import functools
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP

from ..attention import conditioning
from ..attention.gradient import copies_for_gradients, differentiable, ready_for_gradients
from ..attention.hooks import ModelHooks
from ..attention.hypernetworks import hypernetworks
from ..attention.layers import list_layers
from ..attention.noise import StepNoise
from ..attention.reference import Reference
from ..attention.regions import Regions
from ..tiling.rolling import of_model as rolling_of
from .checks import check_references, check_run, check_windows
from .descent import Observer
from .motion import Motion
from .objective import Objective
from .run import GuidedRun
from .sampling import check_sampler, guide_sampler
from .sequence import motion_of, noise_along
from .settings import GuidanceSettings
from .spread import Copy, Spread
from .update import pictures_together
from .windowed_model import WindowedModel
from .windows import Windows

KEY = "attention_distillation"
GUIDANCES = "attention_distillation_guidances"  # attribute of a sampler function: how many guidances it has by now


@dataclass(frozen=True)
class Guidance:
    """What guides a model, with its references.

    Attributes:
        style: the look to take on.
        content: the picture whose structure stays, of the size of the one being made.
        settings: strength, range and extras.
        regions: which part of the picture takes its look from which part of the style reference.
        windows: a picture larger than one window is denoised and distilled in windows.
        observer: told of each iteration.
    """

    style: Reference
    content: Reference | None
    settings: GuidanceSettings
    regions: Regions | None = None
    windows: Windows | None = None
    observer: Observer | None = None

    def in_pieces(self, batch: int) -> bool:
        """Whether parts of an update can be made side by side: windows, references, pictures of a batch."""
        apart = pictures_together(self.settings, batch, 2) < batch
        return apart or self.windows is not None or len(self.style.active_parts) > 1


def apply_guidance(model: ModelPatcher, guidance: Guidance) -> ModelPatcher:
    """A clone of the model that guides whatever sampler runs it. The model itself is not changed.

    Raises:
        ValueError: a reference does not fit the model.
    """
    check_references(model, guidance.style, guidance.content, guidance.regions)
    if guidance.settings.is_off:
        return model.clone()
    pixels = model.get_model_object("latent_format").spacial_downscale_ratio
    if guidance.windows is None:
        shares = guidance.in_pieces(batch=1)
        patched = ready_for_gradients(model, memory=guidance.settings.memory, shares=shares)
    else:
        largest_pass = functools.partial(guidance.windows.largest_pass, pixels=pixels)
        patched = ready_for_gradients(model, largest_pass, guidance.settings.memory, shares=True)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _OuterSample(guidance))
    patched.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, KEY)  # once is enough
    patched.add_callback_with_key(CallbacksMP.ON_PRE_RUN, KEY, _refuse_unguided)
    if guidance.windows is not None:
        patched.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, KEY)  # windows in windows mean nothing
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, WindowedModel(guidance.windows, pixels))
    return patched


def is_guided(model: ModelPatcher) -> bool:
    """Whether `apply_guidance` has put guidance on this model."""
    return bool(model.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY))


def take_guidance_off(model: ModelPatcher) -> ModelPatcher:
    """A clone of the model without what `apply_guidance` has put on it. The model itself is not changed."""
    plain = model.clone()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.CALC_COND_BATCH):
        plain.remove_wrappers_with_key(kind, KEY)
    plain.remove_callbacks_with_key(CallbacksMP.ON_PRE_RUN, KEY)
    return plain


_in_guided_run: ContextVar[bool] = ContextVar("in_guided_run", default=False)


def _refuse_unguided(_patcher: ModelPatcher) -> None:
    """Before a guided model runs: a guider that has a second model never asks that one for its guidance."""
    if not _in_guided_run.get():
        raise ValueError(
            "model: this guider runs the guided model as its second model (model_negative), which would leave the "
            "guidance out; put Apply AD Guidance on its first model"
        )


class _OuterSample:
    """Around a whole sampling run: check everything before any work starts, then hand on a guided sampler."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance

    def __call__(
        self, executor: WrapperExecutor, noise, latent_image, sampler, sigmas, denoise_mask=None, *args, **kwargs
    ):
        guider: comfy.samplers.CFGGuider = executor.class_obj
        check_sampler(sampler, sigmas)
        check_run(
            guider.model_patcher,
            guider.conds,
            latent_image,
            denoise_mask,
            style=self.guidance.style,
            content=self.guidance.content,
            settings=self.guidance.settings,
            regions=self.guidance.regions,
            windows=self.guidance.windows,
        )
        number = getattr(sampler.sampler_function, GUIDANCES, 0)
        sigma_max = float(guider.model_patcher.get_model_object("model_sampling").sigma_max)
        motion = motion_of(self.guidance.settings, self.guidance.content, latent_image)
        guided = guide_sampler(sampler, functools.partial(self._start_run, number, motion), sigma_max)
        setattr(guided.sampler_function, GUIDANCES, number + 1)
        noise = noise_along(motion, noise)
        token = _in_guided_run.set(True)
        try:
            return executor(noise, latent_image, guided, sigmas, denoise_mask, *args, **kwargs)
        finally:
            _in_guided_run.reset(token)

    def _start_run(
        self,
        number: int,
        motion: Motion | None,
        model: Any,
        x: torch.Tensor,
        sigmas: torch.Tensor,
        extra_args: dict[str, Any],
    ) -> GuidedRun:
        """Called with everything loaded; model is the KSamplerX0Inpaint around the guider, number counts guidances."""
        guider: comfy.samplers.CFGGuider = model.inner_model
        latent = torch.zeros_like(x) if model.latent_image is None else model.latent_image
        denoise_mask = extra_args.get("denoise_mask")
        conds = conditioning.of_sampler(guider.conds)
        patches = hypernetworks(extra_args["model_options"])

        def objective_of(one: BaseModel, device: torch.device) -> Objective:
            return Objective(
                one,
                list_layers(one.diffusion_model),
                style=self.guidance.style,
                content=self.guidance.content,
                settings=self.guidance.settings,
                conds=conds,
                latent=latent.to(device).clone(),
                denoise_mask=None if denoise_mask is None else denoise_mask.to(device).clone(),
                regions=self.guidance.regions,
                patches=patches,
                rolling=rolling_of(guider.model_patcher),
                motion=motion,
            )

        # The networks of hypernetworks are shared by all copies, and can be on one device only.
        shares = not patches and self.guidance.in_pieces(len(x))
        clones = self._copies(guider, x.shape, extra_args["model_options"]) if shares else []
        with differentiable(guider.inner_model, *(clone.model for clone in clones)), torch.no_grad():
            objective = objective_of(guider.inner_model, latent.device)
            copies = [Copy(objective_of(clone.model, clone.load_device), clone.load_device) for clone in clones]
        return GuidedRun(
            objective,
            self.guidance.settings,
            StepNoise(extra_args.get("seed") or 0, number),
            sigmas.tolist(),
            self.guidance.windows,
            ModelHooks(guider.inner_model, conds, extra_args["model_options"], [clone.model for clone in clones]),
            self.guidance.observer,
            check_size=functools.partial(check_windows, guider.model_patcher, guider.conds),
            spread=Spread(objective, copies, extra_args["model_options"].get("multigpu_thread_pool")),
        )

    def _copies(
        self, guider: comfy.samplers.CFGGuider, shape: Sequence[int], model_options: dict[str, Any]
    ) -> list[ModelPatcher]:
        """The model's copies on other devices that share the work on a latent of this shape."""
        if self.guidance.windows is not None:
            pixels = guider.inner_model.latent_format.spacial_downscale_ratio
            shape = replace(self.guidance.windows, at_once=1).largest_pass(shape, pixels)
        else:
            workers = len(model_options.get("multigpu_clones", ())) or 1
            shape = [pictures_together(self.guidance.settings, shape[0], workers), *shape[1:]]
        return copies_for_gradients(guider.inner_model, model_options, shape, self.guidance.settings.memory)
