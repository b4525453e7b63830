"""Circular padding for the convolutions of a UNet and a VAE, on clones.

A convolution's padding is one plain attribute, and what it is fed can be changed by a forward pre-hook. Both are put in
as object patches, which ComfyUI sets when it loads the clone and takes back before it loads any other: so every pass of
the clone is tiled, gradient passes included, and no pass of the original is.
"""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from comfy.ldm.models.autoencoder import AutoencodingEngine
from comfy.ldm.modules.diffusionmodules.model import Downsample
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.ldm.wan.vae import WanVAE
from comfy.model_patcher import ModelPatcher
from comfy.sd import VAE
from comfy.taesd.taesd import TAESD

AXES = ("both", "horizontal", "vertical")
KEY = "attention_distillation_tiling"
HOOKS, PADDING = "_forward_pre_hooks", "padding"  # what is patched of a convolution

PreHook = Callable[[torch.nn.Module, tuple], torch.Tensor | tuple]


def tile_model(model: ModelPatcher, axes: str) -> ModelPatcher:
    """A clone of the model whose pictures repeat without a seam. The model itself is not changed.

    Args:
        axes: one of `AXES`; horizontal joins the left and right edges.

    Raises:
        ValueError: a model that is no UNet, or an unknown axis.
    """
    unet = model.model.diffusion_model
    if not is_unet(model):
        raise ValueError(
            f"model: {type(unet).__name__} is not supported; allowed are UNet models such as SD1.5, SD2 and SDXL"
        )
    tiled = model.clone()
    _tile(tiled, "diffusion_model", unet, axes)
    return tiled


def is_unet(model: ModelPatcher) -> bool:
    """Whether `tile_model` takes a model."""
    return isinstance(model.model.diffusion_model, UNetModel)


def is_wrapped(model: ModelPatcher) -> bool:
    """Whether `tile_model` has made this model."""
    return any(name.endswith(f".{HOOKS}") and KEY in hooks for name, hooks in model.object_patches.items())


def check_axes(axes: str) -> None:
    """Refuse an unknown axis.

    Raises:
        ValueError: says what is allowed.
    """
    if axes not in AXES:
        raise ValueError(f"axes: {axes} is not allowed; use one of {', '.join(AXES)}")


def joined_sides(axes: str) -> tuple[bool, bool]:
    """Whether one of `AXES` joins top and bottom, and left and right."""
    return axes != "horizontal", axes != "vertical"


@contextlib.contextmanager
def not_wrapped(network: torch.nn.Module) -> Iterator[tuple[bool, bool]]:
    """Around passes on a picture that is no tile, a reference: its edges see zeros, as without tiling.

    Of this network alone: with MultiGPU CFG Split its copies share their hooks, and run in other threads meanwhile.

    Yields:
        Whether the loaded network otherwise joins top and bottom, and left and right.
    """
    hooked = ((module, module._forward_pre_hooks.get(KEY)) for module in network.modules())
    padded = [(module, hook) for module, hook in hooked if isinstance(hook, _Pad)]
    for module, pad in padded:
        pad.open.add(module)
    try:
        yield any(pad.sides[2] for _, pad in padded), any(pad.sides[0] for _, pad in padded)
    finally:
        for module, pad in padded:
            pad.open.discard(module)


def tile_vae(vae: VAE, axes: str) -> VAE:
    """A copy of the VAE, with the same weights, that encodes and decodes without a seam. The VAE is not changed.

    Args:
        axes: one of `AXES`; horizontal joins the left and right edges.

    Raises:
        ValueError: a VAE of another kind, or an unknown axis.
    """
    vae.throw_exception_if_invalid()
    kinds = AutoencodingEngine | TAESD if vae.latent_dim == 2 else WanVAE
    if not isinstance(vae.first_stage_model, kinds):
        kind = type(vae.first_stage_model).__name__
        raise ValueError(
            f"vae: {kind} is not supported; allowed are image VAEs such as those of SD1.5, SDXL and FLUX, TAESD, and "
            "that of Wan 2.1 and Qwen-Image for single pictures"
        )
    tiled = copy.copy(vae)
    tiled.patcher = vae.patcher.clone()
    _tile(tiled.patcher, "", vae.first_stage_model, axes)
    return tiled


