"""The place of the guided step in ComfyUI's sampling loop.

A sampler brings the picture to the noise levels sigmas[1], sigmas[2], ... and each time calls the model on it first.
`guide_sampler` steps in between: the first call at sigmas[i] carries the sampler's state, which is updated in
place before the model sees it. The state at the end is updated after the loop.
"""

import functools
from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch

from .run import GuidedRun

# Samplers whose first call of the model at sigmas[i] is on their state, by the name of their function.
SUPPORTED_SAMPLERS = frozenset(
    f"sample_{name}"
    for name in (
        "euler", "euler_ancestral", "euler_ancestral_RF", "euler_cfg_pp", "euler_ancestral_cfg_pp",
        "dpm_2", "dpm_2_ancestral", "lms", "ddpm", "lcm", "ipndm", "ipndm_v", "deis", "er_sde",
        "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu",
        "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu",
        "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu",
        "res_multistep", "res_multistep_cfg_pp", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp",
        "gradient_estimation", "gradient_estimation_cfg_pp", "seeds_2", "seeds_3",
    )
)  # fmt: skip


def check_sampler(sampler: comfy.samplers.Sampler) -> None:
    """Refuse a sampler whose state cannot be told from its trial points.

    Raises:
        ValueError: names the sampler and some that work.
    """
    function = getattr(sampler, "sampler_function", None)
    name = getattr(function, "__name__", type(sampler).__name__)
    if type(sampler) is not comfy.samplers.KSAMPLER or name not in SUPPORTED_SAMPLERS:
        raise ValueError(
            f"sampler: {name.removeprefix('sample_')} is not supported with attention distillation, because "
            "it evaluates trial points that cannot be told from the picture; use euler, dpmpp_2m, dpmpp_2m_sde, ddim, "
            "lcm or another single-evaluation sampler"
        )
    if sampler.extra_options.get("s_churn", 0) > 0:
        raise ValueError("s_churn: values above 0 are not supported with attention distillation; use 0")


def guide_sampler(
    sampler: comfy.samplers.KSAMPLER, start_run: Callable[[Any, torch.Tensor, dict[str, Any]], GuidedRun]
) -> comfy.samplers.KSAMPLER:
    """A sampler that does what `sampler` does, with one guided step after each of its steps.

    Args:
        sampler: a supported sampler, see `check_sampler`; it is not changed.
        start_run: called with (model, x, extra_args) when sampling starts: the model as a sampler function is given
            it, the initial noise in k-diffusion space and the options of a model call.
    """
    function = sampler.sampler_function

    @functools.wraps(function)
    def guided(model, x, sigmas, extra_args, **options):
        run = start_run(model, x, extra_args)
        watcher = _StateWatcher(model, run, sigmas, extra_args)
        x = function(watcher, x, sigmas, extra_args=extra_args, **options)
        x = watcher.updated(x, float(sigmas[-1]))
        run.report()
        return x

    return comfy.samplers.KSAMPLER(guided, sampler.extra_options, sampler.inpaint_options)


class _StateWatcher:
    """Stands in for the model a sampler calls, and updates the sampler's state on its first call at each sigma."""

    def __init__(self, model: Any, run: GuidedRun, sigmas: torch.Tensor, extra_args: dict[str, Any]) -> None:
        self._model = model
        self._run = run
        self._sigmas = sigmas
        self._levels = sigmas.tolist()
        self._next = 0
        self._extra_args = extra_args

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        level = float(sigma.flatten()[0])
        if self._next < len(self._levels) and level == self._levels[self._next]:
            if self._next > 0:  # the initial noise is not updated
                x.copy_(self.updated(x, level))
            self._next += 1
        return self._model(x, sigma, **kwargs)

    def updated(self, x: torch.Tensor, level: float) -> torch.Tensor:
        """The state after guidance; with a denoise mask only the masked part of it has moved."""
        if not self._run.is_active(level):
            return x
        mask = self._denoise_mask(x, level)
        if mask is None:
            return self._run.update(x, level)
        kept = self._model.inner_model.inner_model.scale_latent_inpaint(
            x=x, sigma=x.new_tensor([level]), noise=self._model.noise, latent_image=self._model.latent_image
        )
        seen = x * mask + kept * (1 - mask)  # what the model is shown of an inpainted picture
        return self._run.update(seen, level, movable=mask) * mask + x * (1 - mask)

    def _denoise_mask(self, x: torch.Tensor, level: float) -> torch.Tensor | None:
        mask = self._extra_args.get("denoise_mask")
        change = self._extra_args.get("model_options", {}).get("denoise_mask_function")
        if mask is None or change is None:
            return mask
        options = {"model": self._model.inner_model, "sigmas": self._sigmas}
        return change(x.new_tensor([level]), mask, extra_options=options)
