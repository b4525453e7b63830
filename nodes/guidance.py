"""The three ways to guided sampling. They share their settings and their implementation."""

import math

import comfy.samplers
from comfy_api.latest import io

from ..attention.inputs import check_conditioning, check_number
from ..guidance.checks import check_latent
from ..guidance.descent import Iteration, Observer
from ..guidance.patch import Guidance, apply_guidance
from ..guidance.samplers import offered_names, why_refused
from ..guidance.settings import GuidanceSettings
from .shared import (
    NAME,
    STYLE,
    TEXTURE,
    content_input,
    frames_input,
    lr_schedule_input,
    memory_input,
    regions_input,
    settings_inputs,
    shown_losses,
    style_input,
    windows_input,
)
from .types import OTHER_SAMPLERS, START_HERE

MOST_CFG = 100.0


def guide(model, style, content, regions, windows, settings: dict, observer: Observer | None = None):
    """The model with guidance on it, for any sampler."""
    return apply_guidance(model, Guidance(style, content, GuidanceSettings(**settings), regions, windows, observer))


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


class ADLossGuider(io.ComfyNode):
    """A guider for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADLossGuider",
            display_name="AD Loss Guider",
            category=OTHER_SAMPLERS,
            description="A guider for SamplerCustomAdvanced: sampling as with CFG, and after each step the picture is "
            "pulled towards the reference.",
            search_aliases=[*NAME, "guider", "guider for style transfer", "guider for textures"],
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
                    tooltip="How closely the picture follows the prompt. Textures: 1. A prompt in a style: 7.5 with "
                    "SD1.5, 7 with SDXL, 1 with FLUX.",
                ),
                *settings_inputs(),
                content_input(),
                regions_input(),
                windows_input(),
                lr_schedule_input(),
                memory_input(),
                frames_input(),
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
            display_name="AD-Guided KSampler (texture, style)",
            category=START_HERE,
            description="The KSampler, with one addition: after each step the picture is pulled towards the reference.",
            search_aliases=[*NAME, *STYLE, *TEXTURE, "ksampler", "sampler"],
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
                    tooltip="More steps match the reference better. Textures and prompts in a style: 50.",
                ),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=MOST_CFG,
                    step=0.1,
                    round=0.01,
                    tooltip="How closely the picture follows the prompt. Textures: 1. A prompt in a style: 7.5 with "
                    "SD1.5, 7 with SDXL, 1 with FLUX.",
                ),
                io.Combo.Input(
                    "sampler_name",
                    options=offered_names(),
                    default="ddim",
                    tooltip="How noise is taken out. ddim and euler are what the paper uses. Those that cannot be "
                    "guided (uni_pc, sa_solver) are left out.",
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
                    tooltip="Below 1, more of the picture you start from is kept. A new texture, a prompt in a style: "
                    "1. A texture made larger: 0.4. A painted part of a photo: 0.8.",
                ),
                style_input(),
                *settings_inputs(),
                content_input(),
                regions_input(),
                windows_input(),
                lr_schedule_input(),
                memory_input(),
                frames_input(),
            ],
            outputs=[io.Latent.Output(tooltip="The finished latent, for VAE Decode.")],
        )

    @classmethod
    def validate_inputs(cls, sampler_name) -> bool | str:
        """Asked in place of the list's own check: workflows made elsewhere may hold a name that it leaves out."""
        reason = None if sampler_name is None else why_refused(sampler_name)  # None: it is linked, and not known yet
        if reason is not None:
            return f"{sampler_name} is not supported with attention distillation: {reason}"
        if sampler_name is not None and sampler_name not in comfy.samplers.SAMPLER_NAMES:
            return f"{sampler_name!r} is no sampler; use one of {', '.join(offered_names())}"
        return True

    @classmethod
    def execute(
        cls, model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise, style,
        content=None, regions=None, windows=None, **settings,
    ) -> io.NodeOutput:  # fmt: skip
        """ComfyUI's own KSampler on the guided model; on the node, what became of the losses."""
        from nodes import common_ksampler  # ComfyUI's top-level module, not this folder

        iterations: list[Iteration] = []
        guided = guide(model, style, content, regions, windows, settings, iterations.append)
        check_prompts(model, positive, negative, cfg)
        check_latent(model, latent_image["samples"], latent_image.get("noise_mask"), may_be_empty=True)
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
        return io.NodeOutput(latent, ui=shown_losses(iterations))


class ADApplyGuidance(io.ComfyNode):
    """Guidance as a MODEL patch."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        return io.Schema(
            node_id="ADApplyGuidance",
            display_name="Apply AD Guidance",
            category=OTHER_SAMPLERS,
            description="Puts guidance on a model: any sampler node that runs it pulls the picture towards the "
            "reference after each step. Put it after LoRAs and other model nodes.",
            search_aliases=[*NAME, "model patch", "patch for style transfer", "patch for textures"],
            inputs=[
                io.Model.Input("model", tooltip="The model that makes the picture; LoRAs included."),
                style_input(),
                *settings_inputs(),
                content_input(),
                regions_input(),
                windows_input(),
                lr_schedule_input(),
                memory_input(),
                frames_input(),
            ],
            outputs=[io.Model.Output(tooltip="Plug into any sampler node. The model you put in stays as it was.")],
        )

    @classmethod
    def execute(cls, model, style, content=None, regions=None, windows=None, **settings) -> io.NodeOutput:
        """A guided clone of the model."""
        return io.NodeOutput(guide(model, style, content, regions, windows, settings))


NODES = [ADLossGuider, ADGuidedKSampler, ADApplyGuidance]
