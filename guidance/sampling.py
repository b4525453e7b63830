"""The place of the guided step in ComfyUI's sampling loop.

A sampler brings the picture to the noise levels sigmas[1], sigmas[2], ... and each time calls the model on it.
`guide_sampler` steps in between: the call that carries the sampler's state is recognised, and the state is updated in
place before the model sees it. The state at the end is updated after the loop. Each sampler so gets exactly one update
for each of its steps.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch

from .run import GuidedRun
from .samplers import function_name, known, watcher
from .states import ModelStandIn, NoiseLevels, aside

StartRun = Callable[[Any, torch.Tensor, torch.Tensor, dict[str, Any]], GuidedRun]


def check_sampler(sampler: comfy.samplers.Sampler, sigmas: torch.Tensor | None = None) -> None:
    """Refuse a sampler whose state the model is never shown, and noise levels that go back towards noise.

    Raises:
        ValueError: names the sampler, why, and one that works; or the sigmas.
    """
    if not isinstance(sampler, comfy.samplers.KSAMPLER) or type(sampler).sample is not comfy.samplers.KSAMPLER.sample:
        raise ValueError(
            f"sampler: {type(sampler).__name__} is not a sampler of ComfyUI's usual kind (KSAMPLER), so its steps "
            "cannot be found; use one of KSamplerSelect, such as euler"
        )
    function, options = _innermost(sampler.sampler_function), sampler.extra_options
    found, why = known(function), watcher(function, options)
    name = function_name(sampler) if found is None else found.name
    if isinstance(why, str):
        raise ValueError(f"sampler: {name} is not supported with attention distillation: {why}")
    if options.get("s_churn", 0) > 0:
        raise ValueError(
            f"s_churn: {options['s_churn']} is not supported with attention distillation, since {name} then shows the "
            "model a noisier picture than its own; use 0"
        )
    if found is not None and options.get("eta", 1.0) > found.eta:
        raise ValueError(
            f"eta: {options['eta']} is not supported with attention distillation, since {name} then leaves out calls "
            f"of the model, and its steps cannot be told apart; use 0 to {found.eta:g}"
        )
    for inner in options.values():  # of a sampler that calls another one
        if isinstance(inner, comfy.samplers.Sampler):
            check_sampler(inner)
    if sigmas is not None:
        _check_sigmas(sigmas)


def _check_sigmas(sigmas: torch.Tensor) -> None:
    rises = [(now, then) for now, then in zip(sigmas.tolist(), sigmas[1:].tolist(), strict=False) if then > now]
    if rises:
        raise ValueError(
            "sigmas: they rise from {:.4g} to {:.4g}, as in unsampling (FlipSigmas): a picture on its way to noise "
            "cannot be guided with attention distillation; give this sampler the model without guidance, or sigmas "
            "that fall".format(*rises[0])
        )


def guide_sampler(
    sampler: comfy.samplers.KSAMPLER, start_run: StartRun, noise_level: float = float("inf")
) -> comfy.samplers.KSAMPLER:
    """A sampler that does what `sampler` does, with one guided step after each of its steps.

    Args:
        sampler: see `check_sampler`; it is not changed.
        start_run: called with (model, x, sigmas, extra_args) when sampling starts: the model as a sampler function is
            given it, the initial noise in k-diffusion space, the noise levels and the options of a model call.
        noise_level: the model's largest; a state that reaches it again is not guided.
    """
    guided = copy.copy(sampler)
    guided.sampler_function = _Guided(sampler.sampler_function, start_run, noise_level)
    return guided


class _Guided:
    """A sampler function with guidance, under the name and signature of the one that it calls."""

    def __init__(self, function: Callable, start_run: StartRun, noise_level: float) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self._start_run = start_run
        self._noise_level = noise_level

    def __call__(self, model, x, sigmas, extra_args, callback=None, **options):
        if len(sigmas) < 2:  # no step
            return self.function(model, x, sigmas, extra_args=extra_args, callback=callback, **options)
        with aside(model):
            run = self._start_run(model, x, sigmas, extra_args)
        function = _innermost(self.function)
        found, watch = known(function), watcher(function, options)
        name = getattr(self, "__name__", type(function).__name__) if found is None else found.name
        if isinstance(watch, str):
            watch = NoiseLevels  # refused by `check_sampler`
        watching = watch(model, run, sigmas, extra_args, name)
        watching.noise_level = self._noise_level
        watching.checked_inside = isinstance(self.function, _Guided)
        with watching.following(x):
            x = self.function(
                ModelStandIn(watching), x, sigmas, extra_args=extra_args, callback=watching.around(callback), **options
            )
        x = watching.finished(x)
        run.report()
        watching.report()
        return x


def _innermost(function: Callable) -> Callable:
    """The sampler function inside of two guidances in a row."""
    while isinstance(function, _Guided):
        function = function.function
    return function
