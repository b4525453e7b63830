"""Networks of full size, without values: for counting what they take."""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.supported_models
import torch
from comfy.model_base import BaseModel

META = torch.device("meta")
_UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
    "legacy": False,
}  # fmt: skip
_SD15 = {
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "num_heads": 8,
    "num_head_channels": -1, "context_dim": 768, "use_linear_in_transformer": False,
}  # fmt: skip
_SDXL = {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_heads": -1,
    "num_head_channels": 64, "context_dim": 2048, "use_linear_in_transformer": True, "adm_in_channels": 2816,
    "num_classes": "sequential", "use_temporal_attention": False,
}  # fmt: skip
_FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096,
    "hidden_size": 3072, "mlp_ratio": 4.0, "num_heads": 24, "depth": 19, "depth_single_blocks": 38,
    "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": True,
    "txt_ids_dims": [],
}  # fmt: skip


class FullSize(NamedTuple):
    """A network as it is shipped.

    Attributes:
        config: class of comfy.supported_models, by name.
        unet_config: of the network.
        channels: of its latents.
        text: width of its text condition.
        vector: width of the vector that goes with it, 0 for none.
    """

    config: str
    unet_config: dict[str, Any]
    channels: int
    text: int
    vector: int


MODELS = {
    "SD1.5": FullSize("SD15", {**_UNET, **_SD15}, 4, 768, 0),
    "SDXL": FullSize("SDXL", {**_UNET, **_SDXL}, 4, 2048, 2816),
    "FLUX": FullSize("Flux", _FLUX, 16, 4096, 768),
}


def make(name: str, dtype: torch.dtype) -> BaseModel:
    """The model on the meta device: its weights have shapes and no values."""
    full = MODELS[name]
    config = getattr(comfy.supported_models, full.config)({**full.unet_config, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    with META:
        return config.get_model({}, device=META).requires_grad_(False)


def inputs(name: str, side: int, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A latent of a picture of `side` pixels, [1 c h w], and what `apply_model` takes beside it."""
    full = MODELS[name]
    with META:
        conds = {"c_crossattn": torch.zeros(1, 77, full.text, dtype=dtype)}
        if full.vector:
            conds |= {"y": torch.zeros(1, full.vector, dtype=dtype), "guidance": torch.ones(1)}
        return torch.zeros(1, full.channels, side // 8, side // 8), conds
