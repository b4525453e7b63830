"""Seamless Tiling: pictures that repeat without a seam."""

from comfy_api.latest import io

from ..tiling.circular import AXES, tile_model, tile_vae
from .shared import NAME
from .types import TEXTURE_TOOLS


class ADSeamlessTiling(io.ComfyNode):
    """Circular padding for UNet and VAE."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADSeamlessTiling",
            display_name="Seamless Tiling",
            category=TEXTURE_TOOLS,
            description="Makes pictures whose edges fit together, for textures that repeat without a seam. Use both "
            "outputs: the model for sampling or optimising, the VAE for VAE Decode (not VAE Decode (Tiled)).",
            search_aliases=[*NAME, "tileable", "seamless texture", "circular padding", "repeat"],
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the picture. A UNet such as SD1.5 or SDXL."),
                io.Vae.Input("vae", tooltip="The VAE that decodes the picture; it makes seams of its own otherwise."),
                io.Combo.Input(
                    "axes",
                    options=list(AXES),
                    default="both",
                    tooltip="Which edges fit together. Textures that repeat: both. horizontal: left and right. "
                    "vertical: top and bottom. Choose a picture size that is a multiple of 64 pixels.",
                ),
            ],
            outputs=[
                io.Model.Output(tooltip="The model for seamless pictures. The one you put in stays as it was."),
                io.Vae.Output(tooltip="The VAE for seamless pictures. The one you put in stays as it was."),
            ],
        )

    @classmethod
    def execute(cls, model, vae, axes) -> io.NodeOutput:
        """Clones of both."""
        return io.NodeOutput(tile_model(model, axes), tile_vae(vae, axes))


NODES = [ADSeamlessTiling]
