"""Blocks that are run again in the backward: the same gradient and picture, bit for bit, of every kind of model."""

import comfy.model_management
import pytest
import small_models
import torch
from comfy.ldm.modules.attention import SpatialTransformer
from passes import watched
from small_models import gradients

GB = 1024**3


@pytest.fixture
def again(pack_module):
    return pack_module("attention.gradient.again")


@pytest.mark.parametrize("name", small_models.MODELS)
def test_the_gradient_is_the_plain_one(pack_module, tmp_path, name):
    small = small_models.MODELS[name]
    model = small_models.load(small, tmp_path).model
    choices = pack_module("attention.architectures").blocks(model.diffusion_model)
    assert all(choices)
    plain, *others = gradients(pack_module, model, small, [(), *choices])
    assert plain.abs().max() > 0
    assert all(torch.equal(other, plain) for other in others)
    assert not any("forward" in vars(block) for block in model.diffusion_model.modules())


@pytest.mark.parametrize("name", ["FLUX.1-dev", "SD3.5 medium", "SDXL"])
def test_so_it_is_with_packed_weights(pack_module, name):
    small = small_models.MODELS[name]
    packed, _ = small_models.load_packed(small)
    choices = pack_module("attention.architectures").blocks(packed.model.diffusion_model)
    plain, *others = gradients(pack_module, packed.model, small, [(), *choices])
    assert plain.abs().max() > 0
    assert all(torch.equal(other, plain) for other in others)


@pytest.fixture
def styled(graph, random_latent):
    return graph.styled(random_latent(1)).but(content=graph.capture(random_latent(2)), content_weight=0.5)


@pytest.mark.parametrize("settings", [{}, {"content_loss": "query_key_value"}, {"cfg": 4.0, "adain": False}])
def test_memory_does_not_change_the_picture(styled, settings):
    styled = styled.but(**settings)
    fast = styled.but(memory="fast").ksampler()
    assert not torch.equal(fast, styled.but(iterations=0).ksampler())
    assert torch.equal(styled.but(memory="small").ksampler(), fast)


def runs_of_a_transformer(styled, monkeypatch):
    """How often a transformer of the UNet's input runs in a guided pass, in one update of two iterations."""
    block = next(
        module for module in styled.model.model.diffusion_model.modules() if type(module) is SpatialTransformer
    )
    runs, forward = [], block.forward

    def counted(*args, **kwargs):
        runs.append(not torch.is_inference_mode_enabled() and args[0].requires_grad)
        return forward(*args, **kwargs)

    monkeypatch.setitem(vars(block), "forward", counted)
    styled.ksampler()
    assert vars(block)["forward"] is counted, "what stood in its place before has come back"
    monkeypatch.delitem(vars(block), "forward")
    return sum(runs)


@pytest.mark.parametrize(
    ("memory", "free", "runs"),
    [("fast", 0, 2), ("small", 100 * GB, 4), ("auto", 100 * GB, 2), ("auto", 0, 5), ("auto", None, 3)],
)
def test_blocks_are_run_again_where_memory_asks_for_it(styled, pack_module, monkeypatch, caplog, memory, free, runs):
    """Two iterations run each block twice, and twice as often again; counting runs it once more."""
    plan = pack_module("attention.gradient.plan")
    if free is None:  # less than is reckoned, and enough for what is counted
        free = 0.5 * plan.activation_bytes(styled.model.model, (1, 4, 16, 16))
    monkeypatch.setattr(comfy.model_management, "extra_reserved_memory", lambda: 0)
    monkeypatch.setattr(
        comfy.model_management,
        "get_free_memory",
        lambda _device=None, torch_free_too=False: (free, free) if torch_free_too else free,
    )
    caplog.set_level("INFO")
    assert runs_of_a_transformer(styled.but(memory=memory, steps=1), monkeypatch) == runs
    said = [record.getMessage() for record in caplog.records if ": memory: " in record.getMessage()]
    assert len(said) == {(2, "auto"): 0, (5, "auto"): 2, (3, "auto"): 1}.get((runs, memory), 0), said


@pytest.mark.parametrize("error", [ValueError, comfy.model_management.InterruptProcessingException])
def test_blocks_are_as_before_after_an_error(styled, error):
    """In the forward pass, and in the backward."""
    network = styled.model.model.diffusion_model
    for at in (3, 12):
        seen = []

        def fail(_module, args, seen=seen, at=at):
            seen.append(args)
            if len(seen) == at:
                raise error("stop")

        hook = network.output_blocks[0][0].register_forward_pre_hook(fail)
        with pytest.raises(error):
            styled.but(memory="small").ksampler()
        hook.remove()
        assert not any("forward" in vars(block) for block in network.modules())
    with watched(styled.model) as passes:
        styled.core()
    assert all(not one.reads for one in passes)


class Overwriting(torch.nn.Module):
    """Writes to its input after autograd has saved it, as FLUX does."""

    def forward(self, x):
        y = x.square()
        x += 1
        return y * x


def test_overwritten_inputs_and_savings_are_found_as_they_were(again, pack_module):
    kept = pack_module("attention.gradient.saved")._kept(overwrites=True)
    block, x = Overwriting(), torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    with again.run_again([block], lambda: lambda: torch.enable_grad(), overwrite=True), kept:
        y = block(x * 2)
        y += 100
        (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient, 2 * (3 * (2 * x) ** 2 + 2 * (2 * x)).detach())


def test_inputs_that_others_overwrite_are_told_of(again):
    block, x = torch.nn.Tanh(), torch.ones(3, requires_grad=True)
    with again.run_again([block], lambda: lambda: torch.enable_grad()):
        given = x * 2
        y = block(given)
        with torch.no_grad():
            given.add_(1)
    with pytest.raises(RuntimeError, match="input of a block was overwritten"):
        torch.autograd.grad(y.sum(), x)


def test_blocks_that_compute_otherwise_the_second_time_are_told_of(again):
    class Fickle(torch.nn.Module):
        runs = 0

        def forward(self, x):
            self.runs += 1
            return x.square() if self.runs == 1 else x.square().exp()

    block, x = Fickle(), torch.ones(3, requires_grad=True)
    with again.run_again([block], lambda: lambda: torch.enable_grad()):
        y = block(x * 2)
    with pytest.raises(RuntimeError, match="computed otherwise"):
        torch.autograd.grad(y.sum(), x)
