"""Read q, k, v and the attention output of chosen self-attention layers in one forward pass.

The hooks live in the transformer_options of that one call: nothing is put into the model. The same code serves the
reference (without gradient) and the picture (with gradient): only the caller's grad mode differs.
"""

import contextlib
import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_base import BaseModel
from einops import rearrange

from .frames import as_model_takes
from .layers import AttentionLayer
from .tokens import TokenLayout

HIDDEN = -1e4  # a token whose logits are lowered by more than this is not looked at


@dataclass(frozen=True)
class LayerFeatures:
    """Features of one self-attention layer.

    In a transformer the t tokens are not the picture's alone: text tokens, and what the model adds to either, stand
    around them and take part in everything.

    Attributes:
        q, k, v: [b heads t d], in the model's dtype; with rotary positions where the model has such.
        out: softmax(q k^T / sqrt(d)) v before the output projection, [b heads t d].
        grid: (rows, columns) of the picture's tokens.
        start: which token is the first of the picture; its tokens follow each other row by row.
        seen: which tokens the model lets be looked at, [b t], bool; None is all. Padding of a prompt is not.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    grid: tuple[int, int]
    start: int = 0
    seen: torch.Tensor | None = None

    @property
    def layout(self) -> TokenLayout:
        """Where the picture's tokens lie."""
        return TokenLayout(self.grid, self.start, self.q.shape[-2])

    def split(self, count: int) -> "list[LayerFeatures]":
        """The features of each of `count` windows that lie one after the other along the batch."""
        parts = zip(*(tensor.chunk(count) for tensor in (self.q, self.k, self.v, self.out)), strict=True)
        seen = [None] * count if self.seen is None else self.seen.chunk(count)
        return [LayerFeatures(*part, self.grid, self.start, of_part) for part, of_part in zip(parts, seen, strict=True)]


class _LastLayerSeenError(Exception):
    """Ends a forward pass early; never leaves this module."""


def capture_features(
    model: BaseModel,
    x: torch.Tensor,
    sigma: torch.Tensor,
    conds: Mapping[str, Any],
    layers: Sequence[AttentionLayer],
) -> dict[int, LayerFeatures]:
    """Run the model on x up to the last chosen layer and return the features of the chosen layers.

    Args:
        model: ComfyUI's model, loaded on x's device.
        x: latent in k-diffusion space, [b c h w].
        sigma: noise level, a scalar tensor.
        conds: keyword arguments of apply_model (text, SDXL's vector, ...), from `attention.conditioning`.
        layers: the layers to read.

    Returns:
        Features by layer index. Where gradients are enabled and x needs one, they carry it.
    """
    reader = _Reader(layers, tuple(x.shape[-2:]))
    with contextlib.suppress(_LastLayerSeenError):
        model.apply_model(
            as_model_takes(model, x),
            sigma.expand(x.shape[0]),
            transformer_options=reader.transformer_options(sigma),
            **conds,
        )
    missing = [layer.index for layer in layers if layer.index not in reader.features]
    if missing:
        raise ValueError(
            f"model: its attention in layer {missing[0]} did not come by; another node has replaced it, take that away"
        )
    return reader.features


class _Reader:
    """Collects the features of chosen layers in one forward pass, and ends the pass after the last of them."""

    def __init__(self, layers: Sequence[AttentionLayer], size: tuple[int, int]) -> None:
        """size: height and width of the latent."""
        self.features: dict[int, LayerFeatures] = {}
        self._layers = layers
        self._size = size
        self._by_call = {layer.call: layer for layer in layers if layer.call is not None}
        self._calls = itertools.count()

    def transformer_options(self, sigma: torch.Tensor) -> dict[str, Any]:
        """What makes the model call this object."""
        named = {layer.block: functools.partial(self._named, layer) for layer in self._layers if layer.call is None}
        return {
            "patches_replace": {"attn1": named},
            "optimized_attention_override": self._counted,
            "cond_or_uncond": [0],
            "sigmas": sigma.reshape(1),
        }

    def _named(
        self, layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        """Replaces the self-attention that ComfyUI calls by name; all are [b t (heads d)]."""
        q, k, v = (_split_heads(tensor, extra_options["n_heads"]) for tensor in (q, k, v))
        return rearrange(self._read(layer, q, k, v), "b heads t d -> b t (heads d)")

    def _counted(
        self, func, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False, skip_output_reshape=False,
        **kwargs,
    ) -> torch.Tensor:  # fmt: skip
        """Replaces every attention that a model computes.

        The kernel chosen on the command line is never used: some (sage, flash builds) have no backward.

        Args:
            q, k, v: [b heads t d] with skip_reshape, else [b t (heads d)].
            mask: added to the logits, or where to look: [t t], [b t t] or [b heads t t], broadcast.

        Returns:
            [b heads t d] with skip_output_reshape, else [b t (heads d)].
        """
        layer = self._by_call.get(next(self._calls))
        if layer is None:
            return attention_pytorch(
                q, k, v, heads, mask=mask, skip_reshape=skip_reshape, skip_output_reshape=skip_output_reshape, **kwargs
            )
        if not skip_reshape:
            q, k, v = (_split_heads(tensor, heads) for tensor in (q, k, v))
        out = self._read(layer, q, k, v, mask)
        return out if skip_output_reshape else rearrange(out, "b heads t d -> b t (heads d)")

    def _read(
        self,
        layer: AttentionLayer,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Keep the features of a layer, all [b heads t d], and return its attention output."""
        seen = None
        if mask is not None:
            mask = mask.reshape((1,) * (3 - mask.ndim) + mask.shape)
            mask = mask[:, None] if mask.ndim == 3 else mask
            seen = (mask if mask.dtype == torch.bool else mask > HIDDEN).flatten(1, 2).any(dim=1).expand(q.shape[0], -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        grid = layer.grid(*self._size)
        self.features[layer.index] = LayerFeatures(q, k, v, out, grid, layer.picture_start(q.shape[-2], grid), seen)
        if len(self.features) == len(self._layers):
            raise _LastLayerSeenError
        return out


def _split_heads(tokens: torch.Tensor, heads: int) -> torch.Tensor:
    """[b t (heads d)] or, as SD3 hands on its values, [b t heads d]."""
    return rearrange(tokens.flatten(2), "b t (heads d) -> b heads t d", heads=heads)
