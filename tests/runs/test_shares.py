"""Shares of several styles: the attention that each receives, what is pushed away from, and the pictures made."""

import pytest
import small_models
import torch
from guided import Graph

import nodes as comfy_nodes

SMALL = small_models.MODELS["SD2, v-prediction"]


@pytest.fixture(scope="module")
def reference(pack_module):
    return pack_module("attention.reference")


@pytest.fixture(scope="module")
def distillation(pack_module):
    return pack_module("losses.distillation")


def features(pack_module, batch, grid, seed, spread=1.0):
    """Random features of one layer, two heads of size 3."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [spread * torch.randn(batch, 2, grid[0] * grid[1], 3, generator=generator) for _ in range(4)]
    return pack_module("attention.capture").LayerFeatures(*tensors, grid)


@pytest.fixture(scope="module")
def bank(pack_module, reference):
    """`bank(weights, balance)`: tokens of references of 8 x 6, 2 x 3 (two pictures) and 4 x 4 tokens."""

    def make(weights, balance="share", labels=None, label_count=0):
        grids = [(1, (8, 6)), (2, (2, 3)), (1, (4, 4))][: len(weights)]
        style = reference.Reference(
            tuple(
                reference.ReferencePart(torch.zeros(n, 4, *grid), (0,), weight, balance=balance)
                for weight, (n, grid) in zip(weights, grids, strict=True)
            )
        )
        held = [{0: features(pack_module, n, grid, i, 2.0)} for i, (n, grid) in enumerate(grids) if weights[i]]
        pool = pack_module("attention.bank").TokenPool
        return pool(style.active_parts, labels, label_count, in_shares=style.in_shares).banks(held)[0]

    return make


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([1, 3], [0.25, 0.75]),
        ([0.2], [1]),
        ([1, -0.5], [1.5, -0.5]),
        ([2, -0.5], [1.25, -0.25]),
        ([0.1, -1], [2, -1]),
        ([2, 1, -2, -4], [4 / 3, 2 / 3, -1 / 3, -2 / 3]),
    ],
)
def test_shares_of_weights(distillation, weights, expected):
    """They sum to 1; what is pushed away from counts at most as much as the rest."""
    assert distillation.shares(torch.tensor(weights, dtype=torch.float64)).tolist() == pytest.approx(expected)


def test_each_reference_receives_its_share(pack_module, bank, distillation):
    """As much attention at every token and head, whatever its size and its keys; and it is one softmax on all."""
    q = features(pack_module, 2, (5, 4), 7, 3.0).q
    offer = bank([1.0, 3.0, 0.5])
    of_each = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([48, 12, 16]))
    ones = torch.nn.functional.one_hot(of_each, 3).float().expand(1, 2, -1, -1)
    mass = distillation.offered_target(q, type(offer)(offer.k, ones, counts=offer.counts, weights=offer.weights))
    torch.testing.assert_close(mass, (torch.tensor([1.0, 3.0, 0.5]) / 4.5).expand_as(mass), rtol=0, atol=1e-6)
    logits = q @ offer.k.transpose(-1, -2) / 3**0.5
    fixed = torch.cat(
        [
            part - part.logsumexp(dim=-1, keepdim=True) + torch.tensor(weight).log()
            for part, weight in zip(logits.split([48, 12, 16], dim=-1), (1.0, 3.0, 0.5), strict=True)
        ],
        dim=-1,
    )
    expected = fixed.softmax(dim=-1) @ offer.v
    torch.testing.assert_close(distillation.offered_target(q, offer), expected, rtol=0, atol=1e-5)
    by_amount = distillation.offered_target(q, bank([1.0, 3.0, 0.5], "amount"))
    assert (by_amount - expected).abs().mean() > 0.1


def test_half_and_half_lies_between_and_away_lies_beyond(pack_module, bank, distillation):
    q = features(pack_module, 1, (5, 4), 7).q
    one, other, half, away = (
        distillation.offered_target(q, bank(weights)) for weights in ([1.0, 0.0], [0.0, 1.0], [2.0, 2.0], [1.0, -0.5])
    )
    torch.testing.assert_close(half, (one + other) / 2, rtol=0, atol=1e-6)
    torch.testing.assert_close(away, one + 0.5 * (one - other), rtol=0, atol=1e-6)
    alone = bank([1.0, 0.0], "amount")
    assert torch.equal(one, distillation.distillation_target(q, alone.k, alone.v))


def test_shares_in_places(pack_module, bank, distillation):
    """A weight times what the mask covers; where no weight above 0 counts, nothing does."""
    masks, windows = pack_module("guidance.target_masks"), pack_module("guidance.windows")
    offer = bank([1.0, 3.0, -1.0])
    ramp = torch.tensor([1.0, 0.5, 0.0, 0.0]).expand(1, 1, 2, 4)
    right = torch.tensor([0.0, 0.5, 1.0, 0.0]).expand(1, 1, 2, 4)
    targets = masks.TargetMasks([ramp, right, None], [True, True, False], torch.device("cpu"))
    layout, own = windows.whole(2, 4), features(pack_module, 1, (2, 4), 5)
    places = targets.places(layout, layout.windows[0], own.layout, tuple(offer.counts))
    assert places.weight.tolist() == [[1, 1, 1, 0] * 2]
    found = places.target(own.q, offer)
    alone = [distillation.offered_target(own.q, offer.of_parts([part])) for part in (0, 1)]
    alone.append(distillation.distillation_target(own.q, offer.k[:, :, 60:], offer.v[:, :, 60:]))
    for token, of_each in enumerate([(2, 0, -1), (0.375, 1.125, -0.5), (0, 4 / 3, -1 / 3), (0, 0, 0)] * 2):
        expected = sum(share * one[:, :, token] for share, one in zip(of_each, alone, strict=True))
        torch.testing.assert_close(found[:, :, token], expected, rtol=0, atol=1e-5)


def test_shares_within_a_region(bank, pack_module, distillation):
    """Of those of its references; one that has nothing of a label leaves it to the others."""
    labels = [torch.zeros(1, 8, 6, dtype=torch.int64), torch.ones(2, 2, 3, dtype=torch.int64)]
    labels[0][:, :, 3:] = 1
    offer = bank([1.0, 3.0], labels=labels, label_count=2)
    q = features(pack_module, 1, (5, 4), 7).q
    only_first, both = (distillation.offered_target(q, of_label) for of_label in offer.by_label[:2])
    left, right = (offer.k.unflatten(2, (-1, 6))[:, :, :8], offer.v.unflatten(2, (-1, 6))[:, :, :8])
    halves = [
        distillation.distillation_target(q, left[..., some, :].flatten(2, 3), right[..., some, :].flatten(2, 3))
        for some in (slice(3), slice(3, 6))
    ]
    torch.testing.assert_close(only_first, halves[0], rtol=0, atol=1e-6)
    second = distillation.distillation_target(q, offer.k[:, :, 48:], offer.v[:, :, 48:])
    torch.testing.assert_close(both, 0.25 * halves[1] + 0.75 * second, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def graph(pack, tmp_path_factory, random_latent):
    """A graph on a tiny model; it starts from a picture."""
    model = small_models.load(SMALL, tmp_path_factory.mktemp("models"))
    return Graph(pack, model, SMALL.cond(1), SMALL.cond(2), {"samples": random_latent(5, (1, 4, 8, 12))})


def mixed(graph, random_latent, first, second):
    """A style of two references by their weights in shares; where one node says so, it holds for both."""
    style = graph.capture(random_latent(1, (1, 4, 16, 16)), weight=first, balance="share")
    second_says = "share" if second < 0 else "amount"
    return graph.capture(random_latent(2, (1, 4, 8, 6)), weight=second, balance=second_says, reference=style)


def make_objective(pack_module, graph, style):
    model = graph.model.model
    return pack_module("guidance.objective").Objective(
        model, pack_module("attention.layers").list_layers(model.diffusion_model), style=style, content=None,
        settings=pack_module("guidance.settings").GuidanceSettings(),
        conds=pack_module("attention.conditioning").from_socket(graph.negative), latent=torch.zeros(1, 4, 8, 12),
    )  # fmt: skip


def test_pictures_of_two_styles(pack_module, graph, random_latent):
    """Half and half is nearer to each style than the other alone makes it; away from one is farther from it."""
    weights = {"first": (1, 0), "second": (0, 1), "half": (1, 1), "away": (1, -1)}
    node, made = comfy_nodes.NODE_CLASS_MAPPINGS["ADOptimizeLatent"], {}
    for name, of_each in weights.items():
        with torch.inference_mode():
            made[name] = node.execute(
                graph.model, mixed(graph, random_latent, *of_each), graph.latent, 1, "latent", 8, "constant",
                learning_rate=0.1, iterations=1, content_weight=0.0, attention_scale=1.0, content_loss="query",
                conditioning=graph.negative,
            )[0]["samples"]  # fmt: skip
    model, noises = graph.model.model, pack_module("attention.noise")
    loss = {}
    with pack_module("attention.gradient").differentiable(model), torch.no_grad():
        level = noises.NoiseLevel.of(model, 0.0, torch.zeros(1))
        for of_style in ("first", "second"):
            objective = make_objective(pack_module, graph, mixed(graph, random_latent, *weights[of_style]))
            targets = objective.targets(objective.offer(level, None))
            for name, latent in made.items():
                z = model.process_latent_in(latent.clone())
                loss[name, of_style] = objective.losses(objective.features(z, targets), targets).total.item()
    assert loss["first", "first"] < loss["half", "first"] < loss["second", "first"]
    assert loss["second", "second"] < loss["half", "second"] < loss["first", "second"]
    assert loss["away", "second"] > loss["first", "second"]


@torch.inference_mode()
@pytest.mark.parametrize(("weights", "share"), [((3, 1), 0.25), ((1, 1), 0.5), ((1, -1), 0.0)])
def test_attention_measured_in_the_model(graph, random_latent, weights, share):
    """A black and a white picture carried through the attention of all layers: what is white is the second's share."""
    image = torch.tensor([0.0, 1.0])[:, None, None, None].expand(-1, 8, 8, 3)
    node = comfy_nodes.NODE_CLASS_MAPPINGS["ADAttentionMap"]
    style = mixed(graph, random_latent, *weights)
    carried = node.execute(graph.model, style, graph.latent, conditioning=graph.negative, image=image)[1]
    torch.testing.assert_close(carried, torch.full_like(carried, share), rtol=0, atol=1e-4)


