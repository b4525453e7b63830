"""Other nodes' patches on a guided model: they stay in force while it denoises, and leave the pack's passes alone."""

import asyncio
import contextlib
import logging
import re

import comfy.ldm.modules.attention
import comfy.sd
import pytest
import small_models
import torch
from comfy.patcher_extension import WrappersMP
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras import (
    nodes_context_windows,
    nodes_easycache,
    nodes_freelunch,
    nodes_hypernetwork,
    nodes_hypertile,
    nodes_model_advanced,
    nodes_model_downscale,
    nodes_nag,
    nodes_pag,
    nodes_rope,
    nodes_sag,
    nodes_slg,
    nodes_tomesd,
)
from conftest import WIDTH
from guided import Graph
from passes import watched

import nodes as comfy_nodes

STEPS = 2


@pytest.fixture(scope="module")
def two_widths(tmp_path_factory):
    """A tiny SD1.5 with blocks of two widths: FreeU looks for them."""
    made = small_models.MODELS["SD1.5"]
    config = {**made.unet_config, "model_channels": WIDTH, "channel_mult": [1, 2]}
    small = small_models.Small("SD15", config, made.outputs, made.auto, made.context, through_loader=False)
    return small_models.load(small, tmp_path_factory.mktemp("widths"))


@pytest.fixture(scope="module")
def small(pack, two_widths, custom_samplers, random_latent, encode_zeros, encode_random):
    """A guided graph on it at 8x12, one iteration a step."""
    latent = {"samples": torch.zeros(1, 4, 8, 12)}
    graph = Graph(pack, two_widths, encode_random(1), encode_zeros(), latent, steps=STEPS, cfg=3.0)
    return graph.but(iterations=1).styled(random_latent(1, (1, 4, 8, 8)))


def rescale_cfg(model):
    return nodes_model_advanced.RescaleCFG().patch(model, 1.0)[0]


def pag(model):
    return nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0)[0]


def sag(model):
    return nodes_sag.SelfAttentionGuidance.execute(model, 0.8, 2.0)[0]


def freeu(model):
    return nodes_freelunch.FreeU.execute(model, 1.3, 1.4, 0.9, 0.2)[0]


def freeu_v2(model):
    return nodes_freelunch.FreeU_V2.execute(model, 1.3, 1.4, 0.9, 0.2)[0]


def tome(model):
    return nodes_tomesd.TomePatchModel.execute(model, 0.4)[0]


def hypertile(model):
    return nodes_hypertile.HyperTile.execute(model, 32, 2, 0, False)[0]


def compiled(model, backend="eager"):
    """As TorchCompileModel does it, with a backend that needs neither a compiler nor a GPU."""
    clone = model.clone()
    set_torch_compile_wrapper(model=clone, backend=backend)
    return clone


MODEL_NODES = [rescale_cfg, pag, sag, freeu, freeu_v2, tome, hypertile, compiled]


@pytest.mark.parametrize("node", MODEL_NODES, ids=lambda node: node.__name__)
def test_a_model_node_composes(small, node, caplog):
    """It does what it does, guidance comes on top in whichever order, and nothing of either is left."""
    caplog.set_level(logging.INFO)
    with torch.inference_mode():
        patched = small.but(model=node(small.model))
        the_other_way = node(small.patched())
    before, unguided = small.core(), patched.core()
    assert node is compiled or (unguided - before).abs().mean() > 1e-3
    assert torch.equal(patched.but(iterations=0).ksampler(), unguided)
    with watched(small.model) as passes:
        guided = patched.ksampler()
    assert f"{STEPS} updates of 1 iterations" in caplog.text
    assert torch.isfinite(guided).all()
    assert (guided - unguided).abs().mean() > 1e-2
    assert node is compiled or (guided - small.ksampler()).abs().mean() > 1e-3
    for one in passes.reading:
        assert set(one.options["patches_replace"]) == {"attn1"}
        assert one.options["patches"] == {}
    assert torch.equal(patched.ksampler(), guided)
    assert torch.equal(small.core(the_other_way), guided)
    assert torch.equal(small.core(), before)
    assert torch.equal(patched.core(), unguided)


