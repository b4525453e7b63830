"""The text condition of the capturing and distilling passes, in the form the model's own apply_model takes.

Encoding goes through the model's extra_conds, so that SDXL's size vector, FLUX's guidance and any new model's extras
are right without special cases. Of several conditions, the first that is in force at the noise level of a pass counts,
over the whole picture. ControlNet, GLIGEN, areas, masks and reference pictures play no part in these passes.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.model_base import BaseModel

from .architectures import transformer
from .frames import as_model_takes

# Named by ComfyUI: a list of [tensor, options], what a CONDITIONING socket carries.
Conditioning = list

# One condition as a guider holds it. Once encoded, its `model_conds` are objects by name that know how to follow the
# batch and the part of the picture a pass is about.
Cond = dict[str, Any]

Area = tuple[int, int, int, int]  # as ComfyUI writes it: height, width, y, x in latent pixels

TOKENS = 77  # of a CLIP prompt
POOLED_WIDTH = 1280  # of SDXL's pooled prompt; other UNets do not read it
PLAIN_GUIDANCE = 1.0  # of models with distilled guidance: none
_PIXELS_TOLD = 8  # to a latent pixel: what ComfyUI reckons where a condition names no size, whatever the model's VAE

# Pictures that a model looks at, FLUX's Redux mask among them: their attention would be mixed into the style.
_PICTURES = (
    "reference_latents", "reference_latents_text_embeds", "attention_mask_img_shape", "context_latents",
    "time_dim_concat",
)  # fmt: skip

# What an inpainting model is shown beside the noisy picture.
_SHOWN_BESIDE = ("concat_latent_image", "concat_mask")


def from_socket(conditioning: Conditioning) -> list[Cond]:
    """A CONDITIONING in the form a guider holds it; the input is not changed."""
    return comfy.sampler_helpers.convert_cond(conditioning)


def kind_of_passes(conds: Mapping[str, Sequence[Cond]]) -> str:
    """Which of a sampler's conditions the pack's passes read: the negative ones, else the first kind that has text.

    A sampler may hold none at all of a kind, or one without text (DualModelGuider without a negative prompt).

    Args:
        conds: by kind, as a guider holds them.

    Raises:
        ValueError: none has text.
    """
    for kind in ("negative", *conds):
        if any(cond.get("cross_attn") is not None for cond in conds.get(kind) or ()):
            return kind
    raise ValueError(
        "conditioning: the sampler has no conditioning with text; connect an encoded prompt to it, an empty one will do"
    )


def of_sampler(conds: Mapping[str, Sequence[Cond]]) -> Sequence[Cond]:
    """Those of a sampler's conditions that the pack's passes read, see `kind_of_passes`."""
    return conds[kind_of_passes(conds)]


def zeros(model: BaseModel) -> Conditioning:
    """A CONDITIONING of zeros: what stands in for an empty prompt where no text encoder is at hand."""
    architecture = transformer(model.diffusion_model)
    if architecture is None:
        width = model.model_config.unet_config["context_dim"]
        return [[torch.zeros(1, TOKENS, width), {"pooled_output": torch.zeros(1, POOLED_WIDTH)}]]
    network = model.diffusion_model
    text = torch.zeros(1, architecture.text_tokens, architecture.text_width(network))
    # ComfyUI 0.18 asks FLUX for a pooled prompt that may be None.
    pooled = None if architecture.pooled is None else torch.zeros(1, architecture.pooled(network))
    beside = {} if architecture.beside is None else architecture.beside(network)
    return [[text, {"pooled_output": pooled, **beside}]]


def in_force(conds: Sequence[Cond], sigma: float) -> Cond:
    """The first condition whose timestep range holds a noise level; where none does, the first of all."""
    held = (c for c in conds if c.get("timestep_end", 0.0) <= sigma <= c.get("timestep_start", math.inf))
    return next(held, conds[0])


def shown_beside(conds: Sequence[Cond]) -> dict[str, Any]:
    """What the sampler's conditions show an inpainting model beside the noisy picture."""
    return {name: value for name, value in conds[0].items() if name in _SHOWN_BESIDE}


