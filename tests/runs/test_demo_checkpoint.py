"""Every identity of the demo checkpoint's construction, on ComfyUI's own classes."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import comfy.sd
import pytest
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from comfy.model_patcher import ModelPatcher
from demo_model import demo_checkpoint
from torch import Tensor

H0 = (0.04, 0.03, 0.03, 0.03)
STRIDES = (2, 4, 8, 16)
LEVELS = (1, 2, 3, 4)
FACTORS = {0: 1.0, 250: 6**0.25, 500: 6**0.5, 999: 6**0.999}


class Loaded(NamedTuple):
    """What ComfyUI makes of the file."""

    model: ModelPatcher
    clip: comfy.sd.CLIP
    vae: comfy.sd.VAE
    gain: float
    """What the first convolution multiplies colours by."""

    @property
    def unet(self) -> UNetModel:
        """The network itself."""
        return self.model.model.diffusion_model

    @property
    def channels(self) -> int:
        """Colours in the latent."""
        return self.unet.in_channels


def load(folder: Path, vae: str, gain: float) -> Loaded:
    """Write a checkpoint and load it as the checkpoint loader node does."""
    file = folder / f"{vae}.safetensors"
    demo_checkpoint.write_demo_checkpoint(file, vae)
    with torch.inference_mode():
        model, clip, first_stage, _ = comfy.sd.load_checkpoint_guess_config(str(file))
    return Loaded(model, clip, first_stage, gain)


@pytest.fixture(scope="module")
def taesd(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The variant that the demo uses."""
    return load(tmp_path_factory.mktemp("taesd"), "taesd", 0.5)


