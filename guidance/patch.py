"""Put guidance on a model: the one implementation under the guider, the KSampler node and the MODEL patch."""

from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ..attention import conditioning
from ..attention.gradient import differentiable, ready_for_gradients
from ..attention.hooks import ModelHooks
from ..attention.layers import list_layers
from ..attention.reference import Reference, check_image_latent
from ..attention.regions import Regions
from .checks import check_picture, check_references, check_weights
from .objective import Objective
from .run import GuidedRun, reference_generator
from .sampling import check_sampler, guide_sampler
from .settings import GuidanceSettings
from .windowed_model import WindowedModel, check_conds, check_model_options
from .windows import Windows

KEY = "attention_distillation"


@dataclass(frozen=True)
class Guidance:
    """What guides a model, with its references.

    Attributes:
        style: the look to take on.
        content: the picture whose structure stays, of the size of the one being made.
        settings: strength, range and extras.
        regions: which part of the picture takes its look from which part of the style reference.
        windows: a picture larger than one window is denoised and distilled in windows.
    """

    style: Reference
    content: Reference | None
    settings: GuidanceSettings
    regions: Regions | None = None
    windows: Windows | None = None


def apply_guidance(model: ModelPatcher, guidance: Guidance) -> ModelPatcher:
    """A clone of the model that guides whatever sampler runs it. The model itself is not changed.

    Raises:
        ValueError: a reference does not fit the model.
    """
    check_references(model, guidance.style, guidance.content, guidance.regions)
    if guidance.settings.is_off:
        return model.clone()
    patched = ready_for_gradients(model)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _OuterSample(guidance))
    if guidance.windows is not None:
        pixels = model.get_model_object("latent_format").spacial_downscale_ratio
        patched.remove_wrappers_with_key(WrappersMP.CALC_COND_BATCH, KEY)  # windows in windows mean nothing
        patched.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, WindowedModel(guidance.windows, pixels))
    return patched


class _OuterSample:
    """Around a whole sampling run: check everything before any work starts, then hand on a guided sampler."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance

    def __call__(self, executor: WrapperExecutor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        check_image_latent("latent_image", latent_image)
        check_sampler(sampler)
        check_weights(executor.class_obj.model_patcher)
        check_picture(noise.shape, self.guidance.content, self.guidance.regions)
        if self.guidance.windows is not None:
            self._check_windows(executor.class_obj, noise.shape)
        return executor(noise, latent_image, guide_sampler(sampler, self._start_run), sigmas, *args, **kwargs)

    def _check_windows(self, guider: comfy.samplers.CFGGuider, shape: torch.Size) -> None:
        pixels = guider.model_patcher.get_model_object("latent_format").spacial_downscale_ratio
        if not self.guidance.windows.place(*shape[-2:], pixels).is_whole:
            if len(shape) == 5:
                raise ValueError(
                    "windows: this model makes videos of one frame, which ComfyUI cannot cut; take the windows away"
                )
            check_conds(guider.conds)
            check_model_options(guider.model_options)

    def _start_run(self, model: Any, x: torch.Tensor, extra_args: dict[str, Any]) -> GuidedRun:
        """Called with everything loaded; model is the KSamplerX0Inpaint around the guider."""
        guider: comfy.samplers.CFGGuider = model.inner_model
        latent = torch.zeros_like(x) if model.latent_image is None else model.latent_image
        denoise_mask = extra_args.get("denoise_mask")
        conds = conditioning.from_guider(guider)
        with differentiable(guider.inner_model), torch.no_grad():
            objective = Objective(
                guider.inner_model,
                list_layers(guider.inner_model.diffusion_model),
                style=self.guidance.style,
                content=self.guidance.content,
                settings=self.guidance.settings,
                conds=conds,
                latent=latent.clone(),
                denoise_mask=None if denoise_mask is None else denoise_mask.clone(),
                regions=self.guidance.regions,
            )
        generator = reference_generator(extra_args.get("seed"))
        hooks = ModelHooks(guider.inner_model, conds, extra_args["model_options"])
        return GuidedRun(objective, self.guidance.settings, generator, self.guidance.windows, hooks)
