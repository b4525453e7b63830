"""One loaded network, and the programs that are held against each other on it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.samplers
import comfy.sd
import torch
from comfy import model_management
from torch import Tensor

import nodes

from . import networks
from .cases import SHORT, Case
from .measuring import Measured, Program, side_by_side
from .plain import PlainProgram, plain_method

DTYPES = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
}
SEED, LEARNING_RATE, ITERATIONS, CFG = 3, 0.05, 2, 7.5
RUNS = ("run", "plain run")
CHECKED_SIDE = 256
"""Of the pictures whose gradients are compared, in pixels."""


class Loaded:
    """A network with weights, loaded as the pack loads it, and what it is to work on.

    Attributes:
        model: ComfyUI's, whole on the device.
        z: the picture, in model space, fp32.
        level: its noise level.
    """

    def __init__(self, pack: ModuleType, name: str, side: int, dtype: str, file: Path) -> None:
        """
        Args:
            pack: the pack's package.
            name: of the network, whose weights are in the file.
            side: of the picture, in pixels.
            dtype: of the weights, in `DTYPES`.
            file: is read again for dynamic VRAM to be left out.
        """
        self._pack, self._network, self._side = pack, networks.MODELS[name], side
        with torch.inference_mode():
            self._patcher = comfy.sd.load_diffusion_model(str(file), model_options={"dtype": DTYPES[dtype]})
        guided = self.module("attention.gradient").ready_for_gradients(self._patcher)
        model_management.load_models_gpu([guided], force_full_load=True)
        self.model, self.device = guided.model, guided.load_device
        noise, content, style = (self._random(number) for number in range(3))
        sigma = float(self.model.model_sampling.percent_to_sigma(0.5))
        self.level = self.module("attention.noise").NoiseLevel.of(self.model, sigma, content.to(self.device))
        x = self.model.model_sampling.noise_scaling(self.level.sigmas.cpu(), noise, content)
        self.z, self._noise = self.level.scale * x.to(self.device), noise
        self._style = self.model.latent_format.process_out(style)
        self._conds = self._encoded()

    def module(self, name: str) -> ModuleType:
        """A module of the pack, by its name within it."""
        return importlib.import_module(f"{self._pack.__name__}.{name}")

    def _random(self, number: int) -> Tensor:
        shape = (1, self._network.channels, self._side // 8, self._side // 8)
        return torch.randn(shape, generator=torch.Generator().manual_seed(number))

    @property
    def _socket(self) -> list:
        """A prompt as a CONDITIONING socket carries it."""
        generator = torch.Generator().manual_seed(7)
        options = {}
        if self._network.pooled:
            options["pooled_output"] = torch.randn(1, self._network.pooled, generator=generator)
        return [[torch.randn(1, 77, self._network.text, generator=generator), options]]

    def _encoded(self) -> dict[str, Any]:
        """The same as the model takes it."""
        conditioning = self.module("attention.conditioning")
        conds = conditioning.from_socket(self._socket)
        encoded = conditioning.encode(self.model, conds, self.z, size=self.z.shape[-2:])
        return conditioning.for_pass(encoded, self.level.sigma, 1)

    @torch.inference_mode()
    def _reference(self) -> Any:
        node = nodes.NODE_CLASS_MAPPINGS["ADCaptureReferenceAttention"]
        return node.execute(self._patcher, {"samples": self._style}, layers="auto", weight=1.0)[0]

    def plain(self) -> PlainProgram:
        """The plain method on this very model; to be used inside `differentiable`."""
        rescaled = self.model.process_latent_in(self._style) / plain_method().LATENT_SCALE
        reference = rescaled.to(self.device, self.model.get_dtype_inference())
        return PlainProgram(self.model, self._conds, reference, SEED, LEARNING_RATE, ITERATIONS, self.cfg)

    @property
    def cfg(self) -> float:
        """Transformers are told of guidance by their condition, and run once a step."""
        return CFG if self._network.is_unet else 1.0

    def differentiable(self) -> Any:
        """Weights take part in autograd inside."""
        return self.module("attention.gradient").differentiable(self.model)

    def targets(self, memory: str) -> tuple[Any, Any]:
        """What the picture is held against, with the objective that says so; to be made inside `differentiable`."""
        settings = self.module("guidance.settings").GuidanceSettings(learning_rate=LEARNING_RATE, memory=memory)
        conds = self.module("attention.conditioning").from_socket(self._socket)
        layers = self.module("attention.layers").list_layers(self.model.diffusion_model)
        with torch.no_grad():
            objective = self.module("guidance.objective").Objective(
                self.model, layers, style=self._reference(), content=None, settings=settings, conds=conds, latent=self.z
            )
            offer = objective.offer(self.level, self.module("attention.noise").StepNoise(SEED))
            return objective, objective.targets(offer)

    def gradient(self) -> Tensor:
        """The pack's, of the loss of the picture, [1 c h w] in model space."""
        with self.differentiable():
            objective, targets = self.targets("small")
            scale, z = self.level.scale, self.z.clone().requires_grad_()
            loss_scale = self.module("guidance.loss_scale").LossScale.of(self.model)
            loss = lambda z: objective.losses(objective.features(z / scale, targets), targets)  # noqa: E731
            return loss_scale.gradient(loss, z)[0]

    def bare(self) -> Program:
        """The floor: one forward and one backward through ComfyUI's model."""

        def run() -> None:
            with self.differentiable(), self.module("attention.gradient").saved_activations(self.model):
                x = (self.z / self.level.scale).requires_grad_()
                options = {"cond_or_uncond": [0], "sigmas": self.level.sigmas.reshape(1)}
                sigma = self.level.sigmas.expand(1)
                out = self.model.apply_model(x, sigma, transformer_options=options, **self._conds)
                torch.autograd.grad(out.square().mean(), x)

        return run

    def iteration(self, memory: str) -> Program:
        """One of the pack's: gradient and Adam."""
        with self.differentiable():
            objective, targets = self.targets(memory)
            loss_scale = self.module("guidance.loss_scale").LossScale.of(self.model)
            z = self.z.clone().requires_grad_()
            descent = self.module("guidance.descent").Descent(z, learning_rate=LEARNING_RATE, gradient=loss_scale)

        def run() -> None:
            with self.differentiable():
                descent.iterate(objective, targets, 1)

        return run

    def plain_iteration(self) -> Program:
        """One of the plain method's."""
        with self.differentiable():
            iteration = self.plain().iterate(self.z, self.level.sigma)

        def run() -> None:
            with self.differentiable():
                iteration()

        return run

    def sampling(self, steps: int) -> Program:
        """A run of AD-Guided KSampler."""
        node, style = nodes.NODE_CLASS_MAPPINGS["ADGuidedKSampler"], self._reference()
        latent = {"samples": torch.zeros_like(self._noise)}

        @torch.inference_mode()
        def run() -> Tensor:
            return node.execute(
                self._patcher, SEED, steps, self.cfg, "euler", "normal", self._socket, self._socket, latent, 1.0,
                style=style, content=None, regions=None, windows=None, learning_rate=LEARNING_RATE,
                iterations=ITERATIONS, adain=True, content_weight=0.0, attention_scale=1.0, content_loss="query",
                start_percent=0.0, end_percent=1.0,
            )[0]["samples"]  # fmt: skip

        return run

    def plain_sampling(self, steps: int) -> Program:
        """The same by the plain method."""
        sigmas = comfy.samplers.calculate_sigmas(self.model.model_sampling, "normal", steps)

        def run() -> Tensor:
            with self.differentiable():
                return self.plain().run(self._noise, sigmas)

        return run

    def programs(self, steps: int) -> dict[str, Callable[[], Program]]:
        """By name, what is held against each other; a run of `steps` steps where there are any."""
        found: dict[str, Callable[[], Program]] = {
            "floor": self.bare, "fast": partial(self.iteration, "fast"), "small": partial(self.iteration, "small"),
            "step": partial(self.sampling, 1), "run": partial(self.sampling, steps),
        }  # fmt: skip
        if self._network.is_unet:
            found["plain iteration"] = self.plain_iteration
            found["plain step"] = partial(self.plain_sampling, 1)
            found["plain run"] = partial(self.plain_sampling, steps)
        return {name: program for name, program in found.items() if steps or name not in RUNS}


