"""KV injection: against the attention written out, with every sampler, and beside other patches."""

from types import SimpleNamespace

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.samplers
import plain_method as plain
import pytest
import torch
from comfy_extras import nodes_model_advanced, nodes_pag
from passes import watched

import nodes

LAYERS = tuple(range(1, 7))
MASK = torch.zeros(1, 16, 16)
MASK[:, :, 4:11] = 1
LEFT = (torch.arange(20) < 9).float().expand(1, 12, -1)
RAMP = (torch.arange(20) / 16).clamp(max=1) * (torch.arange(12) < 8)[:, None]


@torch.inference_mode()
def injected(graph, strength=1.0, model=None, style=None, **settings):
    """The output of Inject Reference KV."""
    node = nodes.NODE_CLASS_MAPPINGS["ADInjectReferenceKV"]
    settings = {"start_percent": 0.0, "end_percent": 1.0, **settings}
    return node.execute(model or graph.model, style or graph.style, strength=strength, **settings)[0]


@torch.inference_mode()
def calls(graph, model, sampler=None, guider=None):
    """Run a model; (sigma, state, denoised) of each call that the sampler makes, and the picture."""
    noted = []

    def sample_euler(model, x, sigmas, extra_args, callback, disable):
        def note(x, sigma, **kwargs):
            noted.append((float(sigma[0]), x.clone(), model(x, sigma, **kwargs)))
            return noted[-1][2]

        function = sampler or comfy.k_diffusion.sampling.sample_euler
        note.inner_model = model.inner_model
        return function(note, x, sigmas, extra_args=extra_args, callback=callback, disable=True)

    if guider is None:
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(graph.positive, graph.negative)
        guider.set_cfg(graph.cfg)
    return noted, graph.advanced(guider, comfy.samplers.KSAMPLER(sample_euler))


def plain_denoised(graph, references, x, sigma, context, strength, own_attention=None):
    """What the model makes of x when its queries look at the references: hooks on a complete forward pass."""
    unet, model_sigmas = graph.model.model.diffusion_model, graph.model.model.model_sampling.sigmas
    timestep, scale = plain.timestep_of(sigma, model_sigmas), (sigma**2 + 1) ** 0.5
    noises = plain.draw_noises(graph.seed, 0, references, None, plain.Settings(LAYERS, adain=False)).style
    held = [plain.features(unet, plain.noised(r.latent, noise, sigma), timestep, graph.negative[0][0])
            for r, noise in zip(references, noises, strict=True)]  # fmt: skip
    handles, now = [], {}
    attentions = [module for name, module in unet.named_modules() if name.endswith(".attn1")]

    def replace(index, heads):
        k_s, v_s = ([of_one[index][key] for of_one in held] for key in ("k", "v"))

        def hook(module, inputs):
            bias = plain.logit_bias(references, [k.shape[2] for k in k_s], x, now["q"].shape[2], None)
            covered = plain.coverage(references, x, plain.token_grid(*x.shape[-2:], now["q"].shape[2])).flatten(2)
            given, weight = plain.masked_target(now["q"], k_s, v_s, bias, covered)
            given = given.transpose(1, 2).flatten(2)
            own = inputs[0] if own_attention is None else own_attention(now["v"].transpose(1, 2).flatten(2))
            return (own + strength * weight[:, 0] * (given - own),)

        return hook

    for index, attention in enumerate(attentions):
        for name in ("q", "v"):
            handles.append(getattr(attention, f"to_{name}").register_forward_hook(
                lambda module, inputs, output, name=name, heads=attention.heads:
                now.__setitem__(name, plain.split_heads(output, heads))))  # fmt: skip
        if index in LAYERS:
            handles.append(attention.to_out.register_forward_pre_hook(replace(index, attention.heads)))
    try:
        return x - sigma * plain.predict(unet, x / scale, timestep, context)
    finally:
        for handle in handles:
            handle.remove()


