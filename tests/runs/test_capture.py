"""Reading features out of the model, and gradients through it."""

import plain_method as plain
import pytest
import torch
from conftest import WIDTH

SIGMA = 1.7


@pytest.fixture(scope="module")
def setup(sd15, pack_module, encode_zeros, random_latent):
    """The catalogue, a noisy picture in k-diffusion space and its condition."""
    layers = pack_module("attention.layers").list_layers(sd15.model.diffusion_model)
    return (
        layers,
        random_latent(3, (2, 4, 11, 18)) * 0.18215 * 2,
        {"c_crossattn": encode_zeros()[0][0].repeat(2, 1, 1)},
    )


def test_features_are_those_of_the_model(setup, sd15, pack_module):
    """Against module hooks on a complete forward pass, at an odd size."""
    layers, x, conds = setup
    chosen = [layers[i] for i in (1, 4, 6)]
    with torch.inference_mode():
        found = pack_module("attention.capture").capture_features(sd15.model, x, torch.tensor(SIGMA), conds, chosen)
    model_sigmas = sd15.model.model_sampling.sigmas
    z = x / (SIGMA**2 + 1) ** 0.5
    with torch.no_grad():  # weights require gradients on ComfyUI 0.18
        expected = plain.features(
            sd15.model.diffusion_model, z, plain.timestep_of(SIGMA, model_sigmas), torch.zeros(1, 77, 768)
        )
    assert sorted(found) == [1, 4, 6]
    for index, features in found.items():
        assert features.grid == layers[index].grid(11, 18)
        assert features.q.shape == (2, 8, features.grid[0] * features.grid[1], WIDTH // 8)
        for name in ("q", "k", "v", "out"):
            torch.testing.assert_close(getattr(features, name), expected[index][name], rtol=0, atol=2e-5)


def test_the_pass_stops_after_the_last_chosen_layer(setup, sd15, pack_module):
    """The blocks behind it are never run."""
    layers, x, conds = setup
    unet = sd15.model.diffusion_model
    ran = []
    first_parts = [block[0] for block in unet.output_blocks]  # ComfyUI walks through a block's parts itself
    handles = [part.register_forward_pre_hook(lambda module, _: ran.append(module)) for part in first_parts]
    with torch.inference_mode():
        pack_module("attention.capture").capture_features(sd15.model, x, torch.tensor(SIGMA), conds, layers[2:4])
    for handle in handles:
        handle.remove()
    assert layers[3].block == ("output", 0, 0)
    assert ran == first_parts[:1]


def test_gradients_reach_the_picture_and_the_weights_come_back(setup, sd15, pack_module):
    """Through inference tensors, without a copy; errors put the weights back too."""
    layers, x, conds = setup
    gradient, capture = pack_module("attention.gradient"), pack_module("attention.capture")
    before = dict(sd15.model.named_parameters()) | dict(sd15.model.named_buffers())
    assert all(p.is_inference() for p in before.values())
    with torch.inference_mode():
        x = x.clone()
        with pytest.raises(KeyError, match="for the test"), gradient.differentiable(sd15.model):
            aliases = dict(sd15.model.named_parameters())
            assert not any(p.is_inference() or p.requires_grad for p in aliases.values())
            assert all(p.data_ptr() == before[name].data_ptr() for name, p in aliases.items())
            z = x.clone().requires_grad_()
            features = capture.capture_features(sd15.model, z, torch.tensor(SIGMA), {
                name: value.clone() for name, value in conds.items()
            }, layers[-1:])  # fmt: skip
            features[6].out.square().mean().backward()
            assert z.grad.abs().min() > 0
            raise KeyError("for the test")
        assert torch.is_inference_mode_enabled()
    after = dict(sd15.model.named_parameters()) | dict(sd15.model.named_buffers())
    assert all(after[name] is tensor for name, tensor in before.items())


def test_the_gradient_against_finite_differences(sd15_float64, pack_module, random_latent, encode_zeros):
    """The whole loss, style and content, in float64; the target is held still, as stopgrad says."""
    objective, reference = pack_module("guidance.objective"), pack_module("attention.reference")
    layers = pack_module("attention.layers").list_layers(sd15_float64.model.diffusion_model)
    settings = pack_module("guidance.settings").GuidanceSettings(attention_scale=1.3, content_weight=0.5)
    losses = pack_module("losses.distillation")
    capture_features = pack_module("attention.capture").capture_features
    style, content = (
        reference.Reference((reference.ReferencePart(random_latent(seed, shape), (2, 5)),))
        for seed, shape in ((1, (1, 4, 8, 10)), (2, (1, 4, 8, 8)))
    )
    sigma = torch.tensor(SIGMA, dtype=torch.float64)
    with pack_module("attention.gradient").differentiable(sd15_float64.model):
        made = objective.Objective(
            sd15_float64.model, layers, style=style, content=content, settings=settings,
            conds=pack_module("attention.conditioning").from_socket(encode_zeros()),
            latent=torch.zeros(1, 4, 8, 8, dtype=torch.float64),
        )  # fmt: skip
        noise = pack_module("attention.noise")
        level = noise.NoiseLevel.of(made.model, SIGMA, sigma)
        targets = made.targets(made.offer(level, noise.StepNoise(0)))
        x = random_latent(5, (1, 4, 8, 8)).double() * 0.3
        z = x.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(made.losses(made.features(z, targets), targets).total, z)
        chosen = [layers[i] for i in made.layers]
        at_x = capture_features(made.model, x, sigma, targets.conds, chosen)
        (window,) = targets.windows
        bank, (content,) = window.style, window.content
        held = {i: losses.distillation_target(at_x[i].q, bank[i].k, bank[i].v, attention_scale=1.3) for i in bank}

        def loss(x):
            features = capture_features(made.model, x, sigma, targets.conds, chosen)
            style = sum((features[i].out - held[i]).abs().mean() for i in held)
            return style + 0.5 * sum((features[i].q - held.q).abs().mean() for i, held in content.features.items())

        with torch.no_grad():
            for seed in range(3):
                direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
                slope = (loss(x + 1e-7 * direction) - loss(x - 1e-7 * direction)) / 2e-7
                assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-8)


def test_fp16_gradients_do_not_underflow(pack_module):
    """A gradient of 1e-9 survives the way through an fp16 tensor; an overflow lowers the scale, NaN does not."""
    scale = pack_module("guidance.loss_scale").LossScale(torch.float16)

    class Loss:
        def __init__(self, total):
            self.total = total

    def tiny(z):
        return Loss((z.half() * 1.0).float().mean() * 1e-4)

    z = torch.ones(100000, requires_grad=True)
    gradient, _ = scale.gradient(tiny, z)
    torch.testing.assert_close(gradient, torch.full_like(z, 1e-9), rtol=2e-2, atol=0)
    assert scale.value == 2.0**16
    gradient, _ = scale.gradient(lambda z: Loss((z.half() * 1.0).float().sum()), z)
    torch.testing.assert_close(gradient, torch.ones_like(z))
    assert scale.value == 2.0**12
    gradient, _ = scale.gradient(lambda z: Loss((z * float("nan")).sum()), z)
    assert gradient.isnan().all()
    assert scale.value == 2.0**12, "another scale cannot help"
