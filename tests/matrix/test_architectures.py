"""Each architecture on a tiny random model of ComfyUI's own class: its layers, their features, gradients, guidance."""

import copy
import functools
import importlib.util
import logging
import math
import re
import types

import comfy.model_management
import comfy.samplers
import pytest
import small_models
import torch
from guided import Graph

import nodes as comfy_nodes

CROSS_ATTENTION = (
    small_models.unet_outputs, small_models.wan_outputs, small_models.cosmos_outputs, small_models.kandinsky_outputs,
)  # fmt: skip


@pytest.fixture(scope="module", params=small_models.MODELS)
def small(request):
    """One architecture."""
    return small_models.MODELS[request.param]


@pytest.fixture(scope="module")
def model(small, tmp_path_factory):
    """Its model, as ComfyUI's loader hands it on."""
    return small_models.load(small, tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def graph(pack, custom_samplers, small, model, random_latent):
    """A guided graph with a style reference of another size and a content reference."""
    latent = {"samples": small.as_host(torch.zeros(1, small.channels, *small.size))}
    made = Graph(pack, model, small.cond(1), small.cond(2), latent, steps=2)
    return made.styled(small.as_host(random_latent(1, (1, small.channels, 10, 8)))).but(
        content=made.capture(small.as_host(random_latent(2, (1, small.channels, *small.size))))
    )


@pytest.fixture
def made(pack_module, model, small, random_latent):
    """What a pass needs: catalogue, two pictures in k-diffusion space, their noise level, their condition."""
    layers = pack_module("attention.layers").list_layers(model.model.diffusion_model)
    conditioning = pack_module("attention.conditioning")
    x = random_latent(3, (2, small.channels, *small.size)) * 0.18215
    sigma = model.model.model_sampling.percent_to_sigma(0.5)
    encoded = conditioning.encode(model.model, conditioning.from_socket(small.cond(3)), x, size=small.size)
    return layers, x, torch.tensor(sigma), conditioning.for_pass(encoded, float(sigma), 2)


def host_outputs(model, small, x, sigma, conds):
    """A complete forward pass without the pack: what hooks see of each layer's attention, in the order they see it."""
    seen, order, outputs = {}, [], small.outputs(model.diffusion_model)
    gates = [] if small.gates is None else small.gates(model.diffusion_model)

    def note(layer, module, inputs):
        seen[module] = inputs[0]
        order.append(layer)

    handles = [
        module.register_forward_pre_hook(functools.partial(note, layer))
        for layer, modules in enumerate(outputs)
        for module in modules
    ]
    handles += [gate.register_forward_hook(lambda gate, _, value: seen.update({gate: value})) for gate in gates]
    model.apply_model(small.as_host(x), sigma.expand(x.shape[0]), transformer_options={}, **conds)
    for handle in handles:
        handle.remove()
    assert order == [layer for layer, modules in enumerate(outputs) for _ in modules]
    for (module,), gate in zip(outputs, gates, strict=False):
        seen[module] = seen[module] / seen[gate].sigmoid()
    return [torch.cat([seen[module] for module in modules], dim=1) for modules in outputs]


def attention(q, k, v):
    """softmax(q k^T / sqrt(d)) v, written out, [b t (heads d)]."""
    weights = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


def test_features_are_those_of_the_host(pack_module, small, model, made):
    """Number and order of layers; q, k, v make the very attention output that the model itself goes on with."""
    layers, x, sigma, conds = made
    with torch.inference_mode():
        found = pack_module("attention.capture").capture_features(model.model, x, sigma, conds, layers)
        expected = host_outputs(model.model, small, x, sigma, conds)
    assert [layer.index for layer in layers] == list(range(len(expected)))
    assert sorted(found) == list(range(len(expected)))
    for index, of_host in enumerate(expected):
        features, tokens, width = found[index], of_host.shape[1], found[index].q.shape[1] * found[index].q.shape[3]
        own = attention(features.q, features.k, features.v)
        torch.testing.assert_close(own[:, -tokens:], of_host[..., :width], rtol=0, atol=2e-5)
        torch.testing.assert_close(features.out.transpose(1, 2).flatten(2), own, rtol=0, atol=2e-5)


def test_the_pictures_tokens(pack_module, small, model, made):
    """Pixels of the latent change the first layer's value tokens where the catalogue says that they lie."""
    layers, x, sigma, conds = made
    capture = pack_module("attention.capture").capture_features
    if small.outputs is small_models.unet_outputs:
        pytest.skip("a convolution before the first layer mixes its pixels")
    changed = x.clone()
    changed[:, :, 4, 3] += 1
    with torch.inference_mode():
        before, after = (capture(model.model, each, sigma, conds, layers[:1])[0] for each in (x, changed))
    (rows, columns), patch = before.grid, 2 ** layers[0].halvings
    assert (rows, columns) == (-(-small.size[0] // patch), -(-small.size[1] // patch))
    moved = (before.v != after.v).any(dim=-1).any(dim=1)[0].nonzero().flatten().tolist()
    assert moved == [before.start + 4 // patch * columns + 3 // patch]
    marked = before.layout.on_all_tokens(torch.ones(1, rows * columns), 0.0)[0].nonzero().flatten()
    assert marked[0] == before.start
    assert len(marked) == rows * columns


def test_auto_layers(pack_module, small, model, graph):
    assert graph.style.layers == small.auto
    count = len(pack_module("attention.layers").list_layers(model.model.diffusion_model))
    assert graph.capture(torch.zeros(1, small.channels, 8, 8), layers="all").layers == tuple(range(count))


def test_guided_sampling(graph, caplog):
    """It moves the picture, its loss falls, iterations 0 and the model afterwards are bit-identical to no guidance."""
    plain = graph.core()
    with caplog.at_level(logging.INFO):
        guided = graph.but(iterations=4, learning_rate=0.02).ksampler()
    assert torch.isfinite(guided).all()
    assert (guided - plain).abs().max() > 0.01
    found = re.search(r"([\d.]+) -> ([\d.]+) within the last update", caplog.text)
    assert float(found[1]) > float(found[2]) > 0
    assert torch.equal(graph.but(iterations=0).ksampler(), plain)
    assert torch.equal(graph.core(), plain)
    assert not comfy.model_management.in_training


@torch.inference_mode()
def test_attention_map(pack_module, graph, small, model, random_latent):
    """Against attention of the last layer written out; what is on text has no place, and takes of the brightness."""
    latent, conditioning = random_latent(4, (1, small.channels, *small.size)), pack_module("attention.conditioning")
    layer = pack_module("attention.layers").list_layers(model.model.diffusion_model)[small.auto[-1]]
    node, inputs = comfy_nodes.NODE_CLASS_MAPPINGS["ADAttentionMap"], {"conditioning": small.cond(2)}
    style, ours = graph.style, {"samples": small.as_host(latent)}
    found = node.execute(model, style, ours, layer=str(layer.index), **inputs)[0]

    def features(latent):
        latent = model.model.process_latent_in(small.as_host(latent)).reshape(latent.shape)
        level = pack_module("attention.noise").NoiseLevel.of(model.model, 0.0, latent)
        own = conditioning.of_passes(model.model, conditioning.from_socket(small.cond(2)), None)
        conds = conditioning.for_pass(conditioning.encode(model.model, own, latent, size=small.size), level.sigma, 1)
        x = latent / level.scale
        return pack_module("attention.capture").capture_features(model.model, x, level.sigmas, conds, [layer])[
            layer.index
        ]

    picture, reference = features(latent), features(style.parts[0].latent)
    q = picture.q[:, :, picture.start :][:, :, : math.prod(picture.grid)]
    logits = q @ reference.k.transpose(-1, -2) / q.shape[-1] ** 0.5
    if reference.seen is not None:
        logits = logits.masked_fill(~reference.seen[:, None, None], -torch.inf)
    weights = logits.softmax(-1).mean(1)[0, :, reference.start :][:, : math.prod(reference.grid)]
    certain = 1 - torch.distributions.Categorical(weights).entropy() / math.log(weights.shape[-1])
    colours = torch.distributions.Categorical(weights).probs @ pack_module("guidance.charts").chart(
        0, 1, *reference.grid
    ).flatten(0, 1)
    expected = (colours * (weights.sum(-1) * certain).sqrt()[:, None]).unflatten(0, picture.grid)
    side = model.model.latent_format.spacial_downscale_ratio * 2**layer.halvings
    expected = expected.repeat_interleave(side, 0).repeat_interleave(side, 1)[: found.shape[1], : found.shape[2]]
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-4)
    assert found.std() > 1e-3
    assert [n * side // 2**layer.halvings for n in small.size] == list(found.shape[1:3])
    mean, carried = node.execute(model, style, ours, **inputs, image=torch.rand(1, 10, 8, 3)).args
    assert torch.isfinite(mean).all() and mean.shape == carried.shape == found.shape
    assert carried.min() > 0 and carried.max() < 1


@torch.inference_mode()
def injected(graph, strength=1.0, negative_strength=0.0, model=None):
    """The output of Inject Reference KV."""
    node, settings = comfy_nodes.NODE_CLASS_MAPPINGS["ADInjectReferenceKV"], {"start_percent": 0.0, "end_percent": 1.0}
    given = (model or graph.model, graph.style)
    return node.execute(*given, strength=strength, **settings, negative_strength=negative_strength)[0]


@pytest.fixture
def transformer_layers(pack_module, model):
    """Layers of a transformer; UNets have their tests of injection in tests/runs."""
    layers = pack_module("attention.layers").list_layers(model.model.diffusion_model)
    if layers[0].call is None:
        pytest.skip("a UNet")
    return layers


def test_injection_into_a_transformer(graph, transformer_layers):
    """It changes the picture, the negative branch goes on in its direction, and nothing of either is left."""
    graph = graph.but(steps=1, positive=graph.negative)
    plain, on = graph.core(), graph.core(injected(graph))
    assert (on - plain).abs().max() > 1e-3
    along = graph.core(injected(graph, 0.0, 2.0))
    torch.testing.assert_close(along, plain + 2 * (on - plain), rtol=0, atol=2e-4 * float(plain.abs().max()))
    assert torch.equal(graph.core(), plain)


def test_injected_layers_of_a_transformer(graph, small, model, pack_module, transformer_layers):
    """Against attention written out: the picture looks at the reference and at the text, whose own output stays."""
    layers, strength, noted, other = transformer_layers, 0.7, [], model.clone()

    def override(func, q, k, v, heads, mask=None, **asked):
        own = func(q, k, v, heads, mask=mask, **asked)
        reshaped = asked.pop("skip_reshape", False)
        asked.pop("skip_output_reshape", None)
        asked.pop("attn_precision", None)
        noted.append((pack_module("attention.calls").heads_apart(q, k, v, heads, reshaped, asked), mask, own.clone()))
        return own

    other.model_options["transformer_options"]["optimized_attention_override"] = override
    graph = graph.but(steps=1, positive=graph.negative)
    network, seen = model.model.diffusion_model, {}
    outputs = small.outputs(network)
    gates = [] if small.gates is None else small.gates(network)
    handles = [
        module.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0]}))
        for modules in outputs for module in modules
    ]  # fmt: skip
    handles += [gate.register_forward_hook(lambda gate, _, value: seen.update({gate: value})) for gate in gates]
    graph.core(injected(graph, strength, model=other))
    for handle in handles:
        handle.remove()
    features = reference_features(graph, small, model, pack_module, layers)
    for index in graph.style.layers:
        (q, k, v), mask, own = noted[layers[index].call]
        of_reference = features[index]
        shown = [each[:, :, of_reference.start :][:, :, : math.prod(of_reference.grid)]
                 for each in (of_reference.k, of_reference.v)]  # fmt: skip
        grid = layers[index].grid(*small.size)
        start = layers[index].picture_start(q.shape[2], grid)
        rows = torch.arange(start, start + math.prod(grid))
        others = torch.tensor([t for t in range(k.shape[2]) if t not in rows], dtype=torch.long)
        logits = q[:, :, rows] @ torch.cat([k[:, :, others], shown[0]], dim=2).transpose(-1, -2) / q.shape[-1] ** 0.5
        if mask is not None:
            logits[..., : len(others)] += mask.expand(1, 1, k.shape[2], -1)[:, :, rows][..., others]
        looked = (logits.softmax(-1) @ torch.cat([v[:, :, others], shown[1]], dim=2)).transpose(1, 2).flatten(2)
        expected = own.transpose(1, 2).flatten(2) if own.ndim == 4 else own.clone()
        assert (looked - expected[:, rows]).abs().max() > 1e-2
        expected[:, rows] += strength * (looked - expected[:, rows])
        found = torch.cat([seen[module] for module in outputs[index]], dim=1)[..., : expected.shape[-1]]
        if gates:
            found = found / seen[gates[index]].sigmoid()
        torch.testing.assert_close(found, expected[:, -found.shape[1] :], rtol=0, atol=2e-5)


