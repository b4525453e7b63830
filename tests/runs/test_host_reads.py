"""How often a run waits for the device: within a step only where it could not go on without, and listed here."""

from collections import Counter
from types import SimpleNamespace

import comfy.samplers
import pytest
import small_models
import torch
from comfy_extras.nodes_differential_diffusion import DifferentialDiffusion
from guided import Graph
from host_reads import counted
from passes import watched
from recorder import Recorder, run_with, schedule

import nodes

CALL = "guidance/states.py call"
"""By the noise level of its call a sampler's state is known from a trial point; asked before the model is."""

OBSERVE = "guidance/descent.py observe"
"""The losses of an update and whether they are finite, after the last of its iterations."""

MASK = "guidance/run.py _windows_that_move"
"""Which windows a mask lets move, where it is another one at each step: the others cost no pass."""

SCALE = "guidance/loss_scale.py gradient"
"""fp16: a gradient that has overflowed is asked for again at another scale."""

CONDS = "guidance/windowed_model.py _by_window"
"""Which windows a prompt with a mask or an area counts in: the others cost no pass."""

SEEN = "attention/bank.py _read_seen"
"""Which tokens a model with padded prompts lets be looked at, once for all layers."""

INJECTION = "guidance/injection_run.py __call__"
"""The noise level that the reference is to be read at; asked before the model is."""

SHAPE = (1, 4, 8, 8)


@pytest.fixture(scope="module")
def small(pack, tmp_path_factory, random_latent, custom_samplers):
    """A guided graph with AdaIN on the smallest UNet."""
    made = small_models.MODELS["SD2, v-prediction"]
    model = small_models.load(made, tmp_path_factory.mktemp("small"))
    return Graph(pack, model, made.cond(1), made.cond(2), {"samples": torch.zeros(SHAPE)}).styled(
        random_latent(1, SHAPE)
    )


def node(name, **inputs):
    """The output of one of the pack's nodes."""
    with torch.inference_mode():
        return nodes.NODE_CLASS_MAPPINGS[name].execute(**inputs)[0]


