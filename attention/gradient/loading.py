"""Which patcher of a model is loaded for gradients, and how: whole, with room for the backward, and never paged."""

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from .memory import AUTO, activation_bytes, make_room

KEY = "attention_distillation_full_load"

# From the shape of a run's latent to that of the largest pass with gradient.
PassShape = Callable[[Sequence[int]], Sequence[int]]

# For each model with dynamic VRAM, its copy without it, as `clone` takes it: read from disk once, shared by all clones.
_without_dynamic_vram: "weakref.WeakKeyDictionary[torch.nn.Module, Any]" = weakref.WeakKeyDictionary()


def ready_for_gradients(model: ModelPatcher, largest_pass: PassShape = tuple, memory: str = AUTO) -> ModelPatcher:
    """A clone of the model that ComfyUI loads as a whole, with room for the backward. The model itself is not changed.

    With dynamic VRAM, weights may be evicted between forward and backward, and gradients would be silently wrong: the
    clone then stands on a copy without it.

    Args:
        model: as a MODEL socket carries it.
        largest_pass: the shape of the largest pass with gradient, from that of a run's latent; the same if not given.
        memory: how it is to be spent, one of `MEMORY`.

    Raises:
        ValueError: the model's loader cannot do without dynamic VRAM.
    """
    clone = _non_dynamic_clone(model) if model.is_dynamic() else model.clone()
    before = clone.get_wrappers(WrappersMP.PREPARE_SAMPLING, KEY)
    passes = tuple(one for wrapper in before for one in wrapper.passes)
    clone.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, KEY)
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _PrepareSampling((*passes, (largest_pass, memory))))
    return clone


def _non_dynamic_clone(model: ModelPatcher) -> ModelPatcher:
    """As `get_non_dynamic_delegate`, which reads the checkpoint anew for every clone of a model."""
    copy = _without_dynamic_vram.get(model.model)
    if copy is None and model.cached_patcher_init is None:
        raise ValueError(
            "model: guidance needs it without dynamic VRAM, and the node that loaded it does not let ComfyUI load it "
            "again that way; start ComfyUI with --disable-dynamic-vram, or load the model with one of ComfyUI's own "
            "loaders"
        )
    clone = model.clone(disable_dynamic=True, model_override=copy)
    _without_dynamic_vram[model.model] = clone.get_clone_model_override()
    return clone


@dataclass(frozen=True)
class _PrepareSampling:
    """Around the loading of a run's models.

    Attributes:
        passes: of each guidance on the model, the shape of its largest pass, and how memory is to be spent.
    """

    passes: tuple[tuple[PassShape, str], ...]

    def __call__(
        self, executor: WrapperExecutor, model: ModelPatcher, noise_shape, conds, model_options=None, **kwargs
    ) -> Any:
        """Weights that are cast into a shared buffer layer by layer (low VRAM) are gone by the time of the backward."""
        needed = [activation_bytes(model.model, shape_of(noise_shape), memory) for shape_of, memory in self.passes]
        make_room(model, max(needed), conds)
        prepared = executor(
            model, noise_shape, conds, model_options=model_options, **{**kwargs, "force_full_load": True}
        )
        check_loaded(model)
        return prepared


def check_loaded(model: ModelPatcher) -> None:
    """Refuse weights that are streamed to the device as they are needed, although a full load was asked for.

    Raises:
        ValueError: says what to start ComfyUI without.
    """
    if model.model.model_lowvram or not all(_is_on(model.load_device, weight) for weight in model.model.parameters()):
        raise ValueError(
            "model: gradients need all of its weights loaded, and ComfyUI has loaded only a part of them "
            f"({model.loaded_size() / 1024**2:.0f} of {model.model_size() / 1024**2:.0f} MB); start ComfyUI without "
            "--novram, or use a smaller model or one in a smaller number format"
        )


def _is_on(device: torch.device, weight: torch.Tensor) -> bool:
    """Whether a weight lies on a device; a device without a number stands for whichever of its kind."""
    numbers = {device.index, weight.device.index}
    return weight.device.type == device.type and (None in numbers or len(numbers) == 1)
