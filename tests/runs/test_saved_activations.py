"""What autograd saves of a pass stays as it was, where the model's blocks overwrite it."""

import pytest
import small_models
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef

FAMILIES = [name for name in small_models.MODELS if name.startswith(("FLUX", "Chroma"))]


@pytest.fixture
def kept(pack_module):
    """As `saved_activations` of a model that overwrites."""
    return lambda: pack_module("attention.gradient.saved")._kept(overwrites=True)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gradient_is_that_of_torchs_own_way(pack_module, tmp_path, name):
    """Bit for bit, with as many bytes copied; without either, autograd refuses."""
    small = small_models.MODELS[name]
    model = small_models.load(small, tmp_path).model
    conditioning, gradient = pack_module("attention.conditioning"), pack_module("attention.gradient")
    layers = pack_module("attention.layers").list_layers(model.diffusion_model)
    x = torch.randn(1, small.channels, 8, 6, generator=torch.Generator().manual_seed(0))
    encoded = conditioning.encode(model, conditioning.from_socket(small.cond(3)), x, size=x.shape[-2:])

    def gradient_under(context):
        with gradient.differentiable(model), context as saved:
            z = x.clone().requires_grad_()
            conds = conditioning.for_pass(encoded, 0.6, 1)
            found = pack_module("attention.capture").capture_features(model, z, torch.tensor(0.6), conds, layers)
            loss = sum(of_layer.out.square().mean() + of_layer.q.square().mean() for of_layer in found.values())
            copied = getattr(saved, "copied_bytes", None)
            if hasattr(saved, "cloned"):  # torch's
                copied = sum(tensor.nbytes for tensor in saved.cloned.values())
            return torch.autograd.grad(loss, z)[0], copied

    own, copied = gradient_under(gradient.saved_activations(model))
    of_torch, copied_by_torch = gradient_under(torch.autograd.graph.allow_mutation_on_saved_tensors())
    assert own.abs().max() > 0
    assert torch.equal(own, of_torch)
    assert 0 < copied == copied_by_torch
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient_under(torch.enable_grad())


def test_models_that_overwrite_nothing_are_left_alone(pack_module, sd15):
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda tensor: tensor),
        pack_module("attention.gradient").saved_activations(sd15.model),
    ):
        torch.ones(3, requires_grad=True).square()
    assert len(saved) == 1


def by_slice(y):
    y[1:] = 3


def by_view_of_data(y):
    y.data.view(-1)[1:].copy_(torch.ones(3))


OVERWRITE = {
    "y += 1": lambda y: y.__iadd__(1),
    "y **= 2": lambda y: y.__ipow__(2),
    "y /= 2": lambda y: y.__itruediv__(2),
    "slice": by_slice,
    "view": lambda y: y[1:].mul_(2),
    "data": by_view_of_data,
    "out": lambda y: torch.add(torch.ones(4), 1, out=y.data),
    "tuple of out": lambda y: torch.frexp(torch.ones(4), out=(y.data, torch.zeros(4, dtype=torch.int32))),
    "inplace": lambda y: F.relu(y, inplace=True),
    "by keyword": lambda y: torch.relu_(input=y),
    "list": lambda y: torch._foreach_add_([torch.zeros(4), y], 1.0),
    "operator": lambda y: torch.ops.aten.add_.Tensor(y, torch.ones(4)),
    "operator of a list": lambda y: torch.ops.aten._foreach_add_.Scalar([y], 1.0),
    "initialiser": lambda y: torch.nn.init.zeros_(y.detach()),
}


@pytest.mark.parametrize("overwrite", OVERWRITE.values(), ids=OVERWRITE)
def test_each_way_to_overwrite_is_seen(kept, overwrite):
    """Saved twice, at two versions: each keeps its own values."""
    x = torch.tensor([-1.0, 2.0, 3.0, 4.0], requires_grad=True)
    with kept() as saved:
        y = x * 1
        first = y.square().sum()  # saves y
        overwrite(y)
        assert saved.copied_bytes == 16
        second = y.square().sum()
        y.mul_(5)
        assert saved.copied_bytes == 32
        (gradient,) = torch.autograd.grad(first, x, retain_graph=True)
        assert gradient.tolist() == [-2, 4, 6, 8]
        torch.autograd.grad(second, x)


def test_only_what_is_overwritten_is_copied_and_once(kept):
    x = torch.ones(4, requires_grad=True)
    with kept() as saved:
        y, other = x * 2, x * 3
        loss = y.square().sum() + y.square().sum() + other.square().sum()
        y += 1
        y += 1
        assert saved.copied_bytes == 16
        assert torch.autograd.grad(loss, x)[0].tolist() == [34.0] * 4


def test_overwriting_unseen_is_an_error(kept):
    """Never a wrong gradient: here torch's functions are called past every mode."""
    x = torch.ones(4, requires_grad=True)
    with kept(), pytest.raises(RuntimeError, match="an activation was overwritten in a way that the pack cannot see"):
        y = x * 2
        loss = y.square().sum()
        with torch._C.DisableTorchFunction():
            y.add_(1)
        torch.autograd.grad(loss, x)


def test_nothing_is_held_longer_than_autograd_needs_it(kept):
    x = torch.ones(4, requires_grad=True)
    with kept():
        y = x * 2
        memory = StorageWeakRef(y.untyped_storage())
        loss = y.square().sum()
        del y
        assert not memory.expired()
        torch.autograd.grad(loss, x)
        del loss
        assert memory.expired()
