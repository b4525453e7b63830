"""The text condition of the capturing and distilling passes, in the form the model's own apply_model takes.

Encoding goes through the model's extra_conds, so that SDXL's size vector, FLUX's guidance and any new model's extras
are right without special cases. ControlNet, areas and masks of the condition play no part in these passes.
"""

from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_base import BaseModel

# Named by ComfyUI: a list of [tensor, options], what a CONDITIONING socket carries.
Conditioning = list


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


def encode(
    model: BaseModel,
    cond: dict[str, Any],
    latent: torch.Tensor,
    denoise_mask: torch.Tensor | None = None,
) -> dict[str, Any]:
    """Keyword arguments of apply_model for a condition and a latent.

    Args:
        model: ComfyUI's model.
        cond: one condition as a guider holds it.
        latent: the clean latent the pass is about, [b c h w], model scale; inpainting models read it.
        denoise_mask: 1 where the picture may change, [b or 1, 1 or c, h, w]; inpainting models read it.

    Returns:
        Tensors of batch size b, none of them an inference tensor if called outside inference mode.
    """
    encoded = comfy.samplers.encode_model_conds(
        model.extra_conds,
        [cond],
        torch.zeros_like(latent),
        latent.device,
        "negative",
        latent_image=latent,
        denoise_mask=denoise_mask,
        seed=None,
        latent_shapes=[latent.shape],
    )[0]["model_conds"]
    return {
        name: _ordinary(value.process_cond(batch_size=latent.shape[0], area=None).cond)
        for name, value in encoded.items()
    }


def _ordinary(value: Any) -> Any:
    """Conditions from other nodes are inference tensors, which autograd cannot save: clone them."""
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, list):
        return [_ordinary(item) for item in value]
    return value
