"""What a sampler's tensors would be without the latest update of its state, to see what of the update arrives.

Each operation on a tensor that the update has moved is done a second time, on its shadow. For the model's answer that
is taken which follows the picture: had it been shown the picture without the update, its answer would lack the update.
Then whatever a sampler makes of a state and of answers holds the update as a whole: x + (x - answer) / sigma * step
as well as the answer alone, with new noise. What holds less has lost it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map
from torch.utils.weak import WeakTensorKeyDictionary

from ..attention.gradient.saved import overwritten

ROUNDINGS = 8  # of the largest value: what moving a picture there and back leaves
_RANDOM = ("rand", "normal", "bernoulli", "multinomial", "poisson", "uniform", "dropout")


class Shadows:
    """The shadows of tensors, and the operations done on them."""

    def __init__(self) -> None:
        self._of = WeakTensorKeyDictionary()
        self._update: torch.Tensor | None = None

    def cast(self, before: list[tuple[torch.Tensor, torch.Tensor]], update: torch.Tensor) -> None:
        """A state has been updated.

        Args:
            before: tensors that it may have moved, each with what it was.
            update: what was added to the picture that the model is shown.
        """
        self.clear()
        if update.any():
            self._update = update
            for one, was in before:
                self._of[one] = was

    def measure(self, x: torch.Tensor) -> None:
        """Take for the update all that has moved a picture since `cast`: none where one took back another."""
        was = self._of.get(x)
        if was is None:
            return
        update = x.to(torch.promote_types(x.dtype, torch.float32)) - was
        rounding = ROUNDINGS * torch.finfo(update.dtype).eps * x.abs().max()
        if update.abs().max() > rounding:
            self._update = update
        else:
            self.clear()

    def clear(self) -> None:
        """Forget the update."""
        self._of = WeakTensorKeyDictionary()
        self._update = None

    def answered(self, answer: torch.Tensor, shown: torch.Tensor) -> None:
        """The model has given an answer to a picture."""
        was = self._of.get(shown)
        if was is not None and answer.shape == shown.shape:
            self._of[answer] = answer - (shown - was)

    def arrived(self, x: torch.Tensor) -> float:
        """How much of the update x holds: 1 is all of it. 1 too where there was none, or x has another size."""
        if self._update is None or self._update.shape != x.shape:
            return 1.0
        was = self._of.get(x)
        update = self._update.to(torch.promote_types(x.dtype, torch.float32))
        return 0.0 if was is None else float(((x - was) * update).sum() / (update * update).sum())

    def run(self, func: Callable, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The operation, done on the shadows too. Nothing of the first is changed by the second."""
        inputs: list[torch.Tensor] = []
        if self._update is not None:
            tree_map(lambda one: inputs.append(one) if isinstance(one, torch.Tensor) else None, (args, kwargs))
        if not any(one in self._of for one in inputs):
            return func(*args, **kwargs)
        moved = next(overwritten(func, args, kwargs), None)
        if isinstance(moved, torch.Tensor) and moved not in self._of:
            self._of[moved] = moved.clone()
        shadowed = tree_map(
            lambda one: self._of.get(one, one) if isinstance(one, torch.Tensor) else one, (args, kwargs)
        )
        result = func(*args, **kwargs)
        made = list(result) if isinstance(result, (tuple, list)) else [result]
        has_values = any(isinstance(one, torch.Tensor) for one in made) and not _takes_no_values(name)
        if has_values or name == "__setitem__":
            again = func(*shadowed[0], **shadowed[1])
            for one, shadow in zip(made, again if isinstance(again, (tuple, list)) else [again], strict=False):
                if isinstance(one, torch.Tensor) and one is not moved and shadow.data_ptr() != one.data_ptr():
                    self._of[one] = shadow
        return result


def _takes_no_values(name: str) -> bool:
    return name.endswith("_like") or name.startswith("new_") or any(word in name for word in _RANDOM)
