"""Read q, k, v and the attention output of chosen self-attention layers in one forward pass.

The hooks live in the transformer_options of that one call: nothing is put into the model. The same code serves the
reference (without gradient) and the picture (with gradient): only the caller's grad mode differs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_base import BaseModel
from einops import rearrange

from ..tiling.rolling import rolled
from .architectures import overwrites_activations
from .calls import check_place, heads_apart, mask_by_heads, picture_place, split_heads
from .frames import as_model_takes
from .gradient import EndOfPassError, run_again
from .hypernetworks import Patches
from .layers import AttentionLayer
from .tokens import TokenLayout

BESIDE = "c_concat"  # ComfyUI's name for what an inpainting model is shown beside the picture
HIDDEN = -1e4  # a token whose logits are lowered by more than this is not looked at


@dataclass(frozen=True)
class LayerFeatures:
    """Features of one self-attention layer.

    In a transformer the t tokens are not the picture's alone: text tokens, and what the model adds to either, stand
    around them and take part in everything.

    Attributes:
        q, k, v: [b heads t d], in the model's dtype; with rotary positions where the model has such. Where the model
            has a scale of its own in place of 1 / sqrt(d), q bears the difference.
        out: softmax(q k^T / sqrt(d)) v before the output projection, [b heads t d].
        grid: (rows, columns) of the picture's tokens.
        start: which token is the first of the picture; its tokens follow each other row by row.
        seen: which tokens the model lets be looked at, [b t], bool; None is all. Padding of a prompt is not.
        edges: how many rows and columns of the picture's tokens at its edges show what is no picture, see
            `ReferenceReader.read`.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    grid: tuple[int, int]
    start: int = 0
    seen: torch.Tensor | None = None
    edges: tuple[int, int] = (0, 0)

    @property
    def layout(self) -> TokenLayout:
        """Where the picture's tokens lie."""
        return TokenLayout(self.grid, self.start, self.q.shape[-2])

    def split(self, count: int) -> "list[LayerFeatures]":
        """The features of each of `count` windows that lie one after the other along the batch."""
        parts = zip(*(tensor.chunk(count) for tensor in (self.q, self.k, self.v, self.out)), strict=True)
        seen = [None] * count if self.seen is None else self.seen.chunk(count)
        return [LayerFeatures(*part, self.grid, self.start, of_part) for part, of_part in zip(parts, seen, strict=True)]

    def rolled_back(self, offset: Sequence[int], size: Sequence[int]) -> "LayerFeatures":
        """The same with the picture's tokens in the places that they have on the picture, which was shown rolled.

        Args:
            offset: how far, rows and columns in latent pixels, whole tokens.
            size: height and width of the latent.
        """
        tokens = [n * of_grid // side for n, of_grid, side in zip(offset, self.grid, size, strict=True)]
        place = functools.partial(_rolled_back, tokens=tokens, grid=self.grid, start=self.start)
        return replace(self, q=place(self.q), k=place(self.k), v=place(self.v), out=place(self.out))


def _rolled_back(features: torch.Tensor, tokens: Sequence[int], grid: tuple[int, int], start: int) -> torch.Tensor:
    """See `LayerFeatures.rolled_back`; tokens: how far, rows and columns of the grid."""
    end = start + grid[0] * grid[1]
    picture = features[..., start:end, :].unflatten(-2, grid).roll([-n for n in tokens], (-3, -2)).flatten(-3, -2)
    return torch.cat([features[..., :start, :], picture, features[..., end:, :]], dim=-2)


def capture_features(
    model: BaseModel,
    x: torch.Tensor,
    sigma: torch.Tensor,
    conds: Mapping[str, Any],
    layers: Sequence[AttentionLayer],
    patches: Patches | None = None,
    again: Sequence[torch.nn.Module] = (),
    offset: Sequence[int] = (0, 0),
) -> dict[int, LayerFeatures]:
    """Run the model on x up to the last chosen layer and return the features of the chosen layers.

    Args:
        model: ComfyUI's model, loaded on x's device.
        x: latent in k-diffusion space, [b c h w].
        sigma: noise level, a scalar tensor.
        conds: keyword arguments of apply_model (text, SDXL's vector, ...), from `attention.conditioning`.
        layers: the layers to read.
        patches: hypernetworks, which belong to the weights.
        again: blocks of the model that are run again in the backward, in place of what autograd would keep of them.
        offset: how far the model is shown the picture rolled, rows and columns in latent pixels, whole tokens; the
            features lie on the picture as it is.

    Returns:
        Features by layer index. Where gradients are enabled and x needs one, they carry it.
    """
    reader = _Reader(layers, tuple(x.shape[-2:]), patches or {})
    if any(offset):
        x = rolled(x, offset)
        conds = {name: rolled(value, offset) if name == BESIDE else value for name, value in conds.items()}
    overwrite = overwrites_activations(model.diffusion_model)
    with run_again(again, reader.bookmark, overwrite=overwrite), contextlib.suppress(EndOfPassError):
        model.apply_model(
            as_model_takes(model, x),
            sigma.expand(x.shape[0]),
            transformer_options=reader.transformer_options(sigma),
            **conds,
        )
    found, reader.features = reader.features, {}  # blocks that are run again hold the reader until their backward
    missing = [layer.index for layer in layers if layer.index not in found]
    if missing:
        raise ValueError(
            f"model: its attention in layer {missing[0]} did not come by; another node has replaced it, take that away"
        )
    if any(offset):
        found = {index: of_layer.rolled_back(offset, x.shape[-2:]) for index, of_layer in found.items()}
    return found


class _Reader:
    """Collects the features of chosen layers in one forward pass, and ends the pass after the last of them."""

    def __init__(self, layers: Sequence[AttentionLayer], size: tuple[int, int], patches: Patches) -> None:
        """size: height and width of the latent."""
        self.features: dict[int, LayerFeatures] = {}
        self._layers = layers
        self._last = max(layers, key=lambda layer: layer.index, default=None)
        self._size = size
        self._patches = patches
        self._by_call = {layer.call: layer for layer in layers if layer.call is not None}
        self._calls = 0
        self._again = False  # whether a block is run a second time

    def bookmark(self) -> Callable[[], AbstractContextManager]:
        """Notes how many calls have come by; what it returns is around a second run from here on."""
        return functools.partial(self._back_at, self._calls)

    @contextlib.contextmanager
    def _back_at(self, calls: int) -> Iterator[None]:
        before, self._calls, self._again = self._calls, calls, True
        try:
            yield
        finally:
            self._calls, self._again = before, False

    def transformer_options(self, sigma: torch.Tensor) -> dict[str, Any]:
        """What makes the model call this object."""
        named = {layer.block: functools.partial(self._named, layer) for layer in self._layers if layer.call is None}
        return {
            "patches": {kind: list(of_kind) for kind, of_kind in self._patches.items()},
            "patches_replace": {"attn1": named},
            "optimized_attention_override": self._counted,
            "cond_or_uncond": [0],
            "sigmas": sigma.reshape(1),
        }

    def _named(
        self, layer: AttentionLayer, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]
    ) -> torch.Tensor:
        """Replaces the self-attention that ComfyUI calls by name; all are [b t (heads d)]."""
        q, k, v = (split_heads(tensor, extra_options["n_heads"]) for tensor in (q, k, v))
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
            kwargs: `scale` of the logits in place of 1 / sqrt(d); `enable_gqa`, where k and v have fewer heads than q.

        Returns:
            [b heads t d] with skip_output_reshape, else [b t (heads d)].

        Raises:
            ValueError: the model asks for what is not known here, or the layer is not where it is expected.
        """
        q, k, v = heads_apart(q, k, v, heads, skip_reshape, kwargs)
        layer = self._by_call.get(self._calls)
        self._calls += 1
        if layer is None:
            return attention_pytorch(
                q, k, v, heads, mask=mask, skip_reshape=True, skip_output_reshape=skip_output_reshape
            )
        check_place(layer, kwargs.get("transformer_options") or {})
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
            mask = mask_by_heads(mask)
            seen = (mask if mask.dtype == torch.bool else mask > HIDDEN).flatten(1, 2).any(dim=1).expand(q.shape[0], -1)
        grid, start = picture_place(layer, self._size, q.shape[-2], k.shape[-2])
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        if not self._again:
            self.features[layer.index] = LayerFeatures(q, k, v, out, grid, start, seen)
        if layer is self._last:
            raise EndOfPassError
        return out
