"""The three ways to guided sampling. They share their settings and their implementation."""

import math

import comfy.samplers
from comfy_api.latest import io

from ..attention.inputs import check_conditioning, check_number
from ..attention.reference import check_channels, check_frame, check_image_latent
from ..guidance.patch import Guidance, apply_guidance
from ..guidance.settings import CONTENT_LOSSES, LR_SCHEDULES, GuidanceSettings
from .types import CATEGORY, ADReference, ADRegions, ADWindows

ALIASES = ["attention distillation", "style transfer", "texture synthesis", "style guidance", "AD"]
MOST_CFG = 100.0


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
            "prompt, high takes over the reference's texture; too high gives noise. 0.015 for text to image with a "
            "style, 0.05 for textures.",
        ),
        io.Int.Input(
            "iterations",
            default=2,
            min=0,
            max=100,
            tooltip="More gives a closer match to the reference and takes longer. 0 turns guidance off.",
        ),
        io.Boolean.Input(
            "adain",
            default=True,
            tooltip="On: colours and contrast of the reference are taken over at each step. Turn it off for textures.",
        ),
        io.Float.Input(
            "content_weight",
            default=0.25,
            min=0.0,
            max=1000.0,
            step=0.05,
            tooltip="How firmly the structure of the content picture is held. Nothing without a content reference.",
        ),
        io.Float.Input(
            "attention_scale",
            default=1.0,
            min=0.05,
            max=10.0,
            step=0.05,
            advanced=True,
            tooltip="Above 1 the picture copies sharper, more exact pieces of the reference; below 1 it blends them.",
        ),
        io.Combo.Input(
            "content_loss",
            options=list(CONTENT_LOSSES),
            default="query",
            advanced=True,
            tooltip="How the structure is held. query keeps it firmly. query_key keeps what belongs together and lets "
            "shapes change more; its weight is about 200. query_key_value lies between; its weight is about 1.",
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


def lr_schedule_input() -> io.Input:
    """How the learning rate falls; on guided nodes it stands behind all inputs of older workflows."""
    return io.Combo.Input(
        "lr_schedule",
        options=list(LR_SCHEDULES),
        default="constant",
        optional=True,
        advanced=True,
        tooltip="How the pull ends. linear and cosine fall to near 0 and leave a cleaner picture, good for textures; "
        "constant is the paper's.",
    )


def guide(model, style, content, regions, windows, settings: dict):
    """The model with guidance on it, for any sampler."""
    return apply_guidance(model, Guidance(style, content, GuidanceSettings(**settings), regions, windows))


def check_prompts(model, positive, negative, cfg: float) -> None:
    """Refuse what ComfyUI or the pack's passes could not read of the prompts; asked after `guide`.

    A negative prompt may be left out, and where cfg is 1 ComfyUI does not read it.

    Raises:
        ValueError: names the input, what it was given and what is allowed.
    """
    check_number("cfg", cfg, 0, MOST_CFG)
    check_conditioning("positive", positive, model.model)
    if negative:
        not_read = math.isclose(cfg, 1) and not model.model_options.get("disable_cfg1_optimization", False)
        check_conditioning("negative", negative, model.model, without_text=not_read)


def check_latent(model, latent_image) -> None:
    """Refuse a latent that the model cannot take; an empty one is given the model's channels by ComfyUI.

    Raises:
        ValueError: names the input, what it was given and what is allowed.
    """
    latent_format = model.get_model_object("latent_format")
    check_image_latent("latent_image", latent_image)
    check_frame("latent_image", latent_image, latent_format)
    if latent_image.any():
        check_channels("latent_image", latent_image, latent_format.latent_channels)


class ADLossGuider(io.ComfyNode):
    """A guider for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADLossGuider",
            display_name="AD Loss Guider",
            category=CATEGORY,
            description="A guider for SamplerCustomAdvanced: sampling as with CFG, and after each step the picture is "
            "pulled towards the reference.",
            search_aliases=[*ALIASES, "guider"],
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the picture; LoRAs included."),
                io.Conditioning.Input(
                    "positive", tooltip="What the picture should show. An empty prompt for textures."
                ),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                style_input(),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=MOST_CFG,
                    step=0.1,
                    round=0.01,
                    tooltip="How closely the picture follows the prompt. 1 for textures.",
                ),
                *settings_inputs(),
                content_input(),
                regions_input(),
                windows_input(),
                lr_schedule_input(),
            ],
            outputs=[io.Guider.Output(tooltip="Plug into SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(
        cls, model, positive, negative, style, cfg, content=None, regions=None, windows=None, **settings
    ) -> io.NodeOutput:
        """A plain CFG guider on the guided model."""
        guided = guide(model, style, content, regions, windows, settings)
        check_prompts(model, positive, negative, cfg)
        guider = comfy.samplers.CFGGuider(guided)
        guider.set_conds(positive, negative)
        guider.set_cfg(cfg)
        return io.NodeOutput(guider)


class ADGuidedKSampler(io.ComfyNode):
    """KSampler with guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADGuidedKSampler",
            display_name="AD-Guided KSampler",
            category=CATEGORY,
            description="The KSampler, with one addition: after each step the picture is pulled towards the reference.",
            search_aliases=[*ALIASES, "ksampler", "sampler"],
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the picture; LoRAs included."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Another seed, another picture. The same seed and settings give the same picture.",
                ),
                io.Int.Input(
                    "steps",
                    default=50,
                    min=1,
                    max=10000,
                    tooltip="More steps match the reference better. 30 to 50.",
                ),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=MOST_CFG,
                    step=0.1,
                    round=0.01,
                    tooltip="How closely the picture follows the prompt. 1 for textures.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=comfy.samplers.SAMPLER_NAMES,
                    default="ddim",
                    tooltip="How noise is taken out. ddim and euler are what the paper uses.",
                ),
                io.Combo.Input(
                    "scheduler",
                    options=comfy.samplers.SCHEDULER_NAMES,
                    default="ddim_uniform",
                    tooltip="How noise levels are spread over the steps. ddim_uniform is what the paper uses.",
                ),
                io.Conditioning.Input(
                    "positive", tooltip="What the picture should show. An empty prompt for textures."
                ),
                io.Conditioning.Input("negative", tooltip="What it should not show."),
                io.Latent.Input("latent_image", tooltip="The empty latent, or a picture to start from."),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    tooltip="Below 1, more of the picture you start from is kept.",
                ),
                style_input(),
                *settings_inputs(),
                content_input(),
                regions_input(),
                windows_input(),
                lr_schedule_input(),
            ],
            outputs=[io.Latent.Output(tooltip="The finished latent, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise, style,
        content=None, regions=None, windows=None, **settings,
    ) -> io.NodeOutput:  # fmt: skip
        """ComfyUI's own KSampler on the guided model."""
        from nodes import common_ksampler  # ComfyUI's top-level module, not this folder

        guided = guide(model, style, content, regions, windows, settings)
        check_prompts(model, positive, negative, cfg)
        check_latent(model, latent_image["samples"])
        check_number("denoise", denoise, 0, 1)
        (latent,) = common_ksampler(
            guided,
            seed,
            steps,
            cfg,
            sampler_name,
            scheduler,
            positive,
            negative,
            latent_image,
            denoise=denoise,
        )
        return io.NodeOutput(latent)


class ADApplyGuidance(io.ComfyNode):
    """Guidance as a MODEL patch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADApplyGuidance",
            display_name="Apply AD Guidance",
            category=CATEGORY,
            description="Puts guidance on a model: any sampler node that runs it pulls the picture towards the "
            "reference after each step. Put it after LoRAs and other model nodes.",
            search_aliases=[*ALIASES, "model patch"],
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the picture; LoRAs included."),
                style_input(),
                *settings_inputs(),
                content_input(),
                regions_input(),
                windows_input(),
                lr_schedule_input(),
            ],
            outputs=[io.Model.Output(tooltip="Plug into any sampler node. The model you put in stays as it was.")],
        )

    @classmethod
    def execute(cls, model, style, content=None, regions=None, windows=None, **settings) -> io.NodeOutput:
        """A guided clone of the model."""
        return io.NodeOutput(guide(model, style, content, regions, windows, settings))


NODES = [ADLossGuider, ADGuidedKSampler, ADApplyGuidance]
