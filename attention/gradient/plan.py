"""How a run's passes with gradient fit into memory: which blocks are run again in the backward.

Where a generous reckoning fits, none is. Else a pass is counted, which takes as long as a pass without gradient, and as
few blocks are run again as the free memory asks for.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy import model_management
from comfy.model_base import BaseModel

from ..architectures import blocks
from .count import count_saved
from .memory import FAST, GIGABYTE, SMALL, SPARE, activation_bytes
from .streamed import streamed


class MemoryPlan:
    """Chosen anew for each size of pass that a run comes to, before the first of that size."""

    def __init__(self, model: BaseModel, memory: str) -> None:
        """
        Args:
            model: ComfyUI's model, loaded.
            memory: one of `MEMORY`. `fast` runs no block again, `small` runs all again, `auto` as few as fit. Where not
                even the weights do, all are.
        """
        self._model = model
        self._memory = memory
        self._streamed = bool(streamed(model.diffusion_model))
        self._choices = [(), *blocks(model.diffusion_model)]
        self._chosen: dict[torch.Size, Sequence[torch.nn.Module]] = {}

    def again(self, x: torch.Tensor, one_pass: Callable[[torch.Tensor], Any]) -> Sequence[torch.nn.Module]:
        """The blocks to be run again in passes of this size.

        Args:
            x: what the model is given.
            one_pass: the pass and its losses, run once with gradient where it has to be counted; returns the features.
        """
        if not x.requires_grad:
            return ()
        if self._memory == SMALL or self._streamed:
            return self._choices[-1]
        if self._memory == FAST:
            return ()
        if x.shape not in self._chosen:
            self._chosen[x.shape] = self._count(x.detach(), one_pass)
        return self._chosen[x.shape]

    def _count(self, x: torch.Tensor, one_pass: Callable[[torch.Tensor], Any]) -> Sequence[torch.nn.Module]:
        """The first choice that fits into the memory that is free; the last if none does."""
        free = model_management.get_free_memory(x.device) - model_management.extra_reserved_memory()
        if SPARE * activation_bytes(self._model, x.shape) <= free:
            return ()
        with count_saved(self._model.diffusion_model, self._choices[-1]) as saved:
            features = one_pass(x.requires_grad_())
        del features
        needed = [SPARE * saved.peak(choice) for choice in self._choices]
        number = next((i for i, size in enumerate(needed) if size <= free), len(needed) - 1)
        chosen = self._choices[number]
        logging.info(
            "Attention distillation: memory: a pass keeps %.2f GB for its backward, %.2f GB is free: %s",
            needed[0] / GIGABYTE, free / GIGABYTE,
            f"{len(chosen)} blocks are run again in it, {needed[number] / GIGABYTE:.2f} GB" if chosen else "it fits",
        )  # fmt: skip
        if needed[number] > free:
            logging.warning(
                "Attention distillation: memory: it may not suffice; a smaller picture, fewer layers, or AD Windows "
                "need less"
            )
        return chosen
