"""Example Reference Picture: something to start from, before a picture of one's own is loaded."""

import torch
from comfy_api.latest import io

from ..attention.inputs import rgb
from ..pictures import PICTURES, SIZE
from .types import START_HERE


class ADExampleReference(io.ComfyNode):
    """One of the pictures made by formula."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADExampleReference",
            display_name="Example Reference Picture",
            category=START_HERE,
            description="A picture to try things with: a texture, a painted style, a scene, or label maps for "
            "AD Regions. Put Load Image in its place for a picture of your own.",
            search_aliases=["attention distillation", "sample image", "test picture", "texture", "style reference"],
            inputs=[
                io.Combo.Input(
                    "picture",
                    options=list(PICTURES),
                    default="texture: scales",
                    tooltip="texture: one material all over, or two side by side. style: a painting. scene: things to "
                    "be painted. labels: white and black for AD Regions, or for masks; the halves fit texture: two, "
                    "and the disc as target takes after its left half, what is around it after the right.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="A picture of your own: it comes out in place of the example.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    tooltip=f"The example, {SIZE} x {SIZE} pixels, always the same one; or your own picture."
                )
            ],
        )

    @classmethod
    def execute(cls, picture, image=None) -> io.NodeOutput:
        """[1 512 512 3], fp32 in 0..1; or the picture that came in."""
        if image is not None:
            return io.NodeOutput(rgb("image", image))
        if picture not in PICTURES:
            raise ValueError(f"picture: {picture!r} is not one of {', '.join(PICTURES)}")
        return io.NodeOutput(torch.from_numpy(PICTURES[picture]()).float()[None])


NODES = [ADExampleReference]
