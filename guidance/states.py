"""Where a sampler's state passes by: what stands in for the model, and how to tell the sampler's calls apart.

A watcher sees every call of the model. Those that carry the sampler's state, and not a trial point, it updates in
place before the model sees them. Each kind of sampler has a watcher of its own; `samplers` says which.
"""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .run import GuidedRun

Callback = Callable[[dict[str, Any]], None]


class ModelStandIn:
    """What a sampler function is given as its model: calls go past the watcher, all else is the model's own.

    Samplers write to the model too (the noise and picture that a mask keeps): that reaches the model.
    """

    __slots__ = ("_watcher",)

    def __init__(self, watcher: "StateWatcher") -> None:
        object.__setattr__(self, "_watcher", watcher)

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._watcher.call(x, sigma, *args, **kwargs)

    def __copy__(self) -> "ModelStandIn":
        return ModelStandIn(self._watcher)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._watcher.model, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._watcher.model, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._watcher.model, name)


def aside(model: Any) -> AbstractContextManager:
    """Around work that the watcher behind a model, where there is one, should not take for the sampler's."""
    return model._watcher.aside() if isinstance(model, ModelStandIn) else nullcontext()


class StateWatcher:
    """Updates the sampler's state when it passes by.

    Attributes:
        checked_inside: another watcher stands between this one and the sampler, and looks after its steps.
        noise_level: states at this noise level, and above, are nothing but noise and are not guided.
    """

    checked_inside = False
    noise_level = float("inf")

    def __init__(
        self, model: Any, run: GuidedRun, sigmas: torch.Tensor, extra_args: dict[str, Any], name: str = "it"
    ) -> None:
        """
        Args:
            model: as the sampler function would be given it, a KSamplerX0Inpaint.
            run: what a state is updated by; asked once for every state that the sampler reaches.
            sigmas: the noise levels that the sampler is given, two or more.
            extra_args: options of a model call.
            name: the sampler's, for messages.
        """
        self.model = model
        self._run = run
        self._sigmas = sigmas
        self._levels = sigmas.tolist()
        self._extra_args = extra_args
        self._name = name
        self._shown = self._levels[0]  # the noise level of the latest call
        self._left_alone = 0

    def call(self, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One call of the model by the sampler."""
        self._shown = level = float(sigma.flatten()[0])
        if self._is_state(level):
            self._reach(x, level)
        return self.model(x, sigma, *args, **kwargs)

    def _is_state(self, level: float) -> bool:
        """Whether this call of the model carries a state to be updated; asked once for each call."""
        raise NotImplementedError

    def _reach(self, x: torch.Tensor, level: float) -> None:
        """Update the state that the model is about to be shown, in place."""
        x.copy_(self.updated(x, level))

    def following(self, _x: torch.Tensor) -> AbstractContextManager:
        """Around the sampler function, which starts from x."""
        return nullcontext()

    def aside(self) -> AbstractContextManager:
        """Around what is not the sampler's own work."""
        return aside(self.model)

    def around(self, callback: Callback | None) -> Callback | None:
        """The callback that the sampler is given in place of `callback`."""
        return callback

    def finished(self, x: torch.Tensor) -> torch.Tensor:
        """The state after the loop, updated."""
        return self.updated(x, self._levels[-1])

    def report(self) -> None:
        """Say what was left out."""
        if self._left_alone:
            logging.info(
                "Attention distillation: %d states at the model's largest noise level are noise, and were not guided",
                self._left_alone,
            )

    def updated(self, x: torch.Tensor, level: float) -> torch.Tensor:
        """The state after guidance, or x itself; with a denoise mask only the masked part of it has moved."""
        if not self._run.reached(level):
            return x
        if level >= self.noise_level * (1 - 1e-5):
            self._left_alone += 1
            return x
        mask = self._denoise_mask(x)
        if mask is None:
            return self._run.update(x, level)
        kept = self.model.inner_model.inner_model.scale_latent_inpaint(
            x=x, sigma=x.new_full((1,), level), noise=self.model.noise, latent_image=self.model.latent_image
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
        options = {"model": self.model.inner_model, "sigmas": self._sigmas}
        return change(x.new_full((1,), self._shown), mask, extra_options=options) * (mask > 0)


class NoiseLevels(StateWatcher):
    """For samplers that call the model once at each of `sigmas`: on their state, or on it after some trials.

    Other calls may lie between two of `sigmas`. All else is an error at that call.
    """

    def __init__(self, *args: Any, trials: int = 0) -> None:
        super().__init__(*args)
        self._trials = trials
        self._started = False
        self._next = 1  # the initial noise is not updated
        self._tried = 0

    def _is_state(self, level: float) -> bool:
        if not self._started:
            self._started = True
            if not same(level, self._levels[0], 1e-3):  # on flow models ComfyUI's own start a little below 1
                self._refuse(f"it was to start at sigma {self._levels[0]:.4g} and showed the model {level:.4g}")
            return False
        if self._next < len(self._levels) - 1 and same(level, self._levels[self._next]):
            if self._tried < self._trials:
                self._tried += 1
                return False
            self._tried = 0
            self._next += 1
            return True
        self._check_trial(level)
        return False

    def _check_trial(self, level: float) -> None:
        latest, coming = self._levels[self._next - 1], self._levels[self._next]
        if same(level, latest):
            self._refuse(
                f"it calls the model twice at sigma {level:.4g}, so its trial points cannot be told from the picture"
            )
        if level > latest:
            self._refuse(f"it goes back from sigma {latest:.4g} to {level:.4g}, where its steps cannot be told apart")
        if level < coming and not same(level, coming):
            self._refuse(f"it showed the model sigma {level:.4g} before {coming:.4g}, so its steps cannot be found")

    def _refuse(self, why: str) -> None:
        raise ValueError(
            f"sampler: {why}; {self._name} is not supported with attention distillation, use one of ComfyUI's own "
            "samplers, such as euler"
        )

    def finished(self, x: torch.Tensor) -> torch.Tensor:
        if self._next < len(self._levels) - 1:
            self._refuse(
                f"it showed the model only {self._next} of the {len(self._levels) - 1} noise levels it was given, so "
                "its steps cannot be found"
            )
        return super().finished(x)


def same(level: float, other: float, tolerance: float = 1e-5) -> bool:
    """Noise levels that took different ways of rounding."""
    return abs(level - other) <= tolerance * other


class Stages(StateWatcher):
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
                f"sampler: {self._states + 1} of its {len(self._levels) - 1} steps could be found on these sigmas; "
                f"{self._name} needs sigmas that fall from step to step; give it such, or use euler"
            )
        return super().finished(x)


class CountedCalls(StateWatcher):
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


class AcceptedSteps(StateWatcher):
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
