"""The catalogue of self-attention layers, and the words that pick them."""

import comfy.ops
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "num_heads": 8, "use_spatial_transformer": True,
    "context_dim": 768, "legacy": False,
}  # fmt: skip
SDXL = {
    **SD15, "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10], "num_heads": -1,
    "num_head_channels": 64, "context_dim": 2048, "use_linear_in_transformer": True, "num_classes": "sequential",
    "adm_in_channels": 2816,
}  # fmt: skip


@pytest.fixture(scope="module")
def layers(pack_module):
    return pack_module("attention.layers")


def unet(config):
    """A UNet without weights."""
    return UNetModel(**config, dtype=torch.float32, device="meta", operations=comfy.ops.disable_weight_init)


def test_the_papers_layers_of_sd15(layers):
    """16 layers; the last six are the 32x32 and 64x64 ones of the decoder."""
    found = layers.list_layers(unet(SD15))
    assert len(found) == 16
    assert [layer.block for layer in found[10:]] == [("output", n, 0) for n in (6, 7, 8, 9, 10, 11)]
    assert [layer.grid(64, 96) for layer in found[10:]] == [(32, 48)] * 3 + [(64, 96)] * 3
    assert found[6].block == ("middle", 0, 0)
    assert found[6].grid(64, 96) == (8, 12)
    assert layers.select_layers("auto", 16) == tuple(range(10, 16))


def test_the_papers_layers_of_sdxl(layers):
    found = layers.list_layers(unet(SDXL))
    assert len(found) == 70
    assert layers.select_layers("auto", 70) == tuple(range(64, 70))
    assert found[69].block == ("output", 5, 1)
    assert found[69].grid(128, 128) == (64, 64)


def test_the_papers_layers_of_flux(layers):
    """57 blocks; the last seven are single ones."""
    flux = Flux(
        in_channels=16, out_channels=16, vec_in_dim=768, context_in_dim=4096, hidden_size=3072, mlp_ratio=4.0,
        num_heads=24, depth=19, depth_single_blocks=38, axes_dim=[16, 56, 56], theta=10000, patch_size=2, qkv_bias=True,
        guidance_embed=True, txt_ids_dims=[], dtype=torch.float32, device="meta",
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    found = layers.list_layers(flux)
    assert len(found) == 57
    assert layers.select_layers("auto", 57, layers.auto_layer_count(flux)) == tuple(range(50, 57))
    assert [layer.block for layer in found[18:20]] == [("double_blocks", 18, 0), ("single_blocks", 0, 0)]
    assert [found[56].block, found[56].call] == [("single_blocks", 37, 0), 56]
    assert found[56].grid(64, 97) == (32, 49)


def test_the_second_attention_of_sd35_medium(layers):
    """24 joint layers and, in the first 13 blocks, one more of the picture alone behind each."""
    sd35 = OpenAISignatureMMDITWrapper(
        input_size=None, in_channels=16, depth=24, adm_in_channels=2048, qk_norm="rms", num_patches=147456,
        pos_embed_max_size=384, x_block_self_attn_layers=list(range(13)), dtype=torch.float32, device="meta",
        operations=comfy.ops.disable_weight_init,
    )  # fmt: skip
    found = layers.list_layers(sd35)
    assert len(found) == 24 + 13
    assert [(layer.block, layer.joint) for layer in found[1:4]] == [
        (("joint_blocks", 0, 1), False),
        (("joint_blocks", 1, 0), True),
        (("joint_blocks", 1, 1), False),
    ]
    assert layers.auto_layer_count(sd35) == 6


def test_the_catalogue_is_the_order_and_size_of_execution(layers, sd15, encode_zeros):
    """A real forward pass at an odd size meets the layers in the listed order, with the listed token grids."""
    height, width = 11, 18
    found = layers.list_layers(sd15.model.diffusion_model)
    met = []

    def note(q, k, v, extra_options):
        block = (*extra_options["block"], extra_options["block_index"])
        met.append((block, tuple(extra_options["activations_shape"][2:]), q.shape[1]))
        return v

    replace = {layer.block: note for layer in found}
    with torch.inference_mode():
        sd15.model.apply_model(
            torch.zeros(1, 4, height, width), torch.ones(1), c_crossattn=encode_zeros()[0][0],
            transformer_options={"patches_replace": {"attn1": replace}},
        )  # fmt: skip
    expected = [(layer.block, layer.grid(height, width)) for layer in found]
    assert met == [(block, grid, grid[0] * grid[1]) for block, grid in expected]
    assert len(met) == 7
    assert met[2][1] == (6, 9)


@pytest.mark.parametrize(
    ("text", "count", "expected"),
    [
        ("auto", 3, (0, 1, 2)),
        (" All ", 4, (0, 1, 2, 3)),
        ("10-15", 16, (10, 11, 12, 13, 14, 15)),
        ("3,5,8-10", 16, (3, 5, 8, 9, 10)),
        ("5, 3 ,3-5", 16, (3, 4, 5)),
        ("0", 1, (0,)),
    ],
)
def test_select_layers(layers, text, count, expected):
    assert layers.select_layers(text, count) == expected
    assert layers.select_layers(layers.describe_layers(expected), count) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("16", r"layers: layer 16 does not exist; this model has 16 .* 0 to 15"),
        ("3-99", r"layers: layer 99 does not exist; this model has 16"),
        ("8-5", r"layers: the range '8-5' runs backwards; write 5-8"),
        ("last", r"layers: cannot read 'last'"),
        ("-1", r"layers: cannot read '-1'"),
        ("1,,2", r"layers: cannot read ''"),
        ("", r"layers: cannot read ''"),
    ],
)
def test_select_layers_refuses(layers, text, says):
    with pytest.raises(ValueError, match=says):
        layers.select_layers(text, 16)


def test_describe_layers(layers):
    assert layers.describe_layers((3, 5, 8, 9, 10)) == "3,5,8-10"


def test_models_it_cannot_read(layers):
    with pytest.raises(ValueError, match=r"model: Linear is not supported, because .*; use one of SD1\.x"):
        layers.list_layers(torch.nn.Linear(1, 1))
    without = {
        **SD15,
        "transformer_depth": [0] * 8,
        "transformer_depth_middle": -1,
        "transformer_depth_output": [0] * 12,
    }
    with pytest.raises(ValueError, match="model: this UNetModel has no self-attention"):
        layers.list_layers(unet(without))