def _tile(patcher: ModelPatcher, prefix: str, network: torch.nn.Module, axes: str) -> None:
    """Put circular padding on a patcher, in place of any that this module has put there before."""
    check_axes(axes)
    down, across = joined_sides(axes)
    padded_by_hand = _padded_by_hand(network)
    for name, module in network.named_modules(prefix=prefix):
        if not isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            continue
        _take_away(patcher, name)
        hooks, (*time, rows, columns) = (patcher.get_model_object(f"{name}.{key}") for key in (HOOKS, PADDING))
        others = [(key, hook) for key, hook in hooks.items() if key != KEY]
        if id(module) in padded_by_hand:
            _put(patcher, name, others, _repad(across, down))
        elif rows or columns:
            hook = _Pad(columns if across else 0, rows if down else 0)
            _put(patcher, name, others, hook, (*time, 0 if down else rows, 0 if across else columns))


def _padded_by_hand(network: torch.nn.Module) -> set[int]:
    """The convolutions, by id, that are given one column of zeros at the right and one row below before they run."""
    found = {id(module.conv) for module in network.modules() if isinstance(module, Downsample)}
    in_a_row = (module for module in network.modules() if isinstance(module, torch.nn.Sequential))
    pairs = (pair for modules in in_a_row for pair in pairwise(modules))
    return found | {id(convolution) for before, convolution in pairs if isinstance(before, torch.nn.ZeroPad2d)}


def _put(
    patcher: ModelPatcher,
    name: str,
    others: list[tuple[object, PreHook]],
    hook: PreHook,
    padding: tuple[int, ...] | None = None,
) -> None:
    """Patch one convolution. Patches of other packs under the same names are kept in the hook, for `_take_away`."""
    patches = {f"{name}.{HOOKS}": OrderedDict([*others, (KEY, hook)])}
    if padding is not None:
        patches[f"{name}.{PADDING}"] = padding
    hook.put = [(key, patch, patcher.object_patches.get(key)) for key, patch in patches.items()]
    for key, patch in patches.items():
        patcher.add_object_patch(key, patch)


def _take_away(patcher: ModelPatcher, name: str) -> None:
    """Undo `_put` on one convolution, where another pack has not put its own patch on top since."""
    hook = patcher.object_patches.get(f"{name}.{HOOKS}", {}).get(KEY)
    for key, patch, before in () if hook is None else hook.put:
        if patcher.object_patches.get(key) is patch:
            if before is None:
                del patcher.object_patches[key]
            else:
                patcher.object_patches[key] = before


class _Pad:
    """Wraps what a convolution is fed around its edges, in place of its own padding; [b c h w] or [b c 1 h w]."""

    def __init__(self, columns: int, rows: int) -> None:
        self.sides = (columns, columns, rows, rows)
        self.open: set[torch.nn.Module] = set()  # see `not_wrapped`

    def __call__(self, module: torch.nn.Module, args: tuple) -> tuple:
        x, *others = args
        if (x.ndim == 5 and x.shape[2] > 1) or any(torch.is_tensor(other) for other in others):
            raise ValueError(
                "vae: it comes from Seamless Tiling, which takes single pictures only, and was given several frames; "
                "give it one picture at a time, or use the VAE from before that node"
            )
        sides = self.sides if x.ndim == 4 else (*self.sides, 0, 0)
        return F.pad(x, sides, mode="constant" if module in self.open else "circular"), *others


def _repad(across: bool, down: bool) -> PreHook:
    """For a VAE's downsampling, which adds a column of zeros at the right and a row below before its convolution."""

    def wrap(module: torch.nn.Module, args: tuple[torch.Tensor]) -> torch.Tensor:
        x = args[0]
        if across:
            x = F.pad(x[..., :-1], (0, 1, 0, 0), mode="circular")
        if down:
            x = F.pad(x[..., :-1, :], (0, 0, 0, 1), mode="circular")
        return x

    return wrap
