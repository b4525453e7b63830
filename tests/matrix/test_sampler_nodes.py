"""ComfyUI's other sampler nodes and guiders on a guided model, pictures to start from, masks, batches."""

import re

import comfy.samplers
import pytest
import small_models
import torch
from guided import Graph
from passes import watched

import nodes as comfy_nodes

STEPS = 4


@pytest.fixture(scope="module")
def small(graph, random_latent):
    """A guided graph at 8x16, one iteration a step."""
    changed = graph.but(latent={"samples": torch.zeros(1, 4, 8, 16)}, steps=STEPS, cfg=3.0, iterations=1)
    return changed.styled(random_latent(1, (1, 4, 8, 8)))


def updates(log):
    """How many updates each run reported."""
    return [int(found) for found in re.findall(r"(\d+) updates of", log)]


def node(name):
    return comfy_nodes.NODE_CLASS_MAPPINGS[name]


def guider(graph, name="CFGGuider", **inputs):
    """A guider of ComfyUI's on the guided model, and the same on the model itself."""
    with torch.inference_mode():
        return [node(name).execute(model, **inputs)[0] for model in (graph.patched(), graph.model)]


@torch.inference_mode()
def advanced(graph, model, latent, first, last, noise, leftover):
    """What KSampler (Advanced) makes of a part of the steps."""
    return comfy_nodes.KSamplerAdvanced().sample(
        model, noise, graph.seed, graph.steps, graph.cfg, graph.sampler, graph.scheduler, graph.positive,
        graph.negative, latent, first, last, leftover,
    )[0]  # fmt: skip


def test_ksampler_advanced_in_two_parts(small, caplog):
    """Leftover noise is handed on after its update; the second part goes on from there with updates of its own."""
    caplog.set_level("INFO")
    model, states = small.patched(), []
    cfg = guider(small, positive=small.positive, negative=small.negative, cfg=small.cfg)[0]
    sampling = small.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, small.scheduler, small.steps)
    with torch.inference_mode():
        noise = node("RandomNoise").execute(small.seed)[0].generate_noise(small.latent)
        sampler = comfy.samplers.sampler_object(small.sampler)
        cfg.sample(
            noise, small.latent["samples"], sampler, sigmas, seed=small.seed, disable_pbar=True,
            callback=lambda step, x0, x, total: states.append(x.clone()),
        )  # fmt: skip
    first = advanced(small, model, small.latent, 0, 2, "enable", "enable")
    torch.testing.assert_close(small.model.model.process_latent_in(first["samples"]), states[2], rtol=0, atol=1e-5)
    second = advanced(small, model, first, 2, STEPS, "disable", "disable")["samples"]
    assert updates(caplog.text) == [STEPS, 2, 2]
    assert torch.isfinite(second).all()
    unguided = advanced(small, small.model, first, 2, STEPS, "disable", "disable")["samples"]
    assert (second - unguided).abs().mean() > 1e-2
    off = advanced(small, small.but(iterations=0).patched(), first, 2, STEPS, "disable", "disable")["samples"]
    assert torch.equal(off, unguided)


def test_sampler_custom_is_the_same(small):
    with torch.inference_mode():
        sigmas = node("BasicScheduler").execute(small.model, small.scheduler, small.steps, 1.0)[0]
        sampler = comfy.samplers.sampler_object(small.sampler)
        result = node("SamplerCustom").execute(
            small.patched(), True, small.seed, small.cfg, small.positive, small.negative, sampler, sigmas, small.latent
        )
    assert torch.equal(result[0]["samples"], small.ksampler())


def test_basic_guider(small, caplog):
    """It has a positive condition alone: the pack's passes take that."""
    caplog.set_level("INFO")
    guided, unguided = guider(small, "BasicGuider", conditioning=small.positive)
    with watched(small.model) as passes:
        picture = small.advanced(guided)
    assert torch.equal(picture, small.but(cfg=1.0, negative=small.positive).ksampler())
    assert (picture - small.advanced(unguided)).abs().mean() > 1e-2
    assert all(torch.equal(one.text, small.positive[0][0]) for one in passes.reading)
    assert updates(caplog.text)[0] == STEPS


