"""The pure tensor functions, against formulas written out."""

import math

import pytest
import torch


@pytest.fixture(scope="module")
def features():
    """q [2 3 5 4] of a picture, k and v [1 3 7 4] of references, in float64."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((2, 3, 5, 4), (1, 3, 7, 4), (1, 3, 7, 4))
    ]


def written_out(q, k, v, bias=0.0):
    """softmax(q k^T / sqrt(d) + bias) v."""
    logits = torch.einsum("bhid,xhjd->bhij", q, k) / math.sqrt(q.shape[-1]) + bias
    return torch.einsum("bhij,xhjd->bhid", logits.softmax(-1), v)


@pytest.mark.parametrize("attention_scale", [1.0, 1.3])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_target_is_attention_over_the_reference(pack_module, features, attention_scale, weighted):
    q, k, v = features
    log_weight = torch.linspace(-2, 1, 7, dtype=torch.float64) if weighted else None
    target = pack_module("losses.distillation").distillation_target(
        q.clone().requires_grad_(), k, v, attention_scale=attention_scale, log_weight=log_weight
    )
    expected = written_out(attention_scale * q, k, v, 0.0 if log_weight is None else log_weight)
    torch.testing.assert_close(target, expected, rtol=0, atol=1e-12)
    assert not target.requires_grad


def test_a_weight_counts_a_token_that_many_times(pack_module, features):
    q, k, v = features
    target = pack_module("losses.distillation").distillation_target
    log_weight = torch.tensor([3.0] + [1.0] * 6, dtype=torch.float64).log()
    repeated = [torch.cat([t[:, :, :1], t[:, :, :1], t], dim=2) for t in (k, v)]
    torch.testing.assert_close(target(q, k, v, log_weight=log_weight), target(q, *repeated), rtol=0, atol=1e-12)


def test_losses_are_mean_absolute_errors(pack_module):
    """Of one picture; those of a batch are summed, so that none counts less for being in company."""
    out, target = (torch.tensor([values])[None, None] for values in ([1.0, -2.0], [0.5, 2.0]))
    assert pack_module("losses.distillation").distillation_loss(out, target) == (0.5 + 4.0) / 2
    assert pack_module("losses.content").query_loss(out, target) == (0.5 + 4.0) / 2
    assert pack_module("losses.distillation").distillation_loss(out.repeat(3, 1, 1, 1), target) == 3 * (0.5 + 4.0) / 2


def test_losses_of_half_precision_features_are_in_fp32(pack_module):
    """In fp16 the mean of 70000 ones would overflow on its way."""
    out = torch.ones(1, 1, 70000, 1, dtype=torch.float16)
    loss = pack_module("losses.distillation").distillation_loss(out, torch.zeros_like(out))
    assert loss.dtype == torch.float32
    assert loss == 1


def test_the_content_gradient_does_not_reach_the_content(pack_module):
    q, q_c = torch.randn(1, 1, 3, 2, requires_grad=True), torch.randn(1, 1, 3, 2, requires_grad=True)
    pack_module("losses.content").query_loss(q, q_c).backward()
    assert q_c.grad is None
    assert torch.equal(q.grad, (q - q_c).sign() / 6)


def test_adain_takes_mean_and_unbiased_std(pack_module):
    module = pack_module("losses.adain")
    generator = torch.Generator().manual_seed(1)
    z, reference = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((2, 4, 5, 6), (1, 4, 3, 3))
    )
    result = module.adain(z, module.channel_stats(3 * reference + 1))
    torch.testing.assert_close(result.mean((2, 3)), (3 * reference + 1).mean((2, 3)).expand(2, -1), rtol=0, atol=1e-5)
    # the eps of 1e-6 on z's own std is the only deviation
    torch.testing.assert_close(result.std((2, 3)), 3 * reference.std((2, 3)).expand(2, -1), rtol=0, atol=1e-5)


def test_weighted_statistics_are_those_of_repeated_pixels(pack_module):
    stats = pack_module("losses.adain").channel_stats
    z = torch.randn(1, 2, 1, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    weighted = stats(z, torch.tensor([2.0, 0.0, 1.0, 1.0], dtype=torch.float64)[None, None, None])
    repeated = z[..., [0, 0, 2, 3]]
    torch.testing.assert_close(weighted.mean[..., 0, 0], repeated.mean((2, 3)))
    torch.testing.assert_close(weighted.std[..., 0, 0], repeated.std((2, 3)))


def test_flat_channels_and_single_pixels_give_no_nan(pack_module):
    module = pack_module("losses.adain")
    stats = module.channel_stats(torch.full((1, 4, 1, 1), 3.0))
    assert torch.equal(stats.std, torch.zeros(1, 4, 1, 1))
    assert torch.equal(module.adain(torch.full((2, 4, 3, 3), 7.0), stats), torch.full((2, 4, 3, 3), 3.0))