@torch.inference_mode()
def reference_features(graph, small, model, pack_module, layers):
    """What the reference has at the first noise level of a run, by the pack's own reading."""
    noise, conditioning = pack_module("attention.noise"), pack_module("attention.conditioning")
    latent = torch.zeros(1, small.channels, *small.size)
    sigma = comfy.samplers.calculate_sigmas(model.model.model_sampling, graph.scheduler, 1)[0]
    reader = pack_module("attention.reader").ReferenceReader(
        model.model, layers, graph.style, conditioning.from_socket(graph.negative), latent
    )
    level = noise.NoiseLevel.of(model.model, float(sigma), latent)
    return reader.read(level, noise.StepNoise(graph.seed), noise.Purpose.STYLE)[0]


def test_injection_into_a_video_is_refused(pack, custom_samplers, random_latent, tmp_path):
    small = small_models.MODELS["Wan 2.1"]
    model, latent = small_models.load(small, tmp_path), {"samples": torch.zeros(1, 16, 2, *small.size)}
    graph = Graph(pack, model, small.cond(1), small.cond(2), latent, steps=1)
    graph = graph.styled(small.as_host(random_latent(1, (1, 16, 10, 8))))
    with pytest.raises(ValueError, match=r"latent_image: shape \[1, 16, 2, 9, 12\] is not a picture"):
        graph.core(injected(graph))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, comfy.model_management.InterruptProcessingException])
