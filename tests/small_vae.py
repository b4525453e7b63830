"""Small VAEs with fixed random weights: a KL autoencoder of SD1.5's kind, and a TAESD. Both scale by 8."""

import torch
from comfy.ldm.models.autoencoder import AutoencoderKL
from comfy.ldm.wan.vae import WanVAE
from comfy.sd import VAE
from comfy.taesd.taesd import TAESD

KL_CONFIG = {
    "ddconfig": {
        "double_z": True, "z_channels": 4, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 2], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    },
    "embed_dim": 4,
}  # fmt: skip


def _filled(network: torch.nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Random values that keep the activations near unit size."""
    generator = torch.Generator("cpu").manual_seed(seed)
    values = {}
    for name, parameter in network.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            values[name] = noise / parameter[0].numel() ** 0.5
        else:
            values[name] = (
                parameter.new_ones(parameter.shape)
                if name.endswith("gamma") or ("norm" in name and "weight" in name)
                else 0.05 * noise
            )
    return values


@torch.inference_mode()
def small_kl(dtype: torch.dtype = torch.float32, seed: int = 1) -> VAE:
    """An AutoencoderKL of 0.4 M parameters, loaded as the VAE loader does."""
    return VAE(sd=_filled(AutoencoderKL(**KL_CONFIG), seed), config={"params": KL_CONFIG}, dtype=dtype)


@torch.inference_mode()
def small_taesd(seed: int = 2) -> VAE:
    """A TAESD, loaded as the VAE loader does."""
    weights = _filled(TAESD(), seed)
    weights |= {"vae_scale": torch.tensor(0.9), "vae_shift": torch.tensor(0.1)}
    return VAE(sd=weights, dtype=torch.float32)


@torch.inference_mode()
def small_wan(seed: int = 3) -> VAE:
    """A Wan 2.1 VAE, loaded as the VAE loader does. It takes videos; a picture is one frame."""
    sizes = {"dim": 8, "z_dim": 16, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [False, True, True]}
    return VAE(sd=_filled(WanVAE(**sizes), seed), dtype=torch.float32)


SMALL_VAES = {"kl": small_kl, "taesd": small_taesd}


def smooth_image(seed: int, height: int = 64, width: int = 64, batch: int = 1) -> torch.Tensor:
    """A smooth random picture with values in 0..1, [batch height width 3]."""
    generator = torch.Generator("cpu").manual_seed(seed)
    coarse = torch.rand(batch, 3, max(2, height // 8), max(2, width // 8), generator=generator)
    picture = torch.nn.functional.interpolate(coarse, size=(height, width), mode="bilinear", align_corners=True)
    return picture.movedim(1, -1)
