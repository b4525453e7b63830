"""The place of the guided step in ComfyUI's sampling loop.

A sampler brings the picture to the noise levels sigmas[1], sigmas[2], ... and each time calls the model on it.
`guide_sampler` steps in between: the call that carries the sampler's state is recognised, and the state is updated in
place before the model sees it. The state at the end is updated after the loop. Each sampler so gets exactly one update
for each of its steps.
"""

import functools
from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch

from .run import GuidedRun

# Samplers that call the model several times in a step, by the name of their function: how often, the call on their
# state included (it comes first).
CALLS = {
    "sample_heun": 2, "sample_exp_heun_2_x0": 2, "sample_exp_heun_2_x0_sde": 2, "sample_dpm_2": 2,
    "sample_dpm_2_ancestral": 2, "sample_dpmpp_2s_ancestral": 2, "sample_dpmpp_2s_ancestral_cfg_pp": 2,
    "sample_dpmpp_sde": 2, "sample_dpmpp_sde_gpu": 2, "sample_seeds_2": 2, "sample_seeds_3": 3,
}  # fmt: skip

# Samplers that cannot be guided, and why.
REFUSED = {
    "sample_sa_solver": "it corrects the picture after the model has seen it; use sa_solver_pece",
    "sample_unipc": "it corrects the picture after the model has seen it; use dpmpp_2m",
    "sample_unipc_bh2": "it corrects the picture after the model has seen it; use dpmpp_2m",
    "sample_ar_video": "it makes videos",
}


def check_sampler(sampler: comfy.samplers.Sampler) -> None:
    """Refuse a sampler whose state the model is never shown.

    Raises:
        ValueError: names the sampler, why, and one that works.
    """
    if type(sampler) is not comfy.samplers.KSAMPLER:
        raise ValueError(
            f"sampler: {type(sampler).__name__} is not a sampler of ComfyUI's usual kind (KSAMPLER), so its steps "
            "cannot be found; use one of KSamplerSelect, such as euler"
        )
    name = _name(sampler)
    if name in REFUSED:
        shown = {"sample_unipc": "uni_pc", "sample_unipc_bh2": "uni_pc_bh2"}.get(name, name.removeprefix("sample_"))
        raise ValueError(f"sampler: {shown} is not supported with attention distillation: {REFUSED[name]}")
    if sampler.extra_options.get("s_churn", 0) > 0:
        raise ValueError(
            f"s_churn: {sampler.extra_options['s_churn']} is not supported with attention distillation, since the "
            "model is then shown a noisier picture than the sampler's; use 0"
        )
    if name in CALLS and sampler.extra_options.get("eta", 1.0) > 1:
        raise ValueError(
            f"eta: {sampler.extra_options['eta']} is not supported with attention distillation, since this "
            "sampler then leaves out calls of the model, and its steps cannot be told apart; use 0 to 1"
        )


def _name(sampler: comfy.samplers.KSAMPLER) -> str:
    return getattr(sampler.sampler_function, "__name__", type(sampler.sampler_function).__name__)


def guide_sampler(
    sampler: comfy.samplers.KSAMPLER, start_run: Callable[[Any, torch.Tensor, torch.Tensor, dict[str, Any]], GuidedRun]
) -> comfy.samplers.KSAMPLER:
    """A sampler that does what `sampler` does, with one guided step after each of its steps.

    Args:
        sampler: see `check_sampler`; it is not changed.
        start_run: called with (model, x, sigmas, extra_args) when sampling starts: the model as a sampler function is
            given it, the initial noise in k-diffusion space, the noise levels and the options of a model call.
    """
    function, name = sampler.sampler_function, _name(sampler)

    @functools.wraps(function)
    def guided(model, x, sigmas, extra_args, callback=None, **options):
        if len(sigmas) < 2:  # no step
            return function(model, x, sigmas, extra_args=extra_args, callback=callback, **options)
        run = start_run(model, x, sigmas, extra_args)
        watcher = _watcher(name)(model, run, sigmas, extra_args)
        x = function(watcher, x, sigmas, extra_args=extra_args, callback=watcher.around(callback), **options)
        x = watcher.finished(x)
        run.report()
        return x

    return comfy.samplers.KSAMPLER(guided, sampler.extra_options, sampler.inpaint_options)


def _watcher(name: str) -> "type[_StateWatcher] | functools.partial[_StateWatcher]":
    """What finds the state of a sampler function; other packs' functions are taken for single-call ones."""
    if name in CALLS:
        return functools.partial(_Stages, calls=CALLS[name])
    if name == "sample_heunpp2":
        return functools.partial(_Stages, calls=3, calls_before_last=2)  # it looks two noise levels ahead
    if name == "sample_sa_solver_pece":
        return functools.partial(_NoiseLevels, trials=1)  # it shows its prediction first, then the corrected state
    special = {"dpm_adaptive_function": _AcceptedSteps, "dpm_fast_function": _CountedCalls}
    return special.get(name, _NoiseLevels)


Callback = Callable[[dict[str, Any]], None]


