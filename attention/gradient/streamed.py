"""Weights that stay in the computer's memory, because the device has no room for them, in passes with gradient.

ComfyUI casts such weights layer by layer into a buffer that all layers share. By the time of the backward the weights
of another layer lie there. Here a layer is given a copy of its weights for the time of each call, in memory that nobody
else writes to: autograd holds it if it needs it. A block that is run again in the backward fetches its weights again.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from .forwards import in_place_of_forward

MARK = "prev_comfy_cast_weights"
"""ComfyUI gives this attribute to the layers whose weights it has not loaded, for as long as they are not."""


def streamed(*networks: torch.nn.Module) -> list[torch.nn.Module]:
    """The layers of some networks whose weights ComfyUI fetches anew for each call."""
    return [module for network in networks for module in network.modules() if hasattr(module, MARK)]


def fetched_by_us(layers: Iterable[torch.nn.Module]) -> AbstractContextManager:
    """Around passes and their backwards: each call of these layers finds its weights where its input is."""
    return in_place_of_forward(layers, _with_weights)


def _with_weights(layer: torch.nn.Module, forward: Callable, /, *args: Any, **kwargs: Any) -> Any:
    device = next(value.device for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
    with _weights_on(layer, device):
        return forward(*args, **kwargs)


@contextlib.contextmanager
def _weights_on(layer: torch.nn.Module, device: torch.device) -> Iterator[None]:
    before = dict(layer._parameters)
    try:
        for name, weight in before.items():
            if weight is not None:
                layer._parameters[name] = weight.to(device, copy=True)
        yield
    finally:
        layer._parameters.update(before)
