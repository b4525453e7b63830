"""Fine-tune VAE Decoder: sharper decoding."""

import comfy.utils
import torch
from comfy.cli_args import args
from comfy_api.latest import io
from PIL import Image

from ..attention.inputs import rgb
from ..decoder.finetune import FinetuneSettings, finetune_decoder
from .shared import NAME
from .types import COLOUR_AND_DETAIL


class ADFinetuneVAEDecoder(io.ComfyNode):
    """Fits the decoder of a VAE to the reference."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADFinetuneVAEDecoder",
            display_name="Fine-tune VAE Decoder",
            category=COLOUR_AND_DETAIL,
            description="Sharper results: trains the decoder of the VAE on the reference picture for a moment. Decode "
            "the finished latent with the VAE that comes out.",
            search_aliases=[*NAME, "sharper decoding", "vae training", "vae decoder", "sharpen"],
            inputs=[
                io.Vae.Input("vae", tooltip="The VAE to start from. It stays as it was."),
                io.Image.Input(
                    "image",
                    tooltip="The reference picture whose fine detail the decoder learns. A batch is learned together.",
                ),
                io.Int.Input(
                    "steps",
                    default=75,
                    min=0,
                    max=10000,
                    tooltip="More is sharper and closer to the reference's grain, and takes longer. Textures and "
                    "photos: 75. 0 changes nothing.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0001,
                    min=0.000001,
                    max=0.01,
                    step=0.00001,
                    round=0.000001,
                    tooltip="How fast the decoder changes. Higher is sharper sooner; too high gives false colours. "
                    "Textures and photos: 0.0001.",
                ),
            ],
            outputs=[io.Vae.Output(tooltip="Plug into any VAE Decode. Its encoder is that of the VAE you put in.")],
        )

    @classmethod
    def execute(cls, vae, image, **settings) -> io.NodeOutput:
        """Train, and show the reconstruction meanwhile."""
        settings = FinetuneSettings(**settings)
        progress = comfy.utils.ProgressBar(settings.steps)

        def show(step: int, loss: float, picture: torch.Tensor) -> None:
            preview = Image.fromarray((picture * 255).byte().cpu().numpy())
            progress.update_absolute(step, settings.steps, ("JPEG", preview, args.preview_size))

        return io.NodeOutput(finetune_decoder(vae, rgb("image", image), settings, show))


NODES = [ADFinetuneVAEDecoder]
