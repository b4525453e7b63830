"""What the pack asks of ComfyUI, looked up once when it is loaded: a host that lacks something is told at once.

What a module imports by name is missed when it is imported. What is looked up only while a picture is made is listed
here, so that it is missed then, too, and not in the middle of a run.
"""

import importlib
from typing import Any

OLDEST = "0.18.2"

USED_LATER = (
    "comfy.cli_args.args.preview_size",
    "comfy.extra_samplers.uni_pc",
    "comfy.k_diffusion.sampling",
    "comfy.model_base.ModelType.V_PREDICTION",
    "comfy.model_management.cast_to_device",
    "comfy.model_management.current_loaded_models",
    "comfy.model_management.dtype_size",
    "comfy.model_management.extra_reserved_memory",
    "comfy.model_management.free_memory",
    "comfy.model_management.get_free_memory",
    "comfy.model_management.in_training",
    "comfy.model_management.intermediate_device",
    "comfy.model_management.throw_exception_if_processing_interrupted",
    "comfy.patcher_extension.CallbacksMP.ON_PRE_RUN",
    "comfy.patcher_extension.WrappersMP.APPLY_MODEL",
    "comfy.patcher_extension.WrappersMP.CALC_COND_BATCH",
    "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE",
    "comfy.patcher_extension.WrappersMP.PREDICT_NOISE",
    "comfy.patcher_extension.WrappersMP.PREPARE_SAMPLING",
    "comfy.patcher_extension.WrappersMP.SAMPLER_SAMPLE",
    "comfy.sample.fix_empty_latent_channels",
    "comfy.sample.prepare_noise",
    "comfy.sample.sample_custom",
    "comfy.sampler_helpers.convert_cond",
    "comfy.sampler_helpers.get_additional_models",
    "comfy.samplers.CFGGuider",
    "comfy.samplers.KSAMPLER.sample",
    "comfy.samplers.SAMPLER_NAMES",
    "comfy.samplers.SCHEDULER_NAMES",
    "comfy.samplers.Sampler",
    "comfy.samplers.calc_cond_batch",
    "comfy.samplers.calculate_start_end_timesteps",
    "comfy.samplers.encode_model_conds",
    "comfy.samplers.get_area_and_mult",
    "comfy.utils.ProgressBar",
    "comfy_api.latest.io.Boolean.Input",
    "comfy_api.latest.io.Combo.Input",
    "comfy_api.latest.io.ComfyNode",
    "comfy_api.latest.io.Conditioning.Input",
    "comfy_api.latest.io.Custom",
    "comfy_api.latest.io.Float.Input",
    "comfy_api.latest.io.Guider.Output",
    "comfy_api.latest.io.Image.Input",
    "comfy_api.latest.io.Image.Output",
    "comfy_api.latest.io.Input",
    "comfy_api.latest.io.Int.Input",
    "comfy_api.latest.io.Latent.Input",
    "comfy_api.latest.io.Latent.Output",
    "comfy_api.latest.io.Mask.Input",
    "comfy_api.latest.io.Model.Input",
    "comfy_api.latest.io.Model.Output",
    "comfy_api.latest.io.NodeOutput",
    "comfy_api.latest.io.Schema",
    "comfy_api.latest.io.String.Input",
    "comfy_api.latest.io.Vae.Input",
    "comfy_api.latest.io.Vae.Output",
    "comfy_api.latest.ui.PreviewImage",
    "latent_preview.prepare_callback",
    "nodes.common_ksampler",
)
"""Full names; networks are not among them: the pack tells them by their names, and works without those it lacks."""


class HostError(ImportError):
    """ComfyUI lacks something that the pack needs; ComfyUI logs the message, and goes on without the pack."""

    def __init__(self, missing: str) -> None:
        """missing: what it lacks, in words."""
        super().__init__(
            f"Attention Distillation cannot be used with this ComfyUI ({_version()}), which lacks what it needs: "
            f"{missing}. Update ComfyUI ({OLDEST} or newer is needed); if it is the newest, update this pack."
        )


def check_host() -> None:
    """Look up all that is used later.

    Raises:
        HostError: names all that is missing.
    """
    missing = [name for name in USED_LATER if not is_there(name)]
    if missing:
        raise HostError(", ".join(missing))


def is_there(name: str) -> bool:
    """Whether a full name stands for something."""
    try:
        look_up(name)
    except (ImportError, AttributeError):
        return False
    return True


def look_up(name: str) -> Any:
    """What a full name stands for.

    Raises:
        ImportError, AttributeError: there is no such thing.
    """
    first, *rest = name.split(".")
    value: Any = importlib.import_module(first)
    for number, part in enumerate(rest, start=2):
        if not hasattr(value, part):
            importlib.import_module(".".join([first, *rest][:number]))  # a module that nobody has imported yet
        value = getattr(value, part)
    return value


def _version() -> str:
    """ComfyUI's own, as far as it tells."""
    try:
        return importlib.import_module("comfyui_version").__version__
    except (ImportError, AttributeError):
        return "of unknown version"
