"""AdaIN Latent: colours and contrast of a reference, without any sampling."""

import logging

from comfy_api.latest import io

from ..attention.inputs import check_number
from ..attention.reference import check_image_latent, check_mask, warn_of_empty_mask, warn_of_mask
from ..losses.adain import adain_latent
from .shared import NAME
from .types import COLOUR_AND_DETAIL


class ADAdaINLatent(io.ComfyNode):
    """AdaIN as a latent operation."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADAdaINLatent",
            display_name="AdaIN Latent",
            category=COLOUR_AND_DETAIL,
            description="Gives a latent the colours and contrast of a reference latent, channel by channel.",
            search_aliases=[*NAME, "adain", "color match", "colour transfer", "latent statistics"],
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
                    tooltip="0 changes nothing, 1 takes the reference's colours over fully: textures and photos in a "
                    "style.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Only the painted part is changed."),
            ],
            outputs=[io.Latent.Output(tooltip="The latent with the reference's colours and contrast.")],
        )

    @classmethod
    def execute(cls, latent, reference, strength, mask=None) -> io.NodeOutput:
        """Everything else the latent carries (noise mask, batch index) stays."""
        picture, offered = latent["samples"], reference["samples"]
        check_image_latent("latent", picture)
        check_image_latent("reference", offered)
        if offered.shape[1] != picture.shape[1]:
            raise ValueError(
                f"reference: it has {offered.shape[1]} channels, the latent has {picture.shape[1]}; encode both with "
                "the same VAE"
            )
        if offered.ndim != picture.ndim:
            logging.warning(
                "Attention distillation: reference: only one of latent and reference has a frame, as if they came from "
                "two kinds of VAE; their colours may not go together"
            )
        check_number("strength", strength, 0, 1)
        if mask is not None:
            mask = check_mask("mask", mask, picture.shape[0])
            warn_of_empty_mask("mask: the mask", mask)
        warn_of_mask("reference", reference)
        return io.NodeOutput({**latent, "samples": adain_latent(picture, offered, strength, mask)})


NODES = [ADAdaINLatent]
