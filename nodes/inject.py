"""Inject Reference KV: the fast preview."""

from comfy_api.latest import io

from ..guidance.injection import InjectionSettings, apply_injection
from .types import CATEGORY, ADReference


class ADInjectReferenceKV(io.ComfyNode):
    """KV injection as a MODEL patch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADInjectReferenceKV",
            display_name="Inject Reference KV",
            category=CATEGORY,
            description="The fast preview: while sampling, the picture looks at the reference instead of at itself. "
            "Nearly as fast as without it, works with every sampler, and gives a fainter look than guidance.",
            search_aliases=["attention distillation", "kv injection", "reference only", "style transfer", "preview"],
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the picture; LoRAs included."),
                ADReference.Input(
                    "style", tooltip="The reference whose look the picture takes on (Capture Reference Attention)."
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="How much of the reference's look is taken on. 0 changes nothing, 1 is the most.",
                ),
                io.Float.Input(
                    "start_percent",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Later starts leave the composition to the prompt. 0 is the start of sampling, 1 its end.",
                ),
                io.Float.Input(
                    "end_percent",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Earlier ends leave fine detail to the model alone. 0 is the start of sampling, 1 its end.",
                ),
            ],
            outputs=[io.Model.Output(tooltip="Plug into any sampler node. The model you put in stays as it was.")],
        )

    @classmethod
    def execute(cls, model, style, **settings) -> io.NodeOutput:
        """A clone of the model with the injection on it."""
        return io.NodeOutput(apply_injection(model, style, InjectionSettings(**settings)))


NODES = [ADInjectReferenceKV]