CASES = {
    "one reference": ((1, 4, 8, 8), 1.0, 1.0, [{"seed": 1}]),
    "cfg, batch, not square, mixed": ((2, 4, 6, 10), 7.5, 0.6, [{"seed": 1}]),
    "pooled, weighted, masked": (
        (1, 4, 8, 8), 2.0, 1.0,
        [{"seed": 1, "weight": 2.5}, {"seed": 2, "shape": (2, 4, 6, 8)}, {"seed": 3, "mask": MASK}],
    ),
    "a place each, batch, mixed": (
        (2, 4, 6, 10), 7.5, 0.6,
        [{"seed": 1, "target": LEFT}, {"seed": 2, "weight": 2.5, "target": torch.stack([RAMP, RAMP.flip(0)])}],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_each_call_against_attention_written_out(case, graph, random_latent):
    shape, cfg, strength, parts = CASES[case]
    references, style = [], None
    for part in parts:
        latent = random_latent(part["seed"], part.get("shape", (1, 4, 8, 8)))
        options = {key: part[key] for key in ("weight", "mask") if key in part}
        style = graph.capture(latent, reference=style, target_mask=part.get("target"), **options)
        references.append(plain.Reference(latent, **options, target=part.get("target")))
    graph = graph.but(latent={"samples": torch.zeros(shape)}, cfg=cfg, style=style)
    noted, _ = calls(graph, injected(graph, strength))
    plainly, _ = calls(graph, graph.model)
    assert len(noted) == graph.steps
    with torch.inference_mode():
        for (sigma, x, denoised), (_, _, without) in zip(noted, plainly, strict=True):
            positive, negative = (
                plain_denoised(graph, references, x, sigma, cond[0][0], strength)
                for cond in (graph.positive, graph.negative)
            )
            expected = negative + cfg * (positive - negative)
            torch.testing.assert_close(denoised, expected, rtol=0, atol=2e-4 * cfg * max(1, sigma))
            assert (denoised - without).abs().max() > 0.02


def rows_shown(passes):
    """How many pictures of the size being made the network is shown at each noise level, in order."""
    shown = {}
    for one in passes:
        if one.x.shape[-1] == 8:
            shown[one.sigma] = shown.get(one.sigma, 0) + len(one.x)
    return list(shown.values())


@pytest.fixture(scope="module")
def short(graph, random_latent):
    """A graph at 8x8 with a reference of another size, in one step."""
    return graph.but(latent={"samples": torch.zeros(1, 4, 8, 8)}, steps=1).styled(random_latent(1, (1, 4, 8, 10)))


@pytest.mark.parametrize(
    ("strength", "cfg", "rows"),
    [(0.0, 4.0, 2 + 1), (1.0, 4.0, 2 + 1), (1.7, 4.0, 2 + 2), (0.0, 1.0, 1 + 2)],
    ids=["no injection beside it", "over an injection", "beyond the reference", "without cfg"],
)
def test_the_negative_branch(strength, cfg, rows, short):
    """unconditional + cfg (text - unconditional) + s (injected - unconditional), and no call more than that takes."""
    s, graph, references = 1.5, short.but(cfg=cfg), [plain.Reference(_latent_of(short))]
    with watched(graph.model) as passes:
        (((sigma, x, denoised),), _) = calls(graph, injected(graph, strength, negative_strength=s))
    assert rows_shown(passes) == [rows]

    @torch.inference_mode()
    def made(conditioning, strength):
        return plain_denoised(graph, references, x, sigma, conditioning[0][0], strength)

    text, unconditional = (made(each, strength) for each in (graph.positive, graph.negative))
    direction = made(graph.negative, 1.0) - made(graph.negative, 0.0)
    assert s * direction.abs().max() > 0.1 * sigma
    expected = unconditional + cfg * (text - unconditional) + s * direction
    torch.testing.assert_close(denoised, expected, rtol=0, atol=2e-4 * cfg * sigma)


def test_without_a_negative_strength_nothing_more_is_asked(short):
    graph = short.but(cfg=4.0)
    with watched(graph.model) as passes:
        graph.core(injected(graph))
    assert rows_shown(passes) == [2]


def test_the_negative_branch_has_the_range_too(short):
    graph = short.but(cfg=4.0, steps=4)
    with watched(graph.model) as passes:
        graph.core(injected(graph, 0.0, negative_strength=1.0, start_percent=0.3, end_percent=0.7))
    shown = rows_shown(passes)
    assert shown[0] == shown[-1] == 2 and 3 in shown


def basic_guider(graph, model):
    guider = comfy.samplers.CFGGuider(model)
    guider.inner_set_conds({"positive": graph.negative})
    return guider


def dual_guider(graph, model):
    return nodes.NODE_CLASS_MAPPINGS["DualCFGGuider"].execute(
        model, graph.positive, graph.positive, graph.negative, 3.0, 2.0, "nested"
    )[0]


ALONGSIDE = {
    "RescaleCFG": (lambda model: nodes_model_advanced.RescaleCFG().patch(model, 1.0)[0], None),
    "PAG": (lambda model: nodes_pag.PerturbedAttentionGuidance.execute(model, 3.0)[0], None),
    "BasicGuider": (None, basic_guider),
    "DualCFGGuider": (None, dual_guider),
}


@pytest.mark.parametrize("what", ALONGSIDE)
def test_the_negative_branch_comes_once_on_top_of_what_is_there(what, short):
    """Of other nodes and guiders; the direction itself has nothing of them in it."""
    node, guided_by = ALONGSIDE[what]
    graph = short.but(cfg=4.0)
    model = graph.model if node is None else node(graph.model)
    branch = injected(graph, 0.0, model, negative_strength=2.0)
    found = [calls(graph, each, guider=guided_by and guided_by(graph, each))[0][0] for each in (branch, model)]
    (sigma, x, with_branch), (_, _, without) = found
    with torch.inference_mode():
        references, context = [plain.Reference(_latent_of(graph))], graph.negative[0][0]
        on, off = (plain_denoised(graph, references, x, sigma, context, strength) for strength in (1.0, 0.0))
    torch.testing.assert_close(with_branch - without, 2 * (on - off), rtol=0, atol=1e-3 * sigma)


def test_two_negative_branches(short, random_latent):
    """Each has its own reference, and knows nothing of what the other asks the model."""
    graph, latent = short, random_latent(7, (1, 4, 8, 10))
    first = injected(graph, 0.0, negative_strength=2.0)
    both = injected(graph, 0.0, first, graph.capture(latent), negative_strength=3.0)
    (((sigma, x, denoised),), _) = calls(graph, both)
    with torch.inference_mode():
        plainly, context = graph.negative[0][0], graph.positive[0][0]
        off = plain_denoised(graph, [plain.Reference(latent)], x, sigma, plainly, 0.0)
        expected = plain_denoised(graph, [plain.Reference(latent)], x, sigma, context, 0.0)
        for weight, of_one in ((2.0, _latent_of(graph)), (3.0, latent)):
            on = plain_denoised(graph, [plain.Reference(of_one)], x, sigma, plainly, 1.0)
            expected = expected + weight * (on - off)
    torch.testing.assert_close(denoised, expected, rtol=0, atol=2e-3 * sigma)


@pytest.mark.parametrize("block", [("output", 1, 0), ("output", 1)])
def test_what_another_pack_has_put_there_is_called(block, graph, random_latent):
    """A replacement for one transformer or for the whole block counts as the layer's own output."""
    called = []

    def replacement(q, k, v, extra_options):
        called.append(extra_options["n_heads"])
        return v

    small = graph.but(latent={"samples": torch.zeros(1, 4, 8, 8)}).styled(random_latent(1, (1, 4, 8, 8)))
    other = graph.model.clone()
    other.set_model_attn1_replace(replacement, *block)
    alone, _ = calls(small, other)
    count = len(called)
    assert count == small.steps
    both, _ = calls(small, injected(small, 0.3, other))
    assert len(called) == 2 * count
    without, _ = calls(small, injected(small, 0.3))
    assert (both[0][2] - without[0][2]).abs().max() > 0.02
    assert (both[0][2] - alone[0][2]).abs().max() > 0.02


def test_another_packs_output_is_mixed_in(graph, random_latent, pack_module):
    """With v in place of every layer's own attention."""
    latent = random_latent(1, (1, 4, 8, 8))
    small = graph.but(latent={"samples": torch.zeros(1, 4, 8, 8)}).styled(latent)
    other = graph.model.clone()
    layers = pack_module("attention.layers").list_layers(graph.model.model.diffusion_model)
    for index in LAYERS:
        other.set_model_attn1_replace(lambda q, k, v, extra_options: v, *layers[index].block)
    noted, _ = calls(small, injected(small, 0.3, other))
    sigma, x, denoised = noted[0]
    with torch.inference_mode():
        context = small.positive[0][0]
        expected = plain_denoised(small, [plain.Reference(latent)], x, sigma, context, 0.3, lambda v: v)
    torch.testing.assert_close(denoised, expected, rtol=0, atol=2e-4 * sigma)


def test_an_attention_override_stays_in_force(graph, random_latent):
    small = graph.but(latent={"samples": torch.zeros(1, 4, 8, 8)}).styled(random_latent(1, (1, 4, 8, 8)))
    other, seen = graph.model.clone(), []

    def override(func, *args, **kwargs):
        seen.append(args[0].shape)
        return func(*args, **kwargs)

    other.model_options["transformer_options"]["optimized_attention_override"] = override
    calls(small, other)
    without = list(seen)
    calls(small, injected(small, 0.5, other))
    assert seen[len(without) :] == without


@pytest.mark.parametrize(
    "settings", [{"strength": 0.0}, {"start_percent": 0.4, "end_percent": 0.4}, {"end_percent": 0.0}]
)
def test_off_is_bit_identical(settings, styled):
    styled = styled.but(cfg=3.0)
    assert torch.equal(styled.core(injected(styled, **settings)), styled.core())


def test_the_range(styled):
    """Calls outside start_percent and end_percent are those of the model alone."""
    styled = styled.but(steps=4)
    sampling = styled.model.model.model_sampling
    noted, _ = calls(styled, injected(styled, start_percent=0.3, end_percent=0.7))
    reached = [sampling.percent_to_sigma(0.7) < sigma <= sampling.percent_to_sigma(0.3) for sigma, _, _ in noted]
    assert reached[0] is False and any(reached) and reached[-1] is False
    with torch.inference_mode():
        for (sigma, x, denoised), inside in zip(noted, reached, strict=True):
            alone = x - sigma * plain.predict(
                styled.model.model.diffusion_model, x / (sigma**2 + 1) ** 0.5,
                plain.timestep_of(sigma, sampling.sigmas), styled.positive[0][0],
            )  # fmt: skip
            difference = (denoised - alone).abs().max()
            assert difference > 0.02 if inside else difference < 2e-4 * max(1, sigma)


@pytest.mark.parametrize("name", comfy.samplers.SAMPLER_NAMES)
def test_every_sampler(name, graph, random_latent):
    small = graph.but(latent={"samples": torch.zeros(1, 4, 8, 8)}, sampler=name, steps=2)
    small = small.styled(random_latent(1, (1, 4, 8, 8)))
    result = small.core(injected(small))
    assert torch.isfinite(result).all()
    assert (result - small.core()).abs().max() > 0.02


def test_one_seed_one_picture(styled):
    model = injected(styled)
    first = styled.core(model)
    assert torch.equal(styled.core(model), first)
    assert torch.equal(styled.core(injected(styled)), first)
    assert (styled.but(seed=4).core(model) - first).abs().max() > 0.02


def test_a_noise_level_met_again_is_not_read_again(styled, pack_module, monkeypatch):
    """Heun comes to each noise level twice in a row."""
    reader = pack_module("attention.reader").ReferenceReader
    levels, read = [], reader.read
    monkeypatch.setattr(reader, "read", lambda self, level, *of: levels.append(level.sigma) or read(self, level, *of))
    noted, _ = calls(styled, injected(styled), comfy.k_diffusion.sampling.sample_heun)
    assert len(noted) == 2 * styled.steps - 1
    assert levels == pytest.approx(sorted({sigma for sigma, _, _ in noted}, reverse=True))


def test_the_options_of_a_call_are_not_changed(styled):
    """They may be the caller's to use again."""
    model, seen = injected(styled), []
    model.set_model_attn1_replace(lambda q, k, v, extra_options: v, "input", 1)

    def call(apply_model, args):
        options = args["c"]["transformer_options"]
        before = repr((options.keys(), options["patches_replace"]))
        result = apply_model(args["input"], args["timestep"], **args["c"])
        seen.append(repr((options.keys(), options["patches_replace"])) == before)
        return result

    model.set_model_unet_function_wrapper(call)
    styled.core(model)
    assert seen == [True] * styled.steps


def test_nothing_is_left_after_a_run(styled):
    """After a finished and after a cancelled one; the wrappers of the node stay on its clone only."""
    model = injected(styled, negative_strength=1.0)
    plain_result = styled.core()
    before = repr((styled.model.model_options, styled.model.wrappers, model.model_options, model.wrappers))
    styled.core(model)

    def cancel(*args):
        raise comfy.model_management.InterruptProcessingException

    cancelled = injected(styled)
    cancelled.model_options["model_function_wrapper"] = cancel
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        styled.core(cancelled)
    assert repr((styled.model.model_options, styled.model.wrappers, model.model_options, model.wrappers)) == before
    assert not styled.model.wrappers
    assert torch.equal(styled.core(), plain_result)


def test_twice_mixes_the_second_over_the_first(styled, random_latent):
    other = styled.capture(random_latent(7))
    first = injected(styled)
    only_other = styled.core(injected(styled, style=other))
    assert torch.equal(styled.core(injected(styled, 1.0, first, other)), only_other)
    half = styled.core(injected(styled, 0.5, first, other))
    assert (half - only_other).abs().max() > 0.02
    assert (half - styled.core(injected(styled, 0.5, style=other))).abs().max() > 0.02


@pytest.mark.parametrize("injected_first", [True, False])
def test_beside_guidance(injected_first, styled):
    """The guided step takes its own features: it is the plain reading's, from the same state."""
    style = plain.Reference(_latent_of(styled))
    if injected_first:
        model = styled.but(model=injected(styled), iterations=1).patched()
    else:
        model = injected(styled, model=styled.but(iterations=1).patched())
    states = []

    def sample_euler(model, x, sigmas, extra_args, callback, disable):
        for i in range(len(sigmas) - 1):
            before = x.clone()
            denoised = model(x, sigmas[i] * x.new_ones([1]), **extra_args)
            states.append((float(sigmas[i]), before, x.clone(), denoised))
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x

    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(styled.positive, styled.negative)
    styled.advanced(guider, comfy.samplers.KSAMPLER(sample_euler))
    settings = plain.Settings(LAYERS, iterations=1)
    sampling = styled.model.model.model_sampling
    unet = plain.ordinary_copy(styled.model.model.diffusion_model)
    with torch.inference_mode(False):
        for number, (sigma, before, after, denoised) in enumerate(states[1:]):
            scale = (sigma**2 + 1) ** 0.5
            step = plain.guided_step(
                unet, before.clone() / scale, sigma, sampling.sigmas.clone(), styled.negative[0][0], [style],
                plain.draw_noises(styled.seed, number, [style], None, settings), settings,
            )  # fmt: skip
            assert (after / scale - step.after).square().mean().sqrt() < 8e-3
            with torch.no_grad():
                expected = plain_denoised(styled, [style], after, sigma, styled.positive[0][0], 1.0)
            torch.testing.assert_close(denoised.clone(), expected, rtol=0, atol=2e-4 * max(1, sigma))


def _latent_of(graph):
    (part,) = graph.style.parts
    return part.latent


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"strength": 5.5}, r"strength: 5.5 is not allowed; use 0 to 5"),
        ({"strength": float("nan")}, r"strength: nan is not allowed; use 0 to 5"),
        ({"start_percent": 0.6, "end_percent": 0.5}, r"end_percent: 0.5 is not allowed; use 0.6 to 1"),
        ({"negative_strength": -1.0}, r"negative_strength: -1.0 is not allowed; use 0 to 20"),
        ({"negative_strength": 21.0}, r"negative_strength: 21.0 is not allowed; use 0 to 20"),
    ],
)
def test_refuses_settings(settings, says, styled):
    with pytest.raises(ValueError, match=says):
        injected(styled, **settings)


def test_refuses_a_reference_without_weight(graph, random_latent):
    with pytest.raises(ValueError, match="style: every reference in it has weight 0"):
        injected(graph, style=graph.capture(random_latent(1), weight=0.0))


def test_refuses_a_model_that_it_cannot_read(styled):
    model = styled.model.clone()
    model.model = SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1))
    with pytest.raises(ValueError, match="model: Linear is not supported, because this pack does not know its layers"):
        injected(styled, model=model)
