"""Inputs that several nodes share: the settings of guidance, references, regions, windows."""

import logging
from collections.abc import Sequence

from comfy_api.latest import io, ui

from ..guidance.curve import draw_losses
from ..guidance.descent import Iteration
from ..guidance.settings import CONTENT_LOSSES, LR_SCHEDULES, MAX_FRAMES, MEMORY
from .types import ADReference, ADRegions, ADWindows

# What artists search for, in the languages that the pack speaks. The front end finds nodes by these, but it ranks by
# names: the nodes that are meant carry the plain words in theirs.
NAME = ["attention distillation", "注意力蒸馏", "注意力蒸餾", "アテンション蒸留"]
STYLE = ["style transfer", "style reference", "风格迁移", "風格轉換", "スタイル転送", "画風"]
TEXTURE = ["texture", "texture synthesis", "纹理", "紋理", "テクスチャ"]


def settings_inputs() -> list[io.Input]:
    """The settings in the order of the contract."""
    return [
        io.Float.Input(
            "learning_rate",
            default=0.015,
            min=0.0001,
            max=1.0,
            step=0.001,
            round=0.0001,
            tooltip="How strongly the picture is pulled towards the reference at each step. Low keeps the "
            "prompt, high takes over the reference's texture; too high gives noise. Textures and photos in a style: "
            "0.05. A prompt in a style: 0.015 (FLUX: 0.01).",
        ),
        io.Int.Input(
            "iterations",
            default=2,
            min=0,
            max=100,
            tooltip="More gives a closer match to the reference and takes longer. Textures: 3, large ones 2. A prompt "
            "in a style: 3 with SD1.5, 2 with SDXL and FLUX. 0 turns guidance off.",
        ),
        io.Boolean.Input(
            "adain",
            default=True,
            tooltip="On: colours and contrast of the reference are taken over at each step. A prompt in a style: on. "
            "Textures: off.",
        ),
        io.Float.Input(
            "content_weight",
            default=0.25,
            min=0.0,
            max=1000.0,
            step=0.05,
            tooltip="How firmly the structure of the content picture is held. A photo in a style: 0.25; more keeps "
            "more of the photo. Does nothing without a content reference, as for textures.",
        ),
        io.Float.Input(
            "attention_scale",
            default=1.0,
            min=0.05,
            max=10.0,
            step=0.05,
            advanced=True,
            tooltip="Above 1 the picture copies sharper, more exact pieces of the reference; below 1 it blends them. "
            "Textures and photos: 1.",
        ),
        io.Combo.Input(
            "content_loss",
            options=list(CONTENT_LOSSES),
            default="query",
            advanced=True,
            tooltip="How the structure is held. query keeps it firmly: photos in a style. query_key keeps what belongs "
            "together and lets shapes change more; its weight is about 200. query_key_value lies between; its weight "
            "is about 1. query_edges keeps outlines most and gives the style more room between them.",
        ),
        *range_inputs(),
    ]  # fmt: skip


def range_inputs() -> list[io.Input]:
    """The part of the sampling range in which a node has its effect."""
    return [
        io.Float.Input(
            "start_percent",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Later starts leave the composition to the prompt. 0 is the start of sampling, 1 its end. Textures "
            "and photos: 0.",
        ),
        io.Float.Input(
            "end_percent",
            default=1.0,
            min=0.0,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip="Earlier ends leave fine detail to the model alone. 0 is the start of sampling, 1 its end. "
            "Textures and photos: 1.",
        ),
    ]


def style_input() -> io.Input:
    """The reference whose look is taken on."""
    return ADReference.Input(
        "style", tooltip="The reference whose look the picture takes on (Capture Reference Attention)."
    )


def content_input() -> io.Input:
    """The reference whose structure stays."""
    return ADReference.Input(
        "content",
        optional=True,
        tooltip="A reference whose structure the picture keeps. It must have the size of the picture being made.",
    )


def regions_input() -> io.Input:
    """Which part takes its look from which."""
    return ADRegions.Input(
        "regions",
        optional=True,
        tooltip="Which part of the picture takes its look from which part of the style (AD Regions).",
    )


def windows_input() -> io.Input:
    """How pictures larger than the model's native size are sampled."""
    return ADWindows.Input(
        "windows",
        optional=True,
        tooltip="For pictures larger than the model was made for: sample in overlapping windows (AD Windows).",
    )


def _later_choice(name: str, options: Sequence[str], tooltip: str) -> io.Input:
    """A list of choices, the first of them the default, that stands behind all inputs of older workflows."""
    return io.Combo.Input(
        name, options=list(options), default=options[0], optional=True, advanced=True, tooltip=tooltip
    )


def lr_schedule_input() -> io.Input:
    """How the learning rate falls, on guided nodes."""
    return _later_choice(
        "lr_schedule",
        LR_SCHEDULES,
        "How the pull ends. constant is the paper's, for textures and prompts in a style. linear and cosine "
        "fall to near 0 and leave a cleaner picture.",
    )


def memory_input() -> io.Input:
    """How memory is spent."""
    return _later_choice(
        "memory",
        MEMORY,
        "The picture is the same with each. auto: as fast as memory allows. small: less memory, about a third "
        "slower; for large pictures and small cards. fast: never slower, and may run out of memory.",
    )


def frames_input() -> io.Input:
    """Whether the batch is one picture moving."""
    return io.Float.Input(
        "frames",
        default=0.0,
        min=0.0,
        max=MAX_FRAMES,
        step=0.1,
        optional=True,
        advanced=True,
        tooltip="For a batch that is one picture moving, frame by frame: how firmly each frame holds on to the one "
        "before it, so that its texture does not boil. It counts as one more style of this weight; 1 is a good start. "
        "All frames then begin with the same noise, and their texture goes along with what moves in the content "
        "reference, or without one in the latent. 0: each picture of the batch for itself.",
    )


def shown_losses(iterations: Sequence[Iteration]) -> ui.PreviewImage | None:
    """What a node shows after a run: how its losses fell. None where there was no iteration.

    A run is not given up where the folder for previews cannot be written.
    """
    if not iterations:
        return None
    try:
        return ui.PreviewImage(draw_losses(iterations)[None])
    except OSError as error:
        logging.warning("Attention distillation: the plot of the losses could not be saved: %s", error)
        return None