@pytest.mark.parametrize("style", ["regular", "nested"])
def test_dual_cfg_guider(small, style, encode_random, caplog):
    caplog.set_level("INFO")
    inputs = {"cond1": small.positive, "cond2": encode_random(5), "negative": small.negative, "style": style}
    guided, unguided = guider(small, "DualCFGGuider", cfg_conds=2.0, cfg_cond2_negative=3.0, **inputs)
    with watched(small.model) as passes:
        picture = small.advanced(guided)
    assert updates(caplog.text) == [STEPS]
    assert torch.isfinite(picture).all()
    assert (picture - small.advanced(unguided)).abs().mean() > 1e-2
    assert all(torch.equal(one.text, small.negative[0][0]) for one in passes.reading)
    off = guider(small.but(iterations=0), "DualCFGGuider", cfg_conds=2.0, cfg_cond2_negative=3.0, **inputs)[0]
    assert torch.equal(small.advanced(off), small.advanced(unguided))


def test_denoise_below_one_and_a_batch_of_pictures(small, random_latent, caplog):
    """Two pictures to start from, two pooled references: each picture stays its own."""
    caplog.set_level("INFO")
    start = torch.cat([random_latent(7, (1, 4, 8, 16)), random_latent(8, (1, 4, 8, 16))])
    graph = small.but(latent={"samples": start}, denoise=0.3, learning_rate=0.02, adain=False)
    graph = graph.styled(torch.cat([random_latent(1, (1, 4, 8, 8)), random_latent(2, (1, 4, 8, 8))]))
    picture, unguided = graph.ksampler(), graph.core()
    assert updates(caplog.text) == [STEPS]
    assert torch.isfinite(picture).all()
    assert (picture - unguided).abs().mean() > 1e-2
    distances = (picture[:, None] - start[None]).abs().mean(dim=(2, 3, 4))
    assert distances.argmin(dim=1).tolist() == [0, 1]
    assert torch.equal(graph.but(iterations=0).ksampler(), unguided)


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_sde", "lcm"])
def test_inpainting_moves_only_what_is_masked(small, random_latent, sampler):
    """Each kind of sampler; where the mask is 0 the latent that came in comes out."""
    start = random_latent(7, (1, 4, 8, 16))
    mask = torch.zeros(1, 1, 64, 128)
    mask[..., :64] = 1
    graph = small.but(latent={"samples": start, "noise_mask": mask}, sampler=sampler)
    guided, unguided = graph.ksampler(), graph.core()
    assert torch.equal(guided[..., 8:], unguided[..., 8:])
    torch.testing.assert_close(guided[..., 8:], start[..., 8:], rtol=0, atol=1e-4)
    assert (guided[..., :8] - unguided[..., :8]).abs().mean() > 0.1


def test_differential_diffusion(small, random_latent, pack):
    """Its mask has more area with each step; what it never takes in stays, and the mask of each step counts."""
    import comfy_extras.nodes_differential_diffusion as extra

    start = random_latent(7, (1, 4, 8, 16))
    mask = torch.linspace(0, 1, 128).expand(1, 1, 64, 128).clone()
    mask[..., :32] = 0
    graph = small.but(latent={"samples": start, "noise_mask": mask}, scheduler="simple")  # never at the lowest sigma
    with torch.inference_mode():
        graph = graph.but(model=extra.DifferentialDiffusion.execute(graph.model, 1.0)[0])
    guided, unguided = graph.ksampler(), graph.core()
    assert torch.equal(guided[..., :4], unguided[..., :4])
    assert (guided[..., 8:] - unguided[..., 8:]).abs().mean() > 0.1
    assert torch.equal(graph.but(iterations=0).ksampler(), unguided)
    plain = small.but(latent=graph.latent, scheduler="simple")
    assert (unguided - plain.core()).abs().mean() > 1e-2