def test_an_exit_in_the_middle_of_a_pass(graph, model, error):
    """Out of memory, or Cancel: it passes through, and the model is what it was."""
    plain, network = graph.core(), model.model.diffusion_model
    before = [(name, id(tensor)) for name, tensor in network.state_dict(keep_vars=True).items()]
    passes = 0

    def fail(module, args):
        nonlocal passes
        passes += args[0].requires_grad
        if passes == 2:
            raise error

    handle = network.register_forward_pre_hook(fail)
    with pytest.raises(error):
        graph.ksampler()
    handle.remove()
    assert passes == 2
    assert [(name, id(tensor)) for name, tensor in network.state_dict(keep_vars=True).items()] == before
    assert not comfy.model_management.in_training
    assert torch.equal(graph.core(), plain)


def test_the_gradient_against_finite_differences(pack_module, model, small, random_latent):
    """The whole loss, style and content, in float32; the target is held still, as stopgrad says."""
    objectives, references = pack_module("guidance.objective"), pack_module("attention.reference")
    conditioning, target = pack_module("attention.conditioning"), pack_module("losses.distillation").distillation_target
    network = model.model.diffusion_model
    layers = pack_module("attention.layers").list_layers(network)
    scale = pack_module("guidance.loss_scale").LossScale(
        torch.float32, functools.partial(pack_module("attention.gradient").saved_activations, model.model)
    )
    chosen = tuple(range(len(layers)))
    with pack_module("attention.gradient").differentiable(model.model):
        style, content = (
            references.Reference((references.ReferencePart(random_latent(seed, (1, small.channels, *size)), chosen),))
            for seed, size in ((1, (8, 6)), (2, (8, 8)))
        )
        x = random_latent(5, (1, small.channels, 8, 8)) * 0.18215
        objective = objectives.Objective(
            model.model, layers, style=style, content=content,
            settings=pack_module("guidance.settings").GuidanceSettings(
                content_weight=0.5, content_loss="query_edges"
            ),
            conds=conditioning.from_socket(small.cond(3)), latent=torch.zeros_like(x),
        )  # fmt: skip
        noise = pack_module("attention.noise")
        level = noise.NoiseLevel.of(model.model, model.model.model_sampling.percent_to_sigma(0.5), x)
        sigma, targets = level.sigmas, objective.targets(objective.offer(level, noise.StepNoise(0)))
        gradient, losses = scale.gradient(
            lambda z: objective.losses(objective.features(z, targets), targets), x.clone().requires_grad_()
        )

        def features(x):
            with torch.no_grad():
                return pack_module("attention.capture").capture_features(model.model, x, sigma, targets.conds, layers)

        at_x, window = features(x), targets.windows[0]
        held = {i: target(at_x[i].q, bank.k, bank.v) for i, bank in window.style.items()}

        def loss(x):
            found, q_c, edges = features(x), window.content[0].features, window.content[0].edges
            style = sum((found[i].out - held[i]).abs().double().mean() for i in held)
            apart = {i: edges[i][:, None, :, None] * (found[i].q - q_c[i].q).abs().double() for i in q_c}
            return style + 0.5 * sum(of_layer.mean() for of_layer in apart.values())

        for i, weights in window.content[0].edges.items():
            assert weights.shape[1] == at_x[i].q.shape[2]
            assert weights.mean().item() == pytest.approx(1, abs=0.1), "odd sizes make cells of unlike size"
        assert loss(x) == pytest.approx(losses.total.item(), rel=1e-5)
        for seed in range(2):
            noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
            direction = noise + 2 * gradient / gradient.std()
            slope = (loss(x + 2e-3 * direction) - loss(x - 2e-3 * direction)) / 4e-3
            assert slope == pytest.approx((gradient * direction).sum().item(), rel=1e-2)