def of_passes(model: BaseModel, sampler: Sequence[Cond], own: Conditioning | None) -> list[Cond]:
    """The conditions of the capturing and distilling passes.

    A model with distilled guidance (FLUX) has 1.0 of it in these passes, as the authors' program does: the sampler's
    stronger guidance is for denoising. What a conditioning of one's own says itself, holds.

    Args:
        sampler: the sampler's conditions.
        own: a CONDITIONING that takes their place.
    """
    conds = list(sampler) if own is None else from_socket(own)
    architecture = transformer(model.diffusion_model)
    if architecture is None or not architecture.distilled_guidance:
        return conds
    if own is None:
        return [{**cond, "guidance": PLAIN_GUIDANCE} for cond in conds]
    return [{"guidance": PLAIN_GUIDANCE, **cond} for cond in conds]


def encode(
    model: BaseModel,
    conds: Sequence[Cond],
    latent: torch.Tensor,
    *,
    size: Sequence[int],
    denoise_mask: torch.Tensor | None = None,
    beside: Mapping[str, Any] | None = None,
) -> list[Cond]:
    """What a model makes of its text conditions, for passes on a picture and on its windows.

    Args:
        model: ComfyUI's model.
        conds: as a guider holds them.
        latent: the clean latent the passes are about, [b c h w], model scale; inpainting models read it.
        size: (height, width) in latent pixels of the picture being made: what SDXL is told of sizes in every pass,
            those of a reference of another size too, as in the authors' program.
        denoise_mask: 1 where the picture may change, [b or 1, 1 or c, h, w]; inpainting models read it. Without it
            they are shown a picture that is all hole.
        beside: from `shown_beside`, takes the place of latent and denoise_mask.
    """
    left_out = (*_PICTURES, *_SHOWN_BESIDE)
    told = {"height": size[0] * _PIXELS_TOLD, "width": size[1] * _PIXELS_TOLD}
    kept = [{k: v for k, v in cond.items() if k not in left_out} for cond in conds]
    # The sampler's model_conds have pictures encoded in them.
    conds = [{**told, **cond, **(beside or {}), "model_conds": {}} for cond in kept]
    comfy.samplers.calculate_start_end_timesteps(model, conds)
    return comfy.samplers.encode_model_conds(
        model.extra_conds,
        conds,
        torch.zeros_like(as_model_takes(model, latent)),
        latent.device,
        "negative",
        latent_image=as_model_takes(model, latent),
        denoise_mask=None if denoise_mask is None else as_model_takes(model, denoise_mask),
        seed=0,
        latent_shapes=[as_model_takes(model, latent).shape],
    )


def for_pass(
    encoded: Sequence[Cond],
    sigma: float,
    batch: int,
    areas: Sequence[Area | None] = (None,),
    items: slice = slice(None),
) -> dict[str, Any]:
    """Keyword arguments of apply_model for a pass on windows of a picture, one after the other along the batch.

    Args:
        encoded: from `encode`, for the whole picture.
        sigma: noise level of the pass.
        batch: how many pictures a window holds.
        areas: of the windows; None is the whole picture.
        items: which of the pictures the pass is on.

    Returns:
        Tensors of batch size batch * len(areas), or of as many as the items are for batch; none of them an inference
        tensor if called outside inference mode.
    """
    model_conds = in_force(encoded, sigma)["model_conds"]
    taken = {
        name: [value.process_cond(batch_size=batch, area=area) for area in areas] for name, value in model_conds.items()
    }
    together = {name: _ordinary(first.concat(others)) for name, (first, *others) in taken.items()}
    if items == slice(None):
        return together
    return {name: _of_items(value, batch, len(areas), items) for name, value in together.items()}


def _of_items(value: Any, batch: int, areas: int, items: slice) -> Any:
    """What some pictures of a batch are given, in each of its windows; what is not by picture stays."""
    if isinstance(value, list):
        return [_of_items(item, batch, areas, items) for item in value]
    if torch.is_tensor(value) and value.ndim > 0 and len(value) == batch * areas:
        return value.unflatten(0, (areas, batch))[:, items].flatten(0, 1)
    return value


def _ordinary(value: Any) -> Any:
    """Conditions from other nodes are inference tensors, which autograd cannot save: clone them."""
    if torch.is_tensor(value):
        return value.clone()
    if isinstance(value, list):
        return [_ordinary(item) for item in value]
    return value
