"""Where in the picture a style goes: each step against the plain reading, every kind of model, and what is refused."""

from dataclasses import replace

import plain_method as plain
import pytest
import small_models
import torch
from comfy_extras import nodes_context_windows
from guided import Graph
from steps import RMS_TOLERANCE, recording_euler

import nodes as comfy_nodes

LAYERS = tuple(range(1, 7))


def soft_halves(height: int, width: int) -> list[torch.Tensor]:
    """Two masks: the left half, and a ramp that overlaps it; the last column and the ramp's last row are in none."""
    column, row = torch.arange(width) / width, torch.arange(height)
    left = (column < 0.5).float().expand(height, -1)
    ramp = ((column - 0.25) * 2).clamp(0, 1).expand(height, -1).clone()
    ramp[row == height - 1] = 0
    ramp[:, -1] = 0
    return [left, ramp]


@pytest.fixture
def placed(graph, random_latent):
    """`placed(height, width, **changes)`: a graph with two styles in places of their own, and the plain references."""

    def make(height, width, graph=graph, channels=4, **changes):
        masks = soft_halves(height, width)
        parts = [
            plain.Reference(random_latent(1, (1, channels, 8, 8)), 2.0, target=masks[0]),
            plain.Reference(random_latent(2, (1, channels, 12, 10)), target=masks[1]),
        ]
        style = None
        for part in parts:
            style = graph.capture(part.latent, weight=part.weight, target_mask=part.target[None], reference=style)
        latent = {"samples": torch.zeros(1, channels, height, width)}
        return graph.but(style=style, latent=latent, steps=2, **changes), parts

    return make


def plain_window(graph, unet, z, sigma, model_sigmas, parts, number, settings):
    noises = plain.draw_noises(graph.seed, number, parts, None, settings)
    step = plain.guided_step(unet, z, sigma, model_sigmas, graph.negative[0][0], parts, noises, settings)
    return step.after


@pytest.mark.parametrize(("height", "width", "windowed"), [(13, 7, False), (8, 20, True)])
def test_each_step_matches_the_plain_reading(placed, pack_module, height, width, windowed):
    """Also in windows, which may hold one style, both or little of either."""
    graph, parts = placed(height, width)
    starts = [0]
    if windowed:
        graph, starts = graph.but(windows=pack_module("guidance.windows").Windows(96, 64), steps=1), [0, 8]
    states = []
    result = graph.guider(recording_euler(states))
    model = graph.model.model
    unet, model_sigmas = plain.ordinary_copy(model.diffusion_model), model.model_sampling.sigmas.clone()
    states[-1] = (*states[-1][:2], model.process_latent_in(result))
    settings = plain.Settings(layers=LAYERS)
    tolerance = RMS_TOLERANCE * (2 if windowed else 1)  # rounding turns 15 of 640 of Adam's signs there
    with torch.inference_mode(False):
        for number, (sigma, before, after) in enumerate(states[1:]):
            scale = (max(sigma, float(model_sigmas[0])) ** 2 + 1) ** 0.5
            z = before.clone() / scale
            total, count = torch.zeros_like(z), torch.zeros_like(z)
            for start in starts:
                columns = slice(start, start + 12 if windowed else width)
                cut = [replace(part, target=part.target[:, columns]) for part in parts]
                total[..., columns] += plain_window(
                    graph, unet, z[..., columns], sigma, model_sigmas, cut, number, settings
                )
                count[..., columns] += 1
            moved = after.clone() / scale
            assert (moved - total / count).square().mean().sqrt() < tolerance
            assert (moved - z)[..., -1].abs().max() < 1e-5 * z.abs().max()  # in no mask
            assert (moved - z)[..., :-1].abs().mean() > 0.02