def test_a_latent_can_be_optimised_without_text(pack, small, model, graph):
    """AD Optimize Latent makes its own condition of zeros."""
    node = graph._node("ADOptimizeLatent")
    with torch.inference_mode():
        made = node.execute(
            model, graph.style, graph.latent, 1, "noise", 2, "constant", learning_rate=0.05, iterations=1,
            content_weight=0.0, attention_scale=1.0, content_loss="query", start_percent=0.0, end_percent=1.0,
        )[0]["samples"]  # fmt: skip
    assert made.shape == graph.latent["samples"].shape
    assert torch.isfinite(made).all()
    assert made.std() > 0


def test_flux_queries_and_keys_carry_rotary_positions(pack_module, tmp_path):
    """Against the blocks' own projections, turned by hand: pairs of numbers, angle position / 10000^(2i / width)."""
    small = small_models.MODELS["FLUX.1-dev"]
    model = small_models.load(small, tmp_path).model
    conditioning = pack_module("attention.conditioning")
    x, sigma = torch.randn(1, 16, 9, 12), torch.tensor(0.6)
    conds = conditioning.for_pass(
        conditioning.encode(model, conditioning.from_socket(small.cond(3)), x, size=(9, 12)), 0.6, 1
    )
    block = model.diffusion_model.double_blocks[1]
    seen = {}
    for name in ("txt_attn", "img_attn"):
        norm = getattr(block, name).norm
        norm.register_forward_hook(lambda module, inputs, output, name=name: seen.update({name: (*output, inputs[2])}))
    layers = pack_module("attention.layers").list_layers(model.diffusion_model)
    with torch.inference_mode():
        found = pack_module("attention.capture").capture_features(model, x, sigma, conds, layers[1:2])[1]
    positions = torch.zeros(11 + 5 * 6, 3)
    positions[11:, 1:] = torch.cartesian_prod(torch.arange(5.0), torch.arange(6.0))
    angles = torch.cat(
        [positions[:, i : i + 1] / 10000 ** (torch.arange(0, n, 2) / n) for i, n in enumerate((16, 56, 56))], dim=1
    )
    turn = torch.polar(torch.ones_like(angles), angles)
    for i, name in enumerate("qk"):
        unturned = torch.cat([seen["txt_attn"][i], seen["img_attn"][i]], dim=2)
        turned = torch.view_as_real(torch.view_as_complex(unturned.unflatten(-1, (-1, 2)).contiguous()) * turn)
        torch.testing.assert_close(getattr(found, name), turned.flatten(-2), rtol=0, atol=1e-5)
    torch.testing.assert_close(found.v, torch.cat([seen["txt_attn"][2], seen["img_attn"][2]], dim=2))


