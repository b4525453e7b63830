"""Seamless tiles on networks without convolutions: the model is shown its picture rolled, and the answer rolled back.

A transformer knows the places of its tokens and has no padding to close. But rolled by an offset of its own at each
noise level, the picture meets its two edges in the middle of what the model sees: no place is an edge for longer than
one call, and what one call leaves there the next ones mend. It is a wrapper around each call of the model, on a clone.
Passes that read attention make no such call: they ask for the offset (`of_model`, `Rolling.offset`) and roll by
themselves.
"""

import functools
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrapperExecutor, WrappersMP

from .circular import check_axes, is_wrapped, joined_sides

KEY = "attention_distillation_rolling"

# What lies on the picture in a condition and would not be rolled with it, and what to call it.
_ON_THE_PICTURE = {
    "control": "ControlNet",
    "area": "a condition with an area (Conditioning (Set Area))",
    "reference_latents": "ReferenceLatent (pictures to edit)",
    "context_latents": "a picture to edit",
    "time_dim_concat": "a picture to edit",
}
# The same of what nodes put on a model: classes of ComfyUI by name.
_PATCHES = ("DiffSynthCnetPatch", "ZImageControlPatch", "AnimaLLLite")


class Pass(IntEnum):
    """What a pass is for: denoising and distilling at one noise level have their seams in different places."""

    DENOISING = 0
    READING = 1