def test_differential_diffusion_at_the_end(small, random_latent):
    """What the sampler has held to the last does not move after it: a soft mask whose turn never came."""
    import comfy_extras.nodes_differential_diffusion as extra

    mask = torch.full((1, 1, 64, 128), 0.02)
    mask[..., 64:] = 1
    graph = small.but(latent={"samples": random_latent(7, (1, 4, 8, 16)), "noise_mask": mask}, scheduler="simple")
    with torch.inference_mode():
        graph = graph.but(model=extra.DifferentialDiffusion.execute(graph.model, 1.0)[0])
    guided, unguided = graph.ksampler(), graph.core()
    assert torch.equal(guided[..., :7], unguided[..., :7])
    assert (guided[..., 9:] - unguided[..., 9:]).abs().mean() > 0.1


@pytest.fixture(scope="module")
def inpainting(pack, custom_samplers, random_latent, encode_random, tmp_path_factory):
    """A graph on a tiny inpainting SD1.5, with conditions and latent as InpaintModelConditioning makes them."""
    made = small_models.MODELS["SD1.5"]
    config = {**made.unet_config, "in_channels": 9}
    model = small_models.load(
        small_models.Small("SD15", config, made.outputs, made.auto, made.context), tmp_path_factory.mktemp("inpaint")
    )
    mask = torch.zeros(1, 1, 64, 128)
    mask[..., :64] = 1
    beside = {"concat_latent_image": random_latent(9, (1, 4, 8, 16)), "concat_mask": mask}
    positive, negative = ([[encode_random(seed)[0][0], dict(beside)]] for seed in (1, 2))
    latent = {"samples": random_latent(7, (1, 4, 8, 16)), "noise_mask": mask}
    return Graph(pack, model, positive, negative, latent, steps=3, cfg=3.0, settings={"iterations": 1})


@pytest.mark.parametrize("own_text", [False, True])
def test_an_inpainting_model(inpainting, own_text, random_latent, encode_zeros):
    """It sees the hole and the picture around it in each pass on the picture, and neither with the reference."""
    text = {"conditioning": encode_zeros()} if own_text else {}
    graph = inpainting.styled(random_latent(1, (1, 4, 8, 8)), **text)
    unguided = graph.core()
    assert torch.equal(graph.but(iterations=0).ksampler(), unguided)
    with watched(graph.model) as passes:
        picture = graph.ksampler()
    assert torch.equal(picture[..., 8:], unguided[..., 8:])
    assert (picture[..., :8] - unguided[..., :8]).abs().mean() > 0.1
    beside = passes.denoising[0].x[:1, 4:]
    assert (beside[:, 0, :, :8] == 1).all() and (beside[:, 0, :, 8:] == 0).all()
    assert beside[:, 1:].std() > 0.1
    for one in passes.reading:
        if one.with_gradient:
            assert torch.equal(one.x[:, 4:], beside)
        else:
            assert (one.x[:, 4] == 1).all()
            assert one.x[:, 5:].std(dim=(2, 3)).max() < 1e-6


def test_an_inpainting_model_without_its_conditioning(inpainting, random_latent, encode_random):
    """Set Latent Noise Mask alone: mask and picture are those of the latent."""
    plain = inpainting.but(positive=encode_random(1), negative=encode_random(2))
    graph = plain.styled(random_latent(1, (1, 4, 8, 8)))
    with watched(graph.model) as passes:
        picture = graph.ksampler()
    assert torch.equal(picture[..., 8:], graph.core()[..., 8:])
    for one in passes.reading:
        if one.with_gradient:
            assert torch.equal(one.x[:, 4:], passes.denoising[0].x[:1, 4:])