def test_the_denoising_alone_is_compiled(small):
    """What torch has compiled runs in each denoising pass, and in none of the pack's."""
    ran = []

    def backend(graph, _inputs):
        def run(*args):
            ran.append(torch.is_inference_mode_enabled())
            return graph(*args)

        return run

    torch.compiler.reset()
    with torch.inference_mode():
        guided = small.but(model=compiled(small.model, backend)).patched()
    small.core(guided)
    assert len(ran) >= STEPS
    assert all(ran)


class Counted:
    """Four ways in which packs step into the denoising; each counts its calls and lets all through."""

    def __init__(self):
        self.calls = dict.fromkeys(("attn1", "override", "function", "sampler"), 0)
        self.inside_reading = 0

    def _count(self, name):
        self.calls[name] += 1
        self.inside_reading += not torch.is_inference_mode_enabled()

    def attn1(self, q, k, v, extra_options):
        self._count("attn1")
        return comfy.ldm.modules.attention.optimized_attention(q, k, v, extra_options["n_heads"]) * 0.5

    def override(self, func, *args, **kwargs):
        self._count("override")
        return func(*args, **kwargs) * 0.9

    def function(self, apply_model, args):
        self._count("function")
        return apply_model(args["input"], args["timestep"], **args["c"]) * 0.95

    def sampler(self, executor, *args, **kwargs):
        self._count("sampler")
        return executor(*args, **kwargs)

    def on(self, model):
        """A clone of the model with all four."""
        clone = model.clone()
        clone.set_model_attn1_replace(self.attn1, "output", 1, 0)
        clone.model_options["transformer_options"]["optimized_attention_override"] = self.override
        clone.set_model_unet_function_wrapper(self.function)
        clone.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, "another pack", self.sampler)
        return clone


@pytest.mark.parametrize("first", ["guidance", "the other pack"])
def test_another_packs_hooks_stay_in_force(small, first):
    """In whichever order the nodes stand."""
    counted, seen = Counted(), []
    with torch.inference_mode():
        other = counted.on(small.model)
        both = counted.on(small.patched()) if first == "guidance" else small.but(model=other).patched()
    for model in (other, both):
        counted.__init__()
        with watched(small.model) as passes:
            picture = small.core(model)
        assert counted.inside_reading == 0
        seen.append((counted.calls, len(passes.denoising), picture))
    assert seen[0][:2] == seen[1][:2]
    assert min(seen[0][0].values()) >= 1
    assert (seen[0][2] - seen[1][2]).abs().mean() > 1e-2
    assert (seen[0][2] - small.core()).abs().mean() > 1e-2
    assert "attention_distillation" not in repr(other.model_options) + repr(other.wrappers)


def test_injection_calls_what_is_there(small):
    """KV injection on a model that another pack has patched: all of its hooks are called as often as before."""
    counted = Counted()
    with torch.inference_mode():
        other = counted.on(small.model)
        small.core(other)
        before = dict(counted.calls)
        counted.__init__()
        node = comfy_nodes.NODE_CLASS_MAPPINGS["ADInjectReferenceKV"]
        injected = node.execute(other, small.style, strength=0.5, start_percent=0.0, end_percent=1.0)[0]
        small.core(injected)
    assert {name: counted.calls[name] for name in ("attn1", "function", "sampler")} == {
        name: before[name] for name in ("attn1", "function", "sampler")
    }


def test_two_references_one_after_the_other(small, random_latent, caplog):
    """Two Apply nodes in a row: both references count, once each at every step."""
    caplog.set_level(logging.INFO)
    other = small.styled(random_latent(5, (1, 4, 8, 8)) + 3, layers="2-5")
    with torch.inference_mode():
        first = small.patched()
        both = other.but(model=first).patched()
        once = other.but(model=first, iterations=0).patched()
    with watched(small.model) as passes:
        picture = small.core(both)
    found = re.findall(r"layers (\S+) of 7, (\d+) updates", caplog.text)
    assert found == [("1-6", str(STEPS)), ("2-5", str(STEPS))]
    assert len([one for one in passes if one.with_gradient]) == 2 * STEPS
    assert torch.equal(small.core(once), small.ksampler())
    for alone in (small.ksampler(), other.ksampler(), small.core()):
        assert (picture - alone).abs().mean() > 1e-2
    assert torch.equal(small.core(both), picture)


