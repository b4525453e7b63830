"""Which patcher of a model is loaded for gradients, and how: whole, and never paged."""

from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

KEY = "attention_distillation_full_load"


def ready_for_gradients(model: ModelPatcher) -> ModelPatcher:
    """A clone of the model that ComfyUI loads as a whole. The model itself is not changed.

    With dynamic VRAM, weights may be evicted between forward and backward, and gradients would be silently wrong: the
    clone then stands on a copy without it.
    """
    clone = model.get_non_dynamic_delegate() if model.is_dynamic() else model.clone()
    clone.remove_wrappers_with_key(WrappersMP.PREPARE_SAMPLING, KEY)
    clone.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, KEY, _load_fully)
    return clone


def _load_fully(executor: WrapperExecutor, model, noise_shape, conds, model_options=None, **kwargs):
    """Weights that are cast into a shared buffer layer by layer (low VRAM) are gone by the time of the backward."""
    return executor(model, noise_shape, conds, model_options=model_options, **{**kwargs, "force_full_load": True})