@dataclass(frozen=True)
class Rolling:
    """How far the picture is rolled in each pass.

    Attributes:
        axes: one of `AXES`; horizontal joins the left and right edges.
        patch: how many latent pixels a token is wide and high.
    """

    axes: str
    patch: int

    def offset(self, sigma: float, size: Sequence[int], purpose: Pass) -> tuple[int, int]:
        """Rows and columns in latent pixels, whole tokens, 0 along an axis that is not joined.

        It depends on the noise level alone: all conditions of a call are rolled alike, a sampler that comes back to a
        level finds the same model there, and one seed makes one picture.

        Args:
            sigma: noise level.
            size: height and width of the latent.

        Raises:
            ValueError: a side to be joined is not made of whole tokens.
        """
        self.check_size(size)
        (bits,) = struct.unpack("<I", struct.pack("<f", sigma))
        shares = _shares(len(Pass) * bits + purpose)
        # Drawn for both axes, always, so that one axis alone has the offsets that it has beside the other. Never 0.
        drawn = [int(part * max(0, side // self.patch - 1)) for part, side in zip(shares, size, strict=True)]
        rolled = zip(drawn, size, joined_sides(self.axes), strict=True)
        return tuple((1 + n) * self.patch % side if joined else 0 for n, side, joined in rolled)

    def check_size(self, size: Sequence[int]) -> None:
        """Refuse a picture whose joined sides are no multiple of a token.

        Raises:
            ValueError: says what is allowed.
        """
        for side, joined, name in zip(size, joined_sides(self.axes), ("high", "wide"), strict=True):
            if joined and side % self.patch:
                raise ValueError(
                    f"latent_image: it is {side} latent pixels {name}, which is no multiple of {self.patch}, the size "
                    "of a token of this model; Seamless Tiling can join whole tokens only, choose another size"
                )


@functools.lru_cache(maxsize=16)  # asked in each iteration, of a few noise levels
def _shares(seed: int) -> tuple[float, ...]:
    generator = torch.Generator("cpu").manual_seed(seed)
    return tuple(torch.rand(2, generator=generator, dtype=torch.float64).tolist())


def rolled(latent: torch.Tensor, offset: Sequence[int]) -> torch.Tensor:
    """A latent, [... h w], moved by rows and columns; what leaves at one edge comes in at the other."""
    return latent.roll(tuple(offset), (-2, -1)) if any(offset) else latent


def rolled_back(latent: torch.Tensor, offset: Sequence[int]) -> torch.Tensor:
    """The opposite of `rolled`."""
    return rolled(latent, [-n for n in offset])


def roll_model(model: ModelPatcher, axes: str, patch: int) -> ModelPatcher:
    """A clone of the model whose pictures repeat without a seam. The model itself is not changed.

    Args:
        axes: one of `AXES`; horizontal joins the left and right edges.
        patch: how many latent pixels a token of the network is wide and high.

    Raises:
        ValueError: an unknown axis.
    """
    check_axes(axes)
    tiled = model.clone()
    for kind in (WrappersMP.APPLY_MODEL, WrappersMP.OUTER_SAMPLE):
        tiled.remove_wrappers_with_key(kind, KEY)  # once is enough; the latest axes count
    wrapper = _RolledModel(Rolling(axes, patch))
    tiled.add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, wrapper)
    tiled.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, wrapper.check_start)
    return tiled


def of_model(model: ModelPatcher) -> Rolling | None:
    """How far `roll_model` has a model's picture rolled; None for all other models."""
    wrappers = model.get_wrappers(WrappersMP.APPLY_MODEL, KEY)
    return wrappers[-1].rolling if wrappers else None


def is_tiled(model: ModelPatcher) -> bool:
    """Whether Seamless Tiling has made this model, in one way or the other."""
    return is_wrapped(model) or of_model(model) is not None


class _RolledModel:
    """Around each call of the model (APPLY_MODEL)."""

    def __init__(self, rolling: Rolling) -> None:
        self.rolling = rolling

    def __call__(
        self,
        executor: WrapperExecutor,
        x: torch.Tensor,
        t: torch.Tensor,
        c_concat: torch.Tensor | None = None,
        c_crossattn: torch.Tensor | None = None,
        control: Any = None,
        transformer_options: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """
        Args:
            x: [b c h w] or [b c 1 h w].
            t: noise level of each picture of the batch, all the same, [b].
            c_concat: what an inpainting model is shown beside the picture, of its size.
        """
        if control:
            raise ValueError(_refusal(_ON_THE_PICTURE["control"]))
        offset = self.rolling.offset(float(t.flatten()[0]), x.shape[-2:], Pass.DENOISING)
        beside = None if c_concat is None else rolled(c_concat, offset)
        denoised = executor(rolled(x, offset), t, beside, c_crossattn, control, transformer_options or {}, **kwargs)
        return rolled_back(denoised, offset)

    def check_start(
        self, executor: WrapperExecutor, noise: torch.Tensor, latent_image: torch.Tensor, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """Around a whole sampling run (OUTER_SAMPLE): all refusals, asked before anything is loaded."""
        guider = executor.class_obj
        if latent_image.ndim not in (4, 5) or (latent_image.ndim == 5 and latent_image.shape[2] > 1):
            raise ValueError(
                f"latent_image: shape {list(latent_image.shape)} is no picture but a video or sound; Seamless Tiling "
                "makes pictures only"
            )
        self.rolling.check_size(latent_image.shape[-2:])
        found = [*_in_conditions(guider.conds), *_on_the_model(guider.model_options)]
        if found:
            raise ValueError(_refusal(found[0]))
        return executor(noise, latent_image, *args, **kwargs)


def _in_conditions(conds: Mapping[str, Sequence[Mapping[str, Any]] | None]) -> list[str]:
    """What lies on the picture in conditions and would not be rolled with it."""
    of_all = [cond for of_kind in conds.values() for cond in of_kind or ()]
    return [what for cond in of_all for name, what in _ON_THE_PICTURE.items() if cond.get(name) is not None]


def _on_the_model(model_options: Mapping[str, Any]) -> list[str]:
    """What other nodes have put on a model that a rolled picture would break."""
    options = model_options.get("transformer_options", {})
    found = ["Context Windows"] if "context_handler" in model_options else []
    if type(options.get("easycache")).__name__ == "EasyCacheHolder":
        found.append("EasyCache, which goes on from the call before (LazyCache works)")
    patches = (patch for of_kind in options.get("patches", {}).values() for patch in of_kind)
    return [*found, *(name for patch in patches if (name := type(patch).__name__).startswith(_PATCHES))]


def _refusal(what: str) -> str:
    return (
        f"model: it comes from Seamless Tiling, which rolls the picture of a transformer in each step, and {what} "
        "would stay where it is; use one of the two, or a UNet such as SD1.5 or SDXL"
    )
