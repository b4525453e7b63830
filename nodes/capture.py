"""Capture Reference Attention: turn a picture into a reference."""

import torch
from comfy_api.latest import io

from ..attention.encoding import encode_reference
from ..attention.inputs import check_conditioning, rgb
from ..attention.layers import auto_layer_count, list_layers, select_layers
from ..attention.reference import (
    BALANCES,
    LEAST_WEIGHT,
    Reference,
    ReferencePart,
    check_channels,
    check_frame,
    check_image_latent,
    check_reference_mask,
    check_target_mask,
    check_weight,
    warn_of_mask,
)
from .shared import NAME, STYLE, TEXTURE
from .types import START_HERE, ADReference


class ADCaptureReferenceAttention(io.ComfyNode):
    """Makes an AD_REFERENCE; nothing heavy happens here."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADCaptureReferenceAttention",
            display_name="Capture Reference Attention (style)",
            category=START_HERE,
            description="Turns a picture into a reference for style (its look, colours, texture) or content (its "
            "structure), depending on the socket you plug it into. Its attention is read during sampling.",
            search_aliases=[*NAME, *STYLE, *TEXTURE, "reference image"],
            inputs=[
                io.Model.Input("model", tooltip="The model you sample with; LoRAs included."),
                io.Latent.Input(
                    "latent",
                    optional=True,
                    tooltip="The reference picture after VAE Encode, or connect image and vae instead. For content it "
                    "must have the size of the picture being made. A batch counts as several references.",
                ),
                io.String.Input(
                    "layers",
                    default="auto",
                    tooltip="Which part of the look is taken: late layers carry texture and colour, early ones shapes. "
                    "auto is right for textures and photos: the last six self-attention layers; or write indices such "
                    "as 10-15 or 3,5,8-10, or all.",
                ),
                io.Float.Input(
                    "weight",
                    default=1.0,
                    min=LEAST_WEIGHT,
                    max=100.0,
                    step=0.05,
                    tooltip="How much this reference counts beside others pooled with it; 0 leaves it out. "
                    "With a single style reference it changes nothing: leave it at 1. See balance.",
                ),
                io.Mask.Input("mask", optional=True, tooltip="Only the painted part of the reference is used."),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Text for reading the reference: an encoded empty prompt is best. "
                    "Without it the sampler's negative prompt is used.",
                ),
                ADReference.Input(
                    "reference",
                    optional=True,
                    tooltip="Another Capture node: both are pooled, and the picture mixes what suits it best.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The reference picture, in place of latent: it is scaled to the size that the model was "
                    "made for and encoded with vae. A batch counts as several references.",
                ),
                io.Vae.Input("vae", optional=True, tooltip="The model's VAE; only for image."),
                io.Mask.Input(
                    "target_mask",
                    optional=True,
                    tooltip="Where in the new picture this reference counts; the rest is left to other references or "
                    "to the prompt. Grey counts in part. Stretched to the picture.",
                ),
                io.Combo.Input(
                    "balance",
                    options=list(BALANCES),
                    default=BALANCES[0],
                    optional=True,
                    advanced=True,
                    tooltip="What the weights of pooled references mean. amount: each place takes what suits it best, "
                    "so one may win nearly everything. share: each gets its weight's share everywhere, and a weight "
                    "below 0 pushes the picture away from a reference. One share holds for all that are pooled.",
                ),
            ],
            outputs=[
                ADReference.Output("reference", tooltip="Plug into style for the look, into content for the structure.")
            ],
        )

    @classmethod
    def execute(
        cls, model, latent=None, layers="auto", weight=1.0, mask=None, conditioning=None, reference=None, image=None,
        vae=None, target_mask=None, balance=BALANCES[0],
    ) -> io.NodeOutput:  # fmt: skip
        """Check everything that can be checked without running the model, then encode what is not encoded yet."""
        network = model.model.diffusion_model
        indices = select_layers(layers, len(list_layers(network)), auto_layer_count(network))
        if conditioning is not None:
            check_conditioning("conditioning", conditioning, model.model)
        check_weight(weight, balance)
        if target_mask is not None:
            check_target_mask(target_mask)
        if image is None:
            samples = checked_latent(model, latent)
        elif latent is not None:
            raise ValueError("image: latent is connected as well; connect one of the two")
        else:
            image = rgb("image", image)
            if mask is not None:
                check_reference_mask(mask, image.shape[0])
            samples = encode_reference(image, vae, model.model)
        captured = Reference((ReferencePart(samples, indices, weight, mask, conditioning, target_mask, balance),))
        return io.NodeOutput(captured if reference is None else captured.pooled_with(reference))


def checked_latent(model, latent) -> torch.Tensor:
    """The samples of a LATENT that fits the model.

    Raises:
        ValueError: names the input, what it was given and what is allowed.
    """
    if latent is None:
        raise ValueError("latent: nothing is connected; connect a picture after VAE Encode here, or image and vae")
    samples = latent["samples"]
    check_image_latent("latent", samples)
    latent_format = model.get_model_object("latent_format")
    check_channels("latent", samples, latent_format.latent_channels)
    check_frame("latent", samples, latent_format)
    warn_of_mask("latent", latent)
    return samples


NODES = [ADCaptureReferenceAttention]
