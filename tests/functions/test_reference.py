"""Pooled references: what the picture's queries may look at."""

import math

import pytest
import torch


@pytest.fixture(scope="module")
def pool(pack_module):
    """Banks of parts from their features."""

    def banks(captured):
        parts, features = zip(*captured, strict=True)
        return pack_module("attention.bank").TokenPool(parts).banks(features)

    return banks


@pytest.fixture(scope="module")
def reference(pack_module):
    return pack_module("attention.reference")


def features(pack_module, batch, grid, seed):
    """Random features of one layer, two heads of size 3."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(batch, 2, grid[0] * grid[1], 3, generator=generator) for _ in range(4)]
    return pack_module("attention.capture").LayerFeatures(*tensors, grid)


def test_parts_of_any_size_are_pooled_in_order(pack_module, reference, pool):
    """First reference first, pictures of a batch one after the other; each layer only of parts that take part in it."""
    first = reference.ReferencePart(torch.zeros(2, 4, 4, 6), (0, 2))
    second = reference.ReferencePart(torch.zeros(1, 4, 2, 2), (2,))
    of_first = {0: features(pack_module, 2, (4, 6), 0), 2: features(pack_module, 2, (2, 3), 1)}
    of_second = {2: features(pack_module, 1, (1, 1), 2)}
    bank = pool([(first, of_first), (second, of_second)])
    assert list(bank) == [0, 2]
    assert bank[0].k.shape == (1, 2, 48, 3)
    assert torch.equal(bank[2].k[0], torch.cat([of_first[2].k[0], of_first[2].k[1], of_second[2].k[0]], dim=1))
    assert torch.equal(bank[2].v[0, :, -1], of_second[2].v[0, :, 0])
    assert bank[2].log_weight is None
    pooled = reference.Reference((second,)).pooled_with(reference.Reference((first,)))
    assert pooled.parts == (first, second)
    assert pooled.layers == (0, 2)


def test_weights_and_masks(pack_module, reference, pool):
    """A weight is a logarithm on the logits of the part's tokens; tokens outside the mask are not offered."""
    mask = torch.zeros(8, 8)
    mask[:, 4:] = 1
    masked = reference.ReferencePart(torch.zeros(1, 4, 4, 4), (0,), weight=2.0, mask=mask)
    plain = reference.ReferencePart(torch.zeros(1, 4, 4, 4), (0,))
    held, other = features(pack_module, 1, (4, 4), 0), features(pack_module, 1, (4, 4), 1)
    bank = pool([(masked, {0: held}), (plain, {0: other})])[0]
    assert torch.equal(bank.k[0, :, :8], held.k[0].reshape(2, 4, 4, 3)[:, :, 2:].reshape(2, 8, 3))
    assert torch.equal(bank.k[0, :, 8:], other.k[0])
    assert torch.equal(bank.log_weight, torch.tensor([0.0] * 8 + [math.log(0.5)] * 16))


def test_a_weight_alone_changes_nothing(pack_module, reference, pool):
    """Only ratios count, in each layer: one part, or two of one weight, are offered as with weight 1."""
    heavy, light = (reference.ReferencePart(torch.zeros(1, 4, 4, 4), (0, 1), weight=w) for w in (3.0, 0.2))
    only_first = reference.ReferencePart(torch.zeros(1, 4, 4, 4), (0,), weight=0.5)
    held = {index: features(pack_module, 1, (4, 4), index) for index in (0, 1)}
    assert all(bank.log_weight is None for bank in pool([(heavy, held)]).values())
    assert all(bank.log_weight is None for bank in pool([(light, held), (light, held)]).values())
    banks = pool([(heavy, held), (only_first, held)])
    assert banks[0].log_weight.unique().tolist() == pytest.approx([math.log(0.5 / 3), 0.0])
    assert banks[1].log_weight is None


def test_a_mask_smaller_than_a_token_still_offers_the_token_it_touches(pack_module):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 9, 41] = 1
    assert pack_module("attention.tokens").token_mask(mask, (8, 8)).flatten().nonzero().flatten().tolist() == [8 + 5]


def test_weight_0_leaves_a_part_out(reference):
    out = reference.ReferencePart(torch.zeros(1, 4, 4, 4), (0, 1), weight=0.0, conditioning=["a"])
    kept = reference.ReferencePart(torch.zeros(1, 4, 4, 4), (1,), conditioning=["b"])
    pooled = reference.Reference((out, kept))
    assert pooled.active_parts == (kept,)
    assert pooled.layers == (1,)
    assert pooled.conditioning == ["b"]