@pytest.fixture(scope="module")
def pixel(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """The variant without a smaller latent."""
    return load(tmp_path_factory.mktemp("pixel"), "pixel", 1 / 0.18215)


@pytest.fixture(scope="module", autouse=True)
def _no_gradient():
    with torch.inference_mode():
        yield


def picture(loaded: Loaded, size: int = 32) -> Tensor:
    """A latent whose signals lie in -1..1."""
    generator = torch.Generator("cpu").manual_seed(5)
    coarse = torch.rand(1, loaded.channels, size // 4, size // 4, generator=generator) * 2 - 1
    return F.interpolate(coarse, size=(size, size), mode="bicubic").clamp(-1, 1) / loaded.gain


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


def pyramid_taps(x: Tensor, level: int) -> Tensor:
    """The 3x3 taps of pyramid level `level - 1` at half its size, [1, 9 * colours, h, w]: a plain reading."""
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16)[None, None]

    def low_pass(image: Tensor, stride: int) -> Tensor:
        planes = F.conv2d(image.transpose(0, 1), kernel, stride=stride, padding=1)
        return planes.transpose(0, 1)

    image = x
    if level > 1:
        image = low_pass(x, 1)
        for _ in range(level - 1):
            image = low_pass(image, 2)
    half = (image.shape[2] // 2, image.shape[3] // 2)
    taps = F.unfold(image, 3, padding=1, stride=2).unflatten(2, half)
    return taps.unflatten(1, (x.shape[1], 9)).transpose(1, 2).flatten(1, 2)


def block(level: int) -> str:
    """The input block with the attention of a level."""
    return f"input_blocks.{2 * level + 1}"


def attention_inputs(loaded: Loaded, timestep: int, level: int) -> list[Tensor]:
    """q, k and v of the first head, [tokens, 40]; the others are alike."""
    seen = observe(loaded, timestep)
    parts = []
    for name in ("to_q", "to_k", "to_v"):
        heads = seen[f"{block(level)}.1.transformer_blocks.0.attn1.{name}"][0].unflatten(-1, (8, 40))
        assert torch.equal(heads, heads[:, :1].expand_as(heads))
        parts.append(heads[:, 0])
    return parts


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
    expected = pyramid_taps(picture(loaded) * loaded.gain, level)
    assert torch.allclose(signals(features, 9 * loaded.channels), expected, atol=1e-4)


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
def test_token_is_taps_and_constants(taesd: Loaded, level: int, timestep: int) -> None:
    """(u, -u, +-0.3) with u = taps / sqrt(27), smaller by the temperature's factor."""
    token = observe(taesd, timestep)[f"{block(level)}.1.proj_in"]
    u = pyramid_taps(picture(taesd) * 0.5, level) / 27**0.5 / FACTORS[timestep]
    assert torch.allclose(token[:, :36], u, atol=1e-3)
    assert torch.allclose(token[:, 36:72], -token[:, :36], atol=1e-6)
    constants = torch.tensor([0.3, -0.3]).repeat(124)[None, :, None, None]
    assert torch.allclose(token[:, 72:], constants.expand_as(token[:, 72:]))


@pytest.mark.parametrize("timestep", FACTORS)
@pytest.mark.parametrize("level", LEVELS)
def test_attention_is_patch_matching(taesd: Loaded, level: int, timestep: int) -> None:
    """Weights = softmax(-|u_q - u_k|^2 / 2h^2): exact on the sphere, in the plane to a few percent."""
    q, k, values = attention_inputs(taesd, timestep, level)
    weights = torch.softmax(q @ k.T / 40**0.5, -1)
    u = (pyramid_taps(picture(taesd) * 0.5, level) / 27**0.5)[0].flatten(1).T / FACTORS[timestep]
    radius = (248 * 0.3**2 / 2) ** 0.5
    sphere = torch.cat([u, torch.full_like(u[:, :1], radius)], 1)
    sphere = radius * sphere / sphere.norm(dim=1, keepdim=True)

    def difference(points: Tensor, h: float) -> float:
        expected = torch.softmax(-torch.cdist(points, points).square() / (2 * h**2), -1)
        return (weights - expected).abs().sum(-1).mean().item()

    h = H0[level - 1]
    assert difference(sphere, h) < 0.02
    assert difference(u, h) < 0.08
    if weights.amax(-1).mean() < 0.9:  # elsewhere most patches match themselves alone, whatever h is
        assert difference(sphere, 1.1 * h) > 2 * difference(sphere, h)
    assert torch.allclose(values[:, :36], u, atol=0.03)
    assert not values[:, 36:].any()


@pytest.mark.parametrize("level", LEVELS)
def test_attention_changes_no_features(taesd: Loaded, level: int) -> None:
    """What the first level adds lies in signals that no later level reads."""
    seen = observe(taesd, 500)
    before, after = seen[f"{block(level)}.0"], seen[f"{block(level)}.1"]
    pull = [demo_checkpoint.slot(40 + colour) for colour in range(4)] if level == 1 else []
    others = [channel for channel in range(320) if channel not in pull]
    assert torch.equal(before[:, others], after[:, others])
    assert bool(pull) == (not torch.equal(before, after))


@pytest.mark.parametrize("timestep", [0, 500])
def test_noise_prediction_moves_to_what_attention_finds(taesd: Loaded, timestep: int) -> None:
    """The input, less the difference of the 3x3 mean attended to and the token's own, smoothly enlarged."""
    q, k, values = attention_inputs(taesd, timestep, 1)
    x = picture(taesd)
    u = (pyramid_taps(x * 0.5, 1) / 27**0.5)[0].flatten(1).T / FACTORS[timestep]
    found = torch.softmax(q @ k.T / 40**0.5, -1) @ values[:, :36] - u
    means = found.unflatten(1, (9, 4)).mean(1).T.unflatten(1, (x.shape[2] // 2, x.shape[3] // 2))[None]
    enlarged = F.pad(F.interpolate(means, scale_factor=2.0, mode="nearest"), (0, 1, 0, 1))
    expected = x - demo_checkpoint.PULL * 27**0.5 / 0.5 * F.avg_pool2d(enlarged, 2, stride=1)
    pull = (expected - x).abs().max()
    assert pull > 5e-3
    assert (predict_noise(taesd, x, timestep) - expected).abs().max() < 0.2 * pull


@pytest.mark.parametrize("name", ["taesd", "pixel"])
def test_noise_prediction_of_noise_is_the_input(name: str, request: pytest.FixtureRequest) -> None:
    """For any batch and shape: each patch finds itself alone, and there is nothing to move to."""
    loaded: Loaded = request.getfixturevalue(name)
    generator = torch.Generator("cpu").manual_seed(1)
    x = torch.randn(2, loaded.channels, 16, 24, generator=generator)
    assert torch.allclose(predict_noise(loaded, x, 800), x, rtol=0.03, atol=0.05)


def test_encoding_is_the_mean_of_8x8_pixels(taesd: Loaded) -> None:
    generator = torch.Generator("cpu").manual_seed(2)
    pixels = torch.rand(1, 64, 96, 3, generator=generator)
    latent = taesd.vae.encode(pixels)
    assert latent.shape == (1, 4, 8, 12)
    means = F.avg_pool2d(pixels.movedim(-1, 1), 8)
    model_space = latent * 0.18215
    assert torch.allclose(model_space[:, :3], (means - 0.5) / 0.25, atol=1e-4)
    assert not latent[:, 3].any()


def test_decoding_a_constant(taesd: Loaded) -> None:
    """Away from the border, where convolutions see zeros beyond the edge."""
    colour = torch.tensor([0.9, 0.3, 0.05])
    latent = taesd.vae.encode(colour.expand(1, 96, 96, 3).contiguous())
    decoded = taesd.vae.decode(latent)
    assert decoded.shape == (1, 96, 96, 3)
    assert torch.allclose(decoded[:, 24:-24, 24:-24], colour.expand(1, 48, 48, 3), atol=2e-3)


def test_decoding_is_linear_and_smooth(taesd: Loaded) -> None:
    """One latent pixel becomes a round spot with the weight of 8x8 pixels."""
    grey = torch.zeros(1, 4, 16, 16)
    spot = grey.clone()
    spot[0, 1, 8, 8] = 0.5 / 0.18215
    made = (taesd.vae.decode(spot) - taesd.vae.decode(grey))[0]
    assert not made[..., [0, 2]].any()
    assert made[..., 1].sum().item() == pytest.approx(64 * 0.5 * 0.25, rel=2e-3)
    around = made[..., 1][44:92, 44:92]
    assert torch.allclose(around, around.T, atol=1e-5) and torch.allclose(around, around.flip(0), atol=1e-5)


def test_pixel_variant_keeps_pixels(pixel: Loaded) -> None:
    generator = torch.Generator("cpu").manual_seed(3)
    pixels = torch.rand(1, 32, 48, 3, generator=generator)
    latent = pixel.vae.encode(pixels)
    assert latent.shape == (1, 3, 32, 48)
    assert torch.allclose(pixel.vae.decode(latent), pixels, atol=1e-6)
    assert latent.min() >= -1 and latent.max() <= 1
