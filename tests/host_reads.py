"""Counts where the pack waits for the device: each value that is read from a tensor while a run goes on.

On a GPU such a read holds the program up until all work before it is done. A CPU has no such wait, and torch's
operations are the same: so they are counted there.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CHECKOUT = Path(__file__).resolve().parent.parent
PACK = tuple(f"{CHECKOUT / folder}/" for folder in ("attention", "guidance", "losses", "nodes", "tiling"))
TORCH = f"{Path(torch.__file__).parent}/"
OPTIMISER = f"{TORCH}optim/"  # it counts its steps in numbers that lie on the CPU

# Operations whose result, or its size, has to be known before anything else can be done. In inference mode torch tells
# of `item` and `is_nonzero` by these names, else of what they are made of.
OPERATIONS = {
    "_local_scalar_dense", "item", "is_nonzero", "nonzero", "nonzero_numpy", "argwhere", "equal", "allclose",
    "masked_select", "unique_dim", "unique_consecutive", "_unique", "_unique2",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}  # by truth values it looks for those that are true
METHODS = {"tolist", "cpu"}  # no operation of torch's where a tensor lies on the CPU
HANDED_ON = {"__torch_function__", "run"}  # in these the pack does for others, samplers for one, what they ask of torch


class _Operations(TorchDispatchMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        if name in OPERATIONS or (name in INDEXING and any(one is not None and not _is_number(one) for one in args[1])):
            _note(self._found)
        return func(*args, **(kwargs or {}))


class _Methods(TorchFunctionMode):
    def __init__(self, found: Counter[str]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if getattr(func, "__name__", "") in METHODS:
            _note(self._found)
        return func(*args, **(kwargs or {}))


def _is_number(index: torch.Tensor) -> bool:
    return index.dtype not in (torch.bool, torch.uint8)


def _note(found: Counter[str]) -> None:
    """Count for the function of the pack that reads. ComfyUI, tests and the optimiser may read what they like."""
    frame: FrameType = sys._getframe(2)
    while _is_between(frame):
        frame = frame.f_back
    file, name = frame.f_code.co_filename, frame.f_code.co_name
    if file.startswith(PACK):
        found[f"{Path(file).relative_to(CHECKOUT).as_posix()} {name}"] += 1


def _is_between(frame: FrameType) -> bool:
    """Whether a function merely stands between torch and who asks it: torch's own, this file's, a comprehension."""
    file, name = frame.f_code.co_filename, frame.f_code.co_name
    plumbing = file.startswith((TORCH, __file__)) and not file.startswith(OPTIMISER)
    return plumbing or name in HANDED_ON or name.startswith("<")


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Where the pack reads values of tensors meanwhile, and how often: by file and function."""
    found: Counter[str] = Counter()
    with _Operations(found), _Methods(found):
        yield found
