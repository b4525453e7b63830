"""Room in memory for the backward pass.

ComfyUI reckons with a forward pass: for SDXL at 1024 x 1024 with half a gigabyte, where the backward keeps five. So
text encoders, VAE and other models stay loaded until the gradient runs out of memory. Here ComfyUI is asked to unload
them first.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from comfy import model_management, sampler_helpers
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.quant_ops import QuantizedTensor

from ..architectures import blocks

# What a pass keeps for its backward, per latent pixel, byte of the model's number format and unit of the model's
# memory_usage_factor. SD1.5 keeps 94 000, SDXL 203 000, FLUX 283 000; the losses come on top.
ACTIVATION_BYTES = 300_000
GIGABYTE = 1024**3

AUTO, FAST, SMALL = MEMORY = ("auto", "fast", "small")
"""What a user can choose: see `MemoryPlan`."""
SPARE = 1.2
"""What a backward takes at its highest, over what is kept for it: gradients, and where kernels work."""
SMALL_SHARE = 0.3
"""The most that a pass keeps of its plain peak where all blocks are run again; full-size networks: 0.15 to 0.26."""


def activation_bytes(model: BaseModel, shape: Sequence[int], memory: str = FAST) -> float:
    """What a pass with gradient is reckoned to keep until its backward, copies of weights in another format included.

    Args:
        model: ComfyUI's model.
        shape: of the latent that the pass is on, [b c h w] or with a frame axis.
        memory: how it is to be spent, one of `MEMORY`; `auto` is reckoned as `fast`, which it takes where it can.
    """
    pixels = shape[0] * math.prod(shape[2:])
    number = model_management.dtype_size(model.get_dtype_inference())
    activations = pixels * number * model.memory_usage_factor * ACTIVATION_BYTES
    if memory == SMALL:
        return SMALL_SHARE * activations + largest_block(model, lambda block: _copied_weights(model, block))
    return activations + _copied_weights(model, model.diffusion_model)


def largest_block(model: BaseModel, size_of: Callable[[torch.nn.Module], int]) -> int:
    """The size of the largest of a model's blocks that can be run again, in bytes."""
    return max(map(size_of, blocks(model.diffusion_model)[-1]))


def _copied_weights(model: BaseModel, module: torch.nn.Module) -> int:
    """What the weights take that are cast for each call, in bytes: autograd saves the cast ones."""
    dtype = model.get_dtype_inference()
    count = sum(
        math.prod(weight.shape)
        for weight in module.parameters()
        if weight.dtype != dtype and not isinstance(weight, QuantizedTensor)
    )
    return count * model_management.dtype_size(dtype)


def make_room(model: ModelPatcher, needed: float, least: float, conds: dict[str, list[dict[str, Any]]]) -> bool:
    """Have ComfyUI unload what stands in the way of a pass with gradient, and say in the log what was reckoned.

    The model itself and what its conditions bring along, ControlNets for one, stay where they are.

    Args:
        model: the guided model, loaded or not.
        needed: by the backward, in bytes, see `activation_bytes`.
        least: what it can do with if blocks are run again.
        conds: by kind, as a guider holds them.

    Returns:
        Whether all weights fit beside the least.
    """
    device = model.load_device
    wanted = [model, *sampler_helpers.get_additional_models(conds, model.model_dtype())[0]]
    loaded = [
        one for one in model_management.current_loaded_models if any(other.is_clone(one.model) for other in wanted)
    ]
    here = sum(one.model_loaded_memory() for one in loaded if one.device == device)
    weights = sum(one.model_size() for one in wanted if one.load_device == device)
    to_load = max(0, weights - here) + model_management.extra_reserved_memory()
    unloaded = model_management.free_memory(needed + to_load, device, keep_loaded=loaded)
    free = model_management.get_free_memory(device)
    logging.info(
        "Attention distillation: room for gradients on %s: %.2f GB for the backward pass, %.2f GB for weights, "
        "%.2f GB free, %d other models unloaded",
        device, needed / GIGABYTE, weights / GIGABYTE, free / GIGABYTE, len(unloaded),
    )  # fmt: skip
    return least + to_load <= free


def fit_whole(clones: Sequence[ModelPatcher], shape: Sequence[int]) -> bool:
    """Whether models on other devices (MultiGPU CFG Split) have room there for all their weights beside a pass.

    Args:
        clones: of the guided model, loaded or not.
        shape: of a run's latent; a pass may hold the conditions of two kinds.
    """
    for clone in clones:
        to_load = clone.model_size() - clone.loaded_size()
        in_pass = clone.model.memory_required([2 * shape[0], *shape[1:]])
        if to_load + in_pass > model_management.get_free_memory(clone.load_device):
            return False
    return True
