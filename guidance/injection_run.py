"""KV injection in one call of a sampler: what the reference offers at each noise level, and the negative branch.

The negative branch adds s * (injected - plain) to what a guider predicts. Where the guider's own predictions are not
injected (strength 0) that is Style-Prompting Guidance (arXiv 2508.11476): unconditional + cfg * (text - unconditional)
+ s * (injected - unconditional). Where they are, as in StyleKeeper (arXiv 2510.06827), it goes on in that direction.
"""

import contextlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.patcher_extension import WrapperExecutor, WrappersMP, add_wrapper_with_key

from ..attention import conditioning
from ..attention.architectures import attention_calls, transformer
from ..attention.bank import TokenBank, TokenPool
from ..attention.exchange import KeyValueExchange, replaced_attention
from ..attention.hypernetworks import Patches
from ..attention.layers import describe_layers, list_layers
from ..attention.noise import NoiseLevel, Purpose, StepNoise, smallest_level
from ..attention.reader import ReferenceReader
from ..attention.reference import Reference
from .settings import InjectionSettings, NoiseRange
from .target_masks import CallAreas

KEY = "attention_distillation_injection"
OVERRIDE = "optimized_attention_override"  # ComfyUI's name for it in transformer_options


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
        network = guider.inner_model.diffusion_model
        self._layers = list_layers(network)
        self._calls = None if transformer(network) is None else attention_calls(network)
        sampling = guider.inner_model.model_sampling
        self._smallest = smallest_level(guider.inner_model)
        self._range = NoiseRange.of(sampling, settings.start_percent, settings.end_percent)
        self._areas = CallAreas(style) if style.has_target_masks else None
        self._readings: dict[BaseModel, _Reading] = {}
        self._strength = settings.strength
        self._kind = conditioning.kind_of_passes(guider.conds)
        self._x: torch.Tensor | None = None
        self._unconditional: dict[float, torch.Tensor] = {}

    def add_to(self, model_options: dict[str, Any]) -> None:
        """Put this run into the options of a sampler's model calls."""
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self, model_options, is_model_options=True)
        if self._areas is not None:
            add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self._areas, model_options, is_model_options=True)
        if self.settings.negative_strength > 0:
            add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self.note, model_options, is_model_options=True)

    def __call__(
        self, executor: WrapperExecutor, x, t, c_concat, c_crossattn, control, transformer_options, **kwargs
    ) -> torch.Tensor:
        """t: noise level of each picture of the batch, all the same, [b]."""
        sigma = float(t[0])
        if self._strength == 0 or sigma not in self._range:
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        bank = self._bank_at(executor.class_obj, sigma, x.device)
        if self._calls is None:
            given = None if self._areas is None else self._areas.given
            options = replaced_attention(transformer_options, self._layers, bank, self._strength, given)
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        before = transformer_options.get(OVERRIDE)
        exchange = KeyValueExchange(self._layers, bank, tuple(x.shape[-2:]), self._strength, before)
        options = {**transformer_options, OVERRIDE: exchange}
        denoised = executor(x, t, c_concat, c_crossattn, control, options, **kwargs)
        exchange.check_calls(self._calls)
        return denoised

    def report(self) -> None:
        """One line on the run for the console."""
        logging.info(
            "Attention distillation: reference injected into layers %s of %d, read %d times",
            describe_layers(self.style.layers), len(self._layers),
            max((reading.count for reading in self._readings.values()), default=0),
        )  # fmt: skip

    @contextlib.contextmanager
    def noting(self, x: torch.Tensor) -> Iterator[None]:
        """Around a guider's prediction from x: what it finds without text is kept for the negative branch."""
        self._x, self._unconditional = x, {}
        try:
            yield
        finally:
            self._x = None

    def note(self, executor: WrapperExecutor, model, conds, x, timestep, model_options) -> list[torch.Tensor]:
        """Around each call of the model on conditions (CALC_COND_BATCH).

        Other packs may make more such calls, with other attention: the first is the guider's own.
        """
        found = executor(model, conds, x, timestep, model_options)
        if x is self._x:
            for of_kind, denoised in zip(conds, found, strict=True):
                if of_kind is self._guider.conds[self._kind]:
                    self._unconditional.setdefault(self._strength, denoised)
        return found

    def with_negative(
        self, denoised: torch.Tensor, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]
    ) -> torch.Tensor:
        """A guider's prediction with s * (injected - plain) added to it.

        Args:
            denoised: what the guider predicts from x, [b c h w] or with a frame.
            timestep: noise level of each picture of the batch, all the same, [b].
        """
        if self.settings.negative_strength == 0 or float(timestep.flatten()[0]) not in self._range:
            return denoised
        plain, injected = (self._predicted(strength, x, timestep, model_options) for strength in (0.0, 1.0))
        return denoised + self.settings.negative_strength * (injected - plain)

    def _predicted(
        self, strength: float, x: torch.Tensor, timestep: torch.Tensor, model_options: dict[str, Any]
    ) -> torch.Tensor:
        """What the model makes of x without text at a strength of injection; it runs only where that is not known."""
        if strength not in self._unconditional:
            conds = self._guider.conds[self._kind]
            as_kind = [None, conds] if self._kind == "negative" else [conds]  # other packs tell the two apart
            self._strength = strength
            try:
                found = comfy.samplers.calc_cond_batch(self._guider.inner_model, as_kind, x, timestep, model_options)
            finally:
                self._strength = self.settings.strength
            self._unconditional[strength] = found[-1]
        return self._unconditional[strength]

    def _bank_at(self, model: BaseModel, sigma: float, device: torch.device) -> Mapping[int, TokenBank]:
        """What the reference offers at a noise level, read with the weights of this call; only the latest is kept.

        With MultiGPU CFG Split there is a model on each device, run by a thread of its own.
        """
        reading = self._readings.get(model)
        if reading is None:
            reading = self._readings[model] = self._first_reading(model, device)
        wanted = (sigma, model.current_patcher.current_hooks)
        if reading.at != wanted:
            level = NoiseLevel.of(model, sigma, reading.latent, self._smallest)
            reading.bank = reading.pool.banks(reading.reader.read(level, self._noise, Purpose.STYLE))
            reading.at = wanted
            reading.count += 1
        return reading.bank

    def _first_reading(self, model: BaseModel, device: torch.device) -> "_Reading":
        latent, conds = self._latent.to(device), conditioning.of_sampler(self._guider.conds)
        # Without gradients the reader needs nothing of `differentiable`.
        reader = ReferenceReader(model, self._layers, self.style, conds, latent, patches=self._patches)
        pool = TokenPool(self.style.active_parts, pictures_alone=True, in_shares=self.style.in_shares)
        return _Reading(latent, reader, pool)


@dataclass
class _Reading:
    """What the reference offers one model, used by the thread alone that runs this model.

    Attributes:
        latent: the clean latent that sampling starts from, on the model's device.
        reader: of this model.
        pool: makes banks of what is read.
        bank: the latest, by layer.
        at: the noise level and the weights of the latest.
        count: how often the reference was read.
    """

    latent: torch.Tensor
    reader: ReferenceReader
    pool: TokenPool
    bank: Mapping[int, TokenBank] = field(default_factory=dict)
    at: tuple[float, object] | None = None
    count: int = 0
