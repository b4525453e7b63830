"""ComfyUI's samplers: how the state of each is found, or why it cannot be. The one place that names them."""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.samplers

from .other_packs import OtherPacks
from .states import AcceptedSteps, CountedCalls, NoiseLevels, Stages, StateWatcher

Watch = Callable[..., StateWatcher]
Options = dict[str, Any]

HOST_MODULES = ("comfy.k_diffusion.sampling", "comfy.extra_samplers.uni_pc", "comfy.samplers")


@dataclass(frozen=True)
class Known:
    """One of ComfyUI's samplers.

    Attributes:
        name: in the list that users see.
        function: name of its function.
        watch: makes what finds its state, for the sampler's options; or gives the reason why it cannot be guided.
        eta: the largest that its steps can be told apart at.
    """

    name: str
    function: str
    watch: Callable[[Options], Watch | str]
    eta: float = float("inf")


def _known(watch: Watch | str, *names: str, eta: float = float("inf")) -> list[Known]:
    """Samplers that are found alike, whatever their options."""
    return [Known(name, f"sample_{name}", lambda _options: watch, eta) for name in names]


def _sa_solver(options: Options) -> Watch | str:
    """Its options decide what it shows the model."""
    if options.get("corrector_order", 4) == 0:
        return NoiseLevels
    if options.get("use_pece", False):
        return functools.partial(NoiseLevels, trials=1)  # it shows its prediction first, then the corrected state
    return f"{_CORRECTS}; use sa_solver_pece (use_pece), or a corrector_order of 0"


_CORRECTS = "it corrects the picture after the model has seen it"
_TWO = functools.partial(Stages, calls=2)

SAMPLERS: tuple[Known, ...] = (
    *_known(
        NoiseLevels, "euler", "euler_cfg_pp", "euler_ancestral", "euler_ancestral_cfg_pp", "lms", "dpmpp_2m",
        "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_2m_sde_heun", "dpmpp_2m_sde_heun_gpu",
        "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "ddpm", "lcm", "ipndm", "ipndm_v", "deis", "res_multistep",
        "res_multistep_cfg_pp", "res_multistep_ancestral", "res_multistep_ancestral_cfg_pp", "gradient_estimation",
        "gradient_estimation_cfg_pp", "er_sde",
    ),
    Known("ddim", "sample_euler", lambda _options: NoiseLevels),
    *_known(
        _TWO, "heun", "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpm_2", "dpm_2_ancestral", "dpmpp_2s_ancestral",
        "dpmpp_2s_ancestral_cfg_pp", "dpmpp_sde", "dpmpp_sde_gpu", "seeds_2", eta=1.0,
    ),
    *_known(functools.partial(Stages, calls=3), "seeds_3", eta=1.0),
    *_known(functools.partial(Stages, calls=3, calls_before_last=2), "heunpp2"),  # it looks two noise levels ahead
    Known("sa_solver", "sample_sa_solver", _sa_solver),
    Known("sa_solver_pece", "sample_sa_solver_pece", lambda options: _sa_solver({**options, "use_pece": True})),
    Known("dpm_fast", "dpm_fast_function", lambda _options: CountedCalls),
    Known("dpm_adaptive", "dpm_adaptive_function", lambda _options: AcceptedSteps),
    Known("uni_pc", "sample_unipc", lambda _options: f"{_CORRECTS}; use dpmpp_2m"),
    Known("uni_pc_bh2", "sample_unipc_bh2", lambda _options: f"{_CORRECTS}; use dpmpp_2m"),
    *_known("it makes videos; use euler", "ar_video"),
)  # fmt: skip


def why_refused(name: str) -> str | None:
    """Why the sampler of this name in ComfyUI's list cannot be guided; None where it can, or is unknown here."""
    for one in SAMPLERS:
        if one.name == name:
            reason = one.watch({})
            return reason if isinstance(reason, str) else None
    return None


def offered_names() -> list[str]:
    """ComfyUI's list of samplers without those that cannot be guided."""
    return [name for name in comfy.samplers.SAMPLER_NAMES if why_refused(name) is None]


def function_name(sampler: comfy.samplers.KSAMPLER) -> str:
    """What a sampler's function is called."""
    return getattr(sampler.sampler_function, "__name__", type(sampler.sampler_function).__name__)


def known(function: Callable) -> Known | None:
    """What is known of a sampler function; None for those of other packs, also under a name of ComfyUI's."""
    name, module = getattr(function, "__name__", None), getattr(function, "__module__", None)
    if module not in HOST_MODULES:
        return None
    is_inner = "<locals>" in function.__qualname__ and not hasattr(function, "__wrapped__")
    if not is_inner and getattr(sys.modules[module], name, None) is not function:
        return None
    return next((one for one in SAMPLERS if one.function == name), None)


def watcher(function: Callable, options: Options) -> Watch | str:
    """What finds the state of a sampler function called with `options`; a text says why nothing does."""
    found = known(function)
    if found is not None:
        return found.watch(options)
    is_unipc = "unipc" in getattr(function, "__name__", "").lower().replace("_", "")
    return f"{_CORRECTS}; use dpmpp_2m" if is_unipc else OtherPacks  # where it arrives is not where it belongs
