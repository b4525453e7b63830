"""Whether pictures, text conditions and numbers from the sockets are what the code behind them handles.

Asked before anything is loaded: what is let pass here gives the right result later, everything else is an error that
names the input.
"""

from collections.abc import Mapping, Sequence

import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_base import SDXL, BaseModel, SDXLRefiner, Stable_Zero123

from .architectures import transformer
from .conditioning import Cond, Conditioning, kind_of_passes
from .reference import Reference

SIZE_WIDTH = 256  # of each number in the size vector that SDXL and its refiner read behind the pooled text
SIZES = {SDXL: 6, SDXLRefiner: 5}


def rgb(name: str, image: torch.Tensor) -> torch.Tensor:
    """An IMAGE in colour, [b h w 3]: grey is repeated, alpha is left out as VAE Encode leaves it out.

    Args:
        name: of the input.
        image: [b h w c] with 1 (grey), 2 (grey and alpha), 3 (RGB) or 4 (RGB and alpha) channels, in 0..1.

    Raises:
        ValueError: names the input, what it was given and what is allowed.
    """
    shape = list(image.shape)
    if image.ndim != 4 or not 1 <= image.shape[-1] <= 4:
        raise ValueError(
            f"{name}: shape {shape} is not a picture; use [batch, height, width, channels], 1 to 4 channels"
        )
    if 0 in shape:
        raise ValueError(f"{name}: shape {shape} holds no picture; use at least one picture of at least one pixel")
    if not torch.isfinite(image).all():
        raise ValueError(f"{name}: the picture holds NaN or infinite values; all values must be finite")
    coloured = image[..., :3] if image.shape[-1] > 2 else image[..., :1].expand(*shape[:-1], 3)
    return coloured.contiguous()


def check_number(name: str, value: float, low: float, high: float) -> None:
    """Refuse a number outside of low..high, NaN among them.

    Raises:
        ValueError: names the input, what it was given and what is allowed.
    """
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is not allowed; use {low:g} to {high:g}")


def check_conditioning(name: str, conditioning: Conditioning, model: BaseModel, *, without_text: bool = False) -> None:
    """Refuse a CONDITIONING that this model cannot read.

    Args:
        name: of the input.
        conditioning: as the socket carries it.
        model: of a supported kind; it need not be loaded.
        without_text: let conditions without any text pass, and an empty list: the caller does not read them.

    Raises:
        ValueError: names the input, what it was given and what is allowed.
    """
    if not conditioning and not without_text:
        raise ValueError(f"{name}: it holds no condition at all; connect an encoded prompt (it may be empty)")
    for text, options in conditioning:
        if text is not None or not without_text:
            _check_text(name, text, options, model)


def check_texts(name: str, reference: Reference, model: BaseModel) -> None:
    """Refuse a reference whose text was encoded for another kind of model.

    Raises:
        ValueError: names the socket, what it was given and what is allowed.
    """
    for part in reference.active_parts:
        if part.conditioning is not None:
            check_conditioning(name, part.conditioning, model)


def check_conds(model: BaseModel, conds: Mapping[str, Sequence[Cond]]) -> None:
    """Refuse conditions of a sampler that the pack's passes cannot read; asked at the start of a run.

    Only those are asked for that are read: what the others hold is between the sampler and the model.

    Args:
        model: of a supported kind; it need not be loaded.
        conds: by kind (positive, negative), as a guider holds them.

    Raises:
        ValueError: names the kind of condition, what it was given and what is allowed.
    """
    kind = kind_of_passes(conds)
    for cond in conds[kind]:
        _check_text(kind, cond.get("cross_attn"), cond, model)


def text_width(model: BaseModel) -> int | None:
    """How wide a token of the text is that a model reads; None where it reads none or is of an unknown kind."""
    architecture = transformer(model.diffusion_model)
    if architecture is not None:
        return architecture.text_width(model.diffusion_model)
    if type(model.diffusion_model) is not UNetModel or isinstance(model, Stable_Zero123):
        return None  # these convert the text by themselves
    return model.model_config.unet_config.get("context_dim")


def pooled_width(model: BaseModel) -> int | None:
    """How wide the pooled text is that a model cannot do without; None where it can."""
    for kind, sizes in SIZES.items():
        if isinstance(model, kind):
            return model.adm_channels - sizes * SIZE_WIDTH
    architecture = transformer(model.diffusion_model)
    if architecture is None or architecture.pooled is None:
        return None
    return architecture.pooled(model.diffusion_model)


def _check_text(name: str, text: torch.Tensor | None, options: Mapping, model: BaseModel) -> None:
    """One condition: its text [b t width], and in its options the pooled text [b width]."""
    right = "encode it with the text encoder (CLIP) that belongs to the model"
    if text is None:
        raise ValueError(f"{name}: it has a condition without text; {right}, an empty prompt will do")
    if text.ndim != 3 or 0 in text.shape:
        raise ValueError(f"{name}: its text has shape {list(text.shape)}, not [batch, tokens, width]; {right}")
    width = text_width(model)
    if width is not None and text.shape[-1] != width:
        raise ValueError(f"{name}: its text is {text.shape[-1]} wide, this model reads {width}; {right}")
    pooled = options.get("pooled_output")
    needed = pooled_width(model)
    if needed is not None and "unclip_conditioning" not in options:
        if pooled is None:
            raise ValueError(f"{name}: it has no pooled text, which this model needs; {right}")
        if pooled.ndim != 2 or pooled.shape[0] == 0 or pooled.shape[-1] != needed:
            raise ValueError(
                f"{name}: its pooled text has shape {list(pooled.shape)}, this model reads [batch, {needed}]; {right}"
            )
    for values in (text, pooled):
        if values is not None and not torch.isfinite(values).all():
            raise ValueError(f"{name}: its text holds NaN or infinite values; all values must be finite")