def test_vector_guidance_and_pooled_prompt_arrive(pack_module, tmp_path):
    """What a condition holds beside its text changes the features of SDXL, SD3 and FLUX."""
    conditioning, capture = pack_module("attention.conditioning"), pack_module("attention.capture").capture_features
    for name, option in (
        ("SDXL", {"width": 2048}),
        ("SDXL refiner", {"aesthetic_score": 1.0}),
        ("SD3", {"pooled_output": torch.ones(1, 32)}),
        ("FLUX.1-dev", {"guidance": 9.0}),
        ("FLUX.1-dev", {"pooled_output": torch.ones(1, 24)}),
    ):
        small = small_models.MODELS[name]
        model = small_models.load(small, tmp_path).model
        layers = pack_module("attention.layers").list_layers(model.diffusion_model)[:1]
        x, ((text, options),) = torch.randn(1, small.channels, 8, 8), small.cond(3)
        found = []
        for cond in ([[text, options]], [[text, {**options, **option}]]):
            encoded = conditioning.encode(model, conditioning.from_socket(copy.copy(cond)), x, size=(8, 8))
            sigma = torch.tensor(model.model_sampling.percent_to_sigma(0.5))
            with torch.inference_mode():
                found.append(capture(model, x, sigma, conditioning.for_pass(encoded, float(sigma), 1), layers)[0].v)
        assert not torch.equal(*found), name


