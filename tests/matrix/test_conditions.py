"""What a graph hangs on its conditions or into its weights: whether the pack's own passes see it too."""

import comfy.cldm.cldm
import comfy.controlnet
import comfy.gligen
import comfy.hooks
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import pytest
import torch
from comfy_extras.nodes_model_merging import ModelMergeSimple
from conftest import BASE_DIRECTORY, UNET_CONFIG, WIDTH
from passes import watched

import nodes as comfy_nodes

STEPS = 3
ATTENTION = "output_blocks.1.1.transformer_blocks.0.attn1.to_q"  # of one of the layers that are read


@pytest.fixture(scope="module")
def small(graph, random_latent):
    """A guided graph at 8x16 with a prompt, one iteration a step."""
    changed = graph.but(latent={"samples": torch.zeros(1, 4, 8, 16)}, steps=STEPS, cfg=3.0, iterations=1)
    return changed.styled(random_latent(1, (1, 4, 8, 8)))


@pytest.fixture
def prompts(encode_random):
    return encode_random(1), encode_random(2)


def guided(graph):
    """The guided picture, and the passes that made it; iterations 0 must be the core graph to the last bit."""
    unguided = graph.core()
    assert torch.equal(graph.but(iterations=0).ksampler(), unguided)
    with watched(graph.model) as passes:
        picture = graph.ksampler()
    assert torch.isfinite(picture).all()
    assert (picture - unguided).abs().mean() > 1e-3
    assert len([one for one in passes if one.with_gradient]) == STEPS
    return picture, passes


def test_areas_and_masks_are_for_the_denoising(small, prompts):
    """Two prompts, left and right, and one under a mask: the pack reads the whole picture, under the negative one."""
    left, right = prompts
    mask = torch.zeros(1, 64, 128)
    mask[..., 40:80] = 1
    with torch.inference_mode():
        positive = [
            *comfy_nodes.ConditioningSetArea().append(left, 64, 64, 0, 0, 1.0)[0],
            *comfy_nodes.ConditioningSetArea().append(right, 64, 64, 64, 0, 1.0)[0],
            *comfy_nodes.ConditioningSetMask().append(right, mask, "default", 0.7)[0],
        ]
    picture, passes = guided(small.but(positive=positive))
    assert (picture - small.ksampler()).abs().mean() > 1e-3
    assert {one.x.shape[-1] for one in passes.denoising} == {8, 16}
    assert {one.x.shape[-1] for one in passes.reading} == {8, 16}  # the reference is 8 wide
    assert all(one.x.shape[-1] == 16 for one in passes.reading if one.with_gradient)
    assert all(torch.equal(one.text, small.negative[0][0]) for one in passes.reading)


def test_timestep_ranges(small, prompts):
    """The pack's passes take the condition that is in force at their noise level."""
    first, second = prompts
    with torch.inference_mode():
        early = comfy_nodes.ConditioningSetTimestepRange().set_range(first, 0.0, 0.6)[0]
        late = comfy_nodes.ConditioningSetTimestepRange().set_range(second, 0.6, 1.0)[0]
    boundary = small.model.get_model_object("model_sampling").percent_to_sigma(0.6)
    conds = [*late, *early]
    for graph in (small.but(negative=conds), small.styled(torch.ones(1, 4, 8, 8), conditioning=conds)):
        _, passes = guided(graph)
        for one in passes.reading:
            assert torch.equal(one.text, (first if one.sigma >= boundary else second)[0][0])
        assert len({one.sigma >= boundary for one in passes.reading}) == 2


@pytest.fixture(scope="module")
def controlnet():
    """A ControlNet of the small SD1.5's size with random weights, through ComfyUI's loader."""
    config = {k: v for k, v in UNET_CONFIG.items() if k not in ("out_channels", "transformer_depth_output")}
    with torch.no_grad():
        network = comfy.cldm.cldm.ControlNet(
            **config, hint_channels=3, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init
        )
        generator = torch.Generator().manual_seed(7)
        for parameter in network.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.05
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    weights = {f"control_model.{name}": value for name, value in network.state_dict().items()}
    with torch.inference_mode():
        return comfy.controlnet.load_controlnet_state_dict(weights)


