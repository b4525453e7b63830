"""Refusals at the start of a run: before anything is loaded, in whichever order the nodes stand."""

import re

import comfy.model_management
import comfy.sample
import pytest
import torch
from comfy.patcher_extension import WrappersMP

import nodes as comfy_nodes


@pytest.fixture
def unloaded(nothing_loads, styled):
    """The graph; the test fails if anything is loaded."""
    return styled


def node(name):
    return comfy_nodes.NODE_CLASS_MAPPINGS[name]


@torch.inference_mode()
def apply(graph, model):
    """Apply AD Guidance on a model that other nodes have changed."""
    return graph.but(model=model).patched()


def tiled(pack_module, model):
    return pack_module("tiling.circular").tile_model(model, "both")


@pytest.mark.parametrize("first", ["guidance", "tiling"])
def test_windows_on_a_tiled_model(unloaded, pack_module, first):
    windows = pack_module("guidance.windows").Windows(64, 32)
    graph = unloaded.but(windows=windows)
    if first == "guidance":
        model = tiled(pack_module, graph.patched())
    else:
        model = apply(graph, tiled(pack_module, graph.model))
    with pytest.raises(ValueError, match="windows: the model comes from Seamless Tiling"):
        graph.core(model)


@pytest.mark.parametrize("first", ["guidance", "bypass"])
def test_a_bypass_lora(unloaded, first):
    def with_bypass(model):
        patched = model.clone()
        patched.set_injections("bypass_lora", [object()])
        return patched

    with pytest.raises(ValueError, match=r"model: Load LoRA \(Bypass\) is not supported"):
        if first == "guidance":
            unloaded.core(with_bypass(unloaded.patched()))
        else:
            unloaded.core(apply(unloaded, with_bypass(unloaded.model)))


def test_no_conditioning_at_all(unloaded):
    with pytest.raises(ValueError, match="conditioning"):
        unloaded.but(positive=[], negative=[]).core(unloaded.patched())


def test_a_content_of_another_size_speaks_of_pixels_and_of_weight_0_is_let_pass(unloaded, random_latent):
    graph = unloaded.but(content=unloaded.capture(random_latent(2, (1, 4, 8, 12))))
    with pytest.raises(ValueError, match="content: its picture is 96x64, the one being made is 128x128"):
        graph.ksampler()
    with pytest.raises(AssertionError, match="loading was started"):
        graph.but(content_weight=0.0).ksampler()


def test_a_guided_model_in_the_optimisation_node(unloaded):
    """The words say what to do with the graph; no sampler is blamed."""
    with torch.inference_mode(), pytest.raises(ValueError, match=r"model: it has guidance on it \(Apply AD Guidance\)"):
        node("ADOptimizeLatent").execute(
            unloaded.patched(), unloaded.style, unloaded.latent, 3, "noise", 1, "constant", learning_rate=0.05,
            iterations=1, content_weight=0.0, attention_scale=1.0, content_loss="query",
        )  # fmt: skip


def test_a_guided_model_as_the_negative_one_only(styled, custom_samplers):
    """Dual Model CFG Guider runs a second model behind its first one's back."""
    if "DualModelGuider" not in comfy_nodes.NODE_CLASS_MAPPINGS:
        pytest.skip("this ComfyUI has no DualModelGuider")

    def guider(model, negative):
        with torch.inference_mode():
            return node("DualModelGuider").execute(model, styled.positive, 3.0, negative, styled.negative)[0]

    guided = styled.but(steps=1).patched()
    with pytest.raises(ValueError, match=r"runs the guided model as its second model \(model_negative\)"):
        styled.but(steps=1).advanced(guider(styled.model, guided))
    picture = styled.but(steps=1).advanced(guider(guided, guided))
    assert torch.equal(picture, styled.but(steps=1).advanced(guider(guided, styled.model)))
    assert (picture - styled.but(steps=1).advanced(guider(styled.model, styled.model))).abs().mean() > 1e-2


@torch.inference_mode()
def optimised(graph, latent, **changes):
    """AD Optimize Latent's output, one step."""
    settings = {
        "seed": 3, "start_from": "noise", "steps": 1, "lr_schedule": "constant", "learning_rate": 0.05, "iterations": 1,
        "content_weight": 0.0, "attention_scale": 1.0, "content_loss": "query",
    }  # fmt: skip
    return node("ADOptimizeLatent").execute(graph.model, graph.style, latent, **{**settings, **changes})[0]


