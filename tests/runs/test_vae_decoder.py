"""Fitting the VAE decoder: it gets closer to the picture, and everything else stays bit for bit."""

import comfy.cli_args
import comfy.model_management
import comfy.utils
import pytest
import torch
from small_vae import SMALL_VAES, small_kl, smooth_image

import nodes


@pytest.fixture(scope="module")
def finetune(pack_module):
    return pack_module("decoder.finetune")


@pytest.fixture(params=SMALL_VAES)
def vae(request):
    return SMALL_VAES[request.param]()


def fitted(finetune, vae, image, steps=6, learning_rate=1e-3, on_step=None):
    settings = finetune.FinetuneSettings(steps=steps, learning_rate=learning_rate)
    with torch.inference_mode():
        return finetune.finetune_decoder(vae, image, settings, on_step)


def state(vae):
    """The very tensors of a VAE's network and their values."""
    return {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in vae.first_stage_model.state_dict().items()}


def assert_same_state(before, after):
    for name, (pointer, value) in before.items():
        assert after[name][0] == pointer and torch.equal(after[name][1], value), name


def structure(vae):
    return [(name, type(m), m._parameters.copy()) for name, m in vae.first_stage_model.named_modules()]


def test_the_decoder_learns_the_picture_and_the_rest_stays(finetune, vae):
    image = smooth_image(1, 40, 72, batch=2)
    losses = []
    with torch.inference_mode():
        latent = vae.encode(image)
        plain = vae.decode(latent)
        before = state(vae)
        tuned = fitted(finetune, vae, image, on_step=lambda step, loss, picture: losses.append(loss))
        result = tuned.decode(latent)
        assert len(losses) == 6 and losses[-1] < 0.8 * losses[0]
        assert (result - image).abs().mean() < 0.8 * (plain - image).abs().mean()
        assert torch.equal(tuned.encode(image), latent)
        assert torch.equal(vae.encode(image), latent)
        assert torch.equal(vae.decode(latent), plain)
        assert torch.equal(tuned.decode(latent), result)
        assert_same_state(before, state(vae))
    assert tuned.first_stage_model is vae.first_stage_model
    own, changed = (
        tuned.get_sd(),
        {name for name, (_, value) in before.items() if not torch.equal(tuned.get_sd()[name], value)},
    )
    assert own.keys() == before.keys()
    assert changed and all(name.split(".")[0] in ("decoder", "taesd_decoder") for name in changed)


def test_nothing_of_it_stays_in_the_shared_network(finetune, vae):
    """What reads the network directly, as saving does, finds the original after every use of the result."""
    image = smooth_image(2, 32, 32)
    with torch.inference_mode():
        latent = vae.encode(image)
        before = state(vae)
        tuned = fitted(finetune, vae, image, steps=2)
        for use in (lambda: tuned.decode(latent), lambda: tuned.encode(image),
                    lambda: tuned.decode_tiled(latent, tile_x=16, tile_y=16, overlap=4)):  # fmt: skip
            use()
            assert_same_state(before, state(vae))
        with pytest.raises(RuntimeError):
            tuned.decode(latent[:, :2])
        assert_same_state(before, state(vae))


def test_each_step_is_adam_on_the_l1_of_the_whole_batch(finetune):
    """Against autograd on an ordinary copy of the network."""
    vae, image = small_kl(), smooth_image(3, 32, 48, batch=2)
    with torch.inference_mode():
        latents = vae.encode(image)
    tuned = fitted(finetune, vae, image, steps=3, learning_rate=1e-3)
    with torch.inference_mode(False):
        network = small_kl().first_stage_model
        for module in network.modules():
            module._parameters = {
                k: None if p is None else torch.nn.Parameter(p.clone()) for k, p in module._parameters.items()
            }
        optimiser = torch.optim.Adam(network.decoder.parameters(), lr=1e-3)
        for _ in range(3):
            optimiser.zero_grad()
            (network.decode(latents.clone()) - (image.movedim(-1, 1) * 2 - 1)).abs().mean().backward()
            optimiser.step()
        wanted, own, before = network.state_dict(), tuned.get_sd(), vae.get_sd()
    # What a norm takes away again, such as most biases, has a gradient of rounding alone. Adam makes whole steps of it:
    # they differ from processor to processor, and move the rest a little.
    names = [name for name in wanted if name.startswith("decoder.")]
    off = torch.cat([(own[name] - wanted[name]).abs().flatten() for name in names])
    moved = torch.cat([(own[name] - before[name]).abs().flatten() for name in names])
    assert moved.median() > 2e-3, "three steps of 1e-3"
    assert (off > 3e-4).float().mean() < 0.01


def test_half_precision_is_trained_in_fp32(finetune):
    """Steps far below what bf16 resolves add up; the result has the VAE's dtype."""
    vae, image = small_kl(torch.bfloat16), smooth_image(4, 32, 32)
    losses = []
    tuned = fitted(finetune, vae, image, steps=8, learning_rate=2e-4, on_step=lambda step, loss, _: losses.append(loss))
    assert losses[-1] < losses[0]
    weights = tuned.get_sd()
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}
    with torch.inference_mode():
        latent = vae.encode(image)
        assert not torch.equal(tuned.decode(latent), vae.decode(latent))


