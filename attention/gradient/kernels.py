"""Plain versions of fused kernels, for networks that call these even where ComfyUI's flag for training is set.

ComfyUI's kernel library has no backward. The calls of its kernels are torch's to dispatch, so torch's own way to stand
between a caller and a function is taken: it lasts for the time of a pass, and nothing of ComfyUI or torch is changed.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .forwards import in_place_of_forward


def without_fused_kernels(blocks: Iterable[torch.nn.Module]) -> AbstractContextManager:
    """Around passes and their backwards: what these blocks ask of fused kernels, torch's own functions compute."""
    kernels = torch.ops.comfy_kitchen
    plain = {getattr(kernels, name): plain for name, plain in _PLAIN.items() if hasattr(kernels, name)}
    return in_place_of_forward(blocks, functools.partial(_with_plain, plain))


def _with_plain(
    plain: Mapping[Any, Callable], _block: torch.nn.Module, forward: Callable, /, *args: Any, **kwargs: Any
) -> Any:
    with _InPlaceOf(plain):
        return forward(*args, **kwargs)


class _InPlaceOf(TorchFunctionMode):
    """Calls plain functions in place of kernels."""

    def __init__(self, plain: Mapping[Any, Callable]) -> None:
        super().__init__()
        self._plain = plain

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return self._plain.get(func, func)(*args, **(kwargs or {}))


def _turned(x: torch.Tensor, turns: torch.Tensor, split_half: bool) -> torch.Tensor:
    """Points in the plane, turned.

    Args:
        x: [... d]; a point is made of the numbers 2 i and 2 i + 1, with split_half of the numbers i and i + d / 2.
        turns: a matrix for each point, [... d/2 2 2].
    """
    numbers = x.to(turns.dtype)
    points = numbers.unflatten(-1, (2, -1)).movedim(-2, -1) if split_half else numbers.unflatten(-1, (-1, 2))
    points = turns[..., 0] * points[..., :1] + turns[..., 1] * points[..., 1:]
    return (points.movedim(-1, -2) if split_half else points).flatten(-2).type_as(x)


def _rope_split_half(q: torch.Tensor, k: torch.Tensor, turns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return _turned(q, turns, True), _turned(k, turns, True)


def _rms_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    turns: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    width: int = 0,
    split_half: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Each head is normed, then its first `width` numbers are turned; 0 is all."""
    found = []
    for x, scale in ((q, q_scale), (k, q_scale if k_scale is None else k_scale)):
        normed = F.rms_norm(x, x.shape[-1:], scale, epsilon)
        at = width or x.shape[-1]
        found.append(torch.cat([_turned(normed[..., :at], turns, split_half), normed[..., at:]], dim=-1))
    return found[0], found[1]


_PLAIN = {
    "apply_rope_split_half": _rope_split_half,
    "rms_rope_split_half": functools.partial(_rms_rope, split_half=True),
    "rms_rope": _rms_rope,
}