def test_a_mask_over_everything_changes_nothing(styled, random_latent):
    """Without the input, the picture is the same to the last bit; with a full mask, up to rounding."""
    graph = styled.but(latent={"samples": torch.zeros(1, 4, 6, 10)}, steps=1, iterations=1, adain=False)
    without = graph.ksampler()
    everywhere = graph.styled(random_latent(1), target_mask=torch.ones(1, 5, 7)).ksampler()
    torch.testing.assert_close(everywhere, without, rtol=0, atol=2e-3 * without.std().item())
    half = torch.zeros(1, 6, 10)
    half[..., 5:] = 1
    left = graph.styled(random_latent(1), target_mask=half).ksampler()
    assert (left - without).abs().mean() > 0.1
    assert torch.equal(graph.core(), graph.but(iterations=0).ksampler())


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A tiny FLUX: text and picture share their attention."""
    return small_models.load(small_models.MODELS["FLUX.1-dev"], tmp_path_factory.mktemp("models"))


def test_joint_attention(pack_module, flux, random_latent):
    """Each token's own error against the part of its place; the text's by what the masks cover on average."""
    small, layers = small_models.MODELS["FLUX.1-dev"], pack_module("attention.layers")
    reference, noises = pack_module("attention.reference"), pack_module("attention.noise")
    chosen = (3, 9)
    top, right = torch.zeros(1, 4, 6), torch.zeros(1, 4, 6)
    top[:, :2], right[..., 3:] = 1, 0.5
    with pack_module("attention.gradient").differentiable(flux.model):
        style = reference.Reference(tuple(
            reference.ReferencePart(random_latent(seed, (1, 16, *size)), chosen, target_mask=mask)
            for seed, size, mask in ((1, (6, 8), top), (2, (8, 4), right))
        ))  # fmt: skip
        objective = pack_module("guidance.objective").Objective(
            flux.model, layers.list_layers(flux.model.diffusion_model), style=style, content=None,
            settings=pack_module("guidance.settings").GuidanceSettings(),
            conds=pack_module("attention.conditioning").from_socket(small.cond(3)), latent=torch.zeros(1, 16, 8, 12),
        )  # fmt: skip
        level = noises.NoiseLevel.of(flux.model, 0.5, torch.zeros(1))
        targets = objective.targets(objective.offer(level, noises.StepNoise(0)))
        x = random_latent(5, (1, 16, 8, 12)).requires_grad_()
        features = objective.features(x, targets)
        style_loss = objective.losses(features, targets).total
        outs = [features[0][index].out for index in chosen]
        gradients = torch.autograd.grad(style_loss, outs, retain_graph=True)
        covered = torch.cat([torch.tensor([[0.5] * 11, [0.25] * 11]), torch.stack([top, right]).flatten(1)], dim=1)
        expected = 0
        for index in chosen:
            bank, own = targets.windows[0].style[index], features[0][index]
            sizes, scale = [11 + 3 * 4, 11 + 4 * 2], own.q.shape[-1] ** -0.5
            bias = covered.log().T.repeat_interleave(torch.tensor(sizes), dim=1)
            attention = (own.q.detach() @ bank.k.transpose(-1, -2) * scale + bias).softmax(dim=-1)
            error = (own.out - (attention @ bank.v).nan_to_num()).abs().mean(dim=(0, 1, 3))
            expected = expected + (error * covered.sum(dim=0).clamp(max=1)).mean()
        assert style_loss.item() == pytest.approx(expected.item(), rel=1e-5)
        for gradient, plainly in zip(gradients, torch.autograd.grad(expected, outs), strict=True):
            assert (gradient != plainly).float().mean() < 0.01  # signs of errors that are all but 0


@torch.inference_mode()
def test_optimisation_leaves_the_rest_as_it_was(pack, flux, random_latent):
    """With joint attention, at an odd size; the second picture of the batch has another mask."""
    small = small_models.MODELS["FLUX.1-dev"]
    start = random_latent(7, (2, 16, 9, 12))
    mask = torch.zeros(2, 9, 12)
    mask[0, :, :4], mask[1, 5:] = 1, 1
    graph = Graph(pack, flux, small.cond(1), small.cond(2), {"samples": start})
    style = graph.capture(random_latent(1, (1, 16, 10, 8)), target_mask=mask)
    node = comfy_nodes.NODE_CLASS_MAPPINGS["ADOptimizeLatent"]
    made = node.execute(
        flux, style, graph.latent, 1, "latent", 2, "constant", learning_rate=0.05, iterations=1, content_weight=0.0,
        attention_scale=1.0, content_loss="query", conditioning=small.cond(2),
    )[0]["samples"]  # fmt: skip
    moved = (made - start).abs().amax(dim=1) > 1e-3
    assert torch.equal(moved, mask > 0)


@pytest.mark.parametrize(
    ("given", "named"),
    [({"target_mask": torch.ones(1, 8, 8)}, "a target_mask"), ({"balance": "share"}, "balance share")],
)
def test_kv_injection_into_a_transformer_takes_neither_place_nor_share(flux, pack, random_latent, given, named):
    """There the picture looks at its text at the same time. Without them it is taken."""
    small, latent = small_models.MODELS["FLUX.1-dev"], {"samples": torch.zeros(1, 16, 8, 12)}
    graph = Graph(pack, flux, small.cond(1), small.cond(2), latent)
    node, asked = comfy_nodes.NODE_CLASS_MAPPINGS["ADInjectReferenceKV"], {"start_percent": 0.0, "end_percent": 1.0}
    plain, other = (graph.capture(random_latent(1, (1, 16, 10, 8)), **options) for options in ({}, given))
    node.execute(flux, plain, strength=1.0, **asked)
    with pytest.raises(ValueError, match=f"style: Inject Reference KV takes {named} on UNets"):
        node.execute(flux, other, strength=1.0, **asked)


@torch.inference_mode()
def test_the_attention_map_is_dark_where_no_style_counts(flux, pack, random_latent):
    """And elsewhere as without a mask, as bright as the style counts."""
    small, latent = small_models.MODELS["FLUX.1-dev"], {"samples": random_latent(5, (1, 16, 8, 12))}
    graph = Graph(pack, flux, small.cond(1), small.cond(2), latent)
    mask = torch.zeros(1, 8, 12)
    mask[..., :4], mask[..., 4:8] = 1, 0.25
    node, made = comfy_nodes.NODE_CLASS_MAPPINGS["ADAttentionMap"], []
    for target_mask in (None, mask):
        style = graph.capture(random_latent(1, (1, 16, 10, 8)), target_mask=target_mask)
        made.append(node.execute(flux, style, latent, conditioning=small.cond(2))[0])
    plain, masked = (one.unflatten(2, (3, -1)).unbind(dim=2) for one in made)
    torch.testing.assert_close(masked[0], plain[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(masked[1], plain[1] / 2, rtol=0, atol=1e-5)  # brightness is the root of it
    assert masked[2].abs().max() == 0
    assert plain[2].max() > 0.01


def test_content_still_holds_where_no_style_counts(pack_module, placed, random_latent):
    """Where content is held the picture may move, too; a target mask on the content says where that is."""
    graph, _ = placed(8, 8)
    masks, corner = soft_halves(8, 8), torch.zeros(1, 8, 8)
    corner[:, -1, -2:] = 0.5
    cases = {None: torch.ones(8, 8), corner: (masks[0] + masks[1] + corner[0]).clamp(max=1)}
    model = graph.model.model
    for target_mask, reach in cases.items():
        content = graph.capture(random_latent(3, (1, 4, 8, 8)), target_mask=target_mask)
        with pack_module("attention.gradient").differentiable(model):
            objective = pack_module("guidance.objective").Objective(
                model, pack_module("attention.layers").list_layers(model.diffusion_model), style=graph.style,
                content=content, settings=pack_module("guidance.settings").GuidanceSettings(),
                conds=pack_module("attention.conditioning").from_socket(graph.negative),
                latent=torch.zeros(1, 4, 8, 8),
            )  # fmt: skip
        assert torch.equal(objective.reach(8, 8)[0, 0], reach)
    noises = pack_module("attention.noise")
    level = noises.NoiseLevel.of(model, 0.0, torch.zeros(1))
    with pack_module("attention.gradient").differentiable(model):
        held = objective.targets(objective.offer(level, noises.StepNoise(0))).windows[0].content[0]
    assert torch.equal(held.coverage[LAYERS[-1]], corner.flatten(1))


@torch.inference_mode()
def injected(graph):
    """The model of a graph with its style injected."""
    node = comfy_nodes.NODE_CLASS_MAPPINGS["ADInjectReferenceKV"]
    return node.execute(graph.model, graph.style, strength=1.0, start_percent=0.0, end_percent=1.0)[0]


def test_injection_into_an_area_of_a_condition(graph, random_latent):
    """A place is one of the picture, not of the part of it that a condition is for."""
    area = {"area": (8, 4, 0, 8), "strength": 1.0}
    conds = {name: [[getattr(graph, name)[0][0], area]] for name in ("positive", "negative")}
    graph = graph.but(latent={"samples": torch.zeros(1, 4, 8, 12)}, steps=1, **conds)
    right = (torch.arange(12) >= 8).float().expand(1, 8, -1)
    made = {
        name: graph.core(injected(graph.styled(random_latent(1), target_mask=mask)))
        for name, mask in (("right", right), ("rest", 1 - right), ("everywhere", None))
    }
    assert torch.equal(made["rest"], graph.core())
    torch.testing.assert_close(made["right"], made["everywhere"], rtol=0, atol=1e-4)
    assert (made["right"] - made["rest"]).abs().max() > 0.02


def test_injection_in_windows(graph, random_latent, pack_module):
    """The windows of guidance lie outside: each is told as an area."""
    graph = graph.styled(random_latent(1), layers="6").but(
        latent={"samples": torch.zeros(1, 4, 6, 12)}, steps=1, iterations=1, adain=False,
        windows=pack_module("guidance.windows").Windows(64, 32),
    )  # fmt: skip
    left = (torch.arange(12) < 4).float().expand(1, 6, -1)
    windowed = graph.but(model=graph.patched())
    plain, everywhere = windowed.core(), windowed.core(injected(windowed))
    made = windowed.core(injected(windowed.styled(random_latent(1), layers="6", target_mask=left)))
    assert (made - plain)[..., 8:].abs().max() < 0.1 * (everywhere - plain)[..., 8:].abs().max()
    assert (made - plain)[..., :4].abs().max() > 0.5 * (everywhere - plain)[..., :4].abs().max()


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (torch.zeros(1, 4, 4), "target_mask: the mask is empty"),
        (torch.full((1, 4, 4), float("nan")), "target_mask: the mask holds NaN"),
        (torch.ones(4), "target_mask: shape .4. is not a mask"),
    ],
)
def test_masks_that_are_refused_at_once(graph, random_latent, mask, says):
    with pytest.raises(ValueError, match=says):
        graph.capture(random_latent(1), target_mask=mask)


def test_what_is_refused_at_the_start(unsampled, random_latent, pack_module):
    two = unsampled.styled(random_latent(1), target_mask=torch.ones(2, 4, 4))
    with pytest.raises(ValueError, match="style: its target_mask has 2 masks for 1 pictures"):
        two.ksampler()
    with pytest.raises(ValueError, match="style: its target_mask has 2 masks for 1 pictures"):
        two.core(injected(two))
    one = unsampled.styled(random_latent(1), target_mask=torch.ones(1, 4, 4))
    in_parts = nodes_context_windows.ContextWindowsManualNode.execute(
        injected(one), 8, 4, "standard_static", 1, False, "pyramid", 2, False
    )[0]
    with pytest.raises(ValueError, match="style: its target_mask lies on the whole picture"):
        one.core(in_parts)
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    regions = pack_module("attention.regions").Regions(labels, labels, 1)
    with pytest.raises(ValueError, match="regions: the style has a target_mask"):
        two.but(regions=regions).patched()
