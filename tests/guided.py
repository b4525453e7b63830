"""Short ways to run the pack's nodes on the small SD1.5, shared by the tests."""

from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import comfy.samplers
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

import nodes as comfy_nodes

DEFAULTS: dict[str, Any] = {
    "learning_rate": 0.05,
    "iterations": 2,
    "adain": True,
    "content_weight": 0.25,
    "attention_scale": 1.0,
    "content_loss": "query",
    "start_percent": 0.0,
    "end_percent": 1.0,
}

comfy.utils.PROGRESS_BAR_ENABLED = False


@dataclass(frozen=True)
class Graph:
    """The part of a graph that all three ways of guided sampling share."""

    pack: ModuleType
    model: ModelPatcher
    positive: list
    negative: list
    latent: dict[str, Any]
    style: Any = None
    content: Any = None
    regions: Any = None
    windows: Any = None
    seed: int = 3
    steps: int = 3
    cfg: float = 1.0
    sampler: str = "euler"
    scheduler: str = "normal"
    denoise: float = 1.0
    settings: dict[str, Any] = field(default_factory=dict)

    def but(self, **changes: Any) -> "Graph":
        """The graph with other inputs; unknown names are settings of the guidance."""
        own = {name: changes.pop(name) for name in list(changes) if name in self.__dataclass_fields__}
        return replace(self, **{"settings": {**self.settings, **changes}, **own})

    def _node(self, node_id: str) -> Any:
        return comfy_nodes.NODE_CLASS_MAPPINGS[node_id]

    @property
    def _guidance(self) -> dict[str, Any]:
        sockets = {name: getattr(self, name) for name in ("style", "content", "regions", "windows")}
        return {**sockets, **DEFAULTS, **self.settings}

    @torch.inference_mode()
    def capture(self, latent: torch.Tensor, **inputs: Any) -> Any:
        """A Capture Reference Attention node's output."""
        inputs = {"layers": "auto", "weight": 1.0, **inputs}
        return self._node("ADCaptureReferenceAttention").execute(self.model, {"samples": latent}, **inputs)[0]

    def styled(self, latent: torch.Tensor, **inputs: Any) -> "Graph":
        """The graph with a style reference."""
        return self.but(style=self.capture(latent, **inputs))

    @torch.inference_mode()
    def patched(self) -> ModelPatcher:
        """The output of Apply AD Guidance."""
        return self._node("ADApplyGuidance").execute(self.model, **self._guidance)[0]

    @torch.inference_mode()
    def core(self, model: ModelPatcher | None = None) -> torch.Tensor:
        """What ComfyUI's own KSampler node makes of a model."""
        node = self._node("KSampler")()
        return node.sample(
            model or self.model, self.seed, self.steps, self.cfg, self.sampler, self.scheduler, self.positive,
            self.negative, self.latent, self.denoise,
        )[0]["samples"]  # fmt: skip

    @torch.inference_mode()
    def ksampler(self) -> torch.Tensor:
        """What AD-Guided KSampler makes."""
        return self._node("ADGuidedKSampler").execute(
            self.model, self.seed, self.steps, self.cfg, self.sampler, self.scheduler, self.positive,
            self.negative, self.latent, self.denoise, **self._guidance,
        )[0]["samples"]  # fmt: skip

    @torch.inference_mode()
    def guider(self, sampler: comfy.samplers.KSAMPLER | None = None) -> torch.Tensor:
        """What AD Loss Guider makes in SamplerCustomAdvanced."""
        guider = self._node("ADLossGuider").execute(
            self.model, self.positive, self.negative, cfg=self.cfg, **self._guidance
        )[0]
        return self.advanced(guider, sampler)

    @torch.inference_mode()
    def advanced(self, guider: comfy.samplers.CFGGuider, sampler: Any = None) -> torch.Tensor:
        """SamplerCustomAdvanced with a guider, on this graph's seed, sampler, sigmas and latent."""
        noise = self._node("RandomNoise").execute(self.seed)[0]
        sigmas = self._node("BasicScheduler").execute(self.model, self.scheduler, self.steps, self.denoise)[0]
        sampler = sampler or comfy.samplers.sampler_object(self.sampler)
        return self._node("SamplerCustomAdvanced").execute(noise, guider, sampler, sigmas, self.latent)[0]["samples"]
