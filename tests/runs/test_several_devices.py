"""MultiGPU CFG Split, a node of ComfyUI: copies of a model on other devices deal with conditions side by side."""

import threading
from dataclasses import replace

import comfy.hooks
import comfy.model_management
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrapperExecutor, WrappersMP
from conftest import WIDTH

import nodes

pytest.importorskip("comfy.multigpu")  # older ComfyUI has none
HALF = torch.zeros(1, 64, 64)
HALF[:, :, :30] = 1


@pytest.fixture
def small(graph, random_latent):
    """Guided by text whose two conditions never go through a model together: so the arithmetic is the same.

    The style has its place, and the picture is larger than a window.
    """
    negative = [[torch.zeros(1, 2, 768), {}]]  # tokens of it, of which the other has 77
    graph = graph.but(latent={"samples": torch.zeros(1, 4, 8, 12)}, steps=2, cfg=3.0, iterations=1, negative=negative)
    return graph.styled(random_latent(1, (1, 4, 8, 8)), target_mask=HALF)


@torch.inference_mode()
def injected(graph, model, **settings):
    """The output of Inject Reference KV."""
    settings = {"strength": 0.5, "start_percent": 0.0, "end_percent": 1.0, **settings}
    return nodes.NODE_CLASS_MAPPINGS["ADInjectReferenceKV"].execute(model, graph.style, **settings)[0]


class Watched:
    """What runs in denoising: the models, their threads, and ComfyUI's flag for training then."""

    def __init__(self, model):
        self.calls = []
        self.model = model.clone()
        self.model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "test", self)

    def __call__(self, executor, *args, **kwargs):
        self.calls.append((executor.class_obj, threading.current_thread(), comfy.model_management.in_training))
        return executor(*args, **kwargs)

    def check(self):
        """Each of two models has run in a thread of its own, with the flag as it was before."""
        pairs = {(model, thread) for model, thread, _ in self.calls}
        assert len(pairs) == len({model for model, _ in pairs}) == len({thread for _, thread in pairs}) == 2
        assert threading.main_thread() not in {thread for _, thread in pairs}
        assert not any(flag for _, _, flag in self.calls)


def windowed(graph, model):
    """Guidance in windows, each distilled by itself on one device, too."""
    windows = nodes.NODE_CLASS_MAPPINGS["ADWindows"].execute(64, 32)[0]
    return graph.but(model=model, windows=replace(windows, at_once=1)).patched()


WAYS = {
    "the node, then guidance in windows": lambda graph, model, split: windowed(graph, split(model)),
    "injection, then the node": lambda graph, model, split: split(injected(graph, model, negative_strength=0.5)),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_same_picture_with_one_device_and_with_two(small, split, way):
    """And the model is what it was."""
    small = small.but(steps=1)
    before = small.core()
    expected = small.core(WAYS[way](small, small.model, lambda model: model))
    assert (expected - before).abs().mean() > 1e-3
    watched = Watched(small.model)
    assert torch.equal(small.core(WAYS[way](small, watched.model, split)), expected)
    watched.check()
    assert torch.equal(small.core(), before)


def test_weights_that_change_while_a_picture_is_made(small, split):
    """A scheduled LoRA on one prompt: each copy of the model has the weights of its condition and step."""
    name = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_k"
    up, down = torch.randn(2, WIDTH, 2, generator=torch.Generator().manual_seed(0)) / 4
    lora = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down.T.contiguous()}
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    schedule = comfy.hooks.HookKeyframeGroup()
    schedule.add(comfy.hooks.HookKeyframe(0.2, 0.0, 0))
    schedule.add(comfy.hooks.HookKeyframe(1.0, 0.4, 0))
    hooks.set_keyframes_on_hooks(schedule)
    graph = small.but(negative=comfy.hooks.set_hooks_for_conditioning(small.negative, hooks))
    expected = graph.core(injected(graph, windowed(graph, graph.model)))
    assert (expected - small.core(injected(small, windowed(small, small.model)))).abs().mean() > 1e-3
    watched = Watched(graph.model)
    assert torch.equal(graph.core(split(injected(graph, windowed(graph, watched.model)))), expected)
    watched.check()


def to_the_device(executor, x, t, *args, **kwargs):
    """The noise level, which is read before."""
    return executor(x, t.to(x.device), *args, **kwargs)


def test_what_a_device_is_offered_lies_on_it(pack_module, load_sd15, small):
    """The meta device stands for a second one: its tensors do not mix with others. The first one's bank stays."""
    injection = pack_module("guidance.injection_run")
    models = [load_sd15(), load_sd15()]
    for patcher in models:
        patcher.model.current_patcher = patcher
    with torch.inference_mode():
        models[1].model.to("meta")
    guider = comfy.samplers.CFGGuider(models[0])
    guider.inner_model = models[0].model
    guider.conds = {"negative": pack_module("attention.conditioning").from_socket(small.negative)}
    settings = pack_module("guidance.settings").InjectionSettings()
    with torch.inference_mode():
        run = injection.InjectionRun(guider, torch.zeros(1, 4, 8, 8), small.style, settings, 3)
        conds = [[{"uuid": "one"}]]
        run._areas(lambda *args: [], None, conds, torch.zeros(1, 4, 8, 8), None, {})
        for device in ("cpu", "meta", "cpu"):
            model = models[device == "meta"].model
            x, text = torch.zeros(1, 4, 8, 8, device=device), torch.zeros(1, 77, 768, device=device)
            executor = WrapperExecutor.new_class_executor(model._apply_model, model, [run, to_the_device])
            found = executor.execute(x, torch.ones(1), None, text, None, {"uuids": ["one"], "cond_or_uncond": [0]})
            assert found.device == torch.device(device)
    offered = [reading.bank[layer].k.device.type for reading in run._readings.values() for layer in small.style.layers]
    assert offered == ["cpu"] * len(small.style.layers) + ["meta"] * len(small.style.layers)
    assert [reading.count for reading in run._readings.values()] == [1, 1]
