"""Weights that ComfyUI has not loaded, and fetches for each call of their layer: gradient and picture are the same."""

import contextlib
import logging

import comfy.model_management
import pytest
import small_models
import torch
from comfy.model_patcher import ModelPatcher
from small_models import gradients, with_lora


class Host:
    """ComfyUI with a card, on a processor: weights of layers that are not loaded are cast into one shared buffer, in
    which nothing is left of them after the call."""

    def __init__(self):
        self.buffer = torch.empty(1 << 24, dtype=torch.uint8)
        self.elsewhere, self.calls = set(), 0

    def take(self, layers):
        """Have weights of these layers lie elsewhere."""
        for layer in layers:
            self.elsewhere |= {weight.data_ptr() for weight in layer.parameters(recurse=False)}
            layer.__class__ = type(type(layer).__name__, (type(layer),), {"forward": self.calling(type(layer))})

    def calling(self, kind):
        def forward(layer, *args, **kwargs):
            before, at = dict(layer._parameters), 0
            for name, weight in before.items():
                if weight is not None and weight.data_ptr() in self.elsewhere:
                    place = self.buffer[at : at + weight.nbytes].view(weight.dtype).view(weight.shape)
                    layer._parameters[name] = place.copy_(weight)
                    at += -(-weight.nbytes // 16) * 16
            try:
                return kind.forward(layer, *args, **kwargs)
            finally:
                layer._parameters.update(before)
                if at:
                    self.calls += 1
                    self.buffer[:at].fill_(0xFF)  # not a number in every format

        return forward


@pytest.fixture
def streaming(pack_module):
    """Within it, a model is loaded as on a card that has room for next to nothing."""

    @contextlib.contextmanager
    def use(model):
        with torch.inference_mode():
            model.partially_load(model.load_device, 0.1)
        layers = pack_module("attention.gradient.streamed").streamed(model.model)
        kinds, host = [type(layer) for layer in layers], Host()
        assert len(layers) > 20
        host.take(layers)
        yield host
        for layer, kind in zip(layers, kinds, strict=True):
            layer.__class__ = kind
        model.detach()

    return use


@pytest.mark.parametrize("name", small_models.MODELS)
def test_the_gradient_is_that_of_loaded_weights(pack_module, tmp_path, streaming, name):
    """In each kind of model, whether blocks are run again or not; the host's own buffer is not written to."""
    small = small_models.MODELS[name]
    patcher = small_models.load(small, tmp_path)
    choices = [(), pack_module("attention.architectures").blocks(patcher.model.diffusion_model)[-1]]
    (plain,) = gradients(pack_module, patcher.model, small, [()])
    assert plain.abs().max() > 0
    with streaming(patcher) as host:
        for found in gradients(pack_module, patcher.model, small, choices):
            assert torch.equal(found, plain)
        assert not host.calls
        assert not any("forward" in vars(module) for module in patcher.model.modules())


@pytest.mark.parametrize("name", ["SD1.5", "SD3.5 medium"])
def test_the_buffer_of_the_host_is_no_place_for_them(pack_module, tmp_path, streaming, monkeypatch, name):
    """What the test above holds would be wrong without the pack's own fetching."""
    small = small_models.MODELS[name]
    patcher = small_models.load(small, tmp_path)
    monkeypatch.setattr(pack_module("attention.gradient.weights"), "streamed", lambda *_: [])
    with streaming(patcher) as host, pytest.raises(RuntimeError, match="modified by an inplace operation"):
        list(gradients(pack_module, patcher.model, small, [()]))
    assert host.calls


@pytest.mark.parametrize("name", ["FLUX.1-dev", "SD3.5 medium", "SDXL"])
def test_so_it_is_with_packed_weights(pack_module, name):
    small = small_models.MODELS[name]
    packed, _ = small_models.load_packed(small)
    choices = pack_module("attention.architectures").blocks(packed.model.diffusion_model)
    (plain,) = gradients(pack_module, packed.model, small, [()])
    with torch.inference_mode():
        packed.partially_load(packed.load_device, 0.1)
    assert pack_module("attention.gradient.streamed").streamed(packed.model)
    assert all(torch.equal(found, plain) for found in gradients(pack_module, packed.model, small, [(), choices[-1]]))


class Streaming(ModelPatcher):
    """Loads as --novram has it: next to nothing, whatever it is asked for."""

    def partially_load(self, device_to, extra_memory=0, force_patch_weights=False):
        return super().partially_load(device_to, 0.1, force_patch_weights=force_patch_weights)


@pytest.fixture
def styled(graph, random_latent):
    small = {"steps": 2, "iterations": 2}
    return graph.styled(random_latent(1)).but(content=graph.capture(random_latent(2)), content_weight=0.5, **small)


def novram(load_sd15):
    device = comfy.model_management.get_torch_device()
    return Streaming(load_sd15().model, load_device=device, offload_device=device)


def test_the_picture_is_that_of_a_loaded_model(styled, load_sd15, streaming, caplog):
    """Where nothing is loaded at all; the log says so; a plain run afterwards is what it was."""
    model = novram(load_sd15)
    caplog.set_level(logging.INFO)
    loaded, plain = styled.ksampler(), styled.core()
    with streaming(model) as host:
        assert torch.equal(styled.but(model=model).ksampler(), loaded)
        assert host.calls  # by the sampler's own calls, which are ComfyUI's
        assert torch.equal(styled.but(model=model).core(), plain)
    (line,) = [record.message for record in caplog.records if "of weights are on the device" in record.message]
    assert "0.00 of 0.01 GB" in line


def test_a_lora_is_in_force(styled, load_sd15, streaming):
    """ComfyUI works it out anew for each call of a layer that is not loaded."""
    model = novram(load_sd15)
    with streaming(model):
        patched = styled.but(model=with_lora(model, 1.0)).ksampler()
    torch.testing.assert_close(patched, styled.but(model=with_lora(styled.model, 1.0)).ksampler())
    assert not torch.allclose(patched, styled.ksampler())
