"""Bad input: a ValueError that names the input, what was given and what is allowed, before any sampling."""

import pytest
import torch

import nodes


@pytest.mark.parametrize(
    ("shape", "inputs", "says"),
    [
        ((1, 16, 16, 16), {}, "latent: the latent has 16 channels, this model works on 4"),
        ((1, 4, 3, 16, 16), {}, r"latent: shape \[1, 4, 3, 16, 16\] is not a picture; video"),
        (
            (1, 4, 16, 16),
            {"layers": "5-7"},
            "layers: layer 7 does not exist; this model has 7 self-attention layers, 0 to 6",
        ),
        ((1, 4, 16, 16), {"mask": torch.zeros(1, 16, 16)}, "mask: the mask is empty"),
        ((1, 4, 16, 16), {"mask": torch.ones(3, 16, 16)}, "mask: 3 masks for 1 pictures"),
        ((1, 4, 16, 16), {"weight": float("nan")}, "weight: nan is not allowed; use 0 or more"),
    ],
)
def test_capture_refuses(unsampled, shape, inputs, says):
    with pytest.raises(ValueError, match=says):
        unsampled.capture(torch.zeros(shape), **inputs)


def test_capture_refuses_nan(unsampled):
    with pytest.raises(ValueError, match="latent: the latent holds NaN"):
        unsampled.capture(torch.full((1, 4, 16, 16), float("nan")))


def test_a_references_noise_mask_is_ignored_with_a_warning(unsampled, random_latent, caplog):
    node = nodes.NODE_CLASS_MAPPINGS["ADCaptureReferenceAttention"]
    latent = {"samples": random_latent(1), "noise_mask": torch.ones(1, 128, 128)}
    captured = node.execute(unsampled.model, latent, layers="auto", weight=1.0)[0]
    assert captured.parts[0].mask is None
    assert caplog.messages == ["Attention distillation: latent: its noise mask is ignored, the whole picture counts"]


@pytest.mark.parametrize("way", ["ksampler", "guider", "patched_core"])
def test_content_of_another_size(unsampled, random_latent, way):
    graph = unsampled.but(content=unsampled.capture(random_latent(2, (1, 4, 16, 12))))
    run = {
        "ksampler": graph.ksampler,
        "guider": graph.guider,
        "patched_core": lambda: graph.core(graph.patched()),
    }[way]
    with pytest.raises(ValueError, match="content: its picture is 96x128, the one being made is 128x128"):
        run()


def test_content_that_counts_for_nothing_may_have_any_size(styled, random_latent):
    graph = styled.but(content=styled.capture(random_latent(2, (3, 4, 16, 12))), content_weight=0.0, steps=1)
    assert torch.equal(graph.ksampler(), graph.but(content=None).ksampler())


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"negative": [[torch.zeros(1, 77, 1024), {}]]}, "negative: its text is 1024 wide, this model reads 768"),
        ({"negative": [], "positive": []}, "conditioning: the sampler has no conditioning with text"),
        ({"latent": {"samples": torch.ones(1, 16, 16, 16)}}, "latent_image: the latent has 16 channels, this model"),
        ({"latent": {"samples": torch.ones(1, 4, 1, 16, 16)}}, "latent_image: .* is a video of one frame"),
    ],
)
def test_what_a_sampler_node_brings_along(unsampled, inputs, says):
    """Behind Apply AD Guidance it becomes known at the start of the run."""
    graph = unsampled.but(**inputs)
    with pytest.raises(ValueError, match=says):
        graph.core(graph.patched())


def test_a_guider_whose_negative_conditioning_has_no_text(styled):
    """At cfg 1 it is not read: the pack's passes read the positive one, as if it stood for both."""
    graph = styled.but(steps=1)
    guided = graph.patched()
    node = nodes.NODE_CLASS_MAPPINGS["DualModelGuider"]
    with torch.inference_mode():
        guiders = [
            node.execute(guided, graph.positive, cfg=1.0, **more)[0] for more in ({}, {"negative": graph.positive})
        ]
    assert guiders[0].original_conds["negative"][0].get("cross_attn") is None
    without, both = (graph.advanced(guider) for guider in guiders)
    assert torch.equal(without, both)
    assert not torch.equal(without, graph.advanced(nodes.NODE_CLASS_MAPPINGS["CFGGuider"].execute(
        graph.model, graph.positive, graph.positive, 1.0)[0]))  # fmt: skip


def test_content_batch_that_does_not_fit(unsampled, random_latent):
    graph = unsampled.but(content=unsampled.capture(random_latent(2, (3, 4, 16, 16))))
    with pytest.raises(ValueError, match="content: 3 pictures for a batch of 1"):
        graph.ksampler()


def test_samplers_that_cannot_be_guided(unsampled):
    with pytest.raises(
        ValueError, match=r"sampler: uni_pc is not supported with attention distillation: .* use dpmpp_2m"
    ):
        unsampled.but(sampler="uni_pc").ksampler()


def test_latents_that_are_no_finite_picture(unsampled):
    with pytest.raises(ValueError, match="latent_image: the latent holds NaN"):
        unsampled.but(latent={"samples": torch.full((1, 4, 16, 16), float("inf"))}).ksampler()
    with pytest.raises(ValueError, match=r"latent_image: shape \[1, 4, 2, 16, 16\] is not a picture"):
        unsampled.but(latent={"samples": torch.zeros(1, 4, 2, 16, 16)}).ksampler()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"learning_rate": 0.0}, "learning_rate: 0.0 is not allowed; use a number above 0"),
        ({"learning_rate": float("inf")}, "learning_rate: inf is not allowed"),
        ({"iterations": -1}, "iterations: -1 is not allowed; use 0 or more"),
        ({"attention_scale": 0.0}, "attention_scale: 0.0 is not allowed"),
        ({"content_loss": "keys"}, "content_loss: keys is not allowed; use one of query"),
        (
            {"start_percent": 0.6, "end_percent": 0.4},
            r"end_percent: 0.4 is not allowed; use 0.6 \(start_percent\) to 1",
        ),
    ],
)
def test_settings(unsampled, settings, says):
    with pytest.raises(ValueError, match=says):
        unsampled.but(**settings).ksampler()


def test_all_references_left_out(unsampled, random_latent):
    with pytest.raises(ValueError, match="style: every reference in it has weight 0"):
        unsampled.styled(random_latent(1), weight=0.0).ksampler()


def test_a_model_without_self_attention(unsampled, monkeypatch, random_latent):
    """A real UNet whose transformer blocks are all gone, and a network that is no UNet."""
    unet = unsampled.model.model.diffusion_model
    for blocks in (unet.input_blocks, [unet.middle_block], unet.output_blocks):
        for block in blocks:
            for module in block:
                if hasattr(module, "transformer_blocks"):
                    monkeypatch.setitem(module._modules, "transformer_blocks", torch.nn.ModuleList())
    with pytest.raises(ValueError, match="model: this UNetModel has no self-attention"):
        unsampled.capture(random_latent(1))