def test_reference_pictures_of_an_edit_model_take_no_part(pack_module, tmp_path):
    small = small_models.MODELS["FLUX.1-dev"]
    model = small_models.load(small, tmp_path).model
    conditioning = pack_module("attention.conditioning")
    ((text, options),) = small.cond(3)
    cond = [[text, {**options, "reference_latents": [torch.zeros(1, 16, 8, 8)]}]]
    encoded = conditioning.encode(model, conditioning.from_socket(cond), torch.zeros(1, 16, 8, 8), size=(8, 8))
    assert "ref_latents" not in encoded[0]["model_conds"]
    assert "reference_latents" in cond[0][1]


@pytest.mark.parametrize("picture", ["reference latents", "Redux mask"])
def test_pictures_of_the_samplers_conditions_take_no_part(pack, custom_samplers, random_latent, tmp_path, picture):
    """The guider's conditions have been encoded with them: the pack's passes are made without."""
    small = small_models.MODELS["FLUX.1-dev"]
    model = small_models.load(small, tmp_path)
    ((text, options),) = small.cond(3)
    tokens = text.shape[1]
    added = {"reference_latents": [torch.randn(1, 16, 8, 8)]} if picture == "reference latents" else {
        "attention_mask": torch.zeros(1, tokens + 16, tokens + 16), "attention_mask_img_shape": (4, 4)}  # fmt: skip
    cond, seen = [[text, {**options, **added}]], {True: set(), False: set()}

    def note(module, args, kwargs):
        found = "ref_latents" in kwargs or kwargs.get("attention_mask") is not None
        seen[torch.is_inference_mode_enabled()].add(found)

    handle = model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    graph = Graph(pack, model, cond, cond, {"samples": torch.zeros(1, 16, 8, 8)}, steps=2, settings={"iterations": 1})
    assert torch.isfinite(graph.styled(random_latent(1, (1, 16, 10, 8))).ksampler()).all()
    handle.remove()
    assert seen == {True: {True}, False: {False}}


def test_image_prompts_of_sdxl(pack, custom_samplers, random_latent, tmp_path):
    """unCLIP conditioning, whose encoding draws noise."""
    small = small_models.MODELS["SDXL"]
    model = small_models.load(small, tmp_path)
    ((text, options),) = small.cond(3)
    image = types.SimpleNamespace(image_embeds=torch.randn(1, 1280))
    prompt = {"clip_vision_output": image, "strength": 1.0, "noise_augmentation": 0.0}
    cond = [[text, {**options, "unclip_conditioning": [prompt]}]]
    graph = Graph(pack, model, cond, cond, {"samples": torch.zeros(1, 4, 8, 8)}, steps=2, settings={"iterations": 1})
    graph = graph.styled(random_latent(1, (1, 4, 8, 8)))
    assert (graph.ksampler() - graph.core()).abs().mean() > 1e-2


@pytest.mark.parametrize("name", small_models.LOADED_COSMOS)
def test_cosmos_and_anima_as_the_loader_knows_them(pack, custom_samplers, random_latent, tmp_path, name):
    """Anima makes one text of two, the other being words of T5: in the denoising, and in the pack's passes."""
    small = small_models.LOADED_COSMOS[name]
    model, ((text, options),) = small_models.load(small, tmp_path), small.cond(3)
    empty = {"samples": torch.zeros(1, 16, 1, 8, 8)}
    graph = Graph(pack, model, small.cond(3), small.cond(3), empty, steps=1, settings={"iterations": 1})
    reference, words = small.as_host(random_latent(1, (1, 16, 8, 8))), [{}]
    if small.without is not None:
        model.model.diffusion_model.llm_adapter = small_models.text_adapter()
        words = [{"t5xxl_ids": torch.tensor([word, 1]), "t5xxl_weights": torch.ones(2)} for word in (3, 4)]
        assert not torch.equal(graph.but(positive=[[text, {**options, **words[0]}]]).core(), graph.core())
    made = [graph.styled(reference, conditioning=[[text, {**options, **more}]]).ksampler() for more in words]
    assert graph.styled(reference).style.layers == small.auto
    assert all(torch.isfinite(picture).all() for picture in made)
    assert all(not torch.equal(picture, graph.core()) for picture in made)
    assert len(made) == 1 or not torch.equal(*made)