def test_optimisation_has_the_manners_of_a_sampler_node(styled, monkeypatch):
    """Device, batch_index for the noise, sizes told by an empty latent, other keys: as KSampler has them."""
    latent = {
        "samples": torch.zeros(2, 4, 8, 8), "batch_index": [5, 2], "downscale_ratio_spacial": 16, "note": "kept",
    }  # fmt: skip
    made = optimised(styled, latent)
    with torch.inference_mode():
        core = comfy_nodes.KSampler().sample(
            styled.model, 3, 1, 1.0, "euler", "normal", styled.positive, styled.negative, latent
        )[0]
    assert made.keys() == core.keys() == {"samples", "batch_index", "note"}
    assert made["samples"].shape == core["samples"].shape == (2, 4, 16, 16)
    later = optimised(styled, {"samples": torch.zeros(1, 4, 16, 16), "batch_index": [2]})
    torch.testing.assert_close(made["samples"][1:], later["samples"], rtol=0, atol=1e-3)
    monkeypatch.setattr(comfy.model_management, "intermediate_device", lambda: torch.device("meta"))
    assert optimised(styled, latent)["samples"].device == torch.device("meta"), "where ComfyUI keeps latents"


def test_the_seed_of_optimisation_reaches_other_nodes(styled):
    """Context Windows with freenoise asks for it."""
    seeds, model = [], styled.model.clone()

    def note(executor, noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs):
        seeds.append(seed)
        return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)

    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", note)
    optimised(styled.but(model=model), styled.latent, seed=11)
    assert seeds == [11]


def test_the_log_tells_what_falls(styled, caplog):
    """Losses at two noise levels cannot be compared: within the last update they can."""
    caplog.set_level("INFO")
    styled.but(iterations=3, steps=1).ksampler()
    first, last = map(float, re.search(r"([\d.]+) -> ([\d.]+) within the last update", caplog.text).groups())
    assert 0 < last < first


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_the_learning_rate_falls_over_the_guided_steps(pack_module, schedule):
    """As a share of the guided noise levels that lie above."""
    settings = pack_module("guidance.settings").GuidanceSettings(learning_rate=0.1, lr_schedule=schedule)
    found = [settings.learning_rate_at(i / 4) for i in range(4)]
    expected = {"constant": [1, 1, 1, 1], "linear": [1, 0.75, 0.5, 0.25], "cosine": [1, 0.8535534, 0.5, 0.1464466]}
    assert found == pytest.approx([0.1 * factor for factor in expected[schedule]])


def test_windows_that_come_to_be_needed_within_a_run(styled, pack_module):
    """LCM Upscale makes the picture larger than a window: what windows cannot have is asked for then."""
    from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

    graph = styled.but(latent={"samples": torch.zeros(1, 4, 8, 8)}, iterations=1, cfg=1.0)
    graph = graph.but(windows=pack_module("guidance.windows").Windows(64, 32))
    with torch.inference_mode():
        sampler = SamplerLCMUpscale.execute(1.5, -1, "bislerp")[0]
    assert torch.isfinite(graph.guider(sampler)).all()
    with pytest.raises(ValueError, match="windows: the model comes from Seamless Tiling"):
        graph.but(model=tiled(pack_module, graph.model)).guider(sampler)


def injected(pack_module, graph):
    injection = pack_module("guidance.injection")
    return injection.apply_injection(graph.model, graph.style, injection.InjectionSettings())


def test_injection_asks_at_the_start_too(pack_module, unloaded):
    """A sampler without text."""
    model = injected(pack_module, unloaded)
    with pytest.raises(ValueError, match="conditioning"):
        unloaded.but(positive=[], negative=[]).core(model)


def test_injection_has_no_effect_on_optimisation(pack_module, unloaded):
    with pytest.raises(ValueError, match="model: Inject Reference KV has no effect on this node"):
        optimised(unloaded.but(model=injected(pack_module, unloaded)), unloaded.latent)


@pytest.mark.parametrize("way", ["sampling", "sampler node", "optimisation"])
def test_a_noise_mask_that_is_not_finite(unloaded, way):
    latent = {"samples": torch.zeros(1, 4, 16, 16), "noise_mask": torch.full((1, 128, 128), float("nan"))}
    graph = unloaded.but(latent=latent)
    with pytest.raises(ValueError, match="latent_image: its noise mask holds NaN or infinite values"):
        if way == "optimisation":
            optimised(graph, latent)
        elif way == "sampling":
            graph.ksampler()
        else:
            graph.core(graph.patched())
