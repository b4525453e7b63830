"""Blocks of a network that are run again in the backward, in place of what autograd would keep of them until then.

A pass then needs little more memory than the inputs of these blocks and one block whole. The arithmetic is the same, so
the gradient is, to the last bit; only time is lost. torch.utils.checkpoint does so too, but takes what a block saves in
its second run as it is when the backward reads it: in FLUX and Chroma it has been overwritten by then.
"""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch

from .forwards import in_place_of_forward
from .saved import Kept, no_backward

# Notes where a pass is as a block begins; what it returns brings the pass back there, for the time of a second run.
Bookmark = Callable[[], Callable[[], AbstractContextManager]]


class EndOfPassError(Exception):
    """Raised within a block when a pass has done all that it was made for; in the block's second run, too."""


@contextlib.contextmanager
def run_again(blocks: Iterable[torch.nn.Module], bookmark: Bookmark, *, overwrite: bool = False) -> Iterator[None]:
    """Around a forward pass: what these blocks save for the backward is let go, and found again there.

    The blocks are as they were on every exit. The backward comes later, within the same `differentiable`.

    Args:
        blocks: none within another.
        bookmark: called as each block begins.
        overwrite: whether they write to their inputs, which are then copied for each run.
    """
    with in_place_of_forward(blocks, functools.partial(_first_run, bookmark, overwrite)):
        yield


def _first_run(
    bookmark: Bookmark, overwrite: bool, _block: torch.nn.Module, forward: Callable, /, *args: Any, **kwargs: Any
) -> Any:
    call = _Call(forward, args, kwargs, bookmark(), overwrite)
    args, kwargs = _mapped((args, kwargs), torch.Tensor, torch.Tensor.clone if overwrite else _itself)
    with torch.autograd.graph.saved_tensors_hooks(call.forget, call.find):
        return forward(*args, **kwargs)


@dataclass(frozen=True)
class _Input:
    """A tensor that a block was given: without its graph, and its version then; inference tensors have none."""

    tensor: torch.Tensor
    needs_gradient: bool
    version: int | None

    @classmethod
    def of(cls, tensor: torch.Tensor) -> "_Input":
        """A note of a tensor, which is not copied."""
        return cls(tensor.detach(), tensor.requires_grad, None if tensor.is_inference() else tensor._version)

    def again(self, copied: bool) -> torch.Tensor:
        """The tensor as it was.

        Raises:
            RuntimeError: it has been overwritten.
        """
        if self.version is not None and self.tensor._version != self.version:
            raise RuntimeError(
                "Attention distillation: the input of a block was overwritten, so gradients would be wrong. Another "
                "node changes the model's blocks; take it away, or set memory to fast."
            )
        tensor = self.tensor.detach().requires_grad_(self.needs_gradient)
        return tensor.clone() if copied else tensor


class _Call:
    """One call of a block. Only autograd holds it, from the first run of the block to its backward."""

    def __init__(
        self,
        forward: Callable,
        args: tuple,
        kwargs: dict[str, Any],
        bookmark: Callable[[], AbstractContextManager],
        overwrite: bool,
    ) -> None:
        self._forward, self._bookmark, self._overwrite = forward, bookmark, overwrite
        self._inputs = _mapped((args, kwargs), torch.Tensor, _Input.of)
        self._forgotten: list[tuple[torch.Size, torch.dtype]] = []
        self._kept = Kept()
        self._found: list[Any] = []

    def forget(self, tensor: torch.Tensor) -> int:
        """What autograd holds in place of a tensor: its number."""
        self._forgotten.append(_kind(tensor))
        return len(self._forgotten) - 1

    def find(self, number: int) -> torch.Tensor:
        """The tensor of this number, as it was."""
        if not self._found:
            self._second_run()
        return self._kept.unpack(self._found[number])

    def _second_run(self) -> None:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(self._note, no_backward),
            self._kept.watching() if self._overwrite else contextlib.nullcontext(),
            self._bookmark(),
            contextlib.suppress(EndOfPassError),
        ):
            args, kwargs = _mapped(self._inputs, _Input, functools.partial(_Input.again, copied=self._overwrite))
            self._forward(*args, **kwargs)
        if [_kind(saved.tensor) for saved in self._found] != self._forgotten:
            raise RuntimeError(
                "Attention distillation: a block computed otherwise when it was run again, so gradients would be "
                "wrong. Another node changes the model's blocks; take it away, or set memory to fast."
            )

    def _note(self, tensor: torch.Tensor) -> None:
        self._found.append(self._kept.pack(tensor))


def _mapped(value: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """A value with what is of a kind in it changed; lists, tuples and dicts are made anew, all else is shared."""
    if isinstance(value, kind):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(_mapped(each, kind, change) for each in value)
    if type(value) is dict:
        return {key: _mapped(each, kind, change) for key, each in value.items()}
    return value


def _kind(tensor: torch.Tensor) -> tuple[torch.Size, torch.dtype]:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.Tensor.size(tensor), tensor.dtype


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
