"""What a pass with gradient takes beside the weights, counted on tensors without values: the same on every machine."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from . import networks
from .plain import AsPlainMethod, chosen_layers, plain_method

GIGABYTE = 1024**3
FP8 = torch.float8_e4m3fn


class LiveBytes(TorchDispatchMode):
    """Follows all memory that torch hands out, and the most of it that is alive at once.

    Attributes:
        peak: that most, in bytes.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        """weights: are not counted."""
        super().__init__()
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._sum = self.peak = 0

    def __torch_dispatch__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                known = self._alive.get(storage._cdata)
                if storage._cdata not in self._weights and (known is None or known[0].expired()):
                    self._sum += storage.nbytes() - (0 if known is None else known[1])
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._sum > self.peak:  # it may be less: what is gone is still in the sum
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            self._sum = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._sum)
        return out


class FusedAttention(TorchFunctionMode):
    """Attention as cards compute it, in one kernel that keeps no logits; without values torch would write it out."""

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **(kwargs or {}))


def backward(loss: Tensor, z: Tensor) -> None:
    """As `torch.autograd.grad`, which would take a function mode off meanwhile: blocks run again in it."""
    torch.autograd.Variable._execution_engine.run_backward(
        (loss,), (torch.ones_like(loss),), False, False, (z,), allow_unreachable=False, accumulate_grad=False
    )


class CountedPass:
    """The pack's pass with gradient on a network without values.

    Attributes:
        model: ComfyUI's.
        choices: the blocks that may be run again in the backward, none at first and all at last.
    """

    def __init__(self, pack: ModuleType, name: str, side: int, dtype: torch.dtype) -> None:
        """
        Args:
            pack: the pack's package.
            name: of the network.
            side: of the picture, in pixels.
            dtype: of the weights; weights in fp8 are cast to bf16 for each layer.
        """
        self._pack = pack
        computes_in = torch.bfloat16 if dtype == FP8 else dtype
        self.model = networks.make(name, dtype, None if computes_in == dtype else computes_in)
        self.x, self.conds = networks.inputs(name, side, computes_in)
        architectures = self.module("attention.architectures")
        network = self.model.diffusion_model
        self._layers = architectures.list_layers(network)[-architectures.auto_layer_count(network) :]
        self.choices: tuple[Sequence[torch.nn.Module], ...] = ((), *architectures.blocks(network))

    def module(self, name: str) -> ModuleType:
        """A module of the pack, by its name within it."""
        return importlib.import_module(f"{self._pack.__name__}.{name}")

    @property
    def weight_bytes(self) -> int:
        """Of all weights."""
        return sum(weight.nbytes for weight in self.model.diffusion_model.parameters())

    def loss(self, z: Tensor, again: Sequence[torch.nn.Module] = ()) -> tuple[Tensor, list]:
        """The style loss of z against itself, and the features that it is of."""
        capture, losses = self.module("attention.capture"), self.module("losses.distillation")
        sigma = torch.tensor(0.6, device=networks.META)
        found = list(capture.capture_features(self.model, z, sigma, self.conds, self._layers, again=again).values())
        targets = [losses.distillation_target(each.q, each.k.detach(), each.v.detach()) for each in found]
        return sum(
            losses.distillation_loss(each.out, target) for each, target in zip(found, targets, strict=True)
        ), found

    def peak(self, again: Sequence[torch.nn.Module] = ()) -> int:
        """The most that is alive at once, beside the weights, when these blocks are run again; in bytes."""
        gradient = self.module("attention.gradient")
        with gradient.differentiable(self.model):
            live = LiveBytes([*self.model.parameters(), *self.model.buffers()])
            with FusedAttention(), gradient.saved_activations(self.model), live:
                z = self.x.clone().requires_grad_()
                backward(self.loss(z, again)[0], z)
        return live.peak

    def plain_peak(self) -> int:
        """The same of tests/plain_method.py, which reads the reference in the same pass; UNets only."""
        plain, gradient = plain_method(), self.module("attention.gradient")
        unet = AsPlainMethod(self.model.diffusion_model, self.conds)
        settings, x = (
            plain.Settings(chosen_layers(self.model.diffusion_model)),
            self.x.to(self.model.get_dtype_inference()),
        )
        with gradient.differentiable(self.model), networks.META:
            live = LiveBytes([*self.model.parameters(), *self.model.buffers()])
            with FusedAttention(), live:
                z = x.clone().requires_grad_()
                of = (unet, z, 500.0, self.conds["c_crossattn"], [plain.Reference(x)], [x], None, settings)
                backward(plain.loss(*of), z)
        return live.peak


def count(pack: ModuleType, name: str, side: int, dtype: torch.dtype) -> dict[str, float]:
    """Gigabytes: of the weights, and beside them for each setting of `memory`, and of tests/plain_method.py.

    `between` is what `memory` auto takes where fast does not fit and the transformers of a UNet run again do.
    """
    counted = CountedPass(pack, name, side, dtype)
    fast, *between, small = (counted.peak(again) for again in counted.choices)
    found = {"weights": counted.weight_bytes, "fast": fast, "small": small}
    if between:
        found["between"] = between[0]
    if networks.MODELS[name].is_unet:
        found["plain"] = counted.plain_peak()
    return {key: size / GIGABYTE for key, size in found.items()}