def test_content_with_text_of_another_length(graph, small):
    """Where text takes part in attention, the two cannot be compared; a UNet does not mind."""
    text, options = small.cond(4)[0]
    inputs = {"conditioning": [[text[:, 1:], options]]}
    content = graph.capture(small.as_host(torch.zeros(1, small.channels, *small.size)), **inputs)
    if small.outputs in CROSS_ATTENTION:
        assert torch.isfinite(graph.but(content=content, steps=1, iterations=1).ksampler()).all()
    elif small.config not in ("ZImage", "Flux2"):  # they fill up the text
        with pytest.raises(ValueError, match=r"content: its text condition has 10 tokens, the picture's has 11"):
            graph.but(content=content, steps=1).ksampler()


@pytest.mark.parametrize(
    ("name", "changed", "says"),
    [
        ("Wan 2.1", {"model_type": "i2v"}, "Wan image-to-video is not supported, because it needs a video"),
        ("Cosmos-Predict2", {"in_channels": 17}, "Cosmos-Predict2 Video2World is not supported, because it needs a vi"),
        ("Kandinsky 5 Image", {"visual_embed_dim": 132}, "Kandinsky 5 Video is not supported, because it makes vid"),
        ("HunyuanImage 2.1", {"patch_size": [1, 2, 2]}, "HunyuanVideo is not supported, because it makes videos"),
        ("HunyuanImage 2.1", {"time_r_in": torch.nn.Identity()}, r"HunyuanImage 2\.1 distilled is not supported"),
    ],
)
def test_what_is_refused_of_a_class_that_is_read(pack_module, tmp_path, name, changed, says):
    """As the network of such a model has it; unchanged, the class has layers."""
    network = small_models.load(small_models.MODELS[name], tmp_path).model.diffusion_model
    list_layers = pack_module("attention.layers").list_layers
    assert list_layers(network)
    for attribute, value in changed.items():
        setattr(network, attribute, value)
    with pytest.raises(ValueError, match=f"^model: {says}"):
        list_layers(network)


def test_masks_and_regions_leave_text_alone(pack_module):
    """A mask takes away tokens of the picture only; text belongs to every label, and sees all."""
    reference, bank = pack_module("attention.reference"), pack_module("attention.bank")
    features = pack_module("attention.capture").LayerFeatures(
        *[torch.arange(9.0).reshape(1, 1, 9, 1)] * 4, (2, 2), start=3
    )
    mask = torch.zeros(1, 2, 2)
    mask[:, 0] = 1
    part = reference.ReferencePart(torch.zeros(1, 4, 2, 2), (0,), mask=mask)
    labels = torch.tensor([[[0, 1], [1, 1]]])
    pooled = bank.TokenPool([part], [labels], 2).banks([{0: features}])[0]
    assert pooled.k.flatten().tolist() == [0, 1, 2, 3, 4, 7, 8]
    allowed = [of_label.k.flatten().tolist() for of_label in pooled.by_label]
    assert allowed == [[0, 1, 2, 3, 7, 8], [0, 1, 2, 4, 7, 8], [0, 1, 2, 3, 4, 7, 8]]


def test_padding_of_a_prompt_is_not_offered(pack_module):
    reference = pack_module("attention.reference")
    seen = torch.tensor([[False, True, True, True, True]])
    features = pack_module("attention.capture").LayerFeatures(
        *[torch.arange(5.0).reshape(1, 1, 5, 1)] * 4, (2, 2), start=1, seen=seen
    )
    part = reference.ReferencePart(torch.zeros(1, 4, 2, 2), (0,))
    assert pack_module("attention.bank").TokenPool([part]).banks([{0: features}])[0].k.flatten().tolist() == [
        1,
        2,
        3,
        4,
    ]


UNSEEN = "ComfyUI does not let custom nodes see its attention"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pixart.pixartms.PixArtMS", f"PixArt is not supported, because {UNSEEN}"),
        ("hydit.models.HunYuanDiT", f"HunyuanDiT is not supported, because {UNSEEN}"),
        ("ernie.model.ErnieImageModel", f"ERNIE-Image is not supported, because {UNSEEN}"),
        ("hidream_o1.model.HiDreamO1Transformer", "HiDream-O1 is not supported, because it keeps parts of one pass"),
        ("pixeldit.model.PixDiT_T2I", "PixelDiT is not supported, because its gradient would depend on the memory"),
    ],
)
def test_models_that_cannot_be_read(pack_module, name, says):
    """They are refused by name, with the reason; the class is one that this ComfyUI has, if it has the module."""
    module, _, qualname = f"comfy.ldm.{name}".rpartition(".")
    stand_in = type(qualname, (torch.nn.Module,), {"__module__": module})()
    with pytest.raises(ValueError, match=f"^model: {says}"):
        pack_module("attention.layers").list_layers(stand_in)
    if importlib.util.find_spec(module) is not None:
        assert hasattr(importlib.import_module(module), qualname)


