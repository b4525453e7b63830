"""AD Attention Map: against the patches that the demo model is known to match, and against attention written out."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.sd
import pytest
import torch
import torch.nn.functional as F
from comfy.latent_formats import SD15
from patches_of_demo import TAPS, pyramid_taps, slow_waves
from torch import Tensor

import nodes as comfy_nodes

SIZE = 32
WIDTHS, STRIDES = (0.04, 0.03, 0.03), (2, 4, 8)
"""Of the demo model's levels: how unlike patches may be that are matched, and latent pixels to a token."""
COLOURS = torch.tensor(SD15().latent_rgb_factors).T
"""Of the demo model, from a latent in the model's scale to 2 c - 1 of the colours that it stands for, [3, 4]."""


@pytest.fixture(scope="module", autouse=True)
def _inference():
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def demo(pack, demo_file: str) -> Any:
    """The demo model."""
    return comfy.sd.load_checkpoint_guess_config(demo_file, output_vae=False, output_clip=False)[0]


def run(node_id: str, *args: Any, **inputs: Any) -> Any:
    """The outputs of a node."""
    return comfy_nodes.NODE_CLASS_MAPPINGS[node_id].execute(*args, **inputs)


def capture(model: Any, latent: Tensor, **inputs: Any) -> Any:
    """A reference."""
    return run(
        "ADCaptureReferenceAttention", model, {"samples": latent}, **{"layers": "auto", "weight": 1.0, **inputs}
    )[0]


def look(model: Any, style: Any, latent: Tensor, **inputs: Any) -> tuple[Tensor, Tensor]:
    """Map and carried picture."""
    made = run("ADAttentionMap", model, style, {"samples": latent}, **inputs)
    return made[0], made[1]