def test_guidance_and_injection_together(small):
    """In either order the same picture, and nothing is left."""
    before = small.core()
    inputs = {"strength": 0.5, "start_percent": 0.0, "end_percent": 1.0}
    inject = comfy_nodes.NODE_CLASS_MAPPINGS["ADInjectReferenceKV"].execute
    with torch.inference_mode():
        one = small.but(model=inject(small.model, small.style, **inputs)[0]).patched()
        other = inject(small.patched(), small.style, **inputs)[0]
    both = small.core(one)
    assert torch.isfinite(both).all()
    assert torch.equal(small.core(other), both)
    assert (both - small.ksampler()).abs().mean() > 1e-3
    assert torch.equal(small.core(), before)


def test_self_attention_guidance_is_refused_with_windows(small, pack_module):
    windows = pack_module("guidance.windows").Windows(64, 32)
    with torch.inference_mode():
        graph = small.but(model=sag(small.model), windows=windows)
    with pytest.raises(ValueError, match="windows: Self-Attention Guidance would take one window for the whole"):
        graph.ksampler()


def test_self_attention_guidance_is_known_as_comfyui_loads_it(small, pack_module):
    """By the functions it leaves on a model, each alone; functions of the same name made elsewhere are let through."""
    check = pack_module("guidance.windowed_model").check_model_options
    asyncio.run(comfy_nodes.load_custom_node(nodes_sag.__file__, module_parent="comfy_extras"))
    node = comfy_nodes.NODE_CLASS_MAPPINGS["SelfAttentionGuidance"]
    with torch.inference_mode():
        options = node.execute(small.model, 0.8, 2.0)[0].model_options
    (noting,) = options["transformer_options"]["patches_replace"]["attn1"].values()
    (using,) = options["sampler_post_cfg_function"]
    assert noting.__module__ != sag(small.model).model_options["sampler_post_cfg_function"][0].__module__
    another_packs = lambda *args: args  # noqa: E731
    another_packs.__qualname__ = using.__qualname__
    for function, refused in ((noting, True), (using, True), (another_packs, False)):
        for one in ({"sampler_post_cfg_function": [function]},
                    {"transformer_options": {"patches_replace": {"attn1": {("middle", 0, 0): function}}}}):  # fmt: skip
            with pytest.raises(ValueError, match="Self-Attention") if refused else contextlib.nullcontext():
                check(one)


def test_a_bypass_lora_is_refused(small):
    """Its weights are no part of the model; before and after the guidance, and where a latent is optimised."""
    name = "lora_unet_output_blocks_1_1_transformer_blocks_0_attn1_to_q"
    lora = {f"{name}.lora_up.weight": torch.ones(640, 2), f"{name}.lora_down.weight": torch.ones(2, 640)}
    with torch.inference_mode():
        bypassed = comfy.sd.load_bypass_lora_for_models(small.model, None, lora, 1.0, 0.0)[0]
        after = comfy.sd.load_bypass_lora_for_models(small.patched(), None, lora, 1.0, 0.0)[0]
    assert bypassed.get_injections("bypass_lora")
    with pytest.raises(ValueError, match=r"model: Load LoRA \(Bypass\) is not supported"):
        small.but(model=bypassed).patched()
    with pytest.raises(ValueError, match=r"model: Load LoRA \(Bypass\) is not supported"):
        small.core(after)


def test_injection_refuses_a_compiled_model(small):
    """Compiled before or after: TorchCompileModel does not look whether the attention has changed."""
    inputs = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    inject = comfy_nodes.NODE_CLASS_MAPPINGS["ADInjectReferenceKV"].execute
    with torch.inference_mode():
        with pytest.raises(ValueError, match="model: a compiled model keeps the attention"):
            inject(compiled(small.model), small.style, **inputs)
        injected = compiled(inject(small.model, small.style, **inputs)[0])
        with pytest.raises(ValueError, match="model: a compiled model keeps the attention"):
            small.core(injected)