def test_twice_goes_on_from_the_first(finetune):
    vae, image = small_kl(), smooth_image(5, 32, 32)
    losses = []
    note = lambda step, loss, _: losses.append(loss)  # noqa: E731
    once = fitted(finetune, vae, image, steps=3, on_step=note)
    twice = fitted(finetune, once, image, steps=3, on_step=note)
    assert losses[3] < losses[2] < losses[0] and losses[5] < losses[3]
    with torch.inference_mode():
        latent = vae.encode(image)
        errors = [(v.decode(latent) - image).abs().mean() for v in (vae, once, twice)]
    assert errors[0] > errors[1] > errors[2]


def test_the_same_every_time(finetune, vae):
    image = smooth_image(6, 32, 32)
    first, second = (fitted(finetune, vae, image, steps=3).get_sd() for _ in range(2))
    assert all(torch.equal(value, second[name]) for name, value in first.items())


@pytest.mark.parametrize("tiled_first", [True, False])
def test_together_with_tiling(finetune, vae, pack_module, tiled_first):
    """In either order: seamless, and with the fitted decoder."""
    tile_vae, image = pack_module("tiling.circular").tile_vae, smooth_image(11, 32, 48)
    tiled = tile_vae(vae, "both")
    both = (
        fitted(finetune, tiled, image, steps=3)
        if tiled_first
        else tile_vae(fitted(finetune, vae, image, steps=3), "both")
    )
    with torch.inference_mode():
        latent = vae.encode(image)
        result = both.decode(latent)
        torch.testing.assert_close(both.decode(latent.roll(1, -1)).roll(-8, -2), result, rtol=0, atol=1e-4)
        assert (result - tiled.decode(latent)).abs().max() > 1e-2
        assert (result - image).abs().mean() < (tiled.decode(latent) - image).abs().mean()


def test_no_steps(finetune, vae):
    image = smooth_image(7, 32, 32)
    with torch.inference_mode():
        latent = vae.encode(image)
        assert torch.equal(fitted(finetune, vae, image, steps=0).decode(latent), vae.decode(latent))


def test_cancel_leaves_everything_as_it_was(finetune, vae):
    image = smooth_image(8, 32, 32)
    with torch.inference_mode():
        vae.encode(image)
    before, modules = state(vae), structure(vae)

    def cancel(step, loss, picture):
        if step == 2:
            comfy.model_management.interrupt_current_processing()

    with pytest.raises(comfy.model_management.InterruptProcessingException):
        fitted(finetune, vae, image, on_step=cancel)
    assert_same_state(before, state(vae))
    for (name, kind, parameters), (_, kind_after, after) in zip(modules, structure(vae), strict=True):
        assert kind is kind_after and all(after[key] is value for key, value in parameters.items()), name


def test_a_decoder_block_keeps_only_its_input(finetune):
    """Activations kept for the gradient, in bytes, with and without computing them again."""
    vae, image = small_kl(), smooth_image(9, 64, 64)
    sizes = {}
    for name, module in (("again", finetune._Checkpointed), ("kept", lambda block: block)):
        held = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetune, "_Checkpointed", module)
            with torch.autograd.graph.saved_tensors_hooks(
                lambda t, held=held: (
                    held.__setitem__(t.untyped_storage().data_ptr(), t.untyped_storage().nbytes()),
                    t,
                )[1],
                lambda t: t,
            ):
                fitted(finetune, vae, image, steps=1)
        sizes[name] = sum(held.values())
    assert sizes["again"] < 0.5 * sizes["kept"]


def test_node(vae, pack, monkeypatch, caplog):
    """Progress with a preview of the reconstruction at each step, and one line on the console."""
    sent = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", lambda *args, **kwargs: sent.append(args))
    image = torch.cat([smooth_image(10, 37, 50), torch.ones(1, 37, 50, 1)], dim=-1)
    with torch.inference_mode(), caplog.at_level("INFO"):
        tuned = nodes.NODE_CLASS_MAPPINGS["ADFinetuneVAEDecoder"].execute(vae, image, steps=2, learning_rate=1e-4)[0]
        decoded = nodes.VAEDecode().decode(tuned, {"samples": vae.encode(image)})[0]
    previews = [args for args in sent if args[2] is not None]
    assert [args[:2] for args in previews] == [(1, 2), (2, 2)]
    kind, preview, size = previews[0][2]
    assert (kind, preview.size, size) == ("JPEG", (48, 32), comfy.cli_args.args.preview_size)
    assert decoded.shape == (1, 32, 48, 3)
    lines = [r.message for r in caplog.records if r.message.startswith("Attention distillation: VAE decoder")]
    assert len(lines) == 1 and "1 pictures in 2 steps, L1 loss" in lines[0]


def test_refuses(finetune):
    vae = small_kl()
    with pytest.raises(ValueError, match=r"image: 7x20 \(width x height\) is too small; use 8x8 or more"):
        fitted(finetune, vae, torch.zeros(1, 20, 7, 3))
    with pytest.raises(ValueError, match="steps: -1 is not allowed"):
        finetune.FinetuneSettings(steps=-1)
    with pytest.raises(ValueError, match="learning_rate: 0 is not allowed"):
        finetune.FinetuneSettings(learning_rate=0)
    vae.latent_dim = 3
    with pytest.raises(ValueError, match="vae: AutoencoderKL is not supported"):
        fitted(finetune, vae, smooth_image(1, 32, 32))
