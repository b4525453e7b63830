"""Put guidance on a model: the one implementation under the guider, the KSampler node and the MODEL patch."""

from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from ..attention import conditioning
from ..attention.gradient import differentiable
from ..attention.layers import list_layers
from ..attention.reference import Reference, check_channels, check_image_latent
from .objective import Objective
from .run import GuidedRun, reference_generator
from .sampling import check_sampler, guide_sampler
from .settings import GuidanceSettings

KEY = "attention_distillation"


@dataclass(frozen=True)
class Guidance:
    """What guides a model, with its references.

    Attributes:
        style: the look to take on.
        content: the picture whose structure stays, of the size of the one being made.
        settings: strength, range and extras.
    """

    style: Reference
    content: Reference | None
    settings: GuidanceSettings


def apply_guidance(model: ModelPatcher, guidance: Guidance) -> ModelPatcher:
    """A clone of the model that guides whatever sampler runs it. The model itself is not changed.

    With dynamic VRAM, weights may be evicted between forward and backward, and gradients would be silently wrong: the
    clone then stands on a fully loaded copy without it.

    Raises:
        ValueError: a reference does not fit the model.
    """
    check_reference("style", guidance.style, model)
    if guidance.content is not None:
        check_reference("content", guidance.content, model)
    patched = model.get_non_dynamic_delegate() if model.is_dynamic() else model.clone()
    if not guidance.settings.is_off:
        patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _load_fully)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _OuterSample(guidance))
    return patched


def check_reference(name: str, reference: Reference, model: ModelPatcher) -> None:
    """Refuse a reference that was made for another kind of model, or that offers nothing.

    Raises:
        ValueError: names the socket, what it was given and what is allowed.
    """
    count = len(list_layers(model.model.diffusion_model))
    channels = model.get_model_object("latent_format").latent_channels
    if not reference.active_parts:
        raise ValueError(f"{name}: every reference in it has weight 0; give at least one a weight above 0")
    for part in reference.parts:
        check_channels(name, part.latent, channels)
        if part.layers[-1] >= count:
            raise ValueError(
                f"{name}: it was captured on layer {part.layers[-1]}, this model has layers 0 to {count - 1}; "
                "connect the same model to the Capture node"
            )


def check_content_size(content: Reference, shape: torch.Size) -> None:
    """Refuse a content reference that does not lie on the picture pixel by pixel.

    Raises:
        ValueError: names both sizes.
    """
    for part in content.active_parts:
        batch, _, height, width = part.latent.shape
        if (height, width) != shape[-2:]:
            raise ValueError(
                f"content: its latent is {width}x{height}, the picture's is {shape[-1]}x{shape[-2]} (width x height in "
                "latent pixels); resize the content picture to the size of the picture being made"
            )
        if batch not in (1, shape[0]):
            raise ValueError(f"content: {batch} pictures for a batch of {shape[0]}; give one, or one for each")


def _load_fully(executor: WrapperExecutor, model, noise_shape, conds, model_options=None, **kwargs):
    """Weights that are cast into a shared buffer layer by layer (low VRAM) are gone by the time of the backward."""
    return executor(model, noise_shape, conds, model_options=model_options, **{**kwargs, "force_full_load": True})


class _OuterSample:
    """Around a whole sampling run: check everything before any work starts, then hand on a guided sampler."""

    def __init__(self, guidance: Guidance) -> None:
        self.guidance = guidance

    def __call__(self, executor: WrapperExecutor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        check_image_latent("latent_image", latent_image)
        check_sampler(sampler)
        if self.guidance.content is not None:
            check_content_size(self.guidance.content, noise.shape)
        return executor(noise, latent_image, guide_sampler(sampler, self._start_run), sigmas, *args, **kwargs)

    def _start_run(self, model: Any, x: torch.Tensor, extra_args: dict[str, Any]) -> GuidedRun:
        """Called with everything loaded; model is the KSamplerX0Inpaint around the guider."""
        guider: comfy.samplers.CFGGuider = model.inner_model
        latent = torch.zeros_like(x) if model.latent_image is None else model.latent_image
        denoise_mask = extra_args.get("denoise_mask")
        with differentiable(guider.inner_model), torch.no_grad():
            objective = Objective(
                guider.inner_model,
                list_layers(guider.inner_model.diffusion_model),
                style=self.guidance.style,
                content=self.guidance.content,
                settings=self.guidance.settings,
                cond=conditioning.from_guider(guider),
                latent=latent.clone(),
                denoise_mask=None if denoise_mask is None else denoise_mask.clone(),
            )
        return GuidedRun(objective, self.guidance.settings, reference_generator(extra_args.get("seed")))