def test_a_controlnet_is_for_the_denoising(small, controlnet):
    image = torch.rand(1, 64, 128, 3, generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        apply = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet
        positive, negative = apply(small.positive, small.negative, controlnet, image, 1.0, 0.0, 1.0)
    before = small.core()
    picture, passes = guided(small.but(positive=positive, negative=negative))
    assert (picture - small.ksampler()).abs().mean() > 1e-3
    assert all(one.control for one in passes.denoising)
    assert not any(one.control for one in passes.reading)
    assert torch.equal(small.core(), before)


@pytest.fixture(scope="module")
def gligen():
    """GLIGEN for the small SD1.5 with random weights, through ComfyUI's loader."""
    blocks = [f"input_blocks.{i}.1" for i in (1, 3)] + ["middle_block.1"] + [f"output_blocks.{i}.1" for i in range(4)]
    with torch.no_grad():
        fuser = comfy.gligen.GatedSelfAttentionDense(WIDTH, 768, 8, WIDTH // 8)
        position = comfy.gligen.PositionNet(768, 768)
        weights = {f"position_net.{name}": value for name, value in position.state_dict().items()}
        for block in blocks:
            for name, value in fuser.state_dict().items():
                weights[f"{block}.transformer_blocks.0.fuser.{name}"] = value
        generator = torch.Generator().manual_seed(7)
        for name, value in weights.items():
            scale = value[0].numel() ** -0.5 if value.ndim > 1 else 0.3
            weights[name] = scale * torch.randn(value.shape, generator=generator)
    path = BASE_DIRECTORY / "small_gligen.safetensors"
    comfy.utils.save_torch_file(weights, str(path))
    with torch.inference_mode():
        return comfy.sd.load_gligen(str(path))


def test_gligen_is_for_the_denoising(small, gligen):
    box = ("position", gligen, [(torch.ones(1, 768), 4, 6, 2, 3)])
    picture, passes = guided(small.but(positive=[[small.positive[0][0], {"gligen": box}]]))
    assert (picture - small.ksampler()).abs().mean() > 1e-4
    assert any("middle_patch" in one.options.get("patches", {}) for one in passes.denoising)
    assert not any(one.options["patches"] for one in passes.reading)


def lora(seed, strength=0.3):
    """A LoRA on the queries and keys of one layer, in the format that ComfyUI's loader reads."""
    generator = torch.Generator().manual_seed(seed)
    name = "lora_unet_" + ATTENTION.replace(".", "_")
    return {
        f"{name}.lora_up.weight": strength * torch.randn(WIDTH, 4, generator=generator),
        f"{name}.lora_down.weight": torch.randn(4, WIDTH, generator=generator) * WIDTH**-0.5,
        f"{name}.alpha": torch.tensor(4.0),
    }


def baked(load_sd15, change):
    """A fresh small SD1.5 whose weight of `ATTENTION` is changed for good."""
    model = load_sd15()
    with torch.inference_mode():
        weight = model.model.diffusion_model.get_submodule(ATTENTION).weight
        weight.copy_(change(weight))
    return model


def test_a_lora_counts_in_both(small, load_sd15):
    """The same as if it were part of the weights."""
    weights = lora(3)
    up, down = (weights[name] for name in weights if not name.endswith("alpha"))
    with torch.inference_mode():
        patched = comfy.sd.load_lora_for_models(small.model, None, weights, 0.8, 0.0)[0]
    picture, _ = guided(small.but(model=patched))
    expected = small.but(model=baked(load_sd15, lambda weight: weight + 0.8 * up @ down)).ksampler()
    torch.testing.assert_close(picture, expected, rtol=0, atol=1e-3)
    assert (picture - small.ksampler()).abs().mean() > 1e-2


def test_a_merge_counts_in_both(small, load_sd15):
    noise = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(3)) / WIDTH**0.5
    other = baked(load_sd15, lambda weight: weight + noise)
    with torch.inference_mode():
        merged = ModelMergeSimple().merge(small.model, other, 0.25)[0]
    picture, _ = guided(small.but(model=merged))
    expected = small.but(model=baked(load_sd15, lambda weight: weight + 0.75 * noise)).ksampler()
    torch.testing.assert_close(picture, expected, rtol=0, atol=1e-3)
    assert (picture - small.ksampler()).abs().mean() > 1e-2


def hooked(cond, hooks):
    return comfy.hooks.set_hooks_for_conditioning(cond, hooks)


def weight_of(graph):
    weight = graph.model.model.diffusion_model.get_submodule(ATTENTION)
    return lambda: weight.weight.detach().clone()


def test_a_lora_hook_on_all_prompts_counts_in_both(small):
    """The same as that LoRA on the model."""
    before = small.core()
    hooks = comfy.hooks.create_hook_lora(lora(3), 0.8, 0.0)
    graph = small.but(positive=hooked(small.positive, hooks), negative=hooked(small.negative, hooks))
    with torch.inference_mode():
        patched = comfy.sd.load_lora_for_models(small.model, None, lora(3), 0.8, 0.0)[0]
    picture, _ = guided(graph)
    torch.testing.assert_close(picture, small.but(model=patched).ksampler(), rtol=0, atol=1e-3)
    assert torch.equal(small.core(), before)


def test_a_lora_hook_on_one_prompt(small):
    """The pack's passes have the weights of the sampler's negative prompt, wherever their text comes from."""
    plain, note = weight_of(small)().clone(), weight_of(small)
    hooks = comfy.hooks.create_hook_lora(lora(3), 0.8, 0.0)
    own_text = small.styled(torch.ones(1, 4, 8, 8), conditioning=small.positive)
    for graph, negative_has_it in (
        (small.but(positive=hooked(small.positive, hooks)), False),
        (small.but(negative=hooked(small.negative, hooks)), True),
        (own_text.but(negative=hooked(small.negative, hooks)), True),
        (small.but(negative=[*small.negative, *hooked(small.positive, hooks)]), False),  # its weights come last
    ):
        unguided = graph.core()
        with watched(graph.model, note) as passes:
            graph.ksampler()
        assert {torch.equal(one.noted, plain) for one in passes.denoising} == {True, False}
        assert {torch.equal(one.noted, plain) for one in passes.reading} == {not negative_has_it}
        assert torch.equal(graph.core(), unguided)
    assert torch.equal(note(), plain)


def test_a_run_that_ends_early_takes_its_hooks_along(small):
    plain, before = weight_of(small)().clone(), small.core()
    hooks = comfy.hooks.create_hook_lora(lora(3), 0.8, 0.0)
    graph = small.but(positive=hooked(small.positive, hooks), negative=hooked(small.negative, hooks))

    def cancel():
        if not torch.is_inference_mode_enabled():
            raise comfy.model_management.InterruptProcessingException

    with watched(graph.model, cancel), pytest.raises(comfy.model_management.InterruptProcessingException):
        graph.ksampler()
    assert torch.equal(small.core(), before)
    assert torch.equal(weight_of(small)(), plain)


def scheduled(graph):
    """A LoRA that sets in at 40 %, and the noise level of that."""
    hooks = comfy.hooks.create_hook_lora(lora(3), 0.8, 0.0)
    schedule = comfy.hooks.HookKeyframeGroup()
    schedule.add(comfy.hooks.HookKeyframe(0.0, 0.0, 0))
    schedule.add(comfy.hooks.HookKeyframe(1.0, 0.4, 0))
    hooks.set_keyframes_on_hooks(schedule)
    return hooks, graph.model.get_model_object("model_sampling").percent_to_sigma(0.4)


def test_a_scheduled_lora(small):
    """It sets in in the denoising and in the pack's passes alike."""
    plain, note = weight_of(small)().clone(), weight_of(small)
    hooks, boundary = scheduled(small)
    graph = small.but(positive=hooked(small.positive, hooks), negative=hooked(small.negative, hooks), steps=4)
    with watched(graph.model, note) as passes:
        graph.ksampler()
    for some in (passes.reading, passes.denoising):
        assert {one.sigma > boundary for one in some} == {True, False}
        assert all(torch.equal(one.noted, plain) == (one.sigma > boundary) for one in some)
    assert torch.equal(note(), plain)


def test_a_scheduled_lora_where_a_latent_is_optimised(small):
    plain, note = weight_of(small)().clone(), weight_of(small)
    hooks, boundary = scheduled(small)
    with torch.inference_mode(), watched(small.model, note) as passes:
        comfy_nodes.NODE_CLASS_MAPPINGS["ADOptimizeLatent"].execute(
            small.model, small.style, small.latent, 1, "noise", 6, "constant", learning_rate=0.05, iterations=1,
            content_weight=0.0, attention_scale=1.0, content_loss="query",
            conditioning=hooked(small.positive, hooks),
        )  # fmt: skip
    assert {one.sigma > boundary for one in passes} == {True, False}
    assert all(torch.equal(one.noted, plain) == (one.sigma > boundary) for one in passes)
    assert torch.equal(note(), plain)


def test_injection_reads_the_reference_with_the_weights_of_each_prompt(small):
    """With a hook on one prompt there are two sets of weights at each noise level."""
    note = weight_of(small)
    hooks = comfy.hooks.create_hook_lora(lora(3), 0.8, 0.0)
    graph = small.but(positive=hooked(small.positive, hooks))
    with torch.inference_mode(), watched(graph.model, note) as passes:
        node = comfy_nodes.NODE_CLASS_MAPPINGS["ADInjectReferenceKV"]
        model = node.execute(graph.model, graph.style, strength=1.0, start_percent=0.0, end_percent=1.0)[0]
        graph.core(model)
    found, reference = {}, None
    for one in passes:
        if one.x.shape[-1] == 8:
            reference = one
        else:
            assert torch.equal(one.noted, reference.noted)
            found.setdefault(one.sigma, set()).add(float(one.noted.sum()))
    assert [len(weights) for weights in found.values()] == [2] * STEPS


def test_a_controlnet_is_in_the_negative_branch_too(small, controlnet):
    """It is the denoising's, in each call of it; the reference is read without."""
    image = torch.rand(1, 64, 128, 3, generator=torch.Generator().manual_seed(8))
    with torch.inference_mode(), watched(small.model) as passes:
        apply = comfy_nodes.ControlNetApplyAdvanced().apply_controlnet
        positive, negative = apply(small.positive, small.negative, controlnet, image, 1.0, 0.0, 1.0)
        settings = {"strength": 0.0, "start_percent": 0.0, "end_percent": 1.0, "negative_strength": 1.0}
        node = comfy_nodes.NODE_CLASS_MAPPINGS["ADInjectReferenceKV"]
        model = node.execute(small.model, small.style, **settings)[0]
        small.but(positive=positive, negative=negative, cfg=3.0).core(model)
    of_picture = [one for one in passes if one.x.shape[-1] != 8]
    assert sum(len(one.x) for one in of_picture) == 3 * STEPS
    assert all(one.control for one in of_picture)
    assert len(passes) - len(of_picture) == STEPS
    assert not any(one.control for one in passes if one.x.shape[-1] == 8)
