"""A queue of many runs of one graph: none leaves anything behind, neither memory nor something in the model."""

import gc
from dataclasses import replace

import comfy.model_management
import psutil
import pytest
import small_models
import torch
from guided import DEFAULTS, Graph

import nodes

RUNS = 50
SETTLED = 2
"""Runs after which nothing grows any more: ComfyUI keeps a model that it has loaded, torch what it has compiled."""

GROWTH = 4 * 1024**2
"""Of the process, in bytes, from then on: it varies by 1 MB. What autograd holds has no Python object to be counted."""

ONE_LEVEL = {"num_res_blocks": [1], "channel_mult": [1], "transformer_depth": [1], "transformer_depth_output": [1, 1]}


@pytest.fixture
def small(pack, tmp_path, custom_samplers):
    """A graph on an even smaller UNet, at 6x8."""
    made = small_models.MODELS["SD2, v-prediction"]
    made = replace(made, unet_config={**made.unet_config, **ONE_LEVEL})
    latent = {"samples": torch.zeros(1, 4, 6, 8)}
    return Graph(pack, small_models.load(made, tmp_path), made.cond(1), made.cond(2), latent, steps=1)


def node(name, **inputs):
    return nodes.NODE_CLASS_MAPPINGS[name].execute(**inputs)[0]


@torch.inference_mode()
def run(graph, seed):
    """Nodes that read a model, one after the other as ComfyUI's executor calls them; a new seed, so all anew."""
    picture = {"samples": torch.randn(1, 4, 6, 8, generator=torch.Generator().manual_seed(seed))}
    mask = torch.ones(1, 48, 64).tril()
    style = graph.capture(picture["samples"], mask=mask)
    content = graph.capture(picture["samples"].flip(2))
    settings = {**DEFAULTS, "iterations": 1}
    sampled = {"seed": seed, "steps": 1, "latent": {**picture, "noise_mask": mask}}

    guided = node(
        "ADApplyGuidance", model=graph.model, style=style, content=content, memory="small",
        windows=node("ADWindows", size=48, stride=16), **settings,
    )  # fmt: skip
    made = [graph.but(**sampled).core(guided)]
    inputs = {name: settings[name] for name in ("content_weight", "attention_scale", "content_loss")}
    made.append(
        node(
            "ADOptimizeLatent", model=graph.model, style=style, latent_image=picture, seed=seed, start_from="noise",
            steps=1, iterations=1, learning_rate=0.05, lr_schedule="constant", **inputs,
        )["samples"]
    )  # fmt: skip
    injected = node(
        "ADInjectReferenceKV", model=graph.model, style=style, strength=1.0, start_percent=0.0, end_percent=1.0
    )
    made.append(graph.but(**sampled).core(injected))
    made.append(node("ADAttentionMap", model=graph.model, style=style, latent=picture, layer="mean"))
    assert all(torch.isfinite(one).all() for one in made)


def alive():
    """How many tensors there are since `gc.freeze`, and the bytes of the memory that they lie in."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    with torch._C.DisableTorchFunctionSubclass():
        memories = {one.untyped_storage()._cdata: one.untyped_storage().nbytes() for one in tensors}
    return len(tensors), sum(memories.values())


def inside(model):
    """All that a patcher and its network hold, by name; of tensors, which memory."""

    def described(value):
        if isinstance(value, torch.Tensor):
            return value.data_ptr(), value.is_inference(), value.requires_grad
        return len(value) if isinstance(value, dict | list | set | tuple) else id(type(value))

    found = {("patcher", name): described(value) for name, value in vars(model).items()}
    found |= {("options", name): described(value) for name, value in model.model_options.items()}
    for name, module in [("model", model.model), *model.model.named_modules()]:
        for owner in (vars(module), module._parameters, module._buffers):
            found |= {(name, key): described(value) for key, value in owner.items()}
    return found


def test_a_queue_of_runs(small):
    process, sizes, settled = psutil.Process(), [], None
    gc.collect()
    gc.freeze()
    try:
        for number in range(1, RUNS + 1):
            run(small, seed=number)
            tensors = alive()
            held = inside(small.model), len(comfy.model_management.current_loaded_models)
            sizes.append(process.memory_info().rss)
            if number <= SETTLED:
                settled = tensors, held
            assert (tensors, held) == settled, f"after {number} runs"
    finally:
        gc.unfreeze()
    assert max(sizes[-5:]) - max(sizes[SETTLED:7]) < GROWTH
