"""One attention call of a transformer, as an override of it is given: read into one form, and told where it is.

What the model asks of its attention is honoured or declined.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from einops import rearrange

from .layers import AttentionLayer

# What ComfyUI gives its attention beside q, k, v, heads, masks and shapes, and that does not change the result.
_HARMLESS = {"transformer_options", "low_precision_attention", "_inside_attn_wrapper"}
# What is honoured, and what other arguments of torch's attention are where they ask for nothing.
_HONOURED = {"scale", "enable_gqa"}
_NOTHING = {"is_causal": False, "dropout_p": 0.0}


class HeadsApart(NamedTuple):
    """Queries, keys and values of as many heads each, [b heads t d], for plain attention with 1 / sqrt(d)."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


def heads_apart(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, skip_reshape: bool, asked: Mapping[str, Any]
) -> HeadsApart:
    """Read what an attention call is given.

    Args:
        q, k, v: [b heads t d] with skip_reshape, else [b t (heads d)]; or what newer versions of ComfyUI hold these in.
        asked: the call's other arguments: `scale` of the logits in place of 1 / sqrt(d), which q bears then;
            `enable_gqa`, where k and v have fewer heads than q. None asks for nothing.

    Raises:
        ValueError: the model asks for what is not known here.
    """
    q, k, v = map(_held, (q, k, v))
    unknown = sorted(
        name
        for name in asked.keys() - _HARMLESS - _HONOURED
        if asked[name] is not None and not (name in _NOTHING and asked[name] == _NOTHING[name])
    )
    if unknown:
        raise ValueError(
            f"model: its attention is computed with {', '.join(unknown)}, which this pack does not know; another "
            "node may have changed the model's attention, take that away"
        )
    if not skip_reshape:
        width = q.flatten(2).shape[-1] // heads
        of_kv = k.flatten(2).shape[-1] // width if asked.get("enable_gqa") else heads
        q, k, v = split_heads(q, heads), split_heads(k, of_kv), split_heads(v, of_kv)
    if asked.get("enable_gqa"):
        k, v = (tensor.repeat_interleave(heads // tensor.shape[1], dim=1) for tensor in (k, v))
    if asked.get("scale") is not None:
        q = q * (asked["scale"] * q.shape[-1] ** 0.5)
    return HeadsApart(q, k, v)


def _held(value: Any) -> torch.Tensor:
    """A tensor, or the one in a container: newer versions let a kernel take it out, and here it is only looked at."""
    return value if isinstance(value, torch.Tensor) else value.peek()


def split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """[b t (heads d)] or, as SD3 hands on its values, [b t heads d]; or what holds such."""
    return rearrange(_held(tokens).flatten(2), "b t (heads d) -> b heads t d", heads=heads)


def mask_by_heads(mask: torch.Tensor) -> torch.Tensor:
    """A mask of [t t], [b t t] or [b heads t t] with all four dimensions."""
    mask = mask.reshape((1,) * (3 - mask.ndim) + mask.shape)
    return mask[:, None] if mask.ndim == 3 else mask


def picture_place(layer: AttentionLayer, size: tuple[int, int], tokens: int, keys: int) -> tuple[tuple[int, int], int]:
    """The grid of the picture's tokens in a layer, and which token is the first of them.

    Args:
        size: height and width of the latent.
        tokens: how many the layer has up to the end of the picture's; padding of the picture is counted in.
        keys: how many tokens can be looked at.

    Raises:
        ValueError: there are too few.
    """
    grid = layer.grid(*size)
    start = layer.picture_start(tokens, grid)
    if start < 0 or start + grid[0] * grid[1] > keys:
        raise ValueError(
            f"model: its attention in layer {layer.index} has {tokens} tokens, too few for {grid[0]} x {grid[1]} of "
            "the picture; another node has changed the model's attention, take that away"
        )
    return grid, start


def check_place(layer: AttentionLayer, transformer_options: Mapping[str, Any]) -> None:
    """Hold the place that a call has by its count against the one that the model states, where it states one.

    Raises:
        ValueError: another node adds attention to the model or takes it away.
    """
    kind, number = transformer_options.get("block_type"), transformer_options.get("block_index")
    if number is None or (kind is None) != (layer.block_type is None):
        return
    if (kind, number) != (layer.block_type, layer.block[1]):
        raise ValueError(
            f"model: layer {layer.index} is expected in {_named(layer.block_type, layer.block[1])}, and came by in "
            f"{_named(kind, number)}; another node adds attention to the model or takes it away, take that node away"
        )


def _named(kind: str | None, number: int) -> str:
    """A block in words."""
    return f"block {number}" if kind is None else f"{kind} block {number}"
