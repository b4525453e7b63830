"""What to tell the user where a gradient is not finite: whose NaN it is, and what helps."""

import torch

_HELP = "Start ComfyUI with --bf16-unet or --fp32-unet, or choose other layers."


def explain_not_finite(picture: torch.Tensor, loss: torch.Tensor) -> str:
    """Why a gradient is NaN or infinite, in words for the user.

    Args:
        picture: what the loss is of, in model space.
        loss: its loss, unscaled.
    """
    if not torch.isfinite(picture).all():
        return (
            "Attention distillation: the picture was NaN or infinite before guidance came to it, so the sampler or the "
            "model made it so, and without guidance the result is no better. First make the graph work without it: "
            "another sampler, scheduler or VAE, or start ComfyUI with --bf16-unet or --fp32-unet."
        )
    if not torch.isfinite(loss).all():
        return (
            "Attention distillation: the model's attention holds NaN or infinite values, already before any gradient. "
            + _HELP
        )
    return (
        "Attention distillation: the model's attention gave NaN or infinite gradients, though its values are finite. "
        + _HELP
    )
