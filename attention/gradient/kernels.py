"""Plain versions of fused kernels, for networks that call these even where ComfyUI's flag for training is set.

ComfyUI's kernel library has no backward. Which networks call it in training, too, changes from version to version: so
wherever a transformer's block meets one of its norms and rotary positions, it is computed here. The calls are torch's
to dispatch, so torch's own way to stand between a caller and a function is taken: it lasts for the time of a pass, and
nothing of ComfyUI or torch is changed.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from .forwards import in_place_of_forward


def without_fused_kernels(blocks: Iterable[torch.nn.Module]) -> AbstractContextManager:
    """Around passes and their backwards: what these blocks ask of fused kernels, torch's own functions compute."""
    kernels = torch.ops.comfy_kitchen
    known = {getattr(kernels, name): plain for name, plain in _PLAIN.items() if hasattr(kernels, name)}
    by_overload = {kernel.default: plain for kernel, plain in known.items()}
    return in_place_of_forward(blocks, functools.partial(_with_plain, {**known, **by_overload}))


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


def _normed_turned(
    x: torch.Tensor, turns: torch.Tensor, scale: torch.Tensor, epsilon: float, width: int, split_half: bool
) -> torch.Tensor:
    """Each head is normed, then its first `width` numbers are turned; 0 is all."""
    normed = F.rms_norm(x, x.shape[-1:], scale, epsilon)
    at = width or x.shape[-1]
    return torch.cat([_turned(normed[..., :at], turns, split_half), normed[..., at:]], dim=-1)


# The names of arguments are those of ComfyUI's kernels.


def _rope1(x: torch.Tensor, freqs_cis: torch.Tensor, *, split_half: bool) -> torch.Tensor:
    return _turned(x, freqs_cis, split_half)


def _rope(
    xq: torch.Tensor, xk: torch.Tensor, freqs_cis: torch.Tensor, *, split_half: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    return _turned(xq, freqs_cis, split_half), _turned(xk, freqs_cis, split_half)


def _rms_rope1(
    x: torch.Tensor, freqs_cis: torch.Tensor, scale: torch.Tensor, epsilon: float = 1e-6, *, split_half: bool
) -> torch.Tensor:
    return _normed_turned(x, freqs_cis, scale, epsilon, 0, split_half)


def _rms_rope(
    q: torch.Tensor,
    k: torch.Tensor,
    freqs_cis: torch.Tensor,
    q_scale: torch.Tensor,
    k_scale: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    rot_dim: int = 0,
    *,
    split_half: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    scales = (q_scale, q_scale if k_scale is None else k_scale)
    return tuple(
        _normed_turned(x, freqs_cis, scale, epsilon, rot_dim, split_half)
        for x, scale in zip((q, k), scales, strict=True)
    )


def _adaln(
    x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, eps: float = 1e-6, *, norm: Callable[..., torch.Tensor]
) -> torch.Tensor:
    return norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def _in_place(plain: Callable, *args: Any, **kwargs: Any) -> None:
    """A kernel that overwrites the first tensor, or the first two, that it is given."""
    found = plain(*map(_apart, args), **{name: _apart(value) for name, value in kwargs.items()})
    found = found if isinstance(found, tuple) else (found,)
    overwritten = [*args, *kwargs.values()][: len(found)]
    for tensor, value in zip(overwritten, found, strict=True):
        tensor.copy_(value)


def _apart(value: Any) -> Any:
    """A copy, so that what autograd saves of it is not overwritten."""
    return value.clone() if isinstance(value, torch.Tensor) else value


def _kernels() -> Iterator[tuple[str, Callable]]:
    for layout, split_half in (("", False), ("_split_half", True)):
        yield f"apply_rope{layout}", functools.partial(_rope, split_half=split_half)
        yield f"apply_rope{layout}1", functools.partial(_rope1, split_half=split_half)
        yield f"rms_rope{layout}", functools.partial(_rms_rope, split_half=split_half)
        yield f"rms_rope{layout}1", functools.partial(_rms_rope1, split_half=split_half)


_PLAIN: dict[str, Callable] = {
    **dict(_kernels()),
    **{f"{name}_": functools.partial(_in_place, plain) for name, plain in _kernels()},
    "adaln": functools.partial(_adaln, norm=F.layer_norm),
    "rms_adaln": functools.partial(_adaln, norm=F.rms_norm),
}
"""Plain functions by the kernel's name; names with an underscore at their end overwrite what they are given."""
