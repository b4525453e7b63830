"""KV injection: the gradient-free baseline of the paper, as a patch on a model.

In the chosen layers the picture's queries look at the reference's keys and values, which are read at the noise level of
each model call. One forward pass over the reference per noise level is all it costs: no gradients, no full load.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy.ldm.modules.attention import optimized_attention
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import WrapperExecutor, WrappersMP, add_wrapper_with_key
from comfy_api.torch_helpers.torch_compile import TORCH_COMPILE_KWARGS
from einops import rearrange

from ..attention import conditioning
from ..attention.bank import TokenBank, TokenPool
from ..attention.hypernetworks import Patches, hypernetworks
from ..attention.inputs import check_conds
from ..attention.layers import AttentionLayer, describe_layers, list_layers
from ..attention.noise import NoiseLevel, Purpose, StepNoise
from ..attention.reader import ReferenceReader
from ..attention.reference import Reference
from ..losses.distillation import distillation_target
from .checks import check_reference
from .settings import NoiseRange

KEY = "attention_distillation_injection"

Replacement = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class InjectionSettings:
    """What the artist can set.

    Attributes:
        strength: 0 keeps the layer's own output, 1 takes what the reference gives.
        start_percent, end_percent: the part of the sampling range with injection, 0 = pure noise, 1 = finished.

    Raises:
        ValueError: names the setting, what was given and what is allowed.
    """

    strength: float = 1.0
    start_percent: float = 0.0
    end_percent: float = 1.0

    def __post_init__(self) -> None:
        for name, low in (("strength", 0.0), ("start_percent", 0.0), ("end_percent", self.start_percent)):
            value = getattr(self, name)
            if not (math.isfinite(value) and low <= value <= 1):
                raise ValueError(f"{name}: {value} is not allowed; use {low} to 1")

    @property
    def is_off(self) -> bool:
        """True where the result is exactly that of the model as it was."""
        return self.strength == 0 or self.start_percent == self.end_percent


def apply_injection(model: ModelPatcher, style: Reference, settings: InjectionSettings) -> ModelPatcher:
    """A clone of the model that looks at the reference in whatever sampler runs it. The model itself is not changed.

    Applied twice, the second reference is mixed over what the first one gives.

    Raises:
        ValueError: a model that is no UNet or has been compiled, or a reference that does not fit it.
    """
    kind = type(model.model.diffusion_model)
    if not issubclass(kind, UNetModel):
        raise ValueError(
            f"model: {kind.__name__} is not supported by KV injection; allowed are UNet models such as SD1.5 and SDXL"
        )
    check_not_compiled(model.model_options)
    check_one_device(model.get_additional_models_with_key("multigpu"))
    check_reference("style", style, model)
    patched = model.clone()
    if not settings.is_off:
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _check_start)
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, _SamplerSample(style, settings))
    return patched


def is_injected(model: ModelPatcher) -> bool:
    """Whether `apply_injection` has put a reference on this model."""
    return bool(model.get_wrappers(WrappersMP.SAMPLER_SAMPLE, KEY))


def take_injection_off(model: ModelPatcher) -> ModelPatcher:
    """A clone of the model without what `apply_injection` has put on it. The model itself is not changed."""
    plain = model.clone()
    for kind in (WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE):
        plain.remove_wrappers_with_key(kind, KEY)
    return plain


def _check_start(executor: WrapperExecutor, *args, **kwargs) -> torch.Tensor:
    """Around a whole sampling run: all refusals, asked before anything is loaded, in whichever order nodes stand."""
    guider: comfy.samplers.CFGGuider = executor.class_obj
    check_not_compiled(guider.model_options)
    check_one_device(guider.model_patcher.get_additional_models_with_key("multigpu"))
    check_conds(guider.model_patcher.model, guider.conds)
    return executor(*args, **kwargs)


def check_not_compiled(model_options: dict[str, Any]) -> None:
    """Refuse a model that TorchCompileModel has compiled, which would go on with the attention it was first given.

    Raises:
        ValueError: says what to take away.
    """
    if TORCH_COMPILE_KWARGS in model_options:
        raise ValueError(
            "model: a compiled model keeps the attention it was compiled with, so the reference cannot be injected at "
            "each step; take TorchCompileModel away (guidance itself works with it)"
        )


def check_one_device(clones: Sequence[ModelPatcher]) -> None:
    """Refuse a run that ComfyUI spreads over several devices: their worker threads would share one reading.

    Args:
        clones: of the model on other devices.

    Raises:
        ValueError: says what to take away.
    """
    if clones:
        raise ValueError(
            "model: Inject Reference KV does not work together with MultiGPU CFG Split, whose devices run at the same "
            "time; take that node away"
        )


class _SamplerSample:
    """Around one call of a sampler: hands on options that hold the injection, and leaves everything else alone."""

    def __init__(self, style: Reference, settings: InjectionSettings) -> None:
        self.style = style
        self.settings = settings

    def __call__(
        self, executor: WrapperExecutor, guider, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs
    ) -> torch.Tensor:
        latent = torch.zeros_like(noise) if latent_image is None else latent_image
        patches = hypernetworks(extra_args["model_options"])
        run = InjectionRun(guider, latent, self.style, self.settings, extra_args.get("seed"), patches)
        options = create_model_options_clone(extra_args["model_options"])
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, run, options, is_model_options=True)
        extra_args = {**extra_args, "model_options": options}
        result = executor(guider, sigmas, extra_args, callback, noise, latent_image, *args, **kwargs)
        run.report()
        return result


class InjectionRun:
    """Injection for one call of a sampler, as a wrapper around each call of its model (APPLY_MODEL).

    The reference gets the same noise at every noise level. So its features change smoothly with the noise level, which
    samplers that choose their own steps need, and a noise level visited twice gives the same features.
    """

    def __init__(
        self,
        guider: comfy.samplers.CFGGuider,
        latent: torch.Tensor,
        style: Reference,
        settings: InjectionSettings,
        seed: int | None,
        patches: Patches | None = None,
    ) -> None:
        """
        Args:
            guider: has loaded its model and holds the conditions.
            latent: the clean latent that sampling starts from, [b c h w], model scale.
            style: whose keys and values are offered.
            settings: strength and range.
            seed: of the sampling run.
            patches: hypernetworks on the model.
        """
        self.style = style
        self.settings = settings
        self._guider = guider
        self._latent = latent
        self._patches = patches
        self._noise = StepNoise(seed or 0)
        self._layers = list_layers(guider.inner_model.diffusion_model)
        sampling = guider.inner_model.model_sampling
        self._range = NoiseRange.of(sampling, settings.start_percent, settings.end_percent)
        self._pool = TokenPool(style.active_parts)
        self._reader: ReferenceReader | None = None
        self._bank: Mapping[int, TokenBank] = {}
        self._read_at: tuple[float, object] | None = None
        self._captures = 0

    def __call__(
        self, executor: WrapperExecutor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs
    ) -> torch.Tensor:
        """t: noise level of each picture of the batch, all the same, [b]."""
        sigma = float(t[0])
        if sigma in self._range:
            transformer_options = self._injected(transformer_options, self._bank_at(executor.class_obj, sigma))
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)

    def report(self) -> None:
        """One line on the run for the console."""
        logging.info(
            "Attention distillation: reference injected into layers %s of %d, read %d times",
            describe_layers(self.style.layers), len(self._layers), self._captures,
        )  # fmt: skip

    def _bank_at(self, model: BaseModel, sigma: float) -> Mapping[int, TokenBank]:
        """What the reference offers at a noise level, read with the weights of this call; only the latest is kept."""
        wanted = (sigma, model.current_patcher.current_hooks)
        if self._read_at != wanted:
            if self._reader is None:  # without gradients it needs nothing of `differentiable`
                conds = conditioning.of_sampler(self._guider.conds)
                self._reader = ReferenceReader(
                    model, self._layers, self.style, conds, self._latent, patches=self._patches
                )
            level = NoiseLevel.of(model, sigma, self._latent)
            self._bank = self._pool.banks(self._reader.read(level, self._noise, Purpose.STYLE))
            self._read_at = wanted
            self._captures += 1
        return self._bank

    def _injected(self, transformer_options: dict[str, Any], bank: Mapping[int, TokenBank]) -> dict[str, Any]:
        """The options of one model call with the injection in them; those given are not changed."""
        replace = transformer_options.get("patches_replace", {})
        before = replace.get("attn1", {})
        ours = {
            self._layers[index].block: self._replacement(_replacement_of(before, self._layers[index]), of_layer)
            for index, of_layer in bank.items()
        }
        return {**transformer_options, "patches_replace": {**replace, "attn1": {**before, **ours}}}

    def _replacement(self, before: Replacement | None, bank: TokenBank) -> Replacement:
        def inject(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
            own = (before or _host_attention)(q, k, v, extra_options)
            queries = rearrange(q, "b t (heads d) -> b heads t d", heads=extra_options["n_heads"])
            given = distillation_target(queries, bank.k, bank.v, log_weight=bank.log_weight)
            return torch.lerp(own, rearrange(given, "b heads t d -> b t (heads d)"), self.settings.strength)

        return inject


def _replacement_of(replacements: Mapping[tuple, Replacement], layer: AttentionLayer) -> Replacement | None:
    """What another pack has put in a layer's place: for this very transformer, or for all of its block."""
    return replacements.get(layer.block, replacements.get(layer.block[:2]))


def _host_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
    """The attention that ComfyUI computes where nothing replaces it, [b t (heads d)]; overrides stay in force."""
    return optimized_attention(
        q, k, v, extra_options["n_heads"],
        attn_precision=extra_options["attn_precision"], transformer_options=extra_options,
    )  # fmt: skip
