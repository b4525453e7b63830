"""Seamless tiling: rolling what goes in rolls what comes out, and the originals stay what they are."""

from collections import OrderedDict
from dataclasses import replace
from types import SimpleNamespace

import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import small_models
import torch
import torch.nn.functional as F
from small_vae import SMALL_VAES, small_wan, smooth_image

TILED_DIMS = {"both": (-2, -1), "horizontal": (-1,), "vertical": (-2,)}
SIGMA = 1.7


@pytest.fixture(scope="module")
def circular(pack_module):
    return pack_module("tiling.circular")


@pytest.fixture(scope="module", params=SMALL_VAES)
def vae(request):
    return SMALL_VAES[request.param]()


def denoised(model, x, context):
    """What a model makes of x, [b c h w]."""
    comfy.model_management.load_models_gpu([model])
    with torch.inference_mode():
        return model.model.apply_model(x, torch.full((x.shape[0],), SIGMA), c_crossattn=context)


@pytest.fixture(scope="module")
def picture(random_latent, encode_random):
    return random_latent(3, (1, 4, 12, 16)) * 0.18215 * 2, encode_random(1)[0][0]


@pytest.mark.parametrize("axes", TILED_DIMS)
def test_rolling_the_latent_rolls_what_the_unet_makes_of_it(axes, circular, sd15, picture):
    x, context = picture
    tiled = circular.tile_model(sd15, axes)
    plain, result = denoised(sd15, x, context), denoised(tiled, x, context)
    assert (plain - result).abs().max() > 1e-2
    for dim in (-2, -1):
        rolled = denoised(tiled, x.roll(4, dim), context).roll(-4, dim)
        if dim in TILED_DIMS[axes]:
            torch.testing.assert_close(rolled, result, rtol=0, atol=1e-4)
        else:
            assert (rolled - result).abs().max() > 1e-2
    assert torch.equal(denoised(sd15, x, context), plain)
    assert torch.equal(denoised(tiled, x, context), result)


