"""A tile of the demo model has its border where any other line of its tokens might be, whatever the reference.

Noise that repeats each few tokens makes every such line alike, the border among them, unless something tells it apart.
So the border is measured without the chance that a line of one picture has.
"""

from __future__ import annotations

from typing import NamedTuple

import comfy.sample
import comfy.samplers
import comfy.sd
import numpy as np
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from evaluation.measures import LATENT, differences
from guided import Graph
from torch import Tensor

import nodes as comfy_nodes

PERIOD, REPEATS = 8, 4
"""Of the noise, in latent pixels: the demo model's coarsest tokens are as wide."""
LOOKS = ("texture: scales", "texture: pebbles", "texture: wood", "texture: weave", "style: brush strokes",
         "style: watercolour")  # fmt: skip


class Demo(NamedTuple):
    """The demo model."""

    model: ModelPatcher
    prompt: list
    vae: comfy.sd.VAE


@pytest.fixture(scope="module")
def demo(pack, demo_file: str) -> Demo:
    with torch.inference_mode():
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(demo_file)
        return Demo(model, clip.encode_from_tokens_scheduled(clip.tokenize("")), vae)


@torch.inference_mode()
def lines(demo: Demo, pack, reference: Tensor, axes: str | None) -> np.ndarray:
    """How large the steps are across each line of the noise's period in a guided picture, the border last.

    Args:
        axes: of Seamless Tiling; None goes without.
    """
    model, vae = demo.model, demo.vae
    if axes is not None:
        model, vae = comfy_nodes.NODE_CLASS_MAPPINGS["ADSeamlessTiling"].execute(model, vae, axes).result
    noise = torch.randn(1, 4, PERIOD, PERIOD, generator=torch.Generator("cpu").manual_seed(5)).repeat(1, 1, 1, REPEATS)
    graph = Graph(pack, model, demo.prompt, demo.prompt, {"samples": torch.zeros_like(noise)})
    model = graph.styled(demo.vae.encode(reference[None])).but(iterations=2).patched()
    made = comfy.sample.sample_custom(
        model, noise, 1.0, comfy.samplers.sampler_object("euler"), torch.tensor([8.0, 2.0, 0.5, 0.0]), demo.prompt,
        demo.prompt, torch.zeros_like(noise), disable_pbar=True,
    )  # fmt: skip
    picture = vae.decode(made)[0].clamp(0, 1).numpy()
    assert picture.shape == (PERIOD * LATENT, REPEATS * PERIOD * LATENT, 3)
    return differences(picture, 1).mean((1, 2))[PERIOD - 1 :: PERIOD]


@pytest.mark.parametrize("look", LOOKS)
def test_the_border_is_a_line_like_others(demo, pack, pack_module, look):
    *inside, border = lines(demo, pack, picture_of(pack_module, look), "horizontal")
    assert abs(border / np.median(inside) - 1) < 0.01


def test_without_tiling_it_is_not(demo, pack, pack_module):
    *inside, border = lines(demo, pack, picture_of(pack_module, LOOKS[0]), None)
    assert border / np.median(inside) > 2


def picture_of(pack_module, look: str) -> Tensor:
    """The middle of an example picture, 256 pixels."""
    return torch.from_numpy(pack_module("pictures").PICTURES[look]()[128:384, 128:384]).float()
