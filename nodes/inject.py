"""Inject Reference KV: the fast preview."""

from comfy_api.latest import io

from ..guidance.injection import apply_injection
from ..guidance.settings import MAX_NEGATIVE_STRENGTH, MAX_STRENGTH, InjectionSettings
from .shared import NAME, range_inputs, style_input
from .types import OTHER_SAMPLERS


class ADInjectReferenceKV(io.ComfyNode):
    """KV injection as a MODEL patch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADInjectReferenceKV",
            display_name="Inject Reference KV",
            category=OTHER_SAMPLERS,
            description="The fast preview: while sampling, the picture looks at the reference instead of at itself. "
            "Nearly as fast as without it, works with every sampler, and gives a fainter look than guidance.",
            search_aliases=[
                *NAME,
                "kv injection",
                "reference only",
                "preview of style transfer",
                "preview of textures",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the picture; LoRAs included."),
                style_input(),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=MAX_STRENGTH,
                    step=0.01,
                    tooltip="How much of the reference's look is taken on. 0 none, 1 all that it gives: textures "
                    "and photos. Above 1 it is exaggerated; try 2.",
                ),
                *range_inputs(),
                io.Float.Input(
                    "negative_strength",
                    default=0.0,
                    min=0.0,
                    max=MAX_NEGATIVE_STRENGTH,
                    step=0.1,
                    optional=True,
                    tooltip="Pushes the picture away from what it would be without the reference. 0 is off, and "
                    "fastest. Textures: 3, strength 1. A prompt in a style: 3, strength 0, which keeps closer to the "
                    "prompt.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="Plug into any sampler node. The model you put in stays as it was.")],
        )

    @classmethod
    def execute(cls, model, style, **settings) -> io.NodeOutput:
        """A clone of the model with the injection on it."""
        return io.NodeOutput(apply_injection(model, style, InjectionSettings(**settings)))


NODES = [ADInjectReferenceKV]
