"""Which patcher of a model is loaded for gradients, and how: never paged, with room for it, whole if it fits."""

import logging
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy import model_management
from comfy.model_base import BaseModel
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrapperExecutor, WrappersMP

from .memory import AUTO, FAST, GIGABYTE, SMALL, activation_bytes, fit_whole, largest_block, make_room
from .streamed import streamed

KEY = "attention_distillation_full_load"
MULTIGPU = "multigpu"  # ComfyUI's name for a model's copies on other devices

# From the shape of a run's latent to that of the largest pass with gradient.
PassShape = Callable[[Sequence[int]], Sequence[int]]

# For each model with dynamic VRAM, its copy without it: read from disk once, and kept as long as the model itself.
_without_dynamic_vram: "weakref.WeakKeyDictionary[torch.nn.Module, ModelPatcher]" = weakref.WeakKeyDictionary()


def ready_for_gradients(
    model: ModelPatcher, largest_pass: PassShape = tuple, memory: str = AUTO, *, shares: bool = False
) -> ModelPatcher:
    """A clone of the model that ComfyUI loads with room for the backward. The model itself is not changed.

    With dynamic VRAM, weights may be evicted between forward and backward, and gradients would be silently wrong: the
    clone then stands on a copy without it. So do its copies on other devices (MultiGPU CFG Split) that have work to do,
    from the first run on.

    Args:
        model: as a MODEL socket carries it.
        largest_pass: the shape of the largest pass with gradient, from that of a run's latent; the same if not given.
        memory: how it is to be spent, one of `MEMORY`.
        shares: copies on other devices have work to do even where there is one picture only.

    Raises:
        ValueError: the model's loader cannot do without dynamic VRAM.
    """
    clone = _non_dynamic_clone(model) if model.is_dynamic() else model.clone()
    before = clone.get_wrappers(WrappersMP.PREPARE_SAMPLING, KEY)
    passes = tuple(one for wrapper in before for one in wrapper.passes)
    shares = shares or any(wrapper.shares for wrapper in before)
    clone.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, KEY)
    prepare = _PrepareSampling((*passes, (largest_pass, memory)), shares)
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, prepare)
    matched = getattr(CallbacksMP, "ON_MATCH_MULTIGPU_CLONES", None)
    if matched is not None:  # older ComfyUI has no copies on other devices
        clone.remove_callbacks_with_key(matched, KEY)
        clone.add_callback_with_key(matched, KEY, _keep_known)
    return clone


def _non_dynamic_clone(model: ModelPatcher) -> ModelPatcher:
    """A clone of a paged model on its copy without dynamic VRAM.

    ComfyUI goes on to the parent of a patcher that is gone, to unload what it has loaded. The parent of this one knows
    the weights of the copy, as the model does not.
    """
    copy = _without_dynamic_vram.get(model.model)
    if copy is None or _is_paged(copy):  # MultiGPU CFG Split takes copies that are loaded for its own
        copy = _without_dynamic_vram[model.model] = _read_again(model)
    clone = model.clone(disable_dynamic=True, model_override=copy.get_clone_model_override())
    clone.parent = copy
    return clone


def _read_again(model: ModelPatcher) -> ModelPatcher:
    """What the model's loader reads without dynamic VRAM; `get_non_dynamic_delegate` does it for each clone."""
    if model.cached_patcher_init is None:
        raise ValueError(
            "model: guidance needs it without dynamic VRAM, and the node that loaded it does not let ComfyUI load it "
            "again that way; start ComfyUI with --disable-dynamic-vram, or load the model with one of ComfyUI's own "
            "loaders"
        )
    load, arguments, *which = model.cached_patcher_init
    loaded = load(*arguments, disable_dynamic=True)
    copy = loaded[which[0]] if which else loaded
    copy.load_device = model.load_device
    return copy


def _keep_known(model: ModelPatcher, copy: ModelPatcher) -> None:
    """Called by ComfyUI for each patcher that it makes for a copy of the model on another device.

    Its parent is to be one that lives as long as the copy, not the model's clone, which goes with the run: else ComfyUI
    could not unload the copy any more.
    """
    for known in model.get_additional_models_with_key(MULTIGPU):
        if known.model is copy.model:
            before = known.parent
            copy.parent = before if before is not None and before.model is copy.model else known


