"""The three content losses, against formulas written out with whole attention maps."""

import pytest
import torch


@pytest.fixture(scope="module")
def features():
    """q, k of a picture and q, k, v of a content reference, [2 3 7 4] each, in float64."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, 7, 4, generator=generator, dtype=torch.float64) for _ in range(5)]


def attention_map(q, k):
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)


def expected_error(name, q, k, q_c, k_c, v_c):
    """[b heads t x], before the mean."""
    if name == "query":
        return (q - q_c).abs()
    difference = attention_map(q, k) - attention_map(q_c, k_c)
    return (difference if name == "query_key" else difference @ v_c).abs()


def loss(module, name, q, k, q_c, k_c, v_c, weight=None, **options):
    if name == "query":
        return module.query_loss(q, q_c, weight)
    if name == "query_key":
        return module.query_key_loss(q, k, q_c, k_c, weight, **options)
    return module.query_key_value_loss(q, k, q_c, k_c, v_c, weight)


@pytest.mark.parametrize("name", ["query", "query_key", "query_key_value"])
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
        assert (own is None) == (expected is None) == (name == "query" and own is gradients[0][1])
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
