"""Every identity of the demo checkpoint's construction, on ComfyUI's own classes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import comfy.sd
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from comfy.latent_formats import SD15
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from demo_model import demo_checkpoint
from latent_preview import Latent2RGBPreviewer
from patches_of_demo import TAPS, WAVES, pyramid_taps, slow_waves
from torch import Tensor

H0 = (0.04, 0.03, 0.03)
STRIDES = (2, 4, 8)
LEVELS = (1, 2, 3)
FACTORS = {0: 1.0, 250: 6**0.25, 500: 6**0.5, 999: 6**0.999}


class Loaded(NamedTuple):
    """What ComfyUI makes of the file."""

    model: ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    colours: Tensor
    """2 c - 1 of the colours that a latent stands for, in the model's space, [3, channels]."""

    @property
    def unet(self) -> UNetModel:
        """The network itself."""
        return self.model.model.diffusion_model

    @property
    def channels(self) -> int:
        """Colours in the latent."""
        return self.unet.in_channels


def load(folder: Path, vae: str, colours: Tensor) -> Loaded:
    """Write a checkpoint and load it as the checkpoint loader node does."""
    file = folder / f"{vae}.safetensors"
    demo_checkpoint.write_demo_checkpoint(file, vae)
    with torch.inference_mode():
        model, clip, first_stage, _ = comfy.sd.load_checkpoint_guess_config(str(file))
    return Loaded(model, clip, first_stage, colours)


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The variant that the demo uses."""
    return load(tmp_path_factory.mktemp("taesd"), "taesd", torch.tensor(SD15().latent_rgb_factors).T)


@pytest.fixture(scope="module")
def pixel(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The variant without a smaller latent."""
    return load(tmp_path_factory.mktemp("pixel"), "pixel", torch.eye(3) / 0.18215)


@pytest.fixture(scope="module", autouse=True)
def _no_gradient():
    with torch.inference_mode():
        yield