@pytest.mark.parametrize("axes", TILED_DIMS)
def test_each_convolution_of_the_unet(axes, circular, sd15):
    """Against wrapped padding written out; the other axis keeps its zeros."""
    comfy.model_management.load_models_gpu([circular.tile_model(sd15, axes)])
    convolutions = [m for m in sd15.model.diffusion_model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert {conv.stride for conv in convolutions} == {(1, 1), (2, 2)}
    for conv in convolutions:
        x = torch.randn(1, conv.in_channels, 6, 8, generator=torch.Generator().manual_seed(0))
        pad = conv.kernel_size[0] // 2
        wide = torch.cat([x[..., 8 - pad :], x, x[..., :pad]], dim=-1) if axes != "vertical" else F.pad(x, (pad, pad))
        rows = (wide[..., 6 - pad :, :], wide, wide[..., :pad, :])
        full = torch.cat(rows, dim=-2) if axes != "horizontal" else F.pad(wide, (0, 0, pad, pad))
        with torch.inference_mode():
            expected = F.conv2d(full, conv.weight, conv.bias, conv.stride)
            torch.testing.assert_close(conv(x), expected, rtol=0, atol=1e-5)


def test_the_gradient_is_that_of_the_tiled_model(circular, sd15, picture, pack_module):
    x, context = picture
    comfy.model_management.load_models_gpu([circular.tile_model(sd15, "both")])

    def gradient(x):
        z = x.clone().requires_grad_()
        out = sd15.model.apply_model(z, torch.tensor([SIGMA]), c_crossattn=context.clone())
        return torch.autograd.grad(out.square().mean(), z)[0]

    with pack_module("attention.gradient").differentiable(sd15.model):
        expected = gradient(x)
        rolled = gradient(x.roll((2, 6), (-2, -1))).roll((-2, -6), (-2, -1))
    torch.testing.assert_close(rolled, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("axes", TILED_DIMS)
def test_a_reference_is_not_wrapped(axes, circular, sd15, picture, pack_module, random_latent, encode_zeros):
    """What is read of it is what the plain model shows; of that nothing is offered at edges that the picture joins."""
    reference, noises = pack_module("attention.reference"), pack_module("attention.noise")
    style = reference.Reference((reference.ReferencePart(random_latent(1, (1, 4, 8, 40)), (1, 5)),))
    layers = pack_module("attention.layers").list_layers(sd15.model.diffusion_model)
    level = noises.NoiseLevel(2.0, torch.tensor(2.0), torch.ones(1, 1, 1, 1))
    x, context = picture

    def seen_by(model):
        comfy.model_management.load_models_gpu([model])
        with pack_module("attention.gradient").differentiable(sd15.model), torch.no_grad():
            reader = pack_module("attention.reader").ReferenceReader(
                sd15.model, layers, style, pack_module("attention.conditioning").from_socket(encode_zeros()), x
            )
            (features,) = reader.read(level, None, noises.Purpose.STYLE)
            shown = sd15.model.apply_model(x, torch.tensor([SIGMA]), c_crossattn=context.clone())
        return features, shown

    (plain, plain_shown), (tiled, tiled_shown) = seen_by(sd15), seen_by(circular.tile_model(sd15, axes))
    banks = pack_module("attention.bank").TokenPool(style.active_parts).banks([tiled])
    for index, halvings in ((1, 1), (5, 0)):
        assert layers[index].halvings == halvings
        for name in "qkv":
            torch.testing.assert_close(getattr(plain[index], name), getattr(tiled[index], name), rtol=0, atol=1e-4)
        rows, columns = grid = (8 >> halvings, 40 >> halvings)
        down, across = {0: (1, 4), 1: (1, 2)}[halvings]  # four latent pixels, at most an eighth of a side
        down, across = down * (axes != "horizontal"), across * (axes != "vertical")
        assert plain[index].edges == (0, 0) and tiled[index].edges == (down, across)
        inner = tiled[index].k.unflatten(2, grid)[:, :, down : rows - down, across : columns - across].flatten(2, 3)
        assert 0 < inner.shape[2] < rows * columns and torch.equal(banks[index].k, inner)
    assert (plain_shown - tiled_shown).abs().max() > 1e-2


def test_a_mask_on_edges_and_each_label_keep_their_tokens(pack_module):
    """A part offers its edges only where it has nothing else; with regions, each label of it."""
    features = pack_module("attention.capture").LayerFeatures
    part, pool = pack_module("attention.reference").ReferencePart, pack_module("attention.bank").TokenPool
    latent, number = torch.zeros(1, 4, 4, 6), torch.arange(24.0).view(1, 1, 24, 1)
    read = features(number, number, number, number, (4, 6), edges=(1, 1))

    def offered(mask=None, labels=None):
        of_part = part(latent, (0,), mask=mask)
        bank = pool([of_part], *(() if labels is None else ([labels], 2))).banks([{0: read}])[0]
        return [one.k.flatten().tolist() for one in (bank, *bank.by_label)]

    assert offered() == [[7, 8, 9, 10, 13, 14, 15, 16]]
    left, corner = torch.zeros(2, 1, 1, 4, 6)
    left[..., :2], corner[..., 0, 0] = 1, 1
    assert offered(left) == [[7, 13]] and offered(corner) == [[0]]
    labels = torch.ones(1, 4, 6, dtype=torch.long)
    labels[..., 0, :] = 0
    top, rest = [0, 1, 2, 3, 4, 5], [7, 8, 9, 10, 13, 14, 15, 16]
    assert offered(labels=labels)[1:3] == [top, rest]
    thin = torch.ones(1, 32, 48, dtype=torch.long)
    thin[..., -2:, :] = 0  # nearest to no token: those that it touches are its own
    assert offered(labels=thin)[1] == [18, 19, 20, 21, 22, 23]


def test_a_run_on_sdxl_does_not_know_where_its_border_is(circular, pack, tmp_path):
    """Noise rolled by any number of its coarsest tokens makes the picture rolled, but for rounding."""
    small = replace(small_models.MODELS["SDXL"], through_loader=False)
    model = small_models.load(small, tmp_path)
    tiled = circular.tile_model(model, "horizontal")
    noise = torch.randn(1, 4, 8, 24, generator=torch.Generator().manual_seed(2))

    def made(model, noise):
        sigmas = torch.tensor([3.0, 1.0, 0.0])
        with torch.inference_mode():
            return comfy.sample.sample_custom(
                model, noise, 1.0, comfy.samplers.sampler_object("euler"), sigmas, small.cond(1), small.cond(2),
                torch.zeros_like(noise), disable_pbar=True,
            )  # fmt: skip

    picture = made(tiled, noise)
    torch.testing.assert_close(made(tiled, noise.roll(20, -1)).roll(-20, -1), picture, rtol=0, atol=2e-4)
    waves = noise[..., :4].repeat(1, 1, 1, 6)  # the border is a place like any fourth
    plain, picture = made(model, waves), made(tiled, waves)
    for made_of_waves, alike in ((plain, False), (picture, True)):
        steps = (made_of_waves - made_of_waves.roll(1, -1)).abs().mean(dim=(0, 1, 2))[::4]
        assert (abs(steps[0] / steps[1:].median() - 1) < 1e-3) == alike


def test_a_picture_is_wrapped_again_after_an_error(circular, sd15, picture):
    x, context = picture
    network = sd15.model.diffusion_model
    comfy.model_management.load_models_gpu([circular.tile_model(sd15, "both")])

    def shown():
        with torch.inference_mode():
            return sd15.model.apply_model(x, torch.tensor([SIGMA]), c_crossattn=context.clone())

    before = shown()
    with pytest.raises(ValueError), circular.not_wrapped(network):
        assert not torch.allclose(shown(), before)
        raise ValueError
    assert torch.equal(shown(), before)


def test_a_reference_read_on_one_device_leaves_the_copy_on_another_wrapped(circular):
    """MultiGPU CFG Split gives copies of a model the same patches, and runs each in a thread of its own."""
    conv, copy = (torch.nn.Conv2d(1, 1, 3, bias=False) for _ in range(2))
    hooks = OrderedDict({circular.KEY: circular._Pad(1, 1)})
    for each in (conv, copy):
        each.weight.data = torch.ones(1, 1, 3, 3)
        each._forward_pre_hooks = hooks
    x = torch.ones(1, 1, 4, 4)
    with circular.not_wrapped(conv) as of_conv, circular.not_wrapped(copy) as of_copy:
        assert of_conv == of_copy == (True, True)
    with torch.no_grad(), circular.not_wrapped(conv):
        assert conv(x)[0, 0, 0, 0] == 4 and copy(x)[0, 0, 0, 0] == 9
        with circular.not_wrapped(copy):
            assert copy(x)[0, 0, 0, 0] == 4
        assert conv(x)[0, 0, 0, 0] == 4
    assert conv(x)[0, 0, 0, 0] == 9


@pytest.mark.parametrize("axes", TILED_DIMS)
def test_rolling_what_the_vae_is_given(axes, circular, vae):
    """Pixels by 8 and latents by 1; the original in between is bit-identical."""
    tiled = circular.tile_vae(vae, axes)
    image = smooth_image(1, 48, 64)
    with torch.inference_mode():
        latent, plain_latent = tiled.encode(image), vae.encode(image)
        decoded, plain_decoded = tiled.decode(latent), vae.decode(latent)
        assert (latent - plain_latent).abs().max() > 1e-2
        assert (decoded - plain_decoded).abs().max() > 1e-2
        for dim in (-2, -1):
            rolled_latent = tiled.encode(image.roll(8, dim - 1)).roll(-1, dim)
            rolled_image = tiled.decode(latent.roll(1, dim)).roll(-8, dim - 1)
            if dim in TILED_DIMS[axes]:
                torch.testing.assert_close(rolled_latent, latent, rtol=0, atol=1e-4)
                torch.testing.assert_close(rolled_image, decoded, rtol=0, atol=1e-4)
            else:
                assert (rolled_latent - latent).abs().max() > 1e-2
                assert (rolled_image - decoded).abs().max() > 1e-2
        assert torch.equal(vae.encode(image), plain_latent)
        assert torch.equal(tiled.decode(latent), decoded)
        assert torch.equal(vae.decode(latent), plain_decoded)


@pytest.mark.parametrize("axes", TILED_DIMS)
def test_the_vae_of_single_pictures_in_videos(axes, circular):
    """That of Wan and Qwen-Image; a video is refused."""
    vae = small_wan()
    tiled, image = circular.tile_vae(vae, axes), smooth_image(1, 32, 48)
    with torch.inference_mode():
        plain = vae.encode(image)
        latent, decoded = tiled.encode(image), tiled.decode(plain)
        for dim in (-2, -1):
            rolled_latent = tiled.encode(image.roll(8, dim - 1)).roll(-1, dim)
            rolled_image = tiled.decode(plain.roll(1, dim)).roll(-8, dim - 1)
            assert torch.allclose(rolled_latent, latent, rtol=0, atol=1e-4) == (dim in TILED_DIMS[axes])
            assert torch.allclose(rolled_image, decoded, rtol=0, atol=1e-4) == (dim in TILED_DIMS[axes])
        with pytest.raises(ValueError, match="vae: it comes from Seamless Tiling, which takes single pictures only"):
            tiled.decode(plain.repeat(1, 1, 2, 1, 1))
        assert torch.equal(vae.encode(image), plain)


def test_nothing_is_left_on_the_originals(circular, sd15):
    """The very objects that were there before, once the original is loaded again."""
    vae = SMALL_VAES["kl"]()
    networks = {"model": (sd15, sd15.model), "vae": (vae.patcher, vae.first_stage_model)}
    for patcher, _ in networks.values():
        comfy.model_management.load_models_gpu([patcher])

    def attributes(network):
        return [(name, key, value) for name, m in network.named_modules() for key, value in vars(m).items()]

    before = {name: attributes(network) for name, (_, network) in networks.items()}
    tiled = {"model": circular.tile_model(sd15, "both"), "vae": circular.tile_vae(vae, "both").patcher}
    for name, (patcher, network) in networks.items():
        comfy.model_management.load_models_gpu([tiled[name]])
        changed = {key for (_, key, old), (_, _, new) in zip(before[name], attributes(network), strict=True)
                   if old is not new}  # fmt: skip
        assert changed >= {"padding", "_forward_pre_hooks"}
        comfy.model_management.load_models_gpu([patcher])
        for (_, key, old), (_, _, new) in zip(before[name], attributes(network), strict=True):
            assert old is new or (old == new and key not in ("padding", "_forward_pre_hooks")), key
        assert not patcher.object_patches


def test_tiling_again_changes_the_axes(circular, sd15, picture):
    """Also while the first one is loaded, and with hooks of others in place."""
    x, context = picture
    expected = denoised(circular.tile_model(sd15, "vertical"), x, context)
    comfy.model_management.load_models_gpu([sd15])
    seen = []
    conv = sd15.model.diffusion_model.input_blocks[0][0]
    handle = conv.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
    first = circular.tile_model(sd15, "horizontal")
    denoised(first, x, context)
    second = circular.tile_model(first, "vertical")
    del first
    assert torch.equal(denoised(second, x, context), expected)
    handle.remove()
    assert len(seen) == 2


def test_patches_of_other_packs_stay(circular, sd15):
    """Under the same names, put there before or on top; tiling again keeps them too."""
    name = "diffusion_model.input_blocks.0.0"
    padding, hooks = f"{name}.padding", f"{name}._forward_pre_hooks"
    theirs = OrderedDict(theirs=lambda module, args: None)
    before = sd15.clone()
    before.add_object_patch(padding, (2, 3))
    before.add_object_patch(hooks, theirs)
    for axes, expected in (("both", (0, 0)), ("horizontal", (2, 0)), ("vertical", (0, 3))):
        tiled = circular.tile_model(circular.tile_model(before, "vertical"), axes)
        assert tiled.object_patches[padding] == expected
        assert list(tiled.object_patches[hooks]) == ["theirs", circular.KEY]
        (seen,) = tiled.object_patches[hooks][circular.KEY](None, (torch.zeros(1, 1, 8, 8),))
        assert seen.shape[-2:] == (8 + 2 * (2 - expected[0]), 8 + 2 * (3 - expected[1]))
    on_top = circular.tile_model(sd15, "vertical")
    on_top.add_object_patch(padding, (2, 3))
    on_top.add_object_patch(hooks, OrderedDict([*on_top.object_patches[hooks].items(), *theirs.items()]))
    again = circular.tile_model(on_top, "horizontal")
    assert again.object_patches[padding] == (2, 0)
    assert list(again.object_patches[hooks]) == ["theirs", circular.KEY]
    assert before.object_patches == {padding: (2, 3), hooks: theirs}
    assert on_top.object_patches[padding] == (2, 3)


def test_node(circular, pack, sd15):
    import nodes

    vae = SMALL_VAES["taesd"]()
    model, tiled = nodes.NODE_CLASS_MAPPINGS["ADSeamlessTiling"].execute(sd15, vae, "horizontal").result
    assert model.object_patches["diffusion_model.input_blocks.0.0.padding"] == (1, 0)
    assert tiled.patcher.object_patches["taesd_decoder.1.padding"] == (1, 0)
    assert tiled.first_stage_model is vae.first_stage_model and tiled is not vae


def test_refuses(circular, sd15):
    vae = SMALL_VAES["taesd"]()
    with pytest.raises(ValueError, match="axes: diagonal is not allowed; use one of both, horizontal, vertical"):
        circular.tile_model(sd15, "diagonal")
    vae.latent_dim = 3
    with pytest.raises(ValueError, match="vae: TAESD is not supported; allowed are image VAEs"):
        circular.tile_vae(vae, "both")
    model = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="model: Linear is not supported; allowed are UNet models"):
        circular.tile_model(model, "both")
