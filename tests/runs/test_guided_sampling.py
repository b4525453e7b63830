"""Guided sampling through the nodes, against the plain reading of the method and against ComfyUI's own graph."""

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.samplers
import plain_method as plain
import pytest
import torch
from passes import watched
from steps import RMS_TOLERANCE, recording_euler

CASES = {
    "adain, cfg 7.5": ({"cfg": 7.5}, (1, 4, 16, 16), [(1, 4, 16, 16)]),
    "no adain, cfg 1, two references": ({"adain": False}, (1, 4, 16, 16), [(1, 4, 16, 16), (2, 4, 10, 14)]),
    "batch of 2, not square, content": ({"attention_scale": 1.3}, (2, 4, 11, 18), [(1, 4, 16, 16)]),
}


def build(case, graph, random_latent):
    """A graph for a case with the plain reading's inputs for the same."""
    changes, shape, style_shapes = CASES[case]
    latents = [random_latent(10 + i, style_shape) for i, style_shape in enumerate(style_shapes)]
    style = None
    for latent in latents:
        style = graph.capture(latent, reference=style)
    content = random_latent(20, (1, *shape[1:])) if "content" in case else None
    graph = graph.but(latent={"samples": torch.zeros(shape)}, style=style, **changes)
    if content is not None:
        graph = graph.but(content=graph.capture(content))
    settings = plain.Settings(
        layers=tuple(range(1, 7)),
        adain=changes.get("adain", True),
        content_weight=0.25 if content is not None else 0.0,
        attention_scale=changes.get("attention_scale", 1.0),
    )
    return graph, [plain.Reference(latent) for latent in latents], content, settings


@pytest.mark.parametrize("case", CASES)
def test_each_step_matches_the_plain_reading(case, graph, random_latent):
    graph, references, content, settings = build(case, graph, random_latent)
    states = []
    result = graph.guider(recording_euler(states))
    model = graph.model.model
    unet, model_sigmas = plain.ordinary_copy(model.diffusion_model), model.model_sampling.sigmas.clone()
    states[-1] = (*states[-1][:2], model.process_latent_in(result))
    assert len(states) == graph.steps + 1
    assert torch.equal(states[0][1], states[0][2]), "the initial noise must not be updated"
    with torch.inference_mode(False):
        for number, (sigma, before, after) in enumerate(states[1:]):
            scale = (max(sigma, float(model_sigmas[0])) ** 2 + 1) ** 0.5
            step = plain.guided_step(
                unet, before.clone() / scale, sigma, model_sigmas, torch.zeros(1, 77, 768), references,
                plain.draw_noises(graph.seed, number, references, content, settings), settings, content,
            )  # fmt: skip
            rms = (after.clone() / scale - step.after).square().mean().sqrt()
            assert rms < RMS_TOLERANCE, f"sigma {sigma}: rms {rms}"


class Float64Model:
    """What a sampler calls, in float64: the small SD1.5's noise prediction by the diffusion model itself."""

    def __init__(self, model, positive, negative, cfg):
        self.model, self.positive, self.negative, self.cfg = model, positive, negative, cfg

    def __call__(self, x, sigma, **extra_args):
        sigmas = self.model.model_sampling.sigmas
        unet = self.model.diffusion_model
        return plain.denoise(unet, x, float(sigma[0]), sigmas, self.cfg, self.positive, self.negative)


