"""Optimisation mode, against the plain reading of the method and through its node."""

import comfy.model_management
import comfy.model_sampling
import plain_method as plain
import pytest
import torch

import nodes

SETTINGS = {
    "seed": 3, "start_from": "noise", "steps": 4, "learning_rate": 0.05, "iterations": 1, "content_weight": 0.25,
    "attention_scale": 1.0, "content_loss": "query", "lr_schedule": "constant",
}  # fmt: skip


@pytest.fixture(scope="module")
def optimise(styled):
    """The node's output on the small SD1.5: `optimise(graph=styled, **changes)`."""

    @torch.inference_mode()
    def run(graph=styled, **changes):
        node = nodes.NODE_CLASS_MAPPINGS["ADOptimizeLatent"]
        inputs = {"content": graph.content, "latent_image": graph.latent, **SETTINGS, **changes}
        return node.execute(graph.model, graph.style, **inputs)[0]["samples"]

    return run


def bars(height, width, count):
    """A label map of vertical bars, [H W]."""
    return (torch.arange(width) * count // width).expand(height, width)


SHAPE = (1, 4, 10, 14)
TWO, THREE = bars(20, 28, 2), bars(30, 28, 3)
MASK = torch.zeros(16, 16)
MASK[:, :9] = 1
CASES = {
    "style from noise, batch of 2": ({"shape": (2, *SHAPE[1:])}, {}),
    "query_edges, cosine": ({"cosine": True}, {"content_weight": 0.25, "content_loss": "query_edges"}),
    "query_key": ({}, {"content_weight": 200.0, "content_loss": "query_key"}),
    "query_key_value": ({}, {"content_weight": 1.0, "content_loss": "query_key_value"}),
    "two regions": ({"target": TWO, "labels": TWO.flip(1)}, {}),
    "three regions, scale 1.3": ({"target": THREE, "labels": THREE.T}, {"attention_scale": 1.3}),
    "pooled, weighted and masked": ({"pooled": True}, {}),
    "a place each, batch of 2": ({"places": True, "shape": (2, 4, 4, 8)}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_to_the_end_in_float64(case, sd15_float64, pack_module, random_latent):
    given, changes = CASES[case]
    settings = plain.Settings(layers=tuple(range(1, 7)), iterations=2, adain=False, **changes)
    style = [plain.Reference(random_latent(1, (1, 4, 16, 12)).double(), labels=given.get("labels"))]
    if "pooled" in given:
        style = [
            plain.Reference(random_latent(1, (2, 4, 8, 8)).double(), 0.5, MASK),
            plain.Reference(random_latent(2, (1, 4, 12, 10)).double(), 2.0),
            plain.Reference(random_latent(4, (1, 4, 8, 8)).double()),
        ]
    shape = given.get("shape", SHAPE)
    if "places" in given:
        ramp = (torch.arange(16) / 8).clamp(max=1).expand(shape[0], 8, -1).clone()
        ramp[0, 5:] = 0
        style = [
            plain.Reference(random_latent(1, (1, 4, 8, 8)).double(), 2.0, target=(torch.arange(8) < 5).float()[None]),
            plain.Reference(random_latent(2, (1, 4, 12, 10)).double(), target=ramp * (torch.arange(16) < 14)),
        ]
    content = random_latent(6, (1, *shape[1:])).double() if settings.content_weight else None
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    context = torch.randn(1, 77, 768, generator=torch.Generator().manual_seed(1)).double()
    result = descend(sd15_float64.model, pack_module, start, context, style, content, settings, given)
    unet = plain.ordinary_copy(sd15_float64.model.diffusion_model, torch.float64)
    expected = plain.optimise(
        unet, start, context, style, settings, 3, content, given.get("target"), given.get("cosine", False)
    )
    assert result.dtype == torch.float64
    assert (result - expected).abs().max() < 1e-6
    assert (result - start).abs().mean() > 0.02


def descend(model, pack_module, start, context, style, content, settings, given):
    """The pack's result in three steps, model space."""
    reference, optimise = pack_module("attention.reference"), pack_module("guidance.optimise")
    regions = None
    if "target" in given:
        count = int(given["target"].max()) + 1
        regions = pack_module("attention.regions").Regions(given["labels"][None], given["target"][None], count)
    parts = [reference.ReferencePart(r.latent, settings.layers, r.weight, r.mask, target_mask=r.target) for r in style]
    held = None if content is None else reference.Reference((reference.ReferencePart(content, settings.layers),))
    own = pack_module("guidance.settings").GuidanceSettings(
        learning_rate=settings.learning_rate, iterations=2, content_weight=settings.content_weight,
        content_loss=settings.content_loss, attention_scale=settings.attention_scale,
        lr_schedule="cosine" if given.get("cosine") else "constant",
    )  # fmt: skip
    sampler = optimise.OptimiseSampler(
        style=reference.Reference(tuple(parts)), content=held, regions=regions, settings=own,
        optimise=optimise.OptimiseSettings(steps=3),
    )  # fmt: skip
    with pack_module("attention.gradient").differentiable(model):
        objective = pack_module("guidance.objective").Objective(
            model, pack_module("attention.layers").list_layers(model.diffusion_model), style=sampler.style,
            content=held, settings=own, conds=pack_module("attention.conditioning").from_socket([[context, {}]]),
            latent=torch.zeros_like(start), regions=regions,
        )  # fmt: skip
        sigmas = optimise.optimise_sigmas(model.model_sampling, 3)
        reach = objective.reach(*start.shape[-2:])
        return sampler.descend(objective, start, sigmas.tolist(), reach, None)


def test_the_timesteps_of_the_release(sd15, pack_module):
    """t = k * (1000 // N) + 1 from high to low, as sigmas."""
    sampling = sd15.get_model_object("model_sampling")
    for steps, timesteps in ((3, [667, 334, 1]), (300, range(898, 0, -3)), (1000, [999, *range(999, 0, -1)])):
        sigmas = pack_module("guidance.optimise").optimise_sigmas(sampling, steps)
        assert torch.equal(sigmas, sampling.sigmas.cpu()[list(timesteps)])


def test_flow_models_fall_from_high_to_low(pack_module):
    """A table of another length is read at the same fractions."""
    sampling = comfy.model_sampling.ModelSamplingFlux()
    sigmas = pack_module("guidance.optimise").optimise_sigmas(sampling, 4)
    assert torch.equal(sigmas, sampling.sigmas[[7510, 5010, 2510, 10]])
    assert (sigmas.diff() < 0).all()


def test_the_node_from_noise_and_from_a_latent(optimise, styled, random_latent, caplog):
    caplog.set_level("INFO")
    first = optimise()
    assert torch.equal(first, optimise())
    assert (first - optimise(seed=4)).abs().mean() > 0.1
    assert "layers 1-6 of 7, 4 updates of 1 iterations" in caplog.text
    start = random_latent(8)
    graph = styled.but(latent={"samples": start})
    from_latent = optimise(graph, start_from="latent")
    assert torch.equal(from_latent, optimise(graph, start_from="latent", seed=4)), "the seed is for noise only"
    moved = (from_latent - start).abs() * 0.18215
    assert 0.01 < moved.mean() < 4 * 0.05
    cooled = optimise(graph, start_from="latent", lr_schedule="cosine")
    assert 0 < (cooled - start).abs().mean() < (from_latent - start).abs().mean()


def test_starting_from_the_content_stays_at_the_content(optimise, styled, random_latent):
    """q - Q_c is exactly 0 there, in a batch too: rounding must not turn into full-size gradients."""
    start = random_latent(8).expand(2, -1, -1, -1).clone()
    graph = styled.but(latent={"samples": start}, content=styled.capture(start[:1]))
    settings = {"start_from": "latent", "steps": 1, "learning_rate": 1e-3, "content_weight": 1e6}
    only_style = optimise(graph, **{**settings, "content_weight": 0.0})
    assert torch.equal(optimise(graph, **settings), only_style)
    assert not torch.equal(only_style, start)


def test_only_the_masked_part_moves(optimise, styled, random_latent):
    start = random_latent(8)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    graph = styled.but(latent={"samples": start, "noise_mask": mask})
    for start_from in ("latent", "noise"):
        result = optimise(graph, start_from=start_from)
        torch.testing.assert_close(result[..., 8:], start[..., 8:], rtol=0, atol=1e-5)
        assert (result[..., :8] - start[..., :8]).abs().mean() > 0.1


def test_cancel_and_a_clean_model(optimise, styled):
    before = styled.core()
    comfy.model_management.interrupt_current_processing()
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        optimise()
    assert torch.equal(styled.core(), before)


def test_each_step_is_reported_with_a_preview(styled, pack_module, encode_zeros):
    """The callback gets every step, with the latent as ComfyUI's previewers take it."""
    optimise, seen = pack_module("guidance.optimise"), []
    sampler = optimise.OptimiseSampler(
        style=styled.style, content=None, regions=None,
        settings=pack_module("guidance.settings").GuidanceSettings(iterations=1),
        optimise=optimise.OptimiseSettings(steps=3),
    )  # fmt: skip
    with torch.inference_mode():
        result = optimise.optimise_latent(
            styled.model, sampler, latent_image=torch.zeros(1, 4, 16, 16), noise=torch.randn(1, 4, 16, 16),
            cond=encode_zeros(), callback=lambda step, x0, x, total: seen.append((step, x0.clone(), total)),
        )  # fmt: skip
    assert [(step, total) for step, _, total in seen] == [(0, 3), (1, 3), (2, 3)]
    assert torch.equal(styled.model.model.process_latent_out(seen[-1][1]), result)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"steps": 0}, "steps: 0 is not allowed; use 1 to 1000"),
        ({"start_from": "image"}, "start_from: image is not allowed; use one of noise, latent"),
        ({"lr_schedule": "steep"}, "lr_schedule: steep is not allowed; use one of constant, linear, cosine"),
        ({"latent_image": {"samples": torch.ones(1, 16, 8, 8)}}, "latent_image: the latent has 16 channels"),
    ],
)
def test_bad_input(optimise, changes, says):
    with pytest.raises(ValueError, match=says):
        optimise(**changes)
