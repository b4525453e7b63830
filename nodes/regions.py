"""AD Regions: which part of the picture takes its texture from which part of the reference."""

from comfy_api.latest import io

from ..attention.inputs import rgb
from ..attention.regions import read_regions
from . import types
from .shared import NAME


class ADRegions(io.ComfyNode):
    """Two label images as one AD_REGIONS."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADRegions",
            display_name="AD Regions",
            category=types.TEXTURE_TOOLS,
            description="Paint by texture: each colour of the target takes its texture from the part of the reference "
            "that has the same colour. Use flat colours; shades within 32 of 255 count as one colour.",
            search_aliases=[*NAME, "controlled texture", "label map", "texture by numbers"],
            inputs=[
                io.Image.Input(
                    "reference_labels",
                    tooltip="The reference picture painted over in flat colours, one for each texture. A batch: one "
                    "for each picture of a pooled style reference.",
                ),
                io.Image.Input(
                    "target_labels",
                    tooltip="Where each texture goes in the new picture, in the same colours. Any size; it is "
                    "stretched to the picture.",
                ),
            ],
            outputs=[types.ADRegions.Output("regions", tooltip="Plug into regions of a guidance node.")],
        )

    @classmethod
    def execute(cls, reference_labels, target_labels) -> io.NodeOutput:
        """Colours become labels here, so that a missing one is found before any sampling."""
        reference_labels, target_labels = rgb("reference_labels", reference_labels), rgb("target_labels", target_labels)
        return io.NodeOutput(read_regions(reference_labels, target_labels))


NODES = [ADRegions]