def measure(pack: ModuleType, case: Case, files: Callable[[str, str], Path]) -> Measured:
    """Time, memory and gradient of a case.

    Args:
        pack: the pack's package.
        case: of kind CPU or CARD.
        files: finds the weights of a network in a number format.
    """
    measured = Measured()

    def load() -> Loaded:
        return Loaded(pack, case.network, case.side, case.dtype, files(case.network, case.dtype))

    loaded = measured.attempt("loading", load)
    if loaded is not None:
        side_by_side(measured, loaded.programs(case.steps), loaded.device, case.rounds, RUNS)
    del loaded
    measured.cosine = measured.attempt("gradient", lambda: cosine(pack, case, files))
    return measured


def cosine(pack: ModuleType, case: Case, files: Callable[[str, str], Path]) -> float:
    """Of the pack's gradient with the plain method's in fp32; of a transformer, with its own in fp32.

    The weights are the same numbers, so it says what the computation loses, not what was lost when they were rounded.
    """
    model_management.unload_all_models()
    is_unet = networks.MODELS[case.network].is_unet
    network = case.network if is_unet else SHORT
    file = files(network, case.dtype)
    ours = Loaded(pack, network, CHECKED_SIDE, case.dtype, file).gradient().double().cpu()
    model_management.unload_all_models()
    exact = Loaded(pack, network, CHECKED_SIDE, "fp32", file)
    with exact.differentiable(), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        theirs = exact.plain().gradient(exact.z, exact.level.sigma) if is_unet else exact.gradient()
    return float(torch.nn.functional.cosine_similarity(ours.flatten(), theirs.double().cpu().flatten(), dim=0))
