"""AdaIN Latent: colours and contrast of a reference, without any sampling."""

import torch
import torch.nn.functional as F
from comfy_api.latest import io

from ..attention.reference import check_channels, check_image_latent
from ..losses.adain import ChannelStats, adain, channel_stats
from ..losses.precision import at_least_fp32
from .types import CATEGORY


def adain_latent(
    latent: torch.Tensor, reference: torch.Tensor, strength: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """Blend a latent with its AdaIN towards a reference.

    Args:
        latent: [b c h w].
        reference: [n c H W] of any size; all its pixels count together.
        strength: 0 keeps the latent, 1 takes the statistics over fully.
        mask: where to change it, [H W] or [b or 1, H, W]; None everywhere.

    Raises:
        ValueError: a latent that is no picture, other channels, or a mask batch that does not fit.
    """
    check_image_latent("latent", latent)
    check_image_latent("reference", reference)
    check_channels("reference", reference, latent.shape[1])
    pooled = at_least_fp32(reference).to(latent.device).transpose(0, 1).flatten(1)[None, :, None]  # [1 c 1 (n h w)]
    moved = adain(at_least_fp32(latent), ChannelStats(*channel_stats(pooled)))
    amount = torch.tensor(strength, device=latent.device)
    if mask is not None:
        mask = mask.reshape(-1, 1, *mask.shape[-2:])
        if mask.shape[0] not in (1, latent.shape[0]):
            raise ValueError(f"mask: {mask.shape[0]} masks for {latent.shape[0]} latents; give one, or one for each")
        amount = strength * F.interpolate(mask.to(moved), latent.shape[-2:], mode="bilinear")
    return torch.lerp(at_least_fp32(latent), moved, amount.to(moved)).to(latent.dtype)


class ADAdaINLatent(io.ComfyNode):
    """AdaIN as a latent operation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADAdaINLatent",
            display_name="AdaIN Latent",
            category=CATEGORY,
            description="Gives a latent the colours and contrast of a reference latent, channel by channel.",
            search_aliases=[
                "adain",
                "color match",
                "colour transfer",
                "latent statistics",
                "attention distillation",
            ],
            inputs=[
                io.Latent.Input("latent", tooltip="The latent to change."),
                io.Latent.Input(
                    "reference",
                    tooltip="Its colours and contrast are taken. Any size; a batch counts together.",
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="0 changes nothing, 1 takes the reference's colours over fully.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Only the painted part is changed."),
            ],
            outputs=[io.Latent.Output(tooltip="The latent with the reference's colours and contrast.")],
        )

    @classmethod
    def execute(cls, latent, reference, strength, mask=None) -> io.NodeOutput:
        """Everything else the latent carries (noise mask, batch index) stays."""
        samples = adain_latent(latent["samples"], reference["samples"], strength, mask)
        return io.NodeOutput({**latent, "samples": samples})


NODES = [ADAdaINLatent]
