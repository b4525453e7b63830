"""AD Windows: how to sample a picture larger than the model's native size."""

from comfy_api.latest import io

from ..guidance.windows import Windows
from . import types
from .shared import NAME


class ADWindows(io.ComfyNode):
    """Size and stride as one AD_WINDOWS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADWindows",
            display_name="AD Windows",
            category=types.TEXTURE_TOOLS,
            description="For pictures larger than the model was made for, such as long panoramas and big textures: the "
            "picture is sampled in overlapping windows, and overlaps are averaged at every step.",
            search_aliases=[*NAME, "multidiffusion", "panorama", "large texture", "tiled sampling"],
            inputs=[
                io.Int.Input(
                    "size",
                    default=512,
                    min=64,
                    max=16384,
                    step=8,
                    tooltip="Width and height of a window in pixels: the size the model was made for, 512 for SD1.5, "
                    "1024 for SDXL. Textures and photos alike.",
                ),
                io.Int.Input(
                    "stride",
                    default=64,
                    min=8,
                    max=16384,
                    step=8,
                    tooltip="How far apart windows lie, in pixels. Small strides hide the seams best, large ones are "
                    "faster: half the stride takes twice the windows along each side. Textures: 64.",
                ),
            ],
            outputs=[types.ADWindows.Output("windows", tooltip="Plug into windows of a guidance node.")],
        )

    @classmethod
    def execute(cls, size, stride) -> io.NodeOutput:
        """The core checks that windows leave no gaps."""
        return io.NodeOutput(Windows(size, stride))


NODES = [ADWindows]
