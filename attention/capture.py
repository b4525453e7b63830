"""Read q, k, v and the attention output of chosen self-attention layers in one forward pass.

The hooks live in the transformer_options of that one call: nothing is put into the model. The same code serves the
reference (without gradient) and the picture (with gradient): only the caller's grad mode differs.
"""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import attention_pytorch
from comfy.model_base import BaseModel
from einops import rearrange

from .layers import AttentionLayer


@dataclass(frozen=True)
class LayerFeatures:
    """Features of one self-attention layer.

    Attributes:
        q, k, v: [b heads t d], in the model's dtype.
        out: softmax(q k^T / sqrt(d)) v before the output projection, [b heads t d].
        grid: (rows, columns) of the t tokens.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    out: torch.Tensor
    grid: tuple[int, int]


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
    height, width = x.shape[-2:]
    wanted = {layer.index for layer in layers}
    features: dict[int, LayerFeatures] = {}

    def hook(layer: AttentionLayer):
        def read(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict) -> torch.Tensor:
            heads = extra_options["n_heads"]
            q, k, v = (rearrange(tensor, "b t (heads d) -> b heads t d", heads=heads) for tensor in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v)
            features[layer.index] = LayerFeatures(q, k, v, out, layer.grid(height, width))
            if features.keys() == wanted:
                raise _LastLayerSeenError
            return rearrange(out, "b heads t d -> b t (heads d)")

        return read

    transformer_options = {
        "patches_replace": {"attn1": {layer.block: hook(layer) for layer in layers}},
        "optimized_attention_override": _differentiable_attention,
        "cond_or_uncond": [0],
        "sigmas": sigma.reshape(1),
    }
    with contextlib.suppress(_LastLayerSeenError):
        model.apply_model(x, sigma.expand(x.shape[0]), transformer_options=transformer_options, **conds)
    return features


def _differentiable_attention(func, *args, **kwargs) -> torch.Tensor:
    """Replaces the attention kernel chosen on the command line: some (sage, flash builds) have no backward."""
    return attention_pytorch(*args, **kwargs)
