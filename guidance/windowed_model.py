"""Denoising in windows, for whatever sampler and guider runs the model.

Each condition is replaced by one copy for each window, restricted to it through ComfyUI's own `area`: ComfyUI crops the
picture and all that has its shape, and puts the results together. The sampler sees one picture throughout.
"""

import uuid
from typing import Any, NamedTuple

import comfy.samplers
import torch
from comfy.model_base import BaseModel
from comfy.patcher_extension import WrapperExecutor

from .windows import Layout, Window, Windows, chunks

Cond = dict[str, Any]

# What a condition may hold that is laid on the whole picture and that ComfyUI does not cut for an area.
_UNCUT = {"control": "a ControlNet", "gligen": "GLIGEN boxes", "default": "a default conditioning"}

_SELF_ATTENTION_GUIDANCE = "comfy_extras.nodes_sag.SelfAttentionGuidance"  # ComfyUI's node


def check_conds(conds: dict[str, list[Cond]]) -> None:
    """Refuse conditions that cannot be restricted to a window.

    Args:
        conds: by kind (positive, negative), as a guider holds them.

    Raises:
        ValueError: names the condition and what of it does not fit.
    """
    for kind, of_kind in conds.items():
        for cond in of_kind or ():
            for key, what in _UNCUT.items():
                if key in cond:
                    raise ValueError(
                        f"windows: the {kind} conditioning holds {what}, which would be squeezed into every window; "
                        "use text, masks and areas with windows, or take the windows away"
                    )


def check_model_options(model_options: dict[str, Any]) -> None:
    """Refuse Self-Attention Guidance, which takes the attention of the last pass for that of the whole picture.

    ComfyUI's node is known by the module and class that its two functions were made in: one notes the attention, the
    other uses it after each step.

    Raises:
        ValueError: says what to take away.
    """
    replaced = model_options.get("transformer_options", {}).get("patches_replace", {}).get("attn1", {})
    functions = (*replaced.values(), *model_options.get("sampler_post_cfg_function", ()))
    if any(_is_made_by(function, _SELF_ATTENTION_GUIDANCE) for function in functions):
        raise ValueError(
            "windows: Self-Attention Guidance would take one window for the whole picture; take one of the two away"
        )


def _is_made_by(function: Any, owner: str) -> bool:
    """Whether a class of one of ComfyUI's extra nodes has made a function.

    ComfyUI loads their modules by path: such a module's name is the path of its file, without the ending.
    """
    _, module, name = owner.split(".")
    file = getattr(function, "__module__", "").replace("\\", "/").replace(".", "/").rsplit("/", 1)[-1]
    return file == module and getattr(function, "__qualname__", "").split(".")[0] == name


class WindowedModel:
    """Around each call of the model on its conditions (CALC_COND_BATCH): in windows, overlaps plainly averaged."""

    def __init__(self, windows: Windows, pixels: int) -> None:
        """pixels: picture pixels to a latent pixel."""
        self.windows = windows
        self.pixels = pixels

    def __call__(
        self,
        executor: WrapperExecutor,
        model: BaseModel,
        conds: list[list[Cond] | None],
        x: torch.Tensor,
        timestep: torch.Tensor,
        model_options: dict[str, Any],
    ) -> list[torch.Tensor]:
        """x: [b c h w] in k-diffusion space. Returns the denoised picture of each kind of condition, as x."""
        layout = self.windows.place(*x.shape[-2:], self.pixels)
        if layout.is_whole:
            return executor(model, conds, x, timestep, model_options)
        by_window = _by_window([_placed(of_kind, x, timestep) for of_kind in conds], layout)
        sums, count = [torch.zeros_like(x) for _ in conds], x.new_zeros(x.shape[-2:])
        for some in chunks(layout.windows, max(1, self.windows.at_once // x.shape[0])):
            restricted = [[cond for window in some for cond in by_window[window][kind]] for kind in range(len(conds))]
            averages = executor(model, restricted, x, timestep, model_options)
            covered = _coverage(layout, some).to(x)  # undoes ComfyUI's average over these windows
            for total, average in zip(sums, averages, strict=True):
                total += average * covered
            count += covered
        return [total / count for total in sums]


class _Placed(NamedTuple):
    """A condition whose strength, mask and area are all written into a mask.

    Attributes:
        everywhere: there was neither mask nor area, so it counts in every window.
    """

    cond: Cond
    everywhere: bool


def _placed(conds: list[Cond] | None, x: torch.Tensor, timestep: torch.Tensor) -> list[_Placed]:
    """The conditions in force at this timestep, their strength, mask and area all written into a mask.

    ComfyUI itself says how much a condition counts at each pixel; an area so becomes a mask that its windows share.
    """
    found = []
    for cond in conds or ():
        own = comfy.samplers.get_area_and_mult(cond, x, timestep)
        if own is None:
            continue
        mask = torch.zeros_like(x[:, 0])
        place = mask if own.area is None else Window(own.area[2], own.area[3], *own.area[:2]).of(mask)
        place.copy_(own.mult[:, 0])
        everywhere = own.area is None and "mask" not in cond and cond.get("strength", 1.0) != 0
        found.append(_Placed({**cond, "mask": mask, "mask_strength": 1.0, "strength": 1.0}, everywhere))
    return found


def _by_window(placed: list[list[_Placed]], layout: Layout) -> dict[Window, list[list[Cond]]]:
    """For each window and kind, the conditions restricted to it, without those that count nowhere in it.

    What their masks hold is read from the device in one go.
    """
    looked_at = [cond["mask"] for of_kind in placed for cond, everywhere in of_kind if not everywhere]
    counts = [torch.stack([window.of(mask).any() for window in layout.windows]) for mask in looked_at]
    read = iter(torch.stack(counts).tolist() if counts else ())
    everywhere = [True] * len(layout.windows)
    held = [[(one.cond, everywhere if one.everywhere else next(read)) for one in of_kind] for of_kind in placed]
    return {
        window: [[_restricted(cond, window) for cond, counts in of_kind if counts[number]] for of_kind in held]
        for number, window in enumerate(layout.windows)
    }


def _restricted(cond: Cond, window: Window) -> Cond:
    """A copy of a condition for one window.

    ComfyUI's softened borders of an area are off, because the copy has a mask. A copy's uuid is its own and the same
    at every step, for packs that keep something for each condition.
    """
    return {**cond, "area": window.area, "uuid": uuid.uuid5(cond["uuid"], str(window.area))}


def _coverage(layout: Layout, windows: tuple[Window, ...]) -> torch.Tensor:
    """How many of these windows lie on each pixel, [h w]."""
    count = torch.zeros(layout.height, layout.width)
    for window in windows:
        window.of(count).add_(1)
    return count