def test_statistics_by_share(pack_module, graph, random_latent):
    """Of colours, too: the larger picture counts no more, and a negative one not at all."""
    noises, model = pack_module("attention.noise"), graph.model.model
    with pack_module("attention.gradient").differentiable(model):
        level = noises.NoiseLevel.of(model, 0.0, torch.zeros(1, 4, 8, 12))
        first, second, both, away = (
            make_objective(pack_module, graph, mixed(graph, random_latent, *weights))
            .statistics(level, noises.StepNoise(0))[0]
            .mean
            for weights in ((1, 0), (0, 1), (1, 3), (1, -1))
        )
    noise = 3 * level.sigma * level.scale.item() / 48**0.5  # the second one's is another draw where it is the first
    assert (both - (0.25 * first + 0.75 * second)).abs().max() < noise + 1e-4
    assert (first - second).abs().max() > 0.1
    assert (away - first).abs().max() < 1e-5


def test_what_is_refused(graph, random_latent, pack_module):
    latent = random_latent(1, (1, 4, 8, 12))
    for inputs, says in (
        ({"weight": -0.5}, "weight: -0.5 is not allowed; use 0 or more, or below 0 with balance share"),
        ({"weight": -1.5, "balance": "share"}, "weight: -1.5 is not allowed; use -1 or more"),
        ({"balance": "even"}, "balance: even is not allowed; use one of amount, share"),
    ):
        with pytest.raises(ValueError, match=says):
            graph.capture(latent, **inputs)
    away = graph.capture(latent, weight=-1.0, balance="share")
    with pytest.raises(ValueError, match="style: every reference in it has weight 0 or below"):
        graph.but(style=away).patched()
    graph = graph.but(style=mixed(graph, random_latent, 1, -1))
    with pytest.raises(ValueError, match="content: it has a reference of negative weight"):
        graph.but(content=mixed(graph, random_latent, 1, -1)).patched()
    labels = torch.zeros(1, 4, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="regions: the style has a reference of negative weight"):
        graph.but(regions=pack_module("attention.regions").Regions(labels, labels, 1)).patched()
