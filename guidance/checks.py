"""Whether a run can be made at all: references, model, picture, text and windows, asked before anything is loaded."""

from collections.abc import Mapping, Sequence

import torch
from comfy.model_patcher import ModelPatcher

from ..attention import conditioning, inputs
from ..attention.conditioning import Cond
from ..attention.frames import without_frame
from ..attention.layers import list_layers
from ..attention.reference import (
    Reference,
    check_channels,
    check_frame,
    check_image_latent,
    check_regions,
    warn_of_empty_mask,
)
from ..attention.regions import Regions
from ..tiling.rolling import is_tiled
from .settings import GuidanceSettings
from .windowed_model import check_conds, check_model_options
from .windows import Windows


def check_reference(name: str, reference: Reference, model: ModelPatcher) -> None:
    """Refuse a reference that was made for another kind of model, or that offers nothing.

    Raises:
        ValueError: names the socket, what it was given and what is allowed.
    """
    count = len(list_layers(model.model.diffusion_model))
    channels = model.get_model_object("latent_format").latent_channels
    if not any(part.weight > 0 for part in reference.parts):
        raise ValueError(f"{name}: every reference in it has weight 0 or below; give at least one a weight above 0")
    for part in reference.parts:
        check_channels(name, part.latent, channels)
        if part.layers[-1] >= count:
            raise ValueError(
                f"{name}: it was captured on layer {part.layers[-1]}, this model has layers 0 to {count - 1}; "
                "connect the same model to the Capture node"
            )
    inputs.check_texts(name, reference, model.model)


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
        if any(part.weight < 0 for part in content.parts):
            raise ValueError(
                "content: it has a reference of negative weight, which only a style can have; use 0 or more"
            )
    if regions is not None:
        check_regions(style, regions)


def check_run(
    model: ModelPatcher,
    conds: Mapping[str, Sequence[Cond]],
    latent: torch.Tensor,
    noise_mask: torch.Tensor | None,
    *,
    style: Reference,
    content: Reference | None,
    settings: GuidanceSettings,
    regions: Regions | None = None,
    windows: Windows | None = None,
) -> None:
    """Every refusal of a run, asked at its start, before anything is loaded: none depends on the order of nodes.

    Args:
        model: that is about to run, with all that other nodes have put on it.
        conds: the sampler's conditions by kind, as a guider holds them.
        latent: the picture's, [b c h w] or [b c 1 h w].
        noise_mask: where it may change, in any shape.

    Raises:
        ValueError: names the input, what it was given and what is allowed.
    """
    check_latent(model, latent, noise_mask)
    warn_of_empty_mask("latent_image: its noise mask", noise_mask)
    shape, content = latent.shape, content if settings.content_weight > 0 else None
    pixels = model.get_model_object("latent_format").spacial_downscale_ratio
    check_references(model, style, content, regions)
    check_picture(shape, content, regions, pixels)
    check_target_masks("style", style, shape[0])
    if content is not None:
        check_target_masks("content", content, shape[0])
    inputs.check_conds(model.model, conds)
    check_text(model, conditioning.of_sampler(conds), shape, style, content)
    if windows is not None and not windows.place(*shape[-2:], pixels).is_whole:
        check_windows(model, conds, shape)


def check_latent(
    model: ModelPatcher, latent: torch.Tensor, noise_mask: torch.Tensor | None, *, may_be_empty: bool = False
) -> None:
    """Refuse a latent to be made into a picture that the model cannot take.

    Args:
        latent: as the LATENT socket carries it.
        noise_mask: where it may change, in any shape.
        may_be_empty: it has yet to go through ComfyUI, which gives an empty one the model's channels.

    Raises:
        ValueError: names the input, what it was given and what is allowed.
    """
    latent_format = model.get_model_object("latent_format")
    check_image_latent("latent_image", latent)
    check_frame("latent_image", latent, latent_format)
    if not may_be_empty or latent.any():
        check_channels("latent_image", latent, latent_format.latent_channels)
    if noise_mask is not None and not torch.isfinite(noise_mask).all():
        raise ValueError("latent_image: its noise mask holds NaN or infinite values; all values must be finite")


