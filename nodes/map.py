"""AD Attention Map: seeing where the style comes from."""

from comfy_api.latest import io

from ..attention import conditioning as text
from ..attention.inputs import check_conditioning, rgb
from ..guidance.attention_map import MEAN, attention_map
from .capture import checked_latent
from .shared import NAME
from .types import INSPECT, ADReference


class ADAttentionMap(io.ComfyNode):
    """Where each place of a finished picture takes its look from."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADAttentionMap",
            display_name="AD Attention Map",
            category=INSPECT,
            description="Shows where each place of a finished picture takes its look from: the reference is painted "
            "with a colour chart, and the picture takes the colours of the places that it looks at. Bright where it "
            "looks at one place, dark where it looks everywhere.",
            search_aliases=[*NAME, "attention visualization", "correspondence", "where does the style come from"],
            inputs=[
                io.Model.Input("model", tooltip="The model that made the picture; LoRAs included."),
                ADReference.Input(
                    "style",
                    tooltip="The reference that the picture took its look from (Capture Reference Attention). Several "
                    "pooled ones get a chart each, in colours of their own.",
                ),
                io.Latent.Input("latent", tooltip="The finished picture, before VAE Decode."),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Text for reading the attention: an encoded empty prompt is best. Without it, zeros.",
                ),
                io.String.Input(
                    "layer",
                    default=MEAN,
                    optional=True,
                    tooltip="Which layer is looked at: mean for the mean of all that the reference was captured on, or "
                    "the index of one of them, such as 12. Early layers look at large shapes, late ones at fine "
                    "detail.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="A picture that belongs to the reference, pixel for pixel: its normal map, a mask, labels, "
                    "or the reference itself. Comes out at carried, rearranged like the picture. For several "
                    "references one, or a batch with one for each.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "map", tooltip="The picture in the colours of the places that it looks at, bright where it is sure."
                ),
                io.Image.Output(
                    "carried",
                    tooltip="image, carried to where the picture looks at it. Without image: the colour chart of each "
                    "reference, which says what place a colour of the map stands for.",
                ),
            ],
        )

    @classmethod
    def execute(cls, model, style, latent, conditioning=None, layer=MEAN, image=None) -> io.NodeOutput:
        """Check what can be checked without running the model, then one pass over the picture and each reference."""
        samples = checked_latent(model, latent)
        if conditioning is not None:
            check_conditioning("conditioning", conditioning, model.model)
        return io.NodeOutput(
            *attention_map(
                model,
                style,
                samples,
                cond=text.zeros(model.model) if conditioning is None else conditioning,
                layer=layer,
                image=None if image is None else rgb("image", image),
            )
        )


NODES = [ADAttentionMap]