@pytest.mark.parametrize("case", CASES)
def test_to_the_end_in_float64(case, graph, random_latent, sd15_float64, pack_module):
    graph, references, content, settings = build(case, graph, random_latent)
    objective, run = pack_module("guidance.objective"), pack_module("guidance.run")
    sampling, gradient = pack_module("guidance.sampling"), pack_module("attention.gradient")
    layers = pack_module("attention.layers").list_layers(sd15_float64.model.diffusion_model)
    model = sd15_float64.model
    own = pack_module("guidance.settings").GuidanceSettings(
        learning_rate=0.05, adain=settings.adain, attention_scale=settings.attention_scale
    )
    positive, negative = graph.positive[0][0].double(), graph.negative[0][0].double()

    def start_run(_model, x, sigmas, _extra_args):
        with gradient.differentiable(model), torch.no_grad():
            made = objective.Objective(
                model, layers, style=graph.style, content=graph.content, settings=own,
                conds=pack_module("attention.conditioning").from_socket([[negative, {}]]), latent=torch.zeros_like(x),
            )  # fmt: skip
        return run.GuidedRun(made, own, pack_module("attention.noise").StepNoise(graph.seed), sigmas.tolist())

    sigmas = torch.tensor([6.0, 2.5, 0.9, 0.0], dtype=torch.float64)
    noise = torch.randn(graph.latent["samples"].shape, generator=torch.Generator().manual_seed(5)).double()
    euler = comfy.samplers.KSAMPLER(comfy.k_diffusion.sampling.sample_euler)
    guided = sampling.guide_sampler(euler, start_run).sampler_function
    with torch.inference_mode():
        x = guided(
            Float64Model(model, positive, negative, graph.cfg),
            noise * 6,
            sigmas,
            extra_args={},
            callback=None,
            disable=True,
        )
    expected = plain.run(
        plain.ordinary_copy(model.diffusion_model, torch.float64), noise, sigmas, model.model_sampling.sigmas.clone(),
        graph.cfg, positive, negative,
        [plain.Reference(reference.latent.double()) for reference in references], settings, graph.seed,
        None if content is None else content.double(),
    )  # fmt: skip
    assert x.dtype == torch.float64
    assert (x - expected.x).abs().max() < 1e-6
    assert (expected.x - noise * 6).abs().max() > 1


def test_guider_ksampler_and_model_patch_are_one(styled):
    """Three ways, one picture."""
    with_ksampler = styled.ksampler()
    assert torch.equal(with_ksampler, styled.guider())
    assert torch.equal(with_ksampler, styled.core(styled.patched()))


@pytest.mark.parametrize("off", [{"iterations": 0}, {"start_percent": 0.4, "end_percent": 0.4}], ids=str)
def test_switched_off_is_the_core_graph(styled, off):
    assert torch.equal(styled.but(**off).ksampler(), styled.core())


def test_a_plain_ksampler_is_the_same_before_and_after(styled):
    """After a guided run, a cancelled one and one that raised."""
    model = styled.model
    options = repr(model.model_options)
    weights = [(name, id(p), p.data_ptr()) for name, p in model.model.named_parameters()]
    before = styled.core()
    assert not torch.equal(styled.ksampler(), before)

    calls = 0

    def stop_at_the_third(model, x, sigmas, extra_args, callback, disable):
        return comfy.k_diffusion.sampling.sample_euler(Stopping(model), x, sigmas, extra_args, callback, disable)

    class Stopping:
        def __init__(self, model):
            self.inner = model

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, *args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == 3:
                comfy.model_management.interrupt_current_processing()
            if calls == 6:
                raise MemoryError("out of memory, for the test")
            return self.inner(*args, **kwargs)

    stop_at_the_third.__name__ = "sample_euler"
    sampler = comfy.samplers.KSAMPLER(stop_at_the_third)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        styled.guider(sampler)
    with pytest.raises(MemoryError):
        styled.guider(sampler)
    assert calls == 6
    assert torch.equal(styled.core(), before)
    assert repr(model.model_options) == options
    assert [(name, id(p), p.data_ptr()) for name, p in model.model.named_parameters()] == weights


def test_cancel_between_iterations(styled, monkeypatch):
    """Cancel pressed during an update takes effect before the next iteration, with the weights put back."""
    model = styled.model.model
    parameters = dict(model.named_parameters())
    iterations = 0
    real = model.apply_model

    def pressing_cancel(*args, **kwargs):
        nonlocal iterations
        if torch.is_grad_enabled():
            iterations += 1
            if iterations == 2:
                comfy.model_management.interrupt_current_processing()
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "apply_model", pressing_cancel)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        styled.but(iterations=5).ksampler()
    assert iterations == 2
    assert all(p is parameters[name] for name, p in model.named_parameters())


def test_one_seed_one_picture(styled):
    first = styled.ksampler()
    assert torch.equal(first, styled.ksampler())
    assert (first - styled.but(seed=4).ksampler()).abs().mean() > 0.1


def test_the_weight_of_a_single_reference_changes_nothing(styled, random_latent):
    """Neither in attention nor in AdaIN's statistics: only ratios count."""
    graph = styled.but(steps=1, iterations=1)
    assert torch.equal(graph.styled(random_latent(1), weight=3.0).ksampler(), graph.ksampler())


