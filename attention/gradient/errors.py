"""What to tell the user where a gradient is not finite: whose NaN it is, and what helps."""

_HELP = "Start ComfyUI with --bf16-unet or --fp32-unet, or choose other layers."


def explain_not_finite(*, picture: bool, loss: bool) -> str:
    """Why a gradient is NaN or infinite, in words for the user.

    Args:
        picture: whether the picture that the loss is of is finite.
        loss: whether its loss is.
    """
    if not picture:
        return (
            "Attention distillation: the picture was NaN or infinite before guidance came to it, so the sampler or the "
            "model made it so, and without guidance the result is no better. First make the graph work without it: "
            "another sampler, scheduler or VAE, or start ComfyUI with --bf16-unet or --fp32-unet."
        )
    if not loss:
        return (
            "Attention distillation: the model's attention holds NaN or infinite values, already before any gradient. "
            + _HELP
        )
    return (
        "Attention distillation: the model's attention gave NaN or infinite gradients, though its values are finite. "
        + _HELP
    )