@dataclass(frozen=True)
class _PrepareSampling:
    """Around the loading of a run's models.

    Attributes:
        passes: of each guidance on the model, the shape of its largest pass, and how memory is to be spent.
        shares: see `ready_for_gradients`.
    """

    passes: tuple[tuple[PassShape, str], ...]
    shares: bool

    def __call__(
        self, executor: WrapperExecutor, model: ModelPatcher, noise_shape, conds, model_options=None, **kwargs
    ) -> Any:
        """Load all weights where they fit beside the smallest backward; where not, as many as ComfyUI would."""
        needed = max(activation_bytes(model.model, of(noise_shape), memory) for of, memory in self.passes)
        small = [activation_bytes(model.model, of(noise_shape), SMALL) for of, memory in self.passes if memory != FAST]
        least = max(small, default=0)
        fits = make_room(model, needed, least, conds)  # on its own device
        copies = model.get_additional_models_with_key(MULTIGPU)  # which load whole with it
        if self.shares or noise_shape[0] > 1:
            copies = [_non_dynamic_clone(copy) if _is_paged(copy) else copy for copy in copies]
            model.set_additional_models(MULTIGPU, copies)  # ComfyUI itself sets them anew at each run
            for copy in copies:
                make_room(copy, needed, least, conds)
        if fits and fit_whole(copies, noise_shape):
            kwargs = {**kwargs, "force_full_load": True}
        else:
            fetched = largest_block(model.model, lambda block: sum(weight.nbytes for weight in block.parameters()))
            noise_shape = _shape_that_takes(least + fetched, model, noise_shape)
        prepared = executor(model, noise_shape, conds, model_options=model_options, **kwargs)
        check_loaded(model)
        return prepared


def _shape_that_takes(size: float, model: ModelPatcher, shape: Sequence[int]) -> list[int]:
    """The shape of a batch for which ComfyUI leaves at least so much memory free, in bytes."""
    return [math.ceil(shape[0] * max(1, size / model.model.memory_required(list(shape)))), *shape[1:]]


def copies_for_gradients(
    model: BaseModel, model_options: Mapping[str, Any], shape: Sequence[int], memory: str = AUTO
) -> list[ModelPatcher]:
    """The model's copies on other devices (MultiGPU CFG Split) that can do passes with gradient beside it, as loaded.

    They are loaded whole, never paged, and have room for the backward of a pass. Why others cannot is told in the log.

    Args:
        model: ComfyUI's model, loaded.
        model_options: of the sampler's model calls.
        shape: of a pass with gradient.
        memory: how it is to be spent, one of `MEMORY`.
    """
    if "multigpu_thread_pool" not in model_options:
        return []
    clones = [clone for clone in model_options["multigpu_clones"].values() if clone.model is not model]
    found = []
    for clone in clones:
        why = _why_no_gradients(clone, activation_bytes(clone.model, shape, FAST if memory == FAST else SMALL))
        if why is None:
            found.append(clone)
        else:
            logging.info("Attention distillation: %s does no updates: %s", clone.load_device, why)
    if found:
        logging.info("Attention distillation: shared with %s", ", ".join(str(clone.load_device) for clone in found))
    return found


def _why_no_gradients(clone: ModelPatcher, needed: float) -> str | None:
    """What keeps a loaded copy of the model from passes with gradient; needed: by their backward, in bytes."""
    if _is_paged(clone):
        return "its copy of the model is paged there; start ComfyUI with --disable-dynamic-vram"
    weights = clone.model.parameters()
    if streamed(clone.model) or not all(_is_on(clone.load_device, weight) for weight in weights):
        return "its memory does not hold all weights of the model"
    if needed > model_management.get_free_memory(clone.load_device):
        return "it has no memory for the backward pass"
    return None


def _is_paged(clone: ModelPatcher) -> bool:
    """Whether a model's weights may be evicted between forward and backward: its loader has read it that way."""
    return clone.is_dynamic() or hasattr(clone.model, "dynamic_vbars")


def check_loaded(model: ModelPatcher) -> None:
    """Say in the log which weights are fetched for each call of their layer; refuse others that are not on the device.

    Raises:
        ValueError: says which weight lies elsewhere.
    """
    layers = set(streamed(model.model))
    for name, module in model.model.named_modules():
        for weight in module.parameters(recurse=False):
            if not _is_on(model.load_device, weight) and module not in layers:
                raise ValueError(
                    f"model: gradients need its weights on {model.load_device}, and those of {name} are on "
                    f"{weight.device}; another node has moved them, take it away"
                )
    if layers:
        logging.info(
            "Attention distillation: memory: %.2f of %.2f GB of weights are on the device, those of %d layers are "
            "fetched for each of their calls",
            model.loaded_size() / GIGABYTE, model.model_size() / GIGABYTE, len(layers),
        )  # fmt: skip


def _is_on(device: torch.device, weight: torch.Tensor) -> bool:
    """Whether a weight lies on a device; a device without a number stands for whichever of its kind."""
    numbers = {device.index, weight.device.index}
    return weight.device.type == device.type and (None in numbers or len(numbers) == 1)