def test_a_hypernetwork_belongs_to_the_weights(small, tmp_path, pack_module):
    """It changes the pack's passes as it changes the denoising, with a gradient through it; other patches do not."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for width in (WIDTH, 2 * WIDTH):
        weights = (
            {"linear.0.weight": 0.3 * torch.randn(width, width, generator=generator) / width**0.5,
             "linear.0.bias": torch.zeros(width)} for _ in range(2)
        )  # fmt: skip
        layers[width] = list(weights)
    torch.save({**layers, "activation_func": "linear"}, tmp_path / "small.pt")
    with torch.inference_mode():
        patch = nodes_hypernetwork.load_hypernetwork_patch(str(tmp_path / "small.pt"), 1.0)
        model = small.model.clone()
        model.set_model_attn1_patch(patch)
        model.set_model_attn1_patch(lambda q, k, v, extra_options: (q, 0 * k, v))  # another node's
        only_denoising = small.model.clone()
        only_denoising.set_model_attn1_patch(lambda q, k, v, extra_options: (q, 0 * k, v))
    graph = small.but(model=model)
    with watched(small.model) as passes:
        guided = graph.ksampler()
    assert torch.isfinite(guided).all()
    assert all(one.options["patches"] == {"attn1_patch": [patch]} for one in passes.reading)
    networks = pack_module("attention.hypernetworks")
    found = networks.modules_of(networks.hypernetworks(model.model_options))
    assert len(found) == 2
    assert all(parameter.is_inference() for network in found for parameter in network.parameters())
    assert pack_module("attention.hypernetworks").hypernetworks(only_denoising.model_options) == {}
    off = graph.but(iterations=0).ksampler()
    assert (guided - off).abs().mean() > 1e-2


def deep_shrink(model):
    return nodes_model_downscale.PatchModelAddDownscale.execute(model, 1, 2.0, 0.0, 1.0, True, "bicubic", "bicubic")[0]


def easy_cache(model):
    return nodes_easycache.EasyCacheNode.execute(model, 0.2, 0.0, 1.0, False)[0]


def lazy_cache(model):
    return nodes_easycache.LazyCacheNode.execute(model, 0.2, 0.0, 1.0, False)[0]


def context_windows(model):
    """Windows of eight columns; the noise that they share asks for the run's seed."""
    return nodes_context_windows.ContextWindowsManualNode.execute(
        model, 8, 4, "standard_static", 1, False, "pyramid", 3, True
    )[0]


def scale_rope(model):
    return nodes_rope.ScaleROPE.execute(model, 1.5, 0.0, 1.5, 0.0, 1.0, 0.0)[0]


def nag(model):
    return nodes_nag.NAGuidance.execute(model, 5.0, 0.5, 1.5)[0]


def skip_layers(model):
    return nodes_slg.SkipLayerGuidanceDiT.execute(model, 3.0, 0.0, 1.0, "1", "2")[0]


def block_patches(model):
    """The kind of Qwen's DiffSynth ControlNets, and of USO."""
    clone = model.clone()
    clone.set_model_double_block_patch(lambda args: {"img": args["img"], "txt": args["txt"]})
    clone.set_model_post_input_patch(lambda args: {**args, "img": 1.1 * args["img"]})
    return clone


UNSEEN = {
    "two widths": [deep_shrink, easy_cache, lazy_cache, context_windows],
    "FLUX.1-dev": [scale_rope, nag, skip_layers, block_patches],
}


@pytest.fixture(scope="module")
def flux(pack, custom_samplers, random_latent, tmp_path_factory):
    """A guided graph on a tiny FLUX."""
    kind = small_models.MODELS["FLUX.1-dev"]
    model = small_models.load(kind, tmp_path_factory.mktemp("flux"))
    latent = {"samples": torch.zeros(1, 16, 8, 12)}
    graph = Graph(pack, model, kind.cond(1), kind.cond(2), latent, steps=STEPS, cfg=3.0, scheduler="simple")
    return graph.but(iterations=1).styled(random_latent(1, (1, 16, 8, 8)))


@pytest.mark.parametrize(
    ("kind", "node"),
    [(kind, node) for kind, nodes in UNSEEN.items() for node in nodes],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_what_is_for_the_denoising_alone_stays_out_of_the_passes(kind, node, small, flux):
    graph = {"two widths": small, "FLUX.1-dev": flux}[kind]
    with torch.inference_mode():
        patched = graph.but(model=node(graph.model))
    options = []

    def note(_module, _args, kwargs):
        if not torch.is_inference_mode_enabled():
            options.append(kwargs["transformer_options"])

    handle = graph.model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        guided = patched.ksampler()
    finally:
        handle.remove()
    assert torch.isfinite(guided).all()
    assert len(options) == 2 * STEPS
    for given in options:
        assert given["patches"] == {}
        assert given["patches_replace"].keys() == {"attn1"}
        assert not given.get("wrappers")
        assert not {"easycache", "rope_options", "context_handler"} & given.keys()
    assert (guided - patched.but(iterations=0).ksampler()).abs().mean() > 1e-2
