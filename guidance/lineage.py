"""What a sampler makes of its state: which tensors are copies of it, and which state a tensor comes from.

Guidance moves the picture that the model is shown. A sampler of another pack may show a copy and go on from its own
tensor, or go on from an older state. Neither can be seen in the numbers that reach the model, so torch is asked to
tell of every operation of the sampler's (`torch.overrides.TorchFunctionMode`), which changes none of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from .shadows import Shadows

# Ages of what comes from no state: noise and answers of the model; a point shown to the model between two states.
NOWHERE, BETWEEN = -2, -1


class Lineage(TorchFunctionMode):
    """Follows the picture through a sampler's own code while it is entered, except `aside`.

    The age of a tensor is the latest updated state among those that it was worked out from, 0 being where the sampler
    started. Kin are tensors made one from another, since the model's last answer, by operations on one picture: copies,
    views, casts, multiples.
    """

    def __init__(self, x: torch.Tensor) -> None:
        """x: what the sampler starts from, [b c h w] or [b c 1 h w]."""
        super().__init__()
        self.states = 0
        self._shadows = Shadows()
        self._ages = {_memory(x): 0}  # by memory, so that views are one with their base
        self._kin: dict[StorageWeakRef, list[torch.Tensor]] = {}
        self._copies: set[StorageWeakRef] = set()  # made of one other picture since then
        self._aside = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self._aside:
            return func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        result = self._shadows.run(func, name, args, kwargs or {})
        self._note(name, [*_tensors(args), *_tensors(kwargs)], result)
        return result

    def _note(self, name: str, inputs: list[torch.Tensor], result: Any) -> None:
        outputs = inputs[:1] if result is None else list(_tensors(result))  # None: x[i] = y
        if not outputs or not inputs:
            return
        by_shape = name.endswith("_like") or name.startswith("new_")  # nothing of the values
        age = NOWHERE if by_shape else max(self._ages.get(_memory(one), NOWHERE) for one in inputs)
        memories = {_memory(one) for one in inputs}
        for out in outputs:
            self._ages[_memory(out)] = age
            kin = {} if by_shape else {_memory(one): one for one in inputs if _is_picture(one)}
            if _memory(out) not in memories:
                self._kin.pop(_memory(out), None)
                if len(kin) != 1:
                    continue  # of two pictures, or of none
                self._copies.add(_memory(out))
            elif name in ("copy_", "__setitem__"):
                self._copies.add(_memory(out))
            self._join([out, *kin.values()])

    def _join(self, some: list[torch.Tensor]) -> None:
        family = {id(one): one for new in some for one in (new, *self._kin.get(_memory(new), ()))}
        joined = list(family.values())
        for one in joined:
            self._kin[_memory(one)] = joined

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Not looking, for what is not the sampler's own work."""
        before, self._aside = self._aside, True
        try:
            yield
        finally:
            self._aside = before

    def age(self, x: torch.Tensor) -> int | None:
        """The latest updated state that x comes from, other than through the model; None where torch has not told."""
        return self._ages.get(_memory(x))

    def update(self, x: torch.Tensor, after: torch.Tensor) -> None:
        """Give x, a state that the model is about to be shown, new values, and its copies and multiples likewise."""
        before = [(one, one.clone()) for one in {id(one): one for one in (x, *self._kin.get(_memory(x), ()))}.values()]
        multiples = list(self._multiples(x))
        change = after.to(torch.promote_types(x.dtype, torch.float32)) - x
        self.states += 1
        for one, factor in multiples:
            if one is x:
                x.copy_(after)
            else:
                one.add_(change.to(_finer(one, x)) / factor)
            self._ages[_memory(one)] = self.states
        self._shadows.cast(before, change)

    def shown(self, x: torch.Tensor) -> None:
        """x has been shown to the model; another guidance may have moved it further than `update` did."""
        self._shadows.measure(x)

    def between(self, x: torch.Tensor) -> None:
        """x has been shown to the model and not updated: what is made of it, and of no state, skips a state."""
        for one, _ in self._multiples(x):
            if one.nbytes == one.untyped_storage().nbytes():  # else a state may lie beside it
                self._ages[_memory(one)] = BETWEEN

    def _multiples(self, x: torch.Tensor) -> Iterator[tuple[torch.Tensor, float]]:
        """x, and those of its kin that are x divided by a number, each place in memory once.

        Where x itself is no copy it is the sampler's own, and copies of it are notes: they stay what they are.
        """
        yield x, 1.0
        if _memory(x) not in self._copies:
            return
        kin = {(one.data_ptr(), one.stride()): one for one in self._kin.get(_memory(x), ())}
        for one in kin.values():
            factor = None if one.data_ptr() == x.data_ptr() else _factor(one, x)
            if factor is not None:
                yield one, factor

    def arrived(self, x: torch.Tensor) -> float:
        """How much of the latest update is in x, see `Shadows`."""
        return self._shadows.arrived(x)

    def answered(self, answers: list[torch.Tensor], shown: torch.Tensor) -> None:
        """The model has given its answer, the last of these, with its parts: a new part of the work begins."""
        self._kin.clear()
        self._copies.clear()
        self._ages = {memory: age for memory, age in self._ages.items() if not memory.expired()}
        for answer in answers:
            self._shadows.answered(answer, shown)
            self._ages[_memory(answer)] = NOWHERE


def _memory(x: torch.Tensor) -> StorageWeakRef:
    return StorageWeakRef(x.untyped_storage())


def _is_picture(x: torch.Tensor) -> bool:
    return x.ndim >= 3 and x.shape[-2:].numel() > 1 and x.is_floating_point()


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        if value.layout == torch.strided:
            yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))


def _finer(a: torch.Tensor, b: torch.Tensor) -> torch.dtype:
    return torch.promote_types(a.dtype, b.dtype)


def _factor(one: torch.Tensor, shown: torch.Tensor) -> float | None:
    """c where shown = c * one, to the precision of the coarser of both; None where it is no multiple."""
    if one.shape != shown.shape or not one.is_floating_point() or one.device != shown.device:
        return None
    a, b = one.to(_finer(one, shown)).flatten(), shown.to(_finer(one, shown)).flatten()
    largest = a.abs().argmax()
    if a[largest] == 0 or b[largest] == 0:
        return None
    factor = b[largest] / a[largest]
    coarse = max(torch.finfo(one.dtype).eps, torch.finfo(shown.dtype).eps)
    if (b - factor * a).abs().max() > 8 * coarse * b[largest].abs():
        return None
    return 1.0 if abs(factor - 1) <= 2 * coarse else float(factor)