def check_windows(model: ModelPatcher, conds: Mapping[str, Sequence[Cond]], shape: torch.Size) -> None:
    """Refuse what cannot be cut into windows.

    Raises:
        ValueError: says what to take away.
    """
    if is_tiled(model):
        raise ValueError(
            "windows: the model comes from Seamless Tiling, which would close each window on itself; use one of the two"
        )
    if len(shape) == 5:
        raise ValueError(
            "windows: this model makes videos of one frame, which ComfyUI cannot cut; take the windows away"
        )
    check_conds(conds)
    check_model_options(model.model_options)


def check_text(
    model: ModelPatcher, sampler: Sequence[Cond], shape: torch.Size, style: Reference, content: Reference | None
) -> None:
    """Refuse a content text of another length than the picture's, where attention sees both.

    Args:
        sampler: the conditions of passes whose reference brought none.
        shape: of the picture's latent.

    Raises:
        ValueError: names the socket and both lengths.
    """
    layers = list_layers(model.model.diffusion_model)
    if content is None or not any(layers[index].joint for index in {*style.layers, *content.layers}):
        return
    picture = _text_lengths(model, sampler, shape, style.conditioning)
    for part in content.active_parts:
        lengths = _text_lengths(model, sampler, shape, part.conditioning)
        if len(picture | lengths) > 1:
            raise ValueError(
                f"content: its text condition has {_either(lengths)} tokens, the picture's has {_either(picture)}, and "
                "this model's attention sees both; connect one conditioning to the Capture nodes of style and content"
            )


def _text_lengths(
    model: ModelPatcher, sampler: Sequence[Cond], shape: torch.Size, own: conditioning.Conditioning | None
) -> set[int]:
    """Tokens of the texts that may be in force in a pass, after what the model fills them up with."""
    conds = conditioning.of_passes(model.model, sampler, own)
    blank = torch.zeros(1, *shape[1:])
    encoded = conditioning.encode(model.model, conds, without_frame(blank), size=shape[-2:])
    return {one["model_conds"]["c_crossattn"].cond.shape[1] for one in encoded if "c_crossattn" in one["model_conds"]}


def _either(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def check_target_masks(name: str, reference: Reference, batch: int) -> None:
    """Refuse target masks that are neither one nor as many as the pictures being made.

    Raises:
        ValueError: names the socket and both counts.
    """
    for part in reference.active_parts:
        if part.target_mask is not None and len(part.target_mask) not in (1, batch):
            raise ValueError(
                f"{name}: its target_mask has {len(part.target_mask)} masks for {batch} pictures; give one, or one for "
                "each"
            )


def check_picture(shape: torch.Size, content: Reference | None, regions: Regions | None, pixels: int) -> None:
    """Refuse content and target labels that do not fit the picture being made.

    Args:
        shape: [b c h w] of the picture's latent.
        pixels: picture pixels to a latent pixel.

    Raises:
        ValueError: names the socket and both sizes or counts.
    """
    for part in content.active_parts if content is not None else ():
        batch, _, height, width = part.latent.shape
        if (height, width) != shape[-2:]:
            raise ValueError(
                f"content: its picture is {width * pixels}x{height * pixels}, the one being made is "
                f"{shape[-1] * pixels}x{shape[-2] * pixels} (width x height in pixels); resize the content picture to "
                "the size of the picture being made"
            )
        if batch not in (1, shape[0]):
            raise ValueError(f"content: {batch} pictures for a batch of {shape[0]}; give one, or one for each")
    if regions is not None and regions.target.shape[0] not in (1, shape[0]):
        raise ValueError(
            f"regions: {regions.target.shape[0]} target label images for {shape[0]} pictures; give one, or one for each"
        )
