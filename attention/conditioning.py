"""The text condition of the capturing and distilling passes, in the form the model's own apply_model takes.

Encoding goes through the model's extra_conds, so that SDXL's size vector, FLUX's guidance and any new model's extras
are right without special cases. ControlNet, areas, masks and reference pictures of the condition play no part in these
passes.
"""

from collections.abc import Sequence
from typing import Any

import comfy.conds
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_base import BaseModel

from .architectures import transformer
from .frames import as_model_takes

# Named by ComfyUI: a list of [tensor, options], what a CONDITIONING socket carries.
Conditioning = list

# By name, each knows how to follow the batch and the part of the picture a pass is about.
Encoded = dict[str, comfy.conds.CONDRegular]

Area = tuple[int, int, int, int]  # as ComfyUI writes it: height, width, y, x in latent pixels

TOKENS = 77  # of a CLIP prompt
POOLED_WIDTH = 1280  # of SDXL's pooled prompt; other UNets do not read it

# Pictures that a model looks at, FLUX's Redux mask among them: their attention would be mixed into the style.
_PICTURES = (
    "reference_latents", "reference_latents_text_embeds", "attention_mask_img_shape", "context_latents",
    "time_dim_concat",
)  # fmt: skip


def from_socket(conditioning: Conditioning) -> dict[str, Any]:
    """The first entry of a CONDITIONING in the form a guider holds it; the input is not changed."""
    return comfy.sampler_helpers.convert_cond(conditioning)[0]


def from_guider(guider: comfy.samplers.CFGGuider) -> dict[str, Any]:
    """The guider's own negative condition or, where it has none, its positive one."""
    for kind in ("negative", *guider.conds):
        if guider.conds.get(kind):
            return guider.conds[kind][0]
    raise ValueError(
        "conditioning: the guider has no conditioning; connect one to the Capture node's conditioning input"
    )


def zeros(model: BaseModel) -> Conditioning:
    """A CONDITIONING of zeros: what stands in for an empty prompt where no text encoder is at hand."""
    architecture = transformer(model.diffusion_model)
    if architecture is None:
        width = model.model_config.unet_config["context_dim"]
        return [[torch.zeros(1, TOKENS, width), {"pooled_output": torch.zeros(1, POOLED_WIDTH)}]]
    width = model.diffusion_model.get_submodule(architecture.text_input).in_features
    options = {"pooled_output": torch.zeros(1, model.adm_channels)} if architecture.pooled else {}
    return [[torch.zeros(1, architecture.text_tokens, width), options]]


def encode(
    model: BaseModel,
    cond: dict[str, Any],
    latent: torch.Tensor,
    denoise_mask: torch.Tensor | None = None,
) -> Encoded:
    """What a model makes of a condition, for passes on a picture and on its windows.

    Args:
        model: ComfyUI's model.
        cond: one condition as a guider holds it.
        latent: the clean latent the passes are about, [b c h w], model scale; inpainting models read it.
        denoise_mask: 1 where the picture may change, [b or 1, 1 or c, h, w]; inpainting models read it.
    """
    return comfy.samplers.encode_model_conds(
        model.extra_conds,
        [{name: value for name, value in cond.items() if name not in _PICTURES}],
        torch.zeros_like(as_model_takes(model, latent)),
        latent.device,
        "negative",
        latent_image=as_model_takes(model, latent),
        denoise_mask=None if denoise_mask is None else as_model_takes(model, denoise_mask),
        seed=None,
        latent_shapes=[as_model_takes(model, latent).shape],
    )[0]["model_conds"]


def for_pass(encoded: Encoded, batch: int, areas: Sequence[Area | None] = (None,)) -> dict[str, Any]:
    """Keyword arguments of apply_model for a pass on windows of a picture, one after the other along the batch.

    Args:
        encoded: from `encode`, for the whole picture.
        batch: how many pictures a window holds.
        areas: of the windows; None is the whole picture.

    Returns:
        Tensors of batch size batch * len(areas), none of them an inference tensor if called outside inference mode.
    """
    taken = {
        name: [value.process_cond(batch_size=batch, area=area) for area in areas] for name, value in encoded.items()
    }
    return {name: _ordinary(first.concat(others)) for name, (first, *others) in taken.items()}


def _ordinary(value: Any) -> Any:
    """Conditions from other nodes are inference tensors, which autograd cannot save: clone them."""
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, list):
        return [_ordinary(item) for item in value]
    return value
