"""Whether references fit the model and the picture: asked before anything is loaded."""

import torch
from comfy.model_patcher import ModelPatcher

from ..attention.layers import list_layers
from ..attention.reference import Reference, check_channels, check_regions
from ..attention.regions import Regions


def check_reference(name: str, reference: Reference, model: ModelPatcher) -> None:
    """Refuse a reference that was made for another kind of model, or that offers nothing.

    Raises:
        ValueError: names the socket, what it was given and what is allowed.
    """
    count = len(list_layers(model.model.diffusion_model))
    channels = model.get_model_object("latent_format").latent_channels
    if not reference.active_parts:
        raise ValueError(f"{name}: every reference in it has weight 0; give at least one a weight above 0")
    for part in reference.parts:
        check_channels(name, part.latent, channels)
        if part.layers[-1] >= count:
            raise ValueError(
                f"{name}: it was captured on layer {part.layers[-1]}, this model has layers 0 to {count - 1}; "
                "connect the same model to the Capture node"
            )


def check_weights(model: ModelPatcher) -> None:
    """Refuse weights that gradients cannot pass: ComfyUI keeps those of a bypass LoRA outside of the model.

    Raises:
        ValueError: names the node and another one that works.
    """
    if model.get_injections("bypass_lora"):
        raise ValueError("model: Load LoRA (Bypass) is not supported with attention distillation; use Load LoRA")


def check_references(model: ModelPatcher, style: Reference, content: Reference | None, regions: Regions | None) -> None:
    """Refuse references and regions that do not fit the model or each other, and models without gradients.

    Raises:
        ValueError: names the socket, what it was given and what is allowed.
    """
    check_weights(model)
    check_reference("style", style, model)
    if content is not None:
        check_reference("content", content, model)
    if regions is not None:
        check_regions(style, regions)


def check_picture(shape: torch.Size, content: Reference | None, regions: Regions | None) -> None:
    """Refuse content and target labels that do not fit the picture being made.

    Args:
        shape: [b c h w] of the picture's latent.

    Raises:
        ValueError: names the socket and both sizes or counts.
    """
    for part in content.active_parts if content is not None else ():
        batch, _, height, width = part.latent.shape
        if (height, width) != shape[-2:]:
            raise ValueError(
                f"content: its latent is {width}x{height}, the picture's is {shape[-1]}x{shape[-2]} (width x height in "
                "latent pixels); resize the content picture to the size of the picture being made"
            )
        if batch not in (1, shape[0]):
            raise ValueError(f"content: {batch} pictures for a batch of {shape[0]}; give one, or one for each")
    if regions is not None and regions.target.shape[0] not in (1, shape[0]):
        raise ValueError(
            f"regions: {regions.target.shape[0]} target label images for {shape[0]} pictures; give one, or one for each"
        )
