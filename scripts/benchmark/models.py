"""Networks of full size, with random weights or with none at all (on the meta device)."""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.supported_models
import torch
from comfy.model_base import BaseModel

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
        size: side of the pictures that it is made for, in pixels.
    """

    config: str
    unet_config: dict[str, Any]
    channels: int
    text: int
    vector: int
    size: int


MODELS = {
    "SD1.5": FullSize("SD15", {**_UNET, **_SD15}, 4, 768, 0, 512),
    "SDXL": FullSize("SDXL", {**_UNET, **_SDXL}, 4, 2048, 2816, 1024),
    "FLUX": FullSize("Flux", _FLUX, 16, 4096, 768, 512),
}


def make(name: str, dtype: torch.dtype, device: torch.device) -> BaseModel:
    """The model, its weights random with a fixed seed, or without values on the meta device."""
    full = MODELS[name]
    config = getattr(comfy.supported_models, full.config)({**full.unet_config, "dtype": dtype})
    config.set_inference_dtype(dtype, None)
    with torch.device(device):
        model = config.get_model({}, device=device).requires_grad_(False)
    if device.type != "meta":
        generator = torch.Generator(device).manual_seed(20250220)
        for name, weight in model.diffusion_model.named_parameters():
            if weight.ndim == 1:
                weight.fill_(float(name.endswith("weight") or name.endswith("scale")))
            else:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
    return model.eval()


def inputs(name: str, side: int, dtype: torch.dtype, device: torch.device, seed: int = 0) -> tuple[torch.Tensor, dict]:
    """A latent of a picture of `side` pixels, [1 c h w], and what `apply_model` takes beside it."""
    full = MODELS[name]
    with torch.device(device):
        if device.type == "meta":
            fill = torch.zeros
        else:
            generator = torch.Generator(device).manual_seed(seed)

            def fill(*shape, **kwargs):
                return torch.randn(*shape, generator=generator, **kwargs)

        latent = fill(1, full.channels, side // 8, side // 8)
        conds = {"c_crossattn": fill(1, 77, full.text, dtype=dtype)}
        if full.vector:
            conds |= {"y": fill(1, full.vector, dtype=dtype), "guidance": torch.ones(1)}
    return latent, conds