def shown(seed: int, height: int = SIZE, width: int = SIZE) -> Tensor:
    """A picture as signals in -1..1, [1 3 h w]; some of its patches are alike."""
    generator = torch.Generator("cpu").manual_seed(seed)
    coarse = torch.rand(1, 3, height // 4, width // 4, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(height, width), mode="bicubic").clamp(-1, 1) * torch.linspace(0.05, 1, width)


def latent_of(signals: Tensor) -> Tensor:
    """A latent that stands for signals."""
    return torch.einsum("cs,bshw->bchw", torch.linalg.pinv(COLOURS), signals) / SD15().scale_factor


def closeness(picture: Tensor, reference: Tensor, layer: int, sharper: float = 1.0) -> Tensor:
    """How alike patches are: -|w - w'|^2 / 2h^2 of their slow waves, [tokens, tokens]."""
    own, theirs = (
        slow_waves((pyramid_taps(signals, layer + 1) / TAPS**0.5)[0].flatten(1).T) for signals in (picture, reference)
    )
    return -torch.cdist(own, theirs).square() / (2 * (WIDTHS[layer] / sharper) ** 2)


def matched(picture: Tensor, reference: Tensor, layer: int, sharper: float = 1.0) -> Tensor:
    """The true correspondence of patches, [tokens, tokens]."""
    return torch.softmax(closeness(picture, reference, layer, sharper), dim=-1)


def squares(tokens: Tensor, rows: int, side: int) -> Tensor:
    """[tokens, c] as a picture of squares, [H W c]."""
    return tokens.unflatten(0, (rows, -1)).repeat_interleave(side, 0).repeat_interleave(side, 1)


def chart(corners: Any, rows: int, columns: int) -> Tensor:
    """The colour of each token of a reference, [tokens, 3]: mixed from the corners by its middle."""
    above_left, above_right, below_left, below_right = map(torch.tensor, corners)
    y = ((torch.arange(rows) + 0.5) / rows)[:, None, None]
    x = ((torch.arange(columns) + 0.5) / columns)[None, :, None]
    mixed = (1 - y) * ((1 - x) * above_left + x * above_right) + y * ((1 - x) * below_left + x * below_right)
    return mixed.flatten(0, 1)


def brightness(attention: Tensor) -> Tensor:
    """1 - entropy / log n of each row, [rows, 1]; the map shows its root."""
    entropy = -(attention * attention.clamp_min(1e-30).log()).sum(dim=-1, keepdim=True)
    return 1 - entropy / torch.tensor(float(attention.shape[-1])).log()


PICTURE, REFERENCE = shown(5), torch.cat([shown(5)[..., 8:], shown(6)], dim=-1)
"""They share some patches, and have other sizes."""


@pytest.fixture(scope="module")
def style(demo) -> Any:
    """The reference."""
    return capture(demo, latent_of(REFERENCE))


@pytest.mark.parametrize("layer", range(3))
def test_carried_is_the_true_correspondence_of_patches(demo, style, layer):
    """To a thousandth; where the match is taken for a third wider or narrower, it is a hundredth off."""
    image = torch.rand(1, 8 * SIZE, 8 * REFERENCE.shape[-1], 3, generator=torch.Generator().manual_seed(1))
    _, found = look(demo, style, latent_of(PICTURE), layer=str(layer), image=image)
    side = 8 * STRIDES[layer]
    blocks = F.unfold(image.movedim(-1, 1), side, stride=side)[0].T

    def error(sharper: float) -> float:
        carried = matched(PICTURE, REFERENCE, layer, sharper) @ blocks
        expected = F.fold(carried.T[None], 8 * SIZE, side, stride=side)[0].movedim(0, -1)
        return (found[0] - expected).abs().mean().item()

    assert found.shape == (1, 8 * SIZE, 8 * SIZE, 3)
    assert error(1.0) < 1e-3
    assert min(error(1.3), error(1 / 1.3)) > 1e-2


def expected_map(layer: int, corners: Any) -> tuple[Tensor, Tensor]:
    """Colours and certainty of a layer on pixels, by the patches."""
    rows, columns, side = SIZE // STRIDES[layer], REFERENCE.shape[-1] // STRIDES[layer], 8 * STRIDES[layer]
    attention = matched(PICTURE, REFERENCE, layer)
    colours = attention @ chart(corners, rows, columns)
    return squares(colours, rows, side), squares(brightness(attention), rows, side)


def test_the_map_has_the_charts_colours_and_the_attentions_certainty(demo, style, pack_module):
    """Of one layer, and of all: the mean of both."""
    corners = pack_module("guidance.charts").ALONE
    layers = [expected_map(layer, corners) for layer in range(3)]
    for layer, (colours, certain) in enumerate(layers):
        found, _ = look(demo, style, latent_of(PICTURE), layer=str(layer))
        assert (found[0] - colours * certain.sqrt()).abs().mean() < 2e-3
        assert certain.std() > 0.02 and (found[0] - colours).abs().mean() > 0.02, "a case where the brightness counts"
    colours, certain = (sum(of_all) / 3 for of_all in zip(*layers, strict=True))
    found, _ = look(demo, style, latent_of(PICTURE))
    assert (found[0] - colours * certain.sqrt()).abs().mean() < 2e-3
    assert found.min() >= 0 and found.max() <= 1


def test_a_picture_finds_itself(demo):
    """In noise no two patches are alike: what it carries is the very picture, and the map is the chart."""
    latent = torch.randn(1, 4, 16, 24, generator=torch.Generator().manual_seed(1)) / SD15().scale_factor
    image = torch.rand(1, 128, 192, 3, generator=torch.Generator().manual_seed(2))
    style = capture(demo, latent)
    found, carried = look(demo, style, latent, image=image)
    torch.testing.assert_close(carried, image, rtol=0, atol=0.03)
    legend = look(demo, style, latent)[1]
    assert legend.shape == found.shape
    assert (found - legend).abs().max() < 0.2, "squares beside a smooth chart"
    assert (found - legend).abs().mean() < 0.05  # the largest squares are 64 of 128 pixels


def test_each_of_several_references_has_a_chart_of_its_own(demo):
    """No colour is on both, and a picture has the colours of the reference that it is."""
    one, two = latent_of(shown(7)), latent_of(shown(8, 32, 48))
    style = capture(demo, two, reference=capture(demo, one))
    found, charts = look(demo, style, one, layer="0")
    assert charts.shape == (2, 8 * SIZE, 8 * SIZE, 3)
    warm, cool = ({tuple(colour) for colour in (chart.flatten(0, 1) * 8).long().tolist()} for chart in charts)
    assert not warm & cool
    assert (found[0] - charts[0]).abs().mean() < 0.5 * (found[0] - charts[1]).abs().mean()


def test_images_belong_to_references_in_pooled_order(demo):
    """One for each, or one for all; one of weight 0 keeps its place in the order and is not looked at."""
    one, two = latent_of(shown(7)), latent_of(shown(8))
    images = torch.stack([torch.zeros(8, 8, 3), torch.ones(8, 8, 3)])

    def carried(style: Any, image: Tensor) -> list[float]:
        made = look(demo, style, torch.cat([one, two]), layer="0", image=image)[1]
        return [picture.mean().item() for picture in made]

    first, second = carried(capture(demo, two, reference=capture(demo, one)), images)
    assert first < 0.2 and second > 0.8
    assert carried(capture(demo, torch.cat([one, two])), images) == pytest.approx([first, second], abs=1e-5)
    assert carried(capture(demo, torch.cat([one, two])), images[1:]) == pytest.approx([1, 1], abs=1e-5)
    alone = capture(demo, two, reference=capture(demo, one, weight=0.0))
    assert carried(alone, images) == pytest.approx([1, 1], abs=1e-5)


def test_weights_and_masks_count_as_in_guidance(demo):
    """A weight of 3 counts each token three times; what is masked out is never looked at."""
    left = torch.zeros(1, SIZE, SIZE)
    left[..., : SIZE // 2] = 1
    one, two = latent_of(shown(7)), latent_of(shown(8))
    style = capture(demo, two, weight=3.0, reference=capture(demo, one, mask=left))
    images = torch.stack([torch.zeros(8, 8, 3), torch.ones(8, 8, 3)])
    _, found = look(demo, style, latent_of(PICTURE), layer="0", image=images)
    side = SIZE // STRIDES[0]
    offered = closeness(PICTURE, shown(7), 0).unflatten(-1, (side, side))[..., : side // 2].flatten(1)
    logits = torch.cat([offered, closeness(PICTURE, shown(8), 0) + torch.tensor(3.0).log()], dim=-1)
    expected = torch.softmax(logits, dim=-1)[:, offered.shape[-1] :].sum(dim=-1, keepdim=True)
    difference = (found[0, ..., :1] - squares(expected, side, 8 * STRIDES[0])).abs().mean()
    assert difference < 5e-3
    assert 0.1 < expected.mean() < 0.9


def test_a_batch_is_each_picture_for_itself(demo, style):
    """And attention that is worked out in pieces is the same."""
    image = torch.rand(1, 40, 60, 3, generator=torch.Generator().manual_seed(1))
    pictures = [latent_of(PICTURE), latent_of(shown(9))]
    together = look(demo, style, torch.cat(pictures), image=image)
    apart = [look(demo, style, picture, image=image) for picture in pictures]
    for made, of_each in zip(together, zip(*apart, strict=True), strict=True):
        torch.testing.assert_close(made, torch.cat(of_each), rtol=0, atol=1e-4)


def test_large_pictures_are_looked_up_in_pieces(demo, style, pack_module, monkeypatch):
    whole = look(demo, style, latent_of(PICTURE))[0]
    monkeypatch.setattr(pack_module("attention.lookup"), "AT_ONCE", 8 * 384 * 7)
    torch.testing.assert_close(look(demo, style, latent_of(PICTURE))[0], whole, rtol=0, atol=1e-5)


def test_the_references_own_text_comes_first(styled, random_latent, encode_random):
    """As in guidance; the input stands in where the reference brought none, and zeros where there is no input."""
    latent, text = random_latent(4), encode_random(5)
    own = styled.capture(random_latent(1), conditioning=text)
    expected = look(styled.model, own, latent)[0]
    torch.testing.assert_close(look(styled.model, styled.style, latent, conditioning=text)[0], expected)
    torch.testing.assert_close(look(styled.model, own, latent, conditioning=encode_random(6))[0], expected)
    zeros = look(styled.model, styled.style, latent)[0]
    assert (zeros - expected).abs().max() > 1e-3
    nothing = [[torch.zeros_like(text[0][0]), {}]]
    torch.testing.assert_close(look(styled.model, styled.style, latent, conditioning=nothing)[0], zeros)


def test_guidance_and_injection_on_the_model_are_left_out_of_account(styled, random_latent):
    """So the model may come from before or after these nodes; it keeps them."""
    latent = random_latent(4)
    expected = look(styled.model, styled.style, latent)[0]
    guided = styled.patched()
    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    both = run("ADInjectReferenceKV", guided, styled.style, **settings)[0]
    before = styled.core(both)
    assert torch.equal(look(both, styled.style, latent)[0], expected)
    assert torch.equal(styled.core(both), before)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, comfy.model_management.InterruptProcessingException])
def test_nothing_stays_in_the_model(styled, random_latent, pack_module, monkeypatch, error):
    """After a run, and after one that ends in its middle."""
    latent, network = random_latent(4), styled.model.model.diffusion_model
    plain, before = styled.core(), look(styled.model, styled.style, latent)[0]
    held = [(name, id(tensor)) for name, tensor in network.state_dict(keep_vars=True).items()]

    def fail(*_args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(pack_module("attention.lookup"), "_found", fail)
        with pytest.raises(error):
            look(styled.model, styled.style, latent)
    assert [(name, id(tensor)) for name, tensor in network.state_dict(keep_vars=True).items()] == held
    assert torch.equal(look(styled.model, styled.style, latent)[0], before)
    assert torch.equal(styled.core(), plain)


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        ("99", "layer: layer 99 does not exist; this model has 7 self-attention layers, 0 to 6"),
        ("0", "layer: layer 0 is not one of those that the reference was captured on, 1-6; write one of these"),
        ("-1", "layer: cannot read '-1'; write mean, or the index of one layer"),
        ("", "layer: cannot read ''; write mean"),
        ("last", "layer: cannot read 'last'; write mean"),
    ],
)
def test_layers_that_cannot_be_looked_at(unsampled, random_latent, layer, said):
    with pytest.raises(ValueError, match=said):
        look(unsampled.model, unsampled.style, random_latent(4), layer=layer)


def test_layers_are_read_like_words(styled, random_latent):
    latent = random_latent(4)
    assert torch.equal(
        look(styled.model, styled.style, latent, layer=" Mean ")[0], look(styled.model, styled.style, latent)[0]
    )


def test_pictures_that_belong_to_nothing(unsampled, random_latent):
    with pytest.raises(ValueError, match="image: 2 pictures for 1 style pictures; give one, or one for each"):
        look(unsampled.model, unsampled.style, random_latent(4), image=torch.zeros(2, 8, 8, 3))
