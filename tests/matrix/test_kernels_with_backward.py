"""ComfyUI's flag for training: every supported network heeds it, and it is what it was after every exit."""

import comfy.ldm.flux.layers
import comfy.ldm.flux.math
import comfy.model_management
import comfy.quant_ops
import pytest
import small_models
import torch
from torch.utils._python_dispatch import TorchDispatchMode


class FusedKernels(TorchDispatchMode):
    """Notes the operators of ComfyUI's kernel library: they have no backward."""

    def __init__(self):
        super().__init__()
        self.called = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "comfy_kitchen":
            self.called.add(func.name())
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def without_flag():
    """By model, the fused kernels that it calls without the flag."""
    return {}


@pytest.mark.parametrize("name", small_models.MODELS)
def test_every_supported_network_heeds_the_flag(pack_module, without_flag, tmp_path, name):
    """All its layers are read without a single fused kernel."""
    small = small_models.MODELS[name]
    model = small_models.load(small, tmp_path).model
    conditioning = pack_module("attention.conditioning")
    x = torch.randn(1, small.channels, 8, 8)
    encoded = conditioning.encode(model, conditioning.from_socket(small.cond(3)), x, size=x.shape[-2:])
    layers = pack_module("attention.layers").list_layers(model.diffusion_model)

    def called():
        conds = conditioning.for_pass(encoded, 0.6, 1)
        with FusedKernels() as kernels, torch.no_grad():
            pack_module("attention.capture").capture_features(model, x, torch.tensor(0.6), conds, layers)
        return kernels.called

    without_flag[name] = called()
    with pack_module("attention.gradient").differentiable(model):
        assert comfy.model_management.in_training
        assert called() == set()
    assert not comfy.model_management.in_training


def test_the_kernels_can_be_seen(without_flag):
    """Else the test above would say nothing."""
    if without_flag.keys() != small_models.MODELS.keys():
        pytest.skip("goes with the test above, of all models")
    assert without_flag["FLUX.1-dev"] and without_flag["Z-Image"]
    if hasattr(torch.ops.comfy_kitchen, "rms_rope_split_half"):
        assert without_flag["Anima"] and without_flag["JoyImage"]


TURNS, SCALE = "turns", "scale"
ROPE = {
    f"{kind}{layout}{number}": [TURNS] if kind == "apply_rope" else [TURNS, *[SCALE] * (1 if number else 2), 1e-3]
    for kind in ("apply_rope", "rms_rope") for layout in ("", "_split_half") for number in ("", "1")
}  # fmt: skip
KERNELS = {**ROPE, **{f"{name}_": asked for name, asked in ROPE.items()}, "adaln": [SCALE, SCALE, 1e-3],
           "rms_adaln": [SCALE, SCALE, 1e-3]}  # fmt: skip
"""What each kernel is given after the tensors that it changes; with an underscore at its end it overwrites these."""


@pytest.mark.parametrize(("name", "width"), [*((name, 4) for name in KERNELS), ("rms_rope_split_half", 2)])
def test_a_plain_kernel_computes_what_the_fused_one_does(pack_module, name, width):
    """And its backward is right; outside of the blocks the kernel is ComfyUI's."""
    if not hasattr(torch.ops.comfy_kitchen, name):
        pytest.skip("ComfyUI's kernel library has it not")
    kernel, generator = getattr(torch.ops.comfy_kitchen, name), torch.Generator().manual_seed(0)
    pair = "adaln" not in name and not name.rstrip("_").endswith("1")
    shown = torch.randn(2, 1, 2, 2, 4, generator=generator)[: 1 + pair]
    shapes = {TURNS: (1, 2, 1, width // 2, 2, 2), SCALE: (4,)}
    asked = [
        torch.randn(shapes[each], generator=generator) if isinstance(each, str) else each for each in KERNELS[name]
    ] + [width] * (width < 4)

    class Block(torch.nn.Module):
        def forward(self, *shown):
            shown = [each.clone() for each in shown]
            given = [each.to(shown[0]) if isinstance(each, torch.Tensor) else each for each in asked]
            found = kernel(*shown, *given)
            return shown if name.endswith("_") else found

    block = Block()
    fused = block(*shown)
    with pack_module("attention.gradient.kernels").without_fused_kernels([block]), FusedKernels() as kernels:
        torch.testing.assert_close(list(block(*shown)), list(fused))
        assert kernels.called == set()
        exact = [each.double().requires_grad_() for each in shown]
        assert torch.autograd.gradcheck(lambda *given: tuple(block(*given)), exact)
    with FusedKernels() as kernels:
        block(*shown)
    assert kernels.called == {f"comfy_kitchen::{name}"}


def test_a_network_that_calls_kernels_in_training_on_another_version(pack_module, tmp_path, monkeypatch):
    """As if the host had no flag for FLUX's rotary positions: what the pass finds and its gradient are the same."""
    small = small_models.MODELS["FLUX.1-dev"]
    model = small_models.load(small, tmp_path).model
    conditioning = pack_module("attention.conditioning")
    layers = pack_module("attention.layers").list_layers(model.diffusion_model)
    x = torch.randn(1, small.channels, 8, 8, generator=torch.Generator().manual_seed(0))
    encoded = conditioning.encode(model, conditioning.from_socket(small.cond(3)), x, size=x.shape[-2:])
    gradient = pack_module("attention.gradient")

    def found():
        z = x.clone().requires_grad_()
        with gradient.differentiable(model), gradient.saved_activations(model):
            conds = conditioning.for_pass(encoded, 0.6, 1)
            features = pack_module("attention.capture").capture_features(
                model, z, torch.tensor(0.6), conds, layers[-1:]
            )
            sum(each.q.square().mean() + each.out.square().mean() for each in features.values()).backward()
        return z.grad

    plain = found()
    called = []

    def fused(xq, xk, freqs_cis):
        called.append(1)
        return comfy.quant_ops.ck.apply_rope(xq, xk, freqs_cis)

    for module in (comfy.ldm.flux.math, comfy.ldm.flux.layers):
        if hasattr(module, "apply_rope"):
            monkeypatch.setattr(module, "apply_rope", fused)
    torch.testing.assert_close(found(), plain)
    assert called


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_the_flag_is_what_it_was(pack_module, monkeypatch, before, error):
    """Also where guidance is used inside ComfyUI's own training, nested, and after errors."""
    monkeypatch.setattr(comfy.model_management, "in_training", before)
    differentiable = pack_module("attention.gradient").differentiable
    try:
        with differentiable(torch.nn.Linear(1, 1)):
            with differentiable(torch.nn.Linear(1, 1)):
                pass
            assert comfy.model_management.in_training
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert comfy.model_management.in_training is before
