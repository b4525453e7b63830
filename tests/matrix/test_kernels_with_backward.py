"""ComfyUI's flag for training: every supported network heeds it, and it is what it was after every exit."""

import comfy.model_management
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


SHAPES = {"apply_rope_split_half": (), "rms_rope_split_half": ((12,), (12,)), "rms_rope": ((12,), (12,))}


@pytest.mark.parametrize(
    ("name", "width"),
    [("apply_rope_split_half", 12), ("rms_rope_split_half", 12), ("rms_rope_split_half", 8), ("rms_rope", 12)],
)
def test_a_plain_kernel_computes_what_the_fused_one_does(pack_module, name, width):
    """And its backward is right; outside of the blocks the kernel is ComfyUI's."""
    if not hasattr(torch.ops.comfy_kitchen, name):
        pytest.skip("ComfyUI's kernel library has it not")
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 3, 2, 12, generator=generator)
    turns = torch.randn(1, 3, 1, width // 2, 2, 2, generator=generator)
    scales = [torch.randn(shape, generator=generator) for shape in SHAPES[name]]

    class Block(torch.nn.Module):
        def forward(self, q, k, turns, *scales):
            more = [] if not scales else [1e-3] if width == 12 else [1e-3, width]
            return getattr(torch.ops.comfy_kitchen, name)(q, k, turns, *scales, *more)

    block, inputs = Block(), (q, k, turns, *scales)
    fused = block(*inputs)
    with pack_module("attention.gradient.kernels").without_fused_kernels([block]):
        torch.testing.assert_close(block(*inputs), fused)
        exact = [value.double().requires_grad_(number < 2) for number, value in enumerate(inputs)]
        assert torch.autograd.gradcheck(block, exact)
    with FusedKernels() as kernels:
        block(*inputs)
    assert kernels.called == {f"comfy_kitchen::{name}"}


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