def shown(size: int = 32) -> Tensor:
    """A picture as signals in -1..1, [1 3 size size], with patches that are alike."""
    generator = torch.Generator("cpu").manual_seed(5)
    coarse = torch.rand(1, 3, size // 4, size // 4, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1) * torch.linspace(0.05, 1, size)


def picture(loaded: Loaded) -> Tensor:
    """A latent that stands for it."""
    return torch.einsum("cs,bshw->bchw", torch.linalg.pinv(loaded.colours), shown())


@functools.cache
def observe(loaded: Loaded, timestep: int) -> dict[str, Tensor]:
    """What every module puts out when the network sees the picture at a timestep, by the module's name."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor) -> None:
        seen[name] = output

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: keep(name, output))
        for name, module in loaded.unet.named_modules()
    ]
    try:
        predict_noise(loaded, picture(loaded), timestep)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def predict_noise(loaded: Loaded, x: Tensor, timestep: int) -> Tensor:
    """One pass through the network."""
    context, times = torch.zeros(len(x), 77, 768), torch.full((len(x),), float(timestep))
    return loaded.unet(x, times, context=context, transformer_options={})


def signals(features: Tensor, count: int) -> Tensor:
    """The first `count` signals: eight channels out of every ten."""
    batch, channels, height, width = features.shape
    grouped = features.reshape(batch, channels // 10, 10, height, width)[:, :, :8]
    return grouped.reshape(batch, -1, height, width)[:, :count]


def patches(level: int, timestep: int) -> Tensor:
    """u = taps / sqrt(75), smaller by the temperature's factor, [tokens, 75]."""
    return (pyramid_taps(shown(), level) / TAPS**0.5)[0].flatten(1).T / FACTORS[timestep]


def block(level: int) -> str:
    """The input block with the attention of a level."""
    return f"input_blocks.{2 * level + 1}"


def attention_inputs(loaded: Loaded, timestep: int, level: int) -> tuple[Tensor, Tensor, Tensor]:
    """q and k of the first head, [tokens, 40], which the others are like; and the values of all heads, [tokens, 75]."""
    seen = observe(loaded, timestep)
    q, k, v = (
        seen[f"{block(level)}.1.transformer_blocks.0.attn1.{name}"][0].unflatten(-1, (8, 40))
        for name in ("to_q", "to_k", "to_v")
    )
    for heads in (q, k):
        assert torch.equal(heads, heads[:, :1].expand_as(heads))
    assert not v[:, :, 10:].any() and not v[:, 7, 5:].any()
    return q[:, 0], k[:, 0], v[:, :, :10].flatten(1)[:, :TAPS]


def test_loads_as_sd15(taesd: Loaded) -> None:
    assert type(taesd.model.model.model_config).__name__ == "SD15"
    assert taesd.channels == 4
    assert taesd.model.model.get_dtype() == torch.float32
    attentions = [name for name, _ in taesd.unet.named_modules() if name.endswith("attn1")]
    assert attentions == [f"{block(level)}.1.transformer_blocks.0.attn1" for level in LEVELS]


@pytest.mark.parametrize("text", ["", "a castle, (oil painting:1.4)", "word " * 200])
def test_every_prompt_is_zeros(taesd: Loaded, text: str) -> None:
    conditioning = taesd.clip.encode_from_tokens_scheduled(taesd.clip.tokenize(text))
    encoded, extra = conditioning[0]
    assert encoded.shape[1] % 77 == 0 and encoded.shape[2] == 768
    assert not encoded.any() and not extra["pooled_output"].any()


def test_same_weights_every_time() -> None:
    first, second = demo_checkpoint.demo_checkpoint(), demo_checkpoint.demo_checkpoint()
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_unknown_vae() -> None:
    with pytest.raises(ValueError, match=r"'kl'.*taesd or pixel"):
        demo_checkpoint.demo_checkpoint("kl")


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", ["taesd", "pixel"])
def test_features_are_pyramid_taps(name: str, level: int, request: pytest.FixtureRequest) -> None:
    loaded: Loaded = request.getfixturevalue(name)
    features = observe(loaded, 500)[f"{block(level)}.0"]
    assert features.shape[-1] == 32 // STRIDES[level - 1]
    assert torch.allclose(signals(features, TAPS), pyramid_taps(shown(), level), atol=3e-4)


@pytest.mark.parametrize("timestep", FACTORS)
def test_embedding_follows_the_timestep(taesd: Loaded, timestep: int) -> None:
    """The embedding is (y, -y, 0 ...) with y = 6^(t/1000) - 1."""
    embedding = observe(taesd, timestep)["time_embed"][0]
    y = FACTORS[timestep] - 1
    assert embedding[:2].tolist() == pytest.approx([y, -y], abs=2e-3)
    assert not embedding[2:].any()


@pytest.mark.parametrize("timestep", FACTORS)
@pytest.mark.parametrize("level", LEVELS)
def test_carriers_follow_the_timestep(taesd: Loaded, level: int, timestep: int) -> None:
    """+-50 * 6^(t/1000) in the last two channels of every group of ten."""
    grouped = observe(taesd, timestep)[f"{block(level)}.0"].unflatten(1, (32, 10))
    carriers = torch.full_like(grouped[:, :, 8], 50 * FACTORS[timestep])
    assert torch.allclose(grouped[:, :, 8], carriers, rtol=2e-3)
    assert torch.allclose(grouped[:, :, 9], -carriers, rtol=2e-3)


@pytest.mark.parametrize("timestep", FACTORS)
@pytest.mark.parametrize("level", LEVELS)
def test_token_is_waves_and_constants(taesd: Loaded, level: int, timestep: int) -> None:
    """(w, -w, +-0.3) with w = the waves of the patch: 39 slow ones, and 36 faint ones with the rest of its energy."""
    token = observe(taesd, timestep)[f"{block(level)}.1.proj_in"][0].flatten(1).T
    u = patches(level, timestep)
    assert torch.allclose(token[:, :WAVES], slow_waves(u), atol=1e-3)
    energy = token[:, :WAVES].square().sum(1) + 100 * token[:, WAVES:TAPS].square().sum(1)
    assert torch.allclose(energy, u.square().sum(1), rtol=2e-2, atol=1e-5)
    assert torch.allclose(token[:, TAPS : 2 * TAPS], -token[:, :TAPS], atol=1e-6)
    constants = torch.tensor([0.3, -0.3]).repeat(85)
    assert torch.allclose(token[:, 2 * TAPS :], constants.expand(len(token), -1))


@pytest.mark.parametrize("timestep", FACTORS)
@pytest.mark.parametrize("level", LEVELS)
def test_attention_is_patch_matching(taesd: Loaded, level: int, timestep: int) -> None:
    """Weights = softmax(-|w_q - w_k|^2 / 2h^2) of the slow waves w, and the heads share the patch as values."""
    q, k, values = attention_inputs(taesd, timestep, level)
    weights = torch.softmax(q @ k.T / 40**0.5, -1)
    u = patches(level, timestep)

    def difference(points: Tensor, h: float) -> float:
        expected = torch.softmax(-torch.cdist(points, points).square() / (2 * h**2), -1)
        return (weights - expected).abs().sum(-1).mean().item()

    h = H0[level - 1]
    assert difference(slow_waves(u), h) < 0.1
    if weights.amax(-1).mean() < 0.9:  # elsewhere most patches match themselves alone, whatever h is
        assert difference(slow_waves(u), 1.3 * h) > 2 * difference(slow_waves(u), h)
    assert torch.allclose(values, u, atol=0.03)


def test_some_patches_match_others(taesd: Loaded) -> None:
    """So the test above sees the width h of the match, at more than one timestep."""
    shares = [
        torch.softmax(q @ k.T / 40**0.5, -1).amax(-1).mean().item()
        for q, k, _ in (attention_inputs(taesd, timestep, 1) for timestep in FACTORS)
    ]
    assert sum(share < 0.9 for share in shares) >= 2


@pytest.mark.parametrize("level", LEVELS)
def test_attention_changes_no_features(taesd: Loaded, level: int) -> None:
    """What the first level adds lies in signals that no later level reads."""
    seen = observe(taesd, 500)
    before, after = seen[f"{block(level)}.0"], seen[f"{block(level)}.1"]
    pull = [demo_checkpoint.slot(120 + colour) for colour in range(3)] if level == 1 else []
    others = [channel for channel in range(320) if channel not in pull]
    assert torch.equal(before[:, others], after[:, others])
    assert bool(pull) == (not torch.equal(before, after))


@pytest.mark.parametrize("timestep", [0, 500])
def test_noise_prediction_moves_to_what_attention_finds(taesd: Loaded, timestep: int) -> None:
    """The input, less the difference of the middle 3x3 mean attended to and the token's own, smoothly enlarged."""
    q, k, values = attention_inputs(taesd, timestep, 1)
    x = picture(taesd)
    u = patches(1, timestep)
    found = torch.softmax(q @ k.T / 40**0.5, -1) @ values - u
    middle = found.unflatten(1, (5, 5, 3))[:, 1:4, 1:4].mean((1, 2))
    means = middle.T.unflatten(1, (x.shape[2] // 2, x.shape[3] // 2))[None]
    enlarged = F.pad(F.interpolate(means, scale_factor=2.0, mode="nearest"), (0, 1, 0, 1))
    signal = demo_checkpoint.PULL * TAPS**0.5 * F.avg_pool2d(enlarged, 2, stride=1)
    expected = x - torch.einsum("cs,bshw->bchw", torch.linalg.pinv(taesd.colours), signal)
    pull = (expected - x).abs().max()
    assert pull > 5e-3
    assert (predict_noise(taesd, x, timestep) - expected).abs().max() < 0.2 * pull


@pytest.mark.parametrize("name", ["taesd", "pixel"])
def test_noise_prediction_of_noise_is_the_input(name: str, request: pytest.FixtureRequest) -> None:
    """For any batch and shape: each patch finds itself alone, and there is nothing to move to."""
    loaded: Loaded = request.getfixturevalue(name)
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(2, loaded.channels, 16, 24, generator=generator)
    assert torch.allclose(predict_noise(loaded, x, 500), x, rtol=0.03, atol=0.05)


def test_encoding_is_the_mean_of_8x8_pixels(taesd: Loaded) -> None:
    generator = torch.Generator("cpu").manual_seed(2)
    pixels = torch.rand(1, 64, 96, 3, generator=generator)
    latent = taesd.vae.encode(pixels)
    assert latent.shape == (1, 4, 8, 12)
    means = F.avg_pool2d(pixels.movedim(-1, 1), 8)
    signals = torch.einsum("sc,bchw->bshw", taesd.colours, latent * 0.18215)
    assert torch.allclose(signals, 2 * means - 1, atol=1e-4)


def test_previews_show_true_colours(taesd: Loaded) -> None:
    """ComfyUI's own previewer makes of a latent what was encoded."""
    colours = torch.rand(1, 4, 4, 3, generator=torch.Generator("cpu").manual_seed(4))
    pixels = colours.repeat_interleave(8, 1).repeat_interleave(8, 2)
    latent_format = taesd.model.model.latent_format
    previewer = Latent2RGBPreviewer(latent_format.latent_rgb_factors)
    image = previewer.decode_latent_to_preview(latent_format.process_in(taesd.vae.encode(pixels)))
    assert np.abs(np.asarray(image) / 255 - colours[0].numpy()).max() < 2 / 255


def test_decoding_a_constant(taesd: Loaded) -> None:
    """Away from the border, where convolutions see zeros beyond the edge."""
    colour = torch.tensor([0.9, 0.3, 0.05])
    latent = taesd.vae.encode(colour.expand(1, 96, 96, 3).contiguous())
    decoded = taesd.vae.decode(latent)
    assert decoded.shape == (1, 96, 96, 3)
    assert torch.allclose(decoded[:, 24:-24, 24:-24], colour.expand(1, 48, 48, 3), atol=2e-3)


def test_decoding_is_linear_and_smooth(taesd: Loaded) -> None:
    """One latent pixel becomes a round spot with the weight of 8x8 pixels, and encoding gives most of it back."""
    grey = torch.zeros(1, 4, 16, 16)
    spot = grey.clone()
    spot[0, :, 8, 8] = 0.5 * torch.linalg.pinv(taesd.colours)[:, 1] / 0.18215
    made = (taesd.vae.decode(spot) - taesd.vae.decode(grey))[0]
    assert made[..., [0, 2]].abs().max() < 1e-4
    assert made[..., 1].sum().item() == pytest.approx(64 * 0.25, rel=2e-3)
    around = made[..., 1][44:92, 44:92]
    assert torch.allclose(around, around.T, atol=1e-5) and torch.allclose(around, around.flip(0), atol=1e-5)
    assert F.avg_pool2d(made[..., 1][None], 8)[0, 8, 8].item() == pytest.approx(0.25, rel=0.2)


def test_pixel_variant_keeps_pixels(pixel: Loaded) -> None:
    generator = torch.Generator("cpu").manual_seed(3)
    pixels = torch.rand(1, 32, 48, 3, generator=generator)
    latent = pixel.vae.encode(pixels)
    assert latent.shape == (1, 3, 32, 48)
    assert torch.allclose(pixel.vae.decode(latent), pixels, atol=1e-6)
    assert latent.min() >= -1 and latent.max() <= 1
