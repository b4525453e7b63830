"""Room in memory for the backward pass.

ComfyUI reckons with a forward pass: for SDXL at 1024 x 1024 with half a gigabyte, where the backward keeps five. So
text encoders, VAE and other models stay loaded until the gradient runs out of memory. Here ComfyUI is asked to unload
them first.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

from comfy import model_management, sampler_helpers
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher

# What a pass keeps for its backward, per latent pixel, byte of the model's number format and unit of the model's
# memory_usage_factor. SD1.5 keeps 94 000, SDXL 203 000, FLUX 283 000; the losses come on top.
ACTIVATION_BYTES = 300_000
GIGABYTE = 1024**3

AUTO, FAST, SMALL = MEMORY = ("auto", "fast", "small")
"""What a user can choose: see `MemoryPlan`."""
SPARE = 1.2
"""What a backward takes at its highest, over what is kept for it: gradients, and where kernels work."""
SMALL_SHARE = 0.5
"""The most that a pass keeps of its plain peak where all blocks are run again."""


def activation_bytes(model: BaseModel, shape: Sequence[int], memory: str = FAST) -> float:
    """What a pass with gradient is reckoned to keep until its backward.

    Args:
        model: ComfyUI's model.
        shape: of the latent that the pass is on, [b c h w] or with a frame axis.
        memory: how it is to be spent, one of `MEMORY`; `auto` is reckoned as `fast`, which it takes where it can.
    """
    pixels = shape[0] * math.prod(shape[2:])
    number = model_management.dtype_size(model.get_dtype_inference())
    share = SMALL_SHARE if memory == SMALL else 1.0
    return share * pixels * number * model.memory_usage_factor * ACTIVATION_BYTES


def make_room(model: ModelPatcher, needed: float, conds: dict[str, list[dict[str, Any]]]) -> None:
    """Have ComfyUI unload what stands in the way of a pass with gradient, and say in the log what was reckoned.

    The model itself and what its conditions bring along, ControlNets for one, stay where they are.

    Args:
        model: the guided model, loaded or not.
        needed: by the backward, in bytes, see `activation_bytes`.
        conds: by kind, as a guider holds them.
    """
    device = model.load_device
    wanted = [model, *sampler_helpers.get_additional_models(conds, model.model_dtype())[0]]
    loaded = [
        one for one in model_management.current_loaded_models if any(other.is_clone(one.model) for other in wanted)
    ]
    here = sum(one.model_loaded_memory() for one in loaded if one.device == device)
    weights = sum(one.model_size() for one in wanted if one.load_device == device)
    missing = needed + max(0, weights - here) + model_management.extra_reserved_memory()
    unloaded = model_management.free_memory(missing, device, keep_loaded=loaded)
    logging.info(
        "Attention distillation: room for gradients: %.2f GB for the backward pass, %.2f GB for weights, %.2f GB free, "
        "%d other models unloaded",
        needed / GIGABYTE, weights / GIGABYTE, model_management.get_free_memory(device) / GIGABYTE, len(unloaded),
    )  # fmt: skip
