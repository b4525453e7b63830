"""The content losses, against formulas written out with whole attention maps; what the content's edges weigh."""

import pytest
import torch


@pytest.fixture(scope="module")
def features():
    """q, k of a picture and q, k, v of a content reference, [2 3 7 4] each, in float64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 7, 4, generator=generator, dtype=torch.float64) for _ in range(5)]


EDGES = torch.tensor([[0.5, 0.75, 2.5, 1, 1, 0.25, 1]], dtype=torch.float64)


def attention_map(q, k):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


def expected_error(name, q, k, q_c, k_c, v_c):
    """[b heads t x], before the mean."""
    if name == "query":
        return (q - q_c).abs()
    if name == "query_edges":
        return (q - q_c).abs() * EDGES[:, None, :, None]
    difference = attention_map(q, k) - attention_map(q_c, k_c)
    return (difference if name == "query_key" else difference @ v_c).abs()


def loss(module, name, q, k, q_c, k_c, v_c, weight=None, **options):
    if name == "query":
        return module.query_loss(q, q_c, weight)
    if name == "query_edges":
        return module.query_edges_loss(q, q_c, EDGES, weight)
    if name == "query_key":
        return module.query_key_loss(q, k, q_c, k_c, weight, **options)
    return module.query_key_value_loss(q, k, q_c, k_c, v_c, weight)


@pytest.mark.parametrize("name", ["query", "query_key", "query_key_value", "query_edges"])
@pytest.mark.parametrize("weighted", [False, True])
def test_value_and_gradient(pack_module, features, name, weighted):
    q, k, *held = features
    weight = torch.tensor([[1.0, 0, 1, 0, 0, 0.5, 1]], dtype=torch.float64) if weighted else None
    gradients, values = [], []
    for compute in ("pack", "written out"):
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        if compute == "pack":
            value = loss(pack_module("losses.content"), name, *leaves, *held, weight)
        else:
            error = expected_error(name, *leaves, *held)
            rows = torch.ones(1, 7, dtype=torch.float64) if weight is None else weight
            value = (error.mean((1, 3)) * rows).sum() / rows.sum()  # summed over the pictures
        values.append(value)
        gradients.append(torch.autograd.grad(value, leaves, allow_unused=True))
    torch.testing.assert_close(*values, rtol=0, atol=1e-14)
    for own, expected in zip(*gradients, strict=True):
        assert (own is None) == (expected is None) == ("key" not in name and own is gradients[0][1])
        if own is not None:
            torch.testing.assert_close(own, expected, rtol=0, atol=1e-14)


def test_query_key_in_pieces_is_query_key(pack_module, features):
    """One, two and all rows at a time: the same loss and gradient."""
    module, (q, k, q_c, k_c, _) = pack_module("losses.content"), features
    results = []
    for rows in (1, 2, 7):
        leaves = [q.clone().requires_grad_(), k.clone().requires_grad_()]
        value = module.query_key_loss(*leaves, q_c, k_c, map_elements=rows * 2 * 3 * 7)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for other in results[1:]:
        for first, second in zip(results[0], other, strict=True):
            torch.testing.assert_close(first, second, rtol=0, atol=1e-15)


def test_query_key_never_holds_the_whole_map(pack_module):
    """What autograd keeps between forward and backward grows with the tokens, not with their square."""
    module, kept = pack_module("losses.content"), []
    q, k, q_c, k_c = (torch.randn(1, 8, 1024, 40) for _ in range(4))
    q.requires_grad_()

    def note(tensor):
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        module.query_key_loss(q, k, q_c, k_c, map_elements=2**20).backward()
    assert max(kept) == q.numel()


def picture_of_a_square(size=16):
    """A latent [2 4 h w]: a square on one, a flat picture on the other."""
    latent = torch.zeros(2, 4, size, size)
    latent[0, 1, 4:12, 4:12] = 3.0
    return latent + 0.7


def test_edges_weigh_more_and_one_in_the_mean(pack_module):
    maps = pack_module("guidance.maps")
    edges = maps.edge_weights(picture_of_a_square(), None)
    torch.testing.assert_close(edges.mean(dim=(1, 2, 3)), torch.ones(2))
    assert edges[0, 0, 8, 4] > 2.5 and edges[0, 0, 8, 11] > 2.5
    assert edges[0, 0, 8, 8] == edges[0, 0, 0, 0] == maps.EVEN
    assert torch.equal(edges[1], torch.ones(1, 16, 16)), "a flat picture is held evenly"
    assert torch.equal(maps.edge_weights(7 * picture_of_a_square().half(), None)[1], edges[1])
    torch.testing.assert_close(maps.edge_weights(7 * picture_of_a_square(), None), edges)


def test_edges_outside_the_mask_do_not_count(pack_module):
    """The mean is over what is held, so that the loss keeps its size there."""
    covered = torch.zeros(1, 16, 16)
    covered[:, :, :6] = 0.5
    edges = pack_module("guidance.maps").edge_weights(picture_of_a_square(), covered.flatten(1))
    torch.testing.assert_close(edges[:, :, :, :6].mean(dim=(1, 2, 3)), torch.ones(2))


def test_edges_of_windows_are_those_of_the_picture(pack_module):
    """A flat window of a picture with edges is held less than a window with edges; text as a place of the mean."""
    maps, windows = pack_module("guidance.maps"), pack_module("guidance.windows")
    layout_of_tokens = pack_module("attention.tokens").TokenLayout((4, 4), 3, 21)
    edges = maps.edge_weights(picture_of_a_square(32)[:1], None)
    layout = windows.Layout(32, 32, tuple(windows.Window(0, x, 32, 16) for x in (0, 16)))
    own = maps.PictureMaps(None, 0, torch.device("cpu"))
    held = [own.edges(0, edges, layout, window, layout_of_tokens) for window in layout.windows]
    assert all(torch.equal(each[:, [0, 1, 2, 19, 20]], torch.ones(1, 5)) for each in held)
    assert torch.equal(held[1][:, 3:19], torch.full((1, 16), maps.EVEN))
    torch.testing.assert_close(torch.cat(held)[:, 3:19].mean(), torch.tensor(1.0))


def test_without_edges_it_is_the_query_loss(pack_module, features):
    """To the last bits: in the gradient too."""
    module, (q, _, q_c, _, _) = pack_module("losses.content"), features
    edges = pack_module("guidance.maps").edge_weights(torch.full((1, 4, 7, 1), 0.3), None)
    results = []
    for compute in (module.query_loss, lambda a, b: module.query_edges_loss(a, b, edges.flatten(2)[:, 0])):
        leaf = q.clone().requires_grad_()
        value = compute(leaf, q_c)
        results.append([value.detach(), *torch.autograd.grad(value, leaf)])
    for plain, weighed in zip(*results, strict=True):
        torch.testing.assert_close(plain, weighed, rtol=0, atol=1e-15)