def test_reference_noise_is_not_the_initial_noise(pack_module):
    """Nor is any draw another's: of another step, guidance, part or purpose."""
    noise = pack_module("attention.noise")
    like = torch.empty(1, 4, 16, 16)
    for seed in (0, 1, 2**63 + 5, 2**64 - 1):
        draws = [torch.randn(1, 4, 16, 16, generator=torch.manual_seed(seed))]
        for guidance, step, part in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)):
            draws += [noise.StepNoise(seed, guidance, step).draw(like, purpose, part) for purpose in noise.Purpose]
        correlations = torch.corrcoef(torch.stack([draw.flatten() for draw in draws])) - torch.eye(len(draws))
        assert correlations.abs().max() < 0.15


def test_two_guidances_in_a_row_draw_different_noise(styled):
    """Their references are the same, and so would the noise be, were it not told apart."""
    with torch.inference_mode():
        node = styled._node("ADApplyGuidance")
        once = styled.but(adain=False, iterations=1, steps=1)
        twice = node.execute(once.patched(), **once._guidance)[0]
    seen = []
    model = styled.model.model
    real = model.model_sampling.noise_scaling
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.model_sampling, "noise_scaling", lambda s, n, *a: seen.append(n.clone()) or real(s, n, *a))
        once.core(twice)
    _initial, first, second = seen
    assert first.shape == second.shape
    assert not torch.equal(first, second)


def test_the_range_of_guidance(styled, caplog):
    """start_percent and end_percent leave out the states outside."""
    caplog.set_level("INFO")
    sampling = styled.model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "normal", 4).tolist()
    low, high = sampling.percent_to_sigma(0.7), sampling.percent_to_sigma(0.2)
    inside = sum(low < sigma <= high for sigma in sigmas[1:])
    assert 0 < inside < 4
    styled.but(steps=4, iterations=1, start_percent=0.2, end_percent=0.7).ksampler()
    assert f"{inside} updates of 1 iterations" in caplog.text


def test_an_inpainting_mask_moves_only_what_is_painted(styled, random_latent):
    """Where the mask is 0 the result is the latent that came in."""
    start = random_latent(7)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    graph = styled.but(latent={"samples": start, "noise_mask": mask}, steps=3)
    guided, unguided = graph.ksampler(), graph.core()
    assert torch.equal(guided[..., 8:], unguided[..., 8:])
    assert (guided[..., :8] - unguided[..., :8]).abs().mean() > 0.1


def test_the_first_gradient_matches_the_plain_reading(sd15, random_latent, encode_zeros, pack_module):
    """In fp32, before any step of Adam can blur a difference."""
    own = make_run(sd15, random_latent, encode_zeros, pack_module, attention_scale=1.3)
    x, sigma = random_latent(5, (1, 4, 8, 8)) * 0.18215 * 3, 2.0
    scale = (sigma**2 + 1) ** -0.5
    settings = plain.Settings(layers=tuple(range(1, 7)), adain=False, attention_scale=1.3)
    style = [plain.Reference(random_latent(1, (1, 4, 8, 8)))]
    with torch.inference_mode(False):
        noises = plain.draw_noises(0, 0, style, None, settings)
        step = plain.guided_step(
            plain.ordinary_copy(sd15.model.diffusion_model), x * scale, sigma, sd15.model.model_sampling.sigmas.clone(),
            encode_zeros()[0][0], style, noises, settings,
        )  # fmt: skip
    with pack_module("attention.gradient").differentiable(sd15.model):
        z = (x * scale).requires_grad_()
        level = pack_module("attention.noise").NoiseLevel.of(sd15.model, sigma, z)
        targets = own.objective.targets(own.objective.offer(level, own.noise))
        losses = own.objective.losses(own.objective.features(z / scale, targets), targets)
        (gradient,) = torch.autograd.grad(losses.total, z)
    assert losses.total.item() == pytest.approx(step.losses[0], rel=1e-4)
    assert torch.cosine_similarity(gradient.flatten(), step.gradient.flatten(), dim=0) > 0.9999


def test_a_picture_is_guided_in_a_batch_as_alone(sd15_float64, random_latent, encode_zeros, pack_module):
    """In float64 to the last digits; the mean over the batch would take off more where gradients are near epsilon."""
    pictures = torch.cat([random_latent(seed, (1, 4, 8, 8)) for seed in (5, 6, 7, 8)]).double() * 0.18215 * 3
    alone = make_run(sd15_float64, random_latent, encode_zeros, pack_module).update(pictures[:1], 2.0)
    together = make_run(sd15_float64, random_latent, encode_zeros, pack_module, batch=4).update(pictures, 2.0)
    assert (together[:1] - alone).abs().max() < 1e-9
    assert (alone - pictures[:1]).abs().mean() > 0.05