def with_pooled(conditioning, pooled):
    """The conditioning with another pooled text; None takes it away."""
    text, options = conditioning[0]
    kept = {name: value for name, value in options.items() if name != "pooled_output"}
    return [[text, kept if pooled is None else {**kept, "pooled_output": pooled}]]


def test_text_of_another_model_is_refused_before_loading(small, model, graph, pack_module, random_latent, monkeypatch):
    """By its width and, where the model cannot do without it, its pooled text; FLUX can, and runs."""
    inputs = pack_module("attention.inputs")
    right, latent = small.cond(1), small.as_host(random_latent(1, (1, small.channels, *small.size)))
    wider = [[torch.zeros(1, 5, small.context[1] + 8), right[0][1]]]
    needed = "SDXL" in small.config or small.config in ("SD3", "KOALA_700M", "HiDream", "Kandinsky5Image")
    with monkeypatch.context() as patch:
        patch.setattr(comfy.model_management, "load_models_gpu", None)
        graph.capture(latent, conditioning=right)
        with pytest.raises(
            ValueError,
            match=f"conditioning: its text is {small.context[1] + 8} wide, this model reads {small.context[1]};",
        ):
            graph.capture(latent, conditioning=wider)
        assert inputs.pooled_width(model.model) == (small.pooled if needed else None)
        if needed:
            with pytest.raises(ValueError, match="conditioning: it has no pooled text, which this model needs"):
                graph.capture(latent, conditioning=with_pooled(right, None))
            with pytest.raises(ValueError, match=rf"pooled text has shape \[1, {small.pooled + 1}\], this model reads"):
                graph.capture(latent, conditioning=with_pooled(right, torch.zeros(1, small.pooled + 1)))
    if not needed:
        graph.styled(latent, conditioning=with_pooled(right, None)).but(steps=1, iterations=1).ksampler()


def test_the_conditions_of_a_sampler(small, model, pack_module):
    """Asked as a guider holds them: the negative ones, or where they have no text the others."""
    inputs, from_socket = pack_module("attention.inputs"), pack_module("attention.conditioning").from_socket
    right, wider = small.cond(1), [[torch.zeros(1, 5, small.context[1] + 8), small.cond(1)[0][1]]]
    for negative in ([], [[None, {}]], right):
        inputs.check_conds(model.model, {"positive": from_socket(right), "negative": from_socket(negative)})
    inputs.check_conds(model.model, {"positive": from_socket(wider), "negative": from_socket(right)})
    for positive, negative, blamed in ((right, wider, "negative"), (wider, [[None, {}]], "positive")):
        with pytest.raises(ValueError, match=rf"^{blamed}: its text is {small.context[1] + 8} wide"):
            inputs.check_conds(model.model, {"positive": from_socket(positive), "negative": from_socket(negative)})
    with pytest.raises(ValueError, match=r"^conditioning: the sampler has no conditioning with text"):
        inputs.check_conds(model.model, {"positive": from_socket([[None, {}]]), "negative": []})


def test_a_latent_with_the_frame_of_another_family(small, graph, random_latent, caplog):
    """One frame too many is refused; one that ComfyUI adds is taken with a warning, an empty latent without."""
    latent = random_latent(1, (1, small.channels, *small.size))
    if small.frame:
        graph.capture(latent)
        (line,) = [message for message in caplog.messages if "has no frame" in message]
        assert line.startswith("Attention distillation: latent: shape [1, 16, 9, 12] has no frame")
        caplog.clear()
        graph.but(latent={"samples": latent}, steps=1, iterations=0, denoise=0.2).ksampler()
        assert "latent_image: shape [1, 16, 9, 12] has no frame" in caplog.text
        caplog.clear()
        graph.but(latent={"samples": torch.zeros_like(latent)}, steps=1, iterations=0).ksampler()
        assert "has no frame" not in caplog.text
    else:
        with pytest.raises(ValueError, match=r"^latent: shape .* is a video of one frame, this model's latents are"):
            graph.capture(latent.unsqueeze(2))
        with pytest.raises(ValueError, match=r"^latent_image: shape .* is a video of one frame"):
            graph.but(latent={"samples": latent.unsqueeze(2)}).ksampler()
