"""Networks of full size and one toy: without values, for counting what they take, or in a file with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import comfy.supported_models
import comfy.utils
import torch
from comfy.model_base import BaseModel

from .cases import SHORT

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
_TOY = {
    "num_res_blocks": [1, 1], "channel_mult": [1, 1], "transformer_depth": [1, 1], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1], "num_heads": 8, "num_head_channels": -1, "context_dim": 768,
    "use_linear_in_transformer": False,
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


class Network(NamedTuple):
    """A network as it is shipped; the toy and the short one are made up.

    Attributes:
        config: class of comfy.supported_models, by name.
        unet_config: of the network.
        channels: of its latents.
        text: width of its text condition.
        vector: width of the vector that goes with it, 0 for none.
        pooled: width of the pooled prompt that this vector is made of, 0 for none.
    """

    config: str
    unet_config: dict[str, Any]
    channels: int
    text: int
    vector: int = 0
    pooled: int = 0

    @property
    def is_unet(self) -> bool:
        """Whether tests/plain_method.py can read it."""
        return "image_model" not in self.unet_config


MODELS = {
    "toy": Network("SD15", {**_UNET, **_TOY}, 4, 768),
    "SD1.5": Network("SD15", {**_UNET, **_SD15}, 4, 768),
    "SDXL": Network("SDXL", {**_UNET, **_SDXL}, 4, 2048, 2816, 1280),
    "FLUX": Network("Flux", _FLUX, 16, 4096, 768, 768),
    SHORT: Network("Flux", {**_FLUX, "depth": 1, "depth_single_blocks": 7}, 16, 4096, 768, 768),
}


def make(name: str, dtype: torch.dtype, computes_in: torch.dtype | None = None) -> BaseModel:
    """The model on the meta device: its weights have shapes and no values.

    Args:
        name: in `MODELS`.
        dtype: of the weights.
        computes_in: what weights are cast to for each layer, if to anything.
    """
    network = MODELS[name]
    config = getattr(comfy.supported_models, network.config)({**network.unet_config, "dtype": dtype})
    config.set_inference_dtype(dtype, computes_in)
    with META:
        return config.get_model({}, device=META).requires_grad_(False)


def inputs(name: str, side: int, dtype: torch.dtype) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A latent of a picture of `side` pixels, [1 c h w], and what `apply_model` takes beside it; both on meta."""
    network = MODELS[name]
    with META:
        conds = {"c_crossattn": torch.zeros(1, 77, network.text, dtype=dtype)}
        if network.vector:
            conds |= {"y": torch.zeros(1, network.vector, dtype=dtype), "guidance": torch.ones(1)}
        return torch.zeros(1, network.channels, side // 8, side // 8), conds


def write(name: str, dtype: torch.dtype, file: Path, device: torch.device) -> None:
    """A file with fixed random weights, which ComfyUI's loader takes for a checkpoint's.

    Args:
        name: in `MODELS`.
        dtype: of the weights.
        file: to be written, a .safetensors.
        device: where numbers are drawn.
    """
    generator = torch.Generator(device).manual_seed(20250220)
    weights = {}
    for key, empty in make(name, dtype).diffusion_model.state_dict().items():
        if empty.ndim == 1:
            weights[key] = torch.full(empty.shape, float(key.endswith(("weight", "scale")))).to(dtype)
        else:
            values = torch.randn(empty.shape, generator=generator, device=device) * empty[0].numel() ** -0.5
            weights[key] = values.cpu().to(dtype)
    comfy.utils.save_torch_file(weights, str(file))
