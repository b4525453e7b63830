"""How much memory a pass with gradient would keep until its backward, counted without keeping it.

The pass is run once with gradients enabled, and whatever autograd wants to save is counted and let go. So the count
holds for the very model, size, number format and attention kernel at hand; it costs one forward pass.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from .forwards import in_place_of_forward
from .saved import no_backward

GRADIENTS = 2
"""What the backward of a block needs beside what is saved in it, in units of the largest piece of that."""


@dataclass
class SavedBytes:
    """What a pass saves.

    Attributes:
        outside: bytes that stay until the backward whatever is run again.
        inputs, within, largest: of each block that was looked at, the bytes of its inputs, of what is saved in it
            alone, and of the largest piece of that.
        features: of each block, bytes of that which are still in use when the losses are computed.
    """

    outside: int = 0
    inputs: dict[torch.nn.Module, int] = field(default_factory=dict)
    within: dict[torch.nn.Module, int] = field(default_factory=dict)
    largest: dict[torch.nn.Module, int] = field(default_factory=dict)
    features: dict[torch.nn.Module, int] = field(default_factory=dict)

    def peak(self, again: Collection[torch.nn.Module] = ()) -> int:
        """The most that is in use at once when these blocks are run again in the backward, in bytes."""
        kept = peak = self.outside
        for block, within in self.within.items():
            kept += self.inputs[block]
            if block in again:
                peak = max(peak, kept + within + GRADIENTS * self.largest[block])
            else:
                kept += within
        features = sum(size for block, size in self.features.items() if block in again)
        return max(peak, kept + features)


@dataclass
class _Piece:
    """A piece of memory that something is saved in, and how long it stays.

    Attributes:
        storage: the memory.
        size: in bytes.
        block: that it is saved in or given to; None is outside of blocks.
        is_input: whether it is given to the block.
    """

    storage: StorageWeakRef
    size: int
    block: torch.nn.Module | None
    is_input: bool

    @property
    def rank(self) -> int:
        """What is saved outside stays longest, then what a block is given; what is saved in it is found again."""
        return 0 if self.block is None else 1 if self.is_input else 2


class _Counter:
    """Counts memory, each piece once, and once more where it is saved again after something was written to it."""

    def __init__(self, weights: Iterable[torch.Tensor]) -> None:
        self._weights = {torch.Tensor.untyped_storage(tensor)._cdata for tensor in weights}
        self._latest: dict[tuple[int, int], _Piece] = {}
        self._pieces: list[_Piece] = []
        self._blocks: list[torch.nn.Module] = []

    def note(self, block: torch.nn.Module | None, tensor: torch.Tensor, is_input: bool = False) -> None:
        """Note that a tensor stays for the backward."""
        storage = torch.Tensor.untyped_storage(tensor)
        if storage._cdata in self._weights:
            return
        key = (storage._cdata, 0 if tensor.is_inference() else tensor._version)
        piece, known = _Piece(StorageWeakRef(storage), storage.nbytes(), block, is_input), self._latest.get(key)
        if known is None or known.storage.expired():
            self._latest[key] = piece
            self._pieces.append(piece)
        elif piece.rank < known.rank:
            known.block, known.is_input = piece.block, piece.is_input

    def run(self, block: torch.nn.Module, forward: Callable, /, *args: Any, **kwargs: Any) -> Any:
        """Run a block, whose inputs and savings go by its name."""
        self._blocks.append(block)
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor):
                self.note(block, value, is_input=True)
        with torch.autograd.graph.saved_tensors_hooks(functools.partial(self.note, block), no_backward):
            return forward(*args, **kwargs)

    def into(self, saved: SavedBytes) -> None:
        """Sum up."""
        for sizes in (saved.inputs, saved.within, saved.largest, saved.features):
            sizes.update(dict.fromkeys(self._blocks, 0))
        for piece in self._pieces:
            if piece.block is None:
                saved.outside += piece.size
            elif piece.is_input:
                saved.inputs[piece.block] += piece.size
            else:
                saved.within[piece.block] += piece.size
                saved.largest[piece.block] = max(saved.largest[piece.block], piece.size)
                saved.features[piece.block] += 0 if piece.storage.expired() else piece.size


@contextlib.contextmanager
def count_saved(network: torch.nn.Module, blocks: Iterable[torch.nn.Module]) -> Iterator[SavedBytes]:
    """Around a pass with gradient: counts what it would save, and saves nothing; there can be no backward.

    The count is there at the end, when the features that the pass was made for must still be in use.

    Args:
        network: its weights are not counted.
        blocks: to be counted apart, none within another.
    """
    counter, saved = _Counter([*network.parameters(), *network.buffers()]), SavedBytes()
    hooks = torch.autograd.graph.saved_tensors_hooks(functools.partial(counter.note, None), no_backward)
    with hooks, in_place_of_forward(blocks, counter.run):
        yield saved
    counter.into(saved)
