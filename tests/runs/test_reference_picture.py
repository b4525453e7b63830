"""A picture given to Capture Reference Attention as it is: scaled to the model's own area, encoded once."""

import math

import comfy.sd
import pytest
import torch
from small_models import MODELS, load
from small_vae import small_kl, small_taesd, smooth_image

import nodes

SIDES = {"SD1.5": 512, "SD2, noise prediction": 512, "SD2, v-prediction": 768, "SDXL": 1024, "SD3": 1024,
         "FLUX.1-dev": 1024, "Qwen-Image": 1024, "HunyuanImage 2.1": 2048}  # fmt: skip


@torch.inference_mode()
def capture(model, **inputs):
    """The node's reference."""
    return nodes.NODE_CLASS_MAPPINGS["ADCaptureReferenceAttention"].execute(model, **inputs)[0]


@pytest.mark.parametrize("name", SIDES)
def test_the_side_a_model_was_trained_on(name, pack_module, tmp_path):
    assert pack_module("attention.encoding").native_side(load(MODELS[name], tmp_path).model) == SIDES[name]


@pytest.mark.parametrize("shape", [(512, 512), (64, 64), (300, 451), (2000, 500), (1, 1), (3, 5000)])
@pytest.mark.parametrize("multiple", [16, 32])
def test_the_fitted_size_keeps_area_and_shape(shape, multiple, pack_module):
    height, width = pack_module("attention.encoding").fitted_size(*shape, 512, multiple)
    assert height % multiple == width % multiple == 0
    exact = [512 / math.sqrt(shape[0] * shape[1]) * length for length in shape]
    assert abs(height - exact[0]) <= max(multiple / 2, multiple - exact[0])
    assert abs(width - exact[1]) <= max(multiple / 2, multiple - exact[1])


def test_a_picture_of_the_right_size_is_what_vae_encode_makes_of_it(sd15, graph):
    """And the run with it is the run with that latent, bit for bit."""
    vae, image = small_kl(), smooth_image(1, 512, 512).contiguous()
    with torch.inference_mode():
        (encoded,) = nodes.VAEEncode().encode(vae, image)
    by_image = capture(sd15, image=image, vae=vae)
    assert torch.equal(by_image.parts[0].latent, encoded["samples"])
    by_latent = capture(sd15, latent=encoded)
    run = graph.but(steps=1, latent={"samples": torch.zeros(1, 4, 8, 8)})
    assert torch.equal(run.but(style=by_image).ksampler(), run.but(style=by_latent).ksampler())


def test_odd_sizes_and_alpha(sd15, graph):
    """Scaled as a well-kept library scales; alpha is ignored, as VAE Encode ignores it."""
    vae, image = small_kl(), smooth_image(2, 300, 451)
    (part,) = capture(sd15, image=image, vae=vae).parts
    assert part.latent.shape == (1, 4, 416 // 8, 624 // 8)
    scaled = torch.nn.functional.interpolate(
        image.movedim(-1, 1), (416, 624), mode="bicubic", antialias=True
    ).movedim(1, -1)  # fmt: skip
    with torch.inference_mode():
        (expected,) = nodes.VAEEncode().encode(vae, scaled.clamp(0, 1).contiguous())
    assert torch.equal(part.latent, expected["samples"])
    with_alpha = torch.cat([image, torch.rand(1, 300, 451, 1)], dim=-1)
    assert torch.equal(capture(sd15, image=with_alpha, vae=vae).parts[0].latent, part.latent)


def test_a_picture_for_a_model_without_a_vae_is_cut_to_its_tokens(tmp_path):
    """Sixteen pixels wide, in a model of pixels."""
    model = load(MODELS["Chroma Radiance"], tmp_path)
    model.model.diffusion_model.patch_size = 16
    vae = comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)})
    (part,) = capture(model, image=smooth_image(1, 300, 451), vae=vae).parts
    assert part.latent.shape == (1, 3, 832, 1248)  # 835 x 1256 has the area of 1024 x 1024


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({}, "latent: nothing is connected; connect a picture after VAE Encode here, or image and vae"),
        ({"image": smooth_image(1), "latent": {"samples": torch.ones(1, 4, 8, 8)}}, "image: latent is connected as"),
        ({"image": smooth_image(1)}, "vae: nothing is connected, or the checkpoint holds none"),
        ({"image": smooth_image(1), "vae": small_kl(), "mask": torch.zeros(1, 8, 8)}, "mask: the mask is empty"),
        ({"image": smooth_image(1), "vae": small_kl(), "weight": -1.0}, "weight: -1.0 is not allowed"),
        ({"image": smooth_image(1), "vae": small_kl(), "layers": "99"}, "layers: layer 99 does not exist"),
    ],
)  # fmt: skip
def test_what_is_refused_before_anything_is_encoded(sd15, nothing_loads, inputs, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        capture(sd15, **inputs)


def test_another_models_vae_is_refused_before_it_encodes(nothing_loads, tmp_path):
    with pytest.raises(ValueError, match=r"^vae: its latents have 4 channels in 2 dimensions, this model works on pic"):
        capture(load(MODELS["FLUX.1-dev"], tmp_path), image=smooth_image(1), vae=small_taesd())


def test_a_batch_is_several_references(sd15):
    vae, images = small_kl(), torch.cat([smooth_image(1), smooth_image(2)])
    (both,) = capture(sd15, image=images, vae=vae).parts
    alone = [capture(sd15, image=image, vae=vae).parts[0].latent for image in images.split(1)]
    assert torch.equal(both.latent, torch.cat(alone))
