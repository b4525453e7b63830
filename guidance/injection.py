"""KV injection: the gradient-free baseline of the paper, as a patch on a model.

In the chosen layers the picture's queries look at the reference's keys and values, which are read at the noise level of
each model call. One forward pass over the reference per noise level is all it costs: no gradients, no full load. The
negative branch, where it is asked for, costs one or two more of the picture.
"""

import contextlib
import functools
from typing import Any

import comfy.samplers
import torch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrapperExecutor, WrappersMP, get_wrappers_with_key
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS

from ..attention.architectures import transformer
from ..attention.frames import without_frame
from ..attention.hypernetworks import hypernetworks
from ..attention.inputs import check_conds
from ..attention.reference import Reference
from .checks import check_latent, check_reference, check_target_masks
from .injection_run import KEY, InjectionRun
from .settings import InjectionSettings


def apply_injection(model: ModelPatcher, style: Reference, settings: InjectionSettings) -> ModelPatcher:
    """A clone of the model that looks at the reference in whatever sampler runs it. The model itself is not changed.

    Applied twice, the second reference is mixed over what the first one gives.

    Raises:
        ValueError: a model that cannot be read or has been compiled, or a reference that does not fit it.
    """
    check_not_compiled(model.model_options)
    check_reference("style", style, model)
    check_style(model, style)
    patched = model.clone()
    if not settings.is_off:
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, functools.partial(_check_start, style))
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _SamplerSample(style, settings))
    if not settings.is_off and settings.negative_strength > 0:
        patched.remove_wrappers_with_key(WrappersMP.PREDICT_NOISE, KEY)  # once is enough
        patched.add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, _predict_noise)
    return patched


def is_injected(model: ModelPatcher) -> bool:
    """Whether `apply_injection` has put a reference on this model."""
    return bool(model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY))


def take_injection_off(model: ModelPatcher) -> ModelPatcher:
    """A clone of the model without what `apply_injection` has put on it. The model itself is not changed."""
    plain = model.clone()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE):
        plain.remove_wrappers_with_key(kind, KEY)
    return plain


def _check_start(
    style: Reference, executor: WrapperExecutor, noise: torch.Tensor, latent_image, *args, **kwargs
) -> torch.Tensor:
    """Around a whole sampling run: all refusals, asked before anything is loaded, in whichever order nodes stand."""
    guider: comfy.samplers.CFGGuider = executor.class_obj
    check_not_compiled(guider.model_options)
    check_conds(guider.model_patcher.model, guider.conds)
    check_latent(guider.model_patcher, latent_image, None)
    check_target_masks("style", style, noise.shape[0])
    check_whole_picture(style, guider.model_options)
    return executor(noise, latent_image, *args, **kwargs)


def _predict_noise(executor: WrapperExecutor, x, timestep, model_options, seed=None) -> torch.Tensor:
    """Around each prediction that a guider makes of its conditions: adds the negative branch of each injection."""
    runs = get_wrappers_with_key(WrappersMP.APPLY_MODEL, KEY, model_options, is_model_options=True)
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.enter_context(run.noting(x))
        denoised = executor(x, timestep, model_options, seed)
    for run in runs:
        denoised = run.with_negative(denoised, x, timestep, model_options)
    return denoised


def check_whole_picture(style: Reference, model_options: dict[str, Any]) -> None:
    """Refuse a style that has its place in the picture where the model is never shown the whole picture.

    Raises:
        ValueError: says what to take away.
    """
    if style.has_target_masks and "context_handler" in model_options:
        raise ValueError(
            "style: its target_mask lies on the whole picture, which Context Windows takes apart; take one of the two "
            "away"
        )


def check_not_compiled(model_options: dict[str, Any]) -> None:
    """Refuse a model that TorchCompileModel has compiled, which would go on with the attention it was first given.

    Raises:
        ValueError: says what to take away.
    """
    if TORCH_COMPILE_KWARGS in model_options:
        raise ValueError(
            "model: a compiled model keeps the attention it was compiled with, so the reference cannot be injected at "
            "each step; take TorchCompileModel away (guidance itself works with it)"
        )


def check_style(model: ModelPatcher, style: Reference) -> None:
    """Refuse references with places or shares of their own on a transformer: the picture looks at its text there, too.

    Raises:
        ValueError: says what to take away.
    """
    if transformer(model.model.diffusion_model) is None:
        return
    for is_there, what in ((style.has_target_masks, "a target_mask"), (style.in_shares, "balance share")):
        if is_there:
            raise ValueError(
                f"style: Inject Reference KV takes {what} on UNets such as SD1.5 and SDXL only; take it away, or use "
                "guidance (AD-Guided KSampler), which follows it on every model"
            )


class _SamplerSample:
    """Around one call of a sampler: hands on options that hold the injection, and leaves everything else alone."""

    def __init__(self, style: Reference, settings: InjectionSettings) -> None:
        self.style = style
        self.settings = settings

    def __call__(
        self, executor: WrapperExecutor, guider, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs
    ) -> torch.Tensor:
        latent = without_frame(torch.zeros_like(noise) if latent_image is None else latent_image)
        patches = hypernetworks(extra_args["model_options"])
        run = InjectionRun(guider, latent, self.style, self.settings, extra_args.get("seed"), patches)
        options = create_model_options_clone(extra_args["model_options"])
        run.add_to(options)
        extra_args = {**extra_args, "model_options": options}
        result = executor(guider, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)
        run.report()
        return result
