"""AdaIN Latent."""

import pytest
import torch

import nodes


@pytest.fixture(scope="module")
def node(pack):
    return nodes.NODE_CLASS_MAPPINGS["ADAdaINLatent"]


def latent(seed, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + seed


def test_it_takes_the_references_statistics(node):
    """Any channel count and size; a batch of references counts together; other entries of the latent stay."""
    reference = latent(2, (2, 16, 5, 7))
    given = {"samples": latent(1, (3, 16, 8, 6)), "batch_index": [4, 5, 6]}
    out = node.execute(given, {"samples": reference}, 1.0)[0]
    assert out["batch_index"] == [4, 5, 6]
    mean, std = reference.transpose(0, 1).flatten(1).mean(1), reference.transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(out["samples"].mean((2, 3)), mean.expand(3, -1), rtol=0, atol=1e-5)
    torch.testing.assert_close(out["samples"].std((2, 3)), std.expand(3, -1), rtol=0, atol=1e-5)
    assert torch.equal(given["samples"], latent(1, (3, 16, 8, 6)))


def test_strength_and_mask(node):
    given, reference = latent(1, (1, 4, 8, 8)), latent(5, (1, 4, 8, 8))
    full = node.execute({"samples": given}, {"samples": reference}, 1.0)[0]["samples"]
    assert torch.equal(node.execute({"samples": given}, {"samples": reference}, 0.0)[0]["samples"], given)
    half = node.execute({"samples": given}, {"samples": reference}, 0.5)[0]["samples"]
    torch.testing.assert_close(half, (given + full) / 2)
    mask = torch.zeros(1, 64, 64)
    mask[..., 32:] = 1
    masked = node.execute({"samples": given}, {"samples": reference}, 1.0, mask)[0]["samples"]
    assert torch.equal(masked[..., :4], given[..., :4])
    torch.testing.assert_close(masked[..., 4:], full[..., 4:])


@pytest.mark.parametrize("given_has_frame", [True, False])
@pytest.mark.parametrize("reference_has_frame", [True, False])
def test_a_frame_is_kept(node, caplog, given_has_frame, reference_has_frame):
    """[b c 1 h w], as Wan and Qwen-Image have it: the numbers of [b c h w], and a warning where only one has it."""
    given, reference = latent(1, (2, 16, 6, 5)), latent(5, (1, 16, 4, 7))
    mask = torch.zeros(6, 5)
    mask[:3] = 1
    expected = node.execute({"samples": given}, {"samples": reference}, 0.7, mask)[0]["samples"]
    given = given.unsqueeze(2) if given_has_frame else given
    reference = reference.unsqueeze(2) if reference_has_frame else reference
    out = node.execute({"samples": given}, {"samples": reference}, 0.7, mask)[0]["samples"]
    assert out.shape == given.shape
    assert torch.equal(out.reshape(expected.shape), expected)
    assert ("reference: only one of latent and reference has a frame" in caplog.text) == (
        given_has_frame != reference_has_frame
    )


def test_the_references_noise_mask_is_ignored_with_a_warning(node, caplog):
    given, reference = latent(1, (1, 4, 8, 8)), latent(5, (1, 4, 8, 8))
    plain = node.execute({"samples": given}, {"samples": reference}, 1.0)[0]["samples"]
    assert not caplog.messages
    masked = {"samples": reference, "noise_mask": torch.ones(1, 64, 64)}
    assert torch.equal(node.execute({"samples": given}, masked, 1.0)[0]["samples"], plain)
    assert caplog.messages == ["Attention distillation: reference: its noise mask is ignored, the whole picture counts"]


def test_flat_channels_give_the_references_mean(node):
    out = node.execute({"samples": torch.full((1, 4, 4, 4), 2.0)}, {"samples": torch.full((1, 4, 3, 3), 5.0)}, 1.0)
    assert torch.equal(out[0]["samples"], torch.full((1, 4, 4, 4), 5.0))


@pytest.mark.parametrize(
    ("reference", "mask", "says"),
    [
        (
            torch.zeros(1, 16, 4, 4),
            None,
            "reference: it has 16 channels, the latent has 4; encode both",
        ),
        (torch.full((1, 4, 4, 4), float("nan")), None, "reference: the latent holds NaN"),
        (torch.zeros(1, 4, 4, 4), torch.ones(2, 4, 4), "mask: 2 masks for 1 pictures"),
    ],
)
def test_bad_input(node, reference, mask, says):
    with pytest.raises(ValueError, match=says):
        node.execute({"samples": torch.zeros(1, 4, 4, 4)}, {"samples": reference}, 1.0, mask)
