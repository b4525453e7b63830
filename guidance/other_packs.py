"""Samplers of other packs, of which nothing is known: guided where their state can be followed, stopped where not."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from comfy.model_patcher import set_model_options_post_cfg_function

from .lineage import BETWEEN, NOWHERE, Lineage
from .states import Callback, NoiseLevels, same

ENOUGH = 0.75  # of an update: all of it arrives in each of ComfyUI's own samplers, in some more


class OtherPacks(NoiseLevels):
    """The first call at each of `sigmas` is taken for the state, and the sampler must go on from there.

    What it shows may be a copy of its own state, of another precision or scale: both are updated.
    """

    _lineage: Lineage | None = None
    _is_between = False  # whether the latest call was between two states
    _has_moved = False  # whether the latest call was on a state that has been updated

    def following(self, x: torch.Tensor) -> AbstractContextManager:
        self._lineage = Lineage(x)
        return self._lineage

    @contextmanager
    def aside(self) -> Iterator[None]:
        with super().aside(), self._lineage.aside():
            yield

    def call(self, x: torch.Tensor, sigma: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        answers: list[torch.Tensor] = []
        with self.aside():
            self._has_moved = False
            answers.append(super().call(x, sigma, *args, **_noting(answers, kwargs)))
            if self._is_between:
                self._lineage.between(x)
            if self._has_moved:
                self._lineage.shown(x)
            self._lineage.answered(answers, x)
        return answers[-1]

    def _is_state(self, level: float) -> bool:
        starts, found = not self._started, super()._is_state(level)
        self._is_between = not (starts or found)
        return found

    def _reach(self, x: torch.Tensor, level: float) -> None:
        self._check_arrival(x)
        after = self.updated(x, level)
        if after is not x:
            self._has_moved = True
            self._lineage.update(x, after)

    def _check_arrival(self, x: torch.Tensor) -> None:
        if self.checked_inside:
            return
        age = self._lineage.age(x)
        if age == BETWEEN:
            self._refuse("it makes steps of its own between the sigmas that it is given, which would not be guided")
        if age not in (NOWHERE, self._lineage.states) or not self._lineage.arrived(x) > ENOUGH:
            self._refuse("it does not go on from the picture that it shows the model, so the update would be lost")

    def around(self, callback: Callback | None) -> Callback:
        def checked(info: dict[str, Any]) -> None:
            with self.aside():
                self._check_step(info)
                if callback is not None:
                    callback(info)

        return checked

    def _check_step(self, info: dict[str, Any]) -> None:
        """The sampler says which step it is in: the state of that step must have been found."""
        step, level = info.get("i"), info.get("sigma")
        if level is None or not isinstance(step, int) or not 0 <= step < len(self._levels) - 1:
            return
        if same(float(level), self._levels[step]) and (step >= self._next or not self._started):
            self._refuse(f"it is at sigma {float(level):.4g} and never showed the model a picture of that noise level")

    def finished(self, x: torch.Tensor) -> torch.Tensor:
        with self.aside():
            self._check_arrival(x)
            return super().finished(x)


def _noting(answers: list[torch.Tensor], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Options of a model call in which a sampler looks at the parts of the answer (CFG++): they come to `answers`."""
    options = kwargs.get("model_options", {})
    if not options.get("sampler_post_cfg_function"):
        return kwargs

    def note(args: dict[str, Any]) -> torch.Tensor:
        parts = (args.get("cond_denoised"), args.get("uncond_denoised"))
        answers.extend(part for part in parts if isinstance(part, torch.Tensor))
        return args["denoised"]

    return {**kwargs, "model_options": set_model_options_post_cfg_function(options.copy(), note)}
