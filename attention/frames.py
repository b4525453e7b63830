"""Pictures of models that know time (Wan, Qwen-Image and others): theirs are videos of one frame, [b c 1 h w].

Everything in this pack works on [b c h w]; only the model itself is shown the frame.
"""

import torch
from comfy.model_base import BaseModel


def without_frame(latent: torch.Tensor) -> torch.Tensor:
    """[b c 1 h w] or [b c h w] as [b c h w]."""
    return latent.squeeze(2) if latent.ndim == 5 else latent


def as_model_takes(model: BaseModel, latent: torch.Tensor) -> torch.Tensor:
    """[b c h w] with a frame, [b c 1 h w], if the model knows time."""
    return latent.unsqueeze(2) if model.latent_format.latent_dimensions == 3 else latent
