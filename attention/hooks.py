"""Weights that change while a picture is made: ComfyUI's hooks, scheduled LoRAs among them."""

from collections.abc import Sequence
from typing import Any

import torch
from comfy.model_base import BaseModel

from .conditioning import Cond, in_force


class ModelHooks:
    """Gives a model the weights that the sampler's condition has at a noise level.

    ComfyUI changes weights before each pass of a condition that has hooks. So do the passes that read attention: their
    weights are those of the sampler's own condition, wherever their text comes from.
    """

    def __init__(
        self,
        model: BaseModel,
        conds: Sequence[Cond],
        model_options: dict[str, Any],
        copies: Sequence[BaseModel] = (),
    ) -> None:
        """
        Args:
            model: ComfyUI's model, loaded.
            conds: the sampler's conditions, from `conditioning.of_sampler`.
            model_options: of the sampler's model calls; a schedule may look at their sigmas.
            copies: of the model, on other devices, which get the same weights.
        """
        self._model = model
        self._conds = conds
        self._model_options = model_options
        self._copies = copies

    def apply(self, sigma: float) -> None:
        """Change the weights to those in force at a noise level; not to be called inside `differentiable`."""
        patcher = self._model.current_patcher
        hooks = in_force(self._conds, sigma).get("hooks")
        if hooks is not None:
            # It tells the model's copies, too.
            patcher.prepare_hook_patches_current_keyframe(torch.tensor([sigma]), hooks, self._model_options)
        patcher.apply_hooks(hooks=hooks)
        for copy in self._copies:
            copy.current_patcher.apply_hooks(hooks=hooks)
