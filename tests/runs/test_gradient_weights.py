"""Every kind of weight takes part in autograd: aliased without a copy, and back in place afterwards."""

import json

import comfy.ops
import comfy.quant_ops
import pytest
import small_gguf
import torch
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor

WIDTH = 256  # a multiple of every layout's group size


@pytest.fixture(scope="module")
def differentiable(pack_module):
    return pack_module("attention.gradient").differentiable


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantised_layer(name, native):
    """One of ComfyUI's mixed-precision layers, loaded from a quantised state dict.

    native: it multiplies quantised numbers, as ComfyUI has it where the device can, else unpacked ones.
    """
    weight = QuantizedTensor.from_float(values(WIDTH, WIDTH) / WIDTH**0.5, QUANT_ALGOS[name]["comfy_tensor_layout"])
    state = weight.state_dict("weight")
    state["comfy_quant"] = torch.tensor(list(json.dumps({"format": name}).encode()), dtype=torch.uint8)
    state["bias"] = values(WIDTH, seed=1)
    operations = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32, full_precision_mm=not native)
    layer = operations.Linear(WIDTH, WIDTH)
    layer.load_state_dict(state, strict=False)
    assert type(layer.weight) is QuantizedTensor
    return layer


@pytest.mark.parametrize("native", [True, False], ids=["native", "unpacked"])
@pytest.mark.parametrize("name", QUANT_ALGOS)
def test_quantised_layouts_of_comfyui(pack_module, differentiable, name, native):
    """The gradient is exactly that of the unpacked weight, whatever the forward rounds."""
    if native and name == "mxfp8":
        pytest.skip("torch has no kernel for it on the CPU (scaled_mm: CPU does not support swizzle)")
    saved = pack_module("attention.gradient").saved_activations
    with torch.inference_mode():
        layer = quantised_layer(name, native)
        weight = layer.weight
        assert weight.is_inference() and weight._qdata.is_inference()
        unpacked, bias = weight.dequantize(), layer.bias
        model, x, towards = torch.nn.Module(), values(3, WIDTH, seed=2), values(3, WIDTH, seed=3)
        model.diffusion_model = layer
        with differentiable(model), saved(model):
            alias = layer.weight
            assert type(alias) is QuantizedTensor and isinstance(alias, torch.nn.Parameter)
            assert alias._qdata.data_ptr() == weight._qdata.data_ptr()
            assert not any(tensor.is_inference() for tensor in (alias, alias._qdata, alias._params.scale, layer.bias))
            z = x.clone().requires_grad_()
            out = layer(z)
            (gradient,) = torch.autograd.grad((out * towards.clone()).sum(), z)
            gradient, out = gradient.detach(), out.detach()
        assert layer.weight is weight and layer.bias is bias
        assert error(out, x @ unpacked.T + bias) < 0.2
        assert error(gradient, towards @ unpacked) < 1e-5


def error(found, expected):
    """Relative."""
    return ((found - expected).norm() / expected.norm()).item()


def test_every_layout_that_comfyui_registers_is_tried():
    """A layout that comes new has to be looked at: how its tensors are held, and whether it has a CPU path."""
    layouts = {settings["comfy_tensor_layout"] for settings in QUANT_ALGOS.values()}
    assert layouts <= {
        "TensorCoreFP8E4M3Layout", "TensorCoreFP8E5M2Layout", "TensorCoreNVFP4Layout", "TensorCoreMXFP8Layout",
        "TensorWiseINT8Layout", "TensorCoreConvRotW4A4Layout",
    }  # fmt: skip


def test_tensor_classes_of_other_packs(differentiable):
    """The same class over the same memory with the same attributes; its constructor is not called."""
    with torch.inference_mode():
        layer = torch.nn.LayerNorm(8)
        weight = small_gguf.packed(values(8), quantise=False)
        layer._parameters["weight"] = weight
        with differentiable(layer):
            alias = layer.weight
            assert type(alias) is small_gguf.PackedTensor and not alias.is_inference()
            assert (alias.kind, alias.whole) == (weight.kind, weight.whole)
            assert alias.data_ptr() == weight.data_ptr()
            z = values(2, 8, seed=1).clone().requires_grad_()
            (gradient,) = torch.autograd.grad(layer(z).square().sum(), z)
            assert gradient.abs().sum() > 0
        assert layer._parameters["weight"] is weight


def test_weights_beside_the_parameters(differentiable):
    """A buffer, and a tensor that a module holds as a plain attribute."""
    with torch.inference_mode():
        module = torch.nn.Module()
        module.register_buffer("gain", values(3))
        module.offset = values(3, seed=1)
        before = module.gain, module.offset
        with differentiable(module):
            z = values(3, seed=2).clone().requires_grad_()
            (gradient,) = torch.autograd.grad((z * module.gain * module.offset).sum(), z)
            torch.testing.assert_close(gradient, before[0] * before[1])
        assert module.gain is before[0] and module.offset is before[1]


def test_weights_get_no_gradient(differentiable):
    """Also where ComfyUI leaves them asking for one: autograd would save the input of every layer for it."""
    layer = torch.nn.Linear(3, 3)
    weight, saved = layer.weight, []
    with differentiable(layer), torch.autograd.graph.saved_tensors_hooks(saved.append, lambda tensor: tensor):
        layer(torch.ones(1, 3).requires_grad_())
    assert [tuple(tensor.shape) for tensor in saved] == [(3, 3)]
    assert layer.weight is weight and weight.requires_grad


@pytest.mark.parametrize("name", [name for name in QUANT_ALGOS if name != "mxfp8"])  # see above
def test_what_a_pass_keeps_of_quantised_weights(pack_module, differentiable, name):
    """Packed they are there anyway, and not counted; a copy that a layer unpacks for its forward pass is."""
    with torch.inference_mode():
        layer, x = quantised_layer(name, native=True), values(3, WIDTH, seed=2)
        model = torch.nn.Module()
        model.diffusion_model = layer
        with differentiable(model), pack_module("attention.gradient").saved_activations(model):
            z = x.clone().requires_grad_()
            with pack_module("attention.gradient.count").count_saved(layer, []) as found:
                layer(z).square()
    unpacks = name in ("int8_tensorwise", "convrot_w4a4")
    assert found.peak() == 4 * (3 * WIDTH + (WIDTH**2 if unpacks else 3 * WIDTH))  # the output, and that or the input