def left_half(height, width):
    mask = torch.zeros(1, height, width)
    mask[..., : width // 2] = 1
    return mask


def masked(graph):
    return graph.but(latent={**graph.latent, "noise_mask": left_half(64, 64)})


def windowed(graph):
    return graph.but(windows=node("ADWindows", size=48, stride=16))


def differential(graph):
    return masked(graph.but(model=DifferentialDiffusion.execute(graph.model, 1.0)[0]))


def masked_text(graph):
    (text, options), *_ = graph.positive
    return windowed(graph).but(positive=[[text, {**options, "mask": left_half(8, 8), "mask_strength": 1.0}]], cfg=3.0)


def regions(graph):
    labels = left_half(64, 64)[..., None].expand(-1, -1, -1, 3)
    return graph.but(regions=node("ADRegions", reference_labels=labels, target_labels=labels.flip(2)))


def with_content(graph, **inputs):
    latent = torch.randn(SHAPE, generator=torch.Generator().manual_seed(2))
    return graph.but(content=graph.capture(latent, **inputs), content_weight=0.5)


# What is done to the graph, and what is read for each step beside `CALL` and `OBSERVE`.
FEATURES = {
    "style": (lambda graph: graph, {}),
    "cfg and a batch": (lambda graph: graph.but(cfg=5.0, latent={"samples": torch.zeros(2, *SHAPE[1:])}), {}),
    "query, masked": (lambda graph: with_content(graph, mask=left_half(64, 64)), {}),
    "query_key": (lambda graph: with_content(graph).but(content_loss="query_key"), {}),
    "query_edges": (lambda graph: with_content(graph).but(content_loss="query_edges"), {}),
    "query_key_value": (lambda graph: with_content(graph).but(content_loss="query_key_value"), {}),
    "regions": (regions, {}),
    "blocks run again": (lambda graph: graph.but(memory="small"), {}),
    "windows": (windowed, {}),
    "a mask": (masked, {}),
    "a mask and windows": (lambda graph: windowed(masked(graph)), {}),
    "a mask of each step": (differential, {MASK: 1}),
    "a masked prompt in windows": (masked_text, {CONDS: 1}),
}


@pytest.mark.parametrize("feature", FEATURES)
def test_a_step_more_and_an_iteration_more(small, feature):
    """What is read once a run falls out of the difference; iterations read nothing."""
    change, more = FEATURES[feature]
    graph = change(small)
    with counted() as few:
        graph.but(steps=2, iterations=1).ksampler()
    with counted() as many:
        graph.but(steps=3, iterations=3).ksampler()
    assert many - few == Counter({CALL: 1, OBSERVE: 1, **more})
    assert not few - many


def sample_unknown(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Euler as another pack would write it."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


UNKNOWN = {
    "guidance/other_packs.py _check_step",  # which step the sampler says that it is in
    "guidance/shadows.py arrived",  # whether it goes on from the picture that was updated
    "guidance/shadows.py cast",  # whether the update has moved anything
    "guidance/shadows.py measure",
}
"""Of samplers that are not ComfyUI's it is asked at each step, and an answer later would be too late to stop there."""


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m_sde", "uni_pc", "dpm_fast", "dpmpp_2s_ancestral"])
def test_samplers(small, pack_module, name):
    with watched(small.model) as passes, counted() as reads:
        run_with(Recorder(), small, name, pack_module, schedule(small, "normal", steps=4))
    assert len(passes) >= 3
    assert reads == Counter({CALL: len(passes), "guidance/states.py __init__": 1})


def test_dpm_adaptive(small, pack_module):
    recorder = Recorder()
    with watched(small.model) as passes, counted() as reads:
        run_with(recorder, small, "dpm_adaptive", pack_module, schedule(small, "normal", steps=4))
    accepted = {"guidance/states.py updating": len(recorder.states)}  # the noise level of each
    assert reads == Counter({CALL: len(passes), "guidance/states.py __init__": 1, **accepted})


def test_samplers_of_other_packs(small, pack_module):
    """Each of these places at most once a step."""
    sampler, steps = comfy.samplers.KSAMPLER(sample_unknown), 5
    with counted() as reads:
        run_with(Recorder(0.1, range(9)), small, sampler, pack_module, schedule(small, "normal", steps))
    assert reads.pop(CALL) == steps
    assert reads.pop("guidance/states.py __init__") == 1
    assert reads.keys() == UNKNOWN
    assert max(reads.values()) <= steps


def test_optimisation(small):
    inputs = {
        "seed": 3, "start_from": "noise", "learning_rate": 0.05, "content_weight": 0.0, "attention_scale": 1.0,
        "content_loss": "query", "lr_schedule": "constant",
    }  # fmt: skip
    latent = masked(small).latent
    reads = []
    for steps, iterations in ((2, 1), (3, 3)):
        with counted() as found:
            node("ADOptimizeLatent", model=small.model, style=small.style, latent_image=latent, steps=steps,
                 iterations=iterations, **inputs)  # fmt: skip
        reads.append(found)
    assert reads[1] - reads[0] == Counter({OBSERVE: 1})


def test_injection(small):
    inputs = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    model = node("ADInjectReferenceKV", model=small.model, style=small.style, **inputs)
    with counted() as few:
        small.but(steps=2).core(model)
    with counted() as many:
        small.but(steps=3).core(model)
    assert many - few == Counter({INJECTION: 1})


def test_padded_prompts(pack_module):
    """Two references on four layers, in each of which the model hides tokens of its own from sight."""
    features, part = pack_module("attention.capture").LayerFeatures, pack_module("attention.reference").ReferencePart
    of_layer, layers = torch.randn(1, 2, 20, 8), (0, 1, 2, 5)
    seen = {index: torch.arange(20)[None] != index for index in layers}
    of_part = {index: features(*[of_layer] * 4, (4, 4), 4, seen[index]) for index in layers}
    pool = pack_module("attention.bank").TokenPool([part(torch.zeros(SHAPE), layers)] * 2)
    pool.banks([of_part, of_part])
    with counted() as reads:
        banks = pool.banks([of_part, of_part])
    assert reads == Counter({SEEN: 1})
    for index, bank in banks.items():
        shown = of_layer[:, :, seen[index][0]]
        assert torch.equal(bank.k, torch.cat([shown, shown], dim=-2))


def test_fp16(pack_module):
    """A scale has to be found, so each gradient is looked at; without one none is."""
    scale = pack_module("guidance.loss_scale").LossScale
    for dtype, count in ((torch.float16, 3), (torch.bfloat16, 0), (torch.float32, 0)):
        found, z = scale(dtype), torch.ones(4, requires_grad=True)
        with counted() as reads:
            for _ in range(3):
                found.gradient(lambda z: SimpleNamespace(total=z.square().sum()), z)
        assert reads == Counter({SCALE: count} if count else {})
