"""Seamless Tiling: pictures that repeat without a seam."""

from comfy_api.latest import io

from ..attention.architectures import list_layers, token_width
from ..tiling.circular import AXES, is_unet, tile_model, tile_vae
from ..tiling.rolling import roll_model
from .shared import NAME
from .types import TEXTURE_TOOLS


class ADSeamlessTiling(io.ComfyNode):
    """Circular padding for UNet and VAE; a transformer is shown its picture rolled."""

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
                io.Model.Input(
                    "model",
                    tooltip="The model that makes the picture: a UNet such as SD1.5 or SDXL, or a transformer such as "
                    "FLUX, SD3 or Z-Image, with 20 steps or more.",
                ),
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
        tiled = tile_vae(vae, axes)
        if is_unet(model):
            return io.NodeOutput(tile_model(model, axes), tiled)
        list_layers(model.model.diffusion_model)  # refuses networks whose tokens are not known
        return io.NodeOutput(roll_model(model, axes, token_width(model.model.diffusion_model)), tiled)


NODES = [ADSeamlessTiling]
