"""AD Optimize Latent: textures and style transfer without sampling."""

import comfy.sample
import latent_preview
from comfy_api.latest import io

from ..attention import conditioning as text
from ..attention.inputs import check_conditioning
from ..guidance.checks import check_latent
from ..guidance.descent import Iteration
from ..guidance.optimise import STARTS, OptimiseSampler, OptimiseSettings, optimise_latent
from ..guidance.settings import LR_SCHEDULES, GuidanceSettings
from .shared import (
    NAME,
    STYLE,
    TEXTURE,
    content_input,
    frames_input,
    memory_input,
    regions_input,
    settings_inputs,
    shown_losses,
    style_input,
)
from .types import START_HERE

NOT_USED = ("adain", "start_percent", "end_percent")
# What an empty latent says of its size, for models with other VAEs than Stable Diffusion's; a finished one does not.
RATIOS = ("downscale_ratio_spacial", "downscale_ratio_temporal")
DEFAULTS = {"learning_rate": 0.05, "iterations": 1}
TOOLTIPS = {
    "learning_rate": "How strongly the latent is pulled towards the reference at each step. High takes over more of "
    "its texture; too high gives noise. Textures and photos in a style: 0.05.",
    "iterations": "How many pulls make a step. Textures and photos in a style: 1; raise steps for a closer match. 0 "
    "changes nothing.",
}


class ADOptimizeLatent(io.ComfyNode):
    """The paper's optimisation mode."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Node contract: ids, order and defaults must not change."""
        settings = [setting for setting in settings_inputs() if setting.id not in NOT_USED]
        for setting in settings:
            setting.default = DEFAULTS.get(setting.id, setting.default)
            setting.tooltip = TOOLTIPS.get(setting.id, setting.tooltip)
        return io.Schema(
            node_id="ADOptimizeLatent",
            display_name="AD Optimize Latent (style transfer)",
            category=START_HERE,
            description="Changes a latent until its attention matches the reference's, without sampling: a texture "
            "from noise, or a photo in the style of the reference.",
            search_aliases=[*NAME, *STYLE, *TEXTURE, "optimize", "texture from noise", "appearance transfer"],
            inputs=[
                io.Model.Input("model", tooltip="The model whose attention is read; LoRAs included."),
                style_input(),
                io.Latent.Input("latent_image", tooltip="An empty latent for a texture, a picture for style transfer."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Another seed, another texture. Used only when starting from noise.",
                ),
                io.Combo.Input(
                    "start_from",
                    options=list(STARTS),
                    default="noise",
                    tooltip="noise makes something new of the latent's size, latent changes the picture that comes in. "
                    "Textures: noise. A photo in a style: latent.",
                ),
                io.Int.Input(
                    "steps",
                    default=200,
                    min=1,
                    max=1000,
                    tooltip="More steps match the reference better. Textures: 300. A photo in a style: 200.",
                ),
                *settings,
                io.Combo.Input(
                    "lr_schedule",
                    options=list(LR_SCHEDULES),
                    default="constant",
                    advanced=True,
                    tooltip="How the pull ends. constant is the paper's, for textures and photos. linear and cosine "
                    "fall to near 0 and leave less jitter.",
                ),
                content_input(),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip="Text for reading the attention: an encoded empty prompt is best. Without it, zeros.",
                ),
                regions_input(),
                memory_input(),
                frames_input(),
            ],
            outputs=[io.Latent.Output(tooltip="The finished latent, for VAE Decode.")],
        )

    @classmethod
    def execute(
        cls, model, style, latent_image, seed, start_from, steps, lr_schedule,
        content=None, conditioning=None, regions=None, **settings,
    ) -> io.NodeOutput:  # fmt: skip
        """Empty latents, noise, masks, preview, device and what else a latent carries: as in ComfyUI's own samplers."""
        iterations: list[Iteration] = []
        sampler = OptimiseSampler(
            style=style,
            content=content,
            regions=regions,
            settings=GuidanceSettings(adain=False, lr_schedule=lr_schedule, **settings),
            optimise=OptimiseSettings(steps=steps, start_from=start_from),
            observer=iterations.append,
        )
        check_latent(model, latent_image["samples"], latent_image.get("noise_mask"), may_be_empty=True)
        if conditioning is not None:
            check_conditioning("conditioning", conditioning, model.model)
        ratios = {name: latent_image[name] for name in RATIOS if name in latent_image}
        samples = comfy.sample.fix_empty_latent_channels(model, latent_image["samples"], **ratios)
        optimised = optimise_latent(
            model,
            sampler,
            latent_image=samples,
            noise=comfy.sample.prepare_noise(samples, seed, latent_image.get("batch_index")),
            cond=text.zeros(model.model) if conditioning is None else conditioning,
            denoise_mask=latent_image.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, steps),
            seed=seed,
        )
        kept = {name: value for name, value in latent_image.items() if name not in RATIOS}
        return io.NodeOutput({**kept, "samples": optimised}, ui=shown_losses(iterations))


NODES = [ADOptimizeLatent]
