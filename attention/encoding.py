"""Pictures for references: scaled to what the model was trained on, and encoded."""

import math

import torch
from comfy.model_base import BaseModel, ModelType
from comfy.sd import VAE
from comfy.supported_models import SD15, SD20, HunyuanImage21

from .architectures import token_width
from .inputs import rgb
from .reference import check_channels, check_image_latent

PATCH = 2  # in latent pixels: it divides the sides of what is encoded, and more where a token is wider


def native_side(model: BaseModel) -> int:
    """The side in pixels of the square pictures that a kind of model was trained on; other shapes keep its area."""
    if isinstance(model.model_config, SD15):
        return 512
    if isinstance(model.model_config, SD20):
        return 768 if model.model_type == ModelType.V_PREDICTION else 512
    return 2048 if isinstance(model.model_config, HunyuanImage21) else 1024


def fitted_size(height: int, width: int, side: int, multiple: int) -> tuple[int, int]:
    """The size with the area of a square of `side` and the shape of height x width, in multiples (all in pixels)."""
    scale = side / math.sqrt(height * width)
    fitted = (multiple * max(1, round(scale * length / multiple)) for length in (height, width))
    return tuple(fitted)


def encode_reference(image: torch.Tensor, vae: VAE | None, model: BaseModel) -> torch.Tensor:
    """The latent of pictures for a reference, scaled to the model's own area; each is encoded for itself.

    Args:
        image: [n h w c] with 1 to 4 channels (grey, alpha, RGB) in 0..1.
        vae: the model's.
        model: it need not be loaded.

    Returns:
        [n c h' w'] or [n c 1 h' w'], as the LATENT socket carries it.

    Raises:
        ValueError: names the input, what it was given and what is allowed.
    """
    pixels = rgb("image", image).movedim(-1, 1).float()
    check_vae(vae, model)
    multiple = max(PATCH, token_width(model.diffusion_model)) * vae.spacial_compression_encode()
    size = fitted_size(*pixels.shape[-2:], native_side(model), multiple)
    if size != tuple(pixels.shape[-2:]):
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True, align_corners=False)
    pictures = pixels.clamp(0, 1).movedim(1, -1).contiguous()  # laid out as VAE Encode gets them: the same bits
    latent = torch.cat([vae.encode(picture) for picture in pictures.split(1)])  # a video VAE takes a batch for a film
    check_image_latent("vae", latent)
    check_channels("vae", latent, model.latent_format.latent_channels)
    return latent


def check_vae(vae: VAE | None, model: BaseModel) -> None:
    """Refuse a VAE that is missing, broken, or does not belong to the model.

    Raises:
        ValueError: says what is allowed.
    """
    right = "connect the VAE that belongs to the model"
    if vae is None:
        raise ValueError(f"vae: nothing is connected, or the checkpoint holds none, but image needs one; {right}")
    if getattr(vae, "first_stage_model", None) is None:
        raise ValueError(f"vae: it holds no weights; {right}")
    channels = model.latent_format.latent_channels
    if vae.latent_dim not in (2, 3) or vae.latent_channels != channels:
        raise ValueError(
            f"vae: its latents have {vae.latent_channels} channels in {vae.latent_dim} dimensions, this model works on "
            f"pictures of {channels} channels; {right}"
        )