def test_the_authors_mean_over_a_batch_of_two_is_within_tolerance(sd15, random_latent, encode_zeros):
    """Theirs is twice Adam's epsilon in ours: what that moves stays well below what tells programs apart."""
    sampling = sd15.model.model_sampling
    unet, style = plain.ordinary_copy(sd15.model.diffusion_model), [plain.Reference(random_latent(1))]
    z = random_latent(5) * 0.18215
    made = []
    with torch.inference_mode(False):
        for epsilon in (1e-8, 2e-8):
            settings = plain.Settings(tuple(range(1, 7)), iterations=3, adain=False, adam_epsilon=epsilon)
            noises = plain.draw_noises(0, 0, style, None, settings)
            made.append(
                plain.guided_step(
                    unet, z, 2.0, sampling.sigmas.clone(), encode_zeros()[0][0], style, noises, settings
                ).after
            )
    assert 0 < (made[0] - made[1]).square().mean().sqrt() < RMS_TOLERANCE / 2


def test_an_observer_is_told_of_each_iteration_once_a_step(sd15, random_latent, encode_zeros, pack_module):
    """Losses are read from the device when a step is done, not between its iterations."""
    told = []
    with watched(sd15) as passes:
        run = make_run(sd15, random_latent, encode_zeros, pack_module, iterations=3)
        run.log.observer = lambda found: told.append((found, sum(one.with_gradient for one in passes)))
        x = random_latent(5, (1, 4, 8, 8))
        for sigma in (2.0, 0.7):
            assert run.reached(sigma)
            x = run.update(x, sigma)
    places = [(found.step, found.iteration, found.sigma, gradients) for found, gradients in told]
    assert places == [(step, i, sigma, 3 * step + 3) for step, sigma in enumerate((2.0, 0.7)) for i in range(3)]
    for found, _ in told:
        assert found.total == found.style > 0
        assert found.content == 0


@pytest.mark.parametrize(("precision", "cosine"), [("sd15_fp16", 0.99), ("sd15_bf16", 0.95)])
def test_half_precision_models(precision, cosine, request, sd15, random_latent, encode_zeros, pack_module):
    """The first gradient points where the fp32 model's does; the update, which is its signs, mostly."""
    gradients, updates = [], []
    loss_scale = pack_module("guidance.loss_scale").LossScale

    class Noting(loss_scale):
        def gradient(self, compute_loss, z):
            gradient, losses = super().gradient(compute_loss, z)
            gradients.append(gradient)
            return gradient, losses

    for patcher in (sd15, request.getfixturevalue(precision)):
        run = make_run(patcher, random_latent, encode_zeros, pack_module, iterations=1)
        run._gradients[0] = Noting(patcher.model.get_dtype_inference())
        x = random_latent(5, (1, 4, 8, 8)) * 0.18215 * 3
        updates.append(run.update(x, 2.0) - x)
        assert torch.isfinite(updates[-1]).all()
    assert torch.cosine_similarity(*(gradient.flatten() for gradient in gradients), dim=0) >= cosine
    assert (updates[0] * updates[1] > 0).float().mean() > 0.9


def make_run(patcher, random_latent, encode_zeros, pack_module, batch=1, **settings):
    """A GuidedRun on 8x8 pictures without AdaIN."""
    objective, run = pack_module("guidance.objective"), pack_module("guidance.run")
    reference, layers = pack_module("attention.reference"), pack_module("attention.layers")
    own = pack_module("guidance.settings").GuidanceSettings(**{"learning_rate": 0.05, "adain": False, **settings})
    part = reference.ReferencePart(random_latent(1, (1, 4, 8, 8)), tuple(range(1, 7)))
    with pack_module("attention.gradient").differentiable(patcher.model), torch.no_grad():
        made = objective.Objective(
            patcher.model, layers.list_layers(patcher.model.diffusion_model), style=reference.Reference((part,)),
            content=None, settings=own, conds=pack_module("attention.conditioning").from_socket(encode_zeros()),
            latent=torch.zeros(batch, 4, 8, 8, dtype=patcher.model.diffusion_model.dtype),
        )  # fmt: skip
    return run.GuidedRun(made, own, pack_module("attention.noise").StepNoise(0), [14.6, 2.0, 0.0])
