"""Other code in place of what some blocks of a network run, for the time of a pass."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


@contextlib.contextmanager
def in_place_of_forward(blocks: Iterable[torch.nn.Module], run: Callable[..., Any]) -> Iterator[None]:
    """Have `run` called in place of blocks: with the block, its own `forward`, and what that would have been given.

    `forward` is an attribute of the one block then, as where ComfyUI patches objects of a model. The blocks are as they
    were on every exit.
    """
    before: list[tuple[torch.nn.Module, Callable | None]] = []
    try:
        for block in blocks:
            before.append((block, vars(block).get("forward")))
            block.forward = functools.partial(run, block, block.forward)
        yield
    finally:
        for block, forward in before:
            if forward is None:
                del block.forward
            else:
                block.forward = forward