class _StateWatcher:
    """Stands in for the model that a sampler calls, and updates the sampler's state when it passes by."""

    def __init__(self, model: Any, run: GuidedRun, sigmas: torch.Tensor, extra_args: dict[str, Any]) -> None:
        self._model = model
        self._run = run
        self._sigmas = sigmas
        self._levels = sigmas.tolist()
        self._extra_args = extra_args
        self._shown = self._levels[0]  # the noise level of the latest call

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self._shown = level = float(sigma.flatten()[0])
        if self._is_state(level):
            x.copy_(self.updated(x, level))
        return self._model(x, sigma, **kwargs)

    def _is_state(self, level: float) -> bool:
        """Whether this call of the model carries a state to be updated; asked once for each call."""
        raise NotImplementedError

    def around(self, callback: Callback | None) -> Callback | None:
        """The callback that the sampler is given in place of `callback`."""
        return callback

    def finished(self, x: torch.Tensor) -> torch.Tensor:
        """The state after the loop, updated."""
        return self.updated(x, self._levels[-1])

    def updated(self, x: torch.Tensor, level: float) -> torch.Tensor:
        """The state after guidance; with a denoise mask only the masked part of it has moved."""
        if not self._run.reached(level):
            return x
        mask = self._denoise_mask(x)
        if mask is None:
            return self._run.update(x, level)
        kept = self._model.inner_model.inner_model.scale_latent_inpaint(
            x=x, sigma=x.new_tensor([level]), noise=self._model.noise, latent_image=self._model.latent_image
        )
        seen = x * mask + kept * (1 - mask)  # what the model is shown of an inpainted picture
        moved = self._run.update(seen, level, movable=mask)
        return torch.where(mask > 0, moved + (x - seen), x)  # seen and x differ only where the mask is below 1

    def _denoise_mask(self, x: torch.Tensor) -> torch.Tensor | None:
        """Where the sampler has let the picture move at its latest call; never where the mask is 0."""
        mask = self._extra_args.get("denoise_mask")
        change = self._extra_args.get("model_options", {}).get("denoise_mask_function")
        if mask is None or change is None:
            return mask
        options = {"model": self._model.inner_model, "sigmas": self._sigmas}
        return change(x.new_tensor([self._shown]), mask, extra_options=options) * (mask > 0)


class _NoiseLevels(_StateWatcher):
    """For samplers that call the model once at each of `sigmas`: on their state, or on it after some trials."""

    def __init__(self, *args: Any, trials: int = 0) -> None:
        super().__init__(*args)
        self._trials = trials
        self._started = False
        self._next = 1  # the initial noise is not updated
        self._tried = 0

    def _is_state(self, level: float) -> bool:
        if not self._started:
            self._started = True
            return False
        if self._next < len(self._levels) - 1 and _same(level, self._levels[self._next]):
            if self._tried < self._trials:
                self._tried += 1
                return False
            self._tried = 0
            self._next += 1
            return True
        if _same(level, self._levels[self._next - 1]):
            raise ValueError(
                f"sampler: it calls the model twice at sigma {level:.4g}, so its trial points cannot be told from the "
                "picture; with attention distillation use one of ComfyUI's own samplers, such as euler"
            )
        return False

    def finished(self, x: torch.Tensor) -> torch.Tensor:
        if self._next < len(self._levels) - 1:
            raise ValueError(
                f"sampler: it showed the model only {self._next} of the {len(self._levels) - 1} noise levels it was "
                "given, so its steps cannot be found; with attention distillation use one of ComfyUI's own samplers, "
                "such as euler"
            )
        return super().finished(x)


def _same(level: float, other: float) -> bool:
    """Noise levels that took different ways of rounding."""
    return abs(level - other) <= 1e-5 * other


class _Stages(_StateWatcher):
    """For samplers that make several calls in a step: the state comes when those of the step before are done.

    Noise levels cannot tell: a trial point may lie at the level of the next state. Their callback comes after the first
    call of each step.
    """

    def __init__(self, *args: Any, calls: int, calls_before_last: int | None = None) -> None:
        super().__init__(*args)
        self._calls = calls
        self._calls_before_last = calls_before_last or calls
        self._step = -1
        self._made = 0
        self._states = 0

    def around(self, callback: Callback | None) -> Callback:
        def counting(info: dict[str, Any]) -> None:
            self._step, self._made = self._step + 1, 1
            if callback is not None:
                callback(info)

        return counting

    def _is_state(self, level: float) -> bool:
        expected = self._calls if self._step < len(self._levels) - 3 else self._calls_before_last
        if self._step < 0 or self._made < expected:
            self._made += 1
            return False
        self._states += 1
        return True

    def finished(self, x: torch.Tensor) -> torch.Tensor:
        if self._states != len(self._levels) - 2:
            raise ValueError(
                f"sampler: {self._states + 1} of its {len(self._levels) - 1} steps could be found on these sigmas; use "
                "sigmas that fall from step to step, or euler"
            )
        return super().finished(x)


class _CountedCalls(_StateWatcher):
    """For dpm_fast, which makes steps of up to three calls between noise levels of its own."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        steps = len(self._levels) - 1
        self._calls = 0
        # Orders of its steps are 3, 3, ... and what is left of `steps` calls: a state comes after each three.
        self._states = {3 * (i + 1) for i in range(steps // 3)} | ({steps - 1} if steps % 3 == 0 else set())

    def _is_state(self, level: float) -> bool:
        self._calls += 1
        return self._calls - 1 in self._states

    def finished(self, x: torch.Tensor) -> torch.Tensor:
        return self.updated(x, self._levels[-1] or self._levels[-2])


class _AcceptedSteps(_StateWatcher):
    """For dpm_adaptive, which tells in its callback whether it has accepted a step."""

    _accepted = 0

    def around(self, callback: Callback | None) -> Callback:
        def updating(info: dict[str, Any]) -> None:
            if info["n_accept"] > self._accepted:
                self._accepted = info["n_accept"]
                info["x"].copy_(self.updated(info["x"], float(info["sigma"])))
            if callback is not None:
                callback(info)

        return updating

    def _is_state(self, level: float) -> bool:
        return False

    def finished(self, x: torch.Tensor) -> torch.Tensor:
        return x  # its last step has been accepted, and the state updated then
