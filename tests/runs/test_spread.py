"""The work of guidance, spread over copies of MultiGPU CFG Split: windows, pooled references, pictures of a batch."""

import gc
import threading
import time
import weakref
from collections import Counter
from typing import NamedTuple

import comfy.model_base
import comfy.model_management
import pytest
import torch
from comfy.model_management import InterruptProcessingException

import nodes as comfy_nodes

multigpu = pytest.importorskip("comfy.multigpu")  # older ComfyUI has none
HALF = torch.zeros(1, 64, 128)
HALF[..., :50] = 1
ANOTHER = torch.device("cpu:0")


class Pass(NamedTuple):
    """A pass of a model: what for, in which thread, of how many pictures, and ComfyUI's flag for training then."""

    model: comfy.model_base.BaseModel
    kind: str
    thread: threading.Thread
    pictures: int
    training: bool


class Passes(list):
    """All passes. `before` is called with each before it is made."""

    def before(self, found):
        """To be replaced."""

    def of(self, kind):
        """How many passes of a kind each model made."""
        return Counter(one.model for one in self if one.kind == kind)


@pytest.fixture
def passes(monkeypatch):
    """The passes of all models; at the end none has left ComfyUI's flag for training behind."""
    found, real = Passes(), comfy.model_base.BaseModel.apply_model

    def noting(model, x, *args, **kwargs):
        reading = "attn1" in kwargs["transformer_options"].get("patches_replace", {})
        kind = ("descent" if torch.is_grad_enabled() else "reading") if reading else "denoising"
        training = comfy.model_management.in_training
        found.append(Pass(model, kind, threading.current_thread(), len(x), training))
        found.before(found[-1])
        return real(model, x, *args, **kwargs)

    monkeypatch.setattr(comfy.model_base.BaseModel, "apply_model", noting)
    yield found
    assert all(one.training == (one.kind != "denoising") for one in found)
    assert not comfy.model_management.in_training


@pytest.fixture
def wide(graph, random_latent):
    """A picture of 8x16, guided by text whose two conditions never go through a model together."""
    graph = graph.but(latent={"samples": torch.zeros(1, 4, 8, 16)}, cfg=3.0, steps=2, iterations=2)
    return graph.but(negative=[[torch.zeros(1, 2, 768), {}]]).styled(random_latent(1, (1, 4, 8, 8)))


@pytest.fixture
def make_windows(pack_module):
    """A function that makes an AD_WINDOWS; sizes in pixels, 8 to a latent pixel. Two lie next to each other."""
    return lambda at_once=1, stride=64: pack_module("guidance.windows").Windows(64, stride, at_once)


def pooled(pack_module, graph, *latents, **inputs):
    """The graph with several style references, of rising weight."""
    parts = [graph.capture(each, weight=1.0 + i, **inputs).parts[0] for i, each in enumerate(latents)]
    return graph.but(style=pack_module("attention.reference").Reference(tuple(parts)))


def test_windows(wide, split, passes, make_windows, random_latent):
    """Each with its own place of the style, of the content and of a noise mask: the same picture to the last bit."""
    latent = {**wide.latent, "noise_mask": 1 - HALF / 2}
    graph = wide.styled(random_latent(1, (1, 4, 8, 8)), target_mask=HALF)
    graph = graph.but(
        windows=make_windows(stride=32), latent=latent, content=wide.capture(random_latent(2, (1, 4, 8, 16)))
    )
    expected = graph.core(graph.patched())
    assert passes.of("descent") == {graph.model.model: 12}
    passes.clear()
    assert torch.equal(graph.core(graph.but(model=split(graph.model)).patched()), expected)
    assert sorted(passes.of("descent").values()) == [4, 8]
    assert len({(one.model, one.thread) for one in passes if one.kind == "descent"}) == 2
    assert passes.of("reading")[graph.model.model] == 2 + 4  # of the style, and of the content in two of the windows


def test_few_windows_are_spread_rather_than_kept_together(wide, split, passes, make_windows):
    """In other batches than on one device, so the same but for rounding; whichever device is slow, to the last bit."""
    graph = wide.but(windows=make_windows(at_once=8), steps=1, iterations=1)
    expected = graph.core(graph.patched())
    assert {one.pictures for one in passes if one.kind == "descent"} == {2}
    passes.clear()
    patched = graph.but(model=split(graph.model)).patched()
    found = graph.core(patched)
    assert sorted(passes.of("descent").values()) == [1, 1]
    assert {one.pictures for one in passes if one.kind == "descent"} == {1}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
    for slow in (True, False):
        passes.before = lambda one, slow=slow: time.sleep(0.02 * ((one.model is graph.model.model) == slow))
        assert torch.equal(graph.core(patched), found)


def test_pooled_references(pack_module, wide, split, passes, random_latent):
    """The readings of three are spread, and pooled in their order: the same picture to the last bit."""
    graph = pooled(pack_module, wide, *(random_latent(i, (1, 4, 8, 8)) for i in (1, 2, 3)))
    expected = graph.core(graph.patched())
    passes.clear()
    assert torch.equal(graph.core(graph.but(model=split(graph.model)).patched()), expected)
    assert sorted(passes.of("reading").values()) == [2, 4]
    assert passes.of("descent") == {graph.model.model: 4}


def test_pictures_of_a_batch(wide, split, passes, random_latent):
    """In other batches than on one device, so the same but for rounding."""
    graph = wide.but(
        latent={"samples": torch.zeros(2, 4, 8, 16)}, content=wide.capture(random_latent(2, (2, 4, 8, 16)))
    )
    expected = graph.core(graph.patched())
    passes.clear()
    found = graph.core(graph.but(model=split(graph.model)).patched())
    assert sorted(passes.of("descent").values()) == [4, 4]
    assert {one.pictures for one in passes if one.kind == "descent"} == {1}
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


def test_frames_of_a_sequence_stay_together(wide, split, passes):
    """Each looks at the one before."""
    graph = wide.but(latent={"samples": torch.zeros(2, 4, 8, 16)}, steps=1, frames=0.5)
    expected = graph.core(graph.patched())
    passes.clear()
    assert torch.equal(graph.core(graph.but(model=split(graph.model)).patched()), expected)
    assert passes.of("descent") == {graph.model.model: 2}


@pytest.fixture
def two_of_a_model(pack_module, load_sd15):
    """A function that makes a run's objective and the same spread over two devices, in float64."""
    models = [load_sd15(torch.float64).model for _ in range(2)]
    objective, spread = pack_module("guidance.objective"), pack_module("guidance.spread")
    pool = multigpu.MultiGPUThreadPool([ANOTHER])

    def make(**inputs):
        layers = pack_module("attention.layers").list_layers
        with pack_module("attention.gradient").differentiable(*models), torch.no_grad():
            own, copied = (objective.Objective(one, layers(one.diffusion_model), **inputs) for one in models)
        return own, spread.Spread(own, [spread.Copy(copied, ANOTHER)], pool)

    yield make
    pool.shutdown()


@pytest.mark.parametrize("kind", ["places", "regions", "everywhere"])
def test_what_belongs_to_a_picture_of_a_batch_goes_with_it(pack_module, two_of_a_model, random_latent, kind):
    """Of three: places, regions, text, content and its mask, noise mask. In float64 there is no rounding to see."""
    reference, run, regions = (
        pack_module(f"{name}") for name in ("attention.reference", "guidance.run", "attention.regions")
    )
    generator, layers = torch.Generator().manual_seed(0), (1, 3, 5)
    masks = torch.zeros(3, 64, 64)
    for i in range(3):
        masks[i, :, 16 * i : 16 * i + 30] = 1
    places = masks if kind == "places" else None
    style = [
        reference.ReferencePart(random_latent(i, (1, 4, 8, 8)), layers, 1.0 + i, target_mask=places) for i in (1, 2)
    ]
    maps = None
    if kind == "regions":
        maps = regions.Regions((masks[:1] > 0).long().expand(2, -1, -1), (masks > 0).long(), 2)
    content = reference.ReferencePart(random_latent(3, (3, 4, 8, 8)), layers, mask=masks.flip(-1))
    text = torch.randn(3, 77, 768, generator=generator, dtype=torch.float64)
    x = random_latent(5, (3, 4, 8, 8)).double() / 2
    own = pack_module("guidance.settings").GuidanceSettings(learning_rate=0.05, content_loss="query_edges")
    objective, spread = two_of_a_model(
        style=reference.Reference(tuple(style)), content=reference.Reference((content,)), settings=own, regions=maps,
        conds=pack_module("attention.conditioning").from_socket([[text, {}]]), latent=torch.zeros_like(x),
    )  # fmt: skip
    made = []
    for spread_over in (None, spread):
        noise = pack_module("attention.noise").StepNoise(0)
        guided = run.GuidedRun(objective, own, noise, [14.6, 2.0], spread=spread_over)
        movable = masks[:, None, ::8, ::8].double() if kind == "everywhere" else None
        made.append((guided.update(x, 2.0, movable), [found.total for found in guided.log.iterations]))
    assert (made[0][0] - x).abs().mean() > 0.02
    assert (made[1][0] - made[0][0]).abs().max() < 1e-9
    assert made[1][1] == pytest.approx(made[0][1], rel=1e-9)


def test_a_loss_scale_that_has_to_change(wide, load_sd15, split, passes, make_windows, monkeypatch, pack_module):
    """It goes on from one window to the next in fp16, and does so on two devices: those made too early are again."""
    monkeypatch.setattr(pack_module("guidance.loss_scale"), "FP16_START", 2.0**32)
    graph = wide.but(model=load_sd15(torch.float16), windows=make_windows(), steps=1, iterations=1)
    expected = graph.core(graph.patched())
    alone = passes.of("descent").total()
    assert alone > 3  # the first window several times, the second once
    passes.clear()
    assert torch.equal(graph.core(graph.but(model=split(graph.model)).patched()), expected)
    assert passes.of("descent").pop(graph.model.model) == alone
    assert len(passes.of("descent")) == 2


class BrokenError(Exception):
    """What a pass raises."""


@pytest.mark.parametrize("what", ["an error", "errors on both", "Cancel"])
def test_what_ends_a_run_leaves_nothing_behind(wide, split, passes, make_windows, what):
    """Neither weights that are not the model's own, nor results that the next run would take for its own."""
    graph = wide.but(windows=make_windows(), steps=1, iterations=1)
    patched = graph.but(model=split(graph.model)).patched()
    expected = graph.core(patched)
    models = [graph.model.model, *(clone.model for clone in patched.get_additional_models_with_key("multigpu"))]
    assert len(passes.of("descent")) == 2
    weights = [[id(weight) for weight in model.parameters()] for model in models]

    def fail(found):
        if found.kind != "descent" or (found.model is models[0] and what != "errors on both"):
            return
        if what == "Cancel":
            comfy.model_management.interrupt_current_processing()
            comfy.model_management.throw_exception_if_processing_interrupted()
        raise BrokenError(str(models.index(found.model)))

    passes.before = fail
    with pytest.raises(InterruptProcessingException if what == "Cancel" else BrokenError) as raised:
        graph.core(patched)
    assert what == "Cancel" or str(raised.value) == ("0" if what == "errors on both" else "1")
    assert not comfy.model_management.in_training
    assert [[id(weight) for weight in model.parameters()] for model in models] == weights
    assert not any("_worker_loop" in thread.name for thread in threading.enumerate())
    passes.before = lambda found: None
    assert torch.equal(graph.core(patched), expected)


def test_the_model_is_put_back_when_all_are_done(wide, split, passes, make_windows):
    """Cancel comes while another device is still at work."""
    graph = wide.but(windows=make_windows(), steps=1, iterations=1)
    patched = graph.but(model=split(graph.model)).patched()
    cancelled, still = threading.Event(), []

    def cancel(found):
        if found.kind == "descent" and found.model is graph.model.model:
            cancelled.set()
            raise InterruptProcessingException
        if found.kind == "descent":
            cancelled.wait(10)
            time.sleep(0.2)
            still.append(comfy.model_management.in_training)

    passes.before = cancel
    with pytest.raises(InterruptProcessingException):
        graph.core(patched)
    assert still == [True]


@pytest.fixture
def another_copy(load_sd15):
    """A patcher of a model of its own, on the other device."""
    patcher = load_sd15()
    patcher.load_device = ANOTHER
    return patcher


def paged(patcher, monkeypatch):
    """As ComfyUI marks a model that dynamic VRAM has read."""
    patcher.model.dynamic_vbars = {}


def streaming(patcher, monkeypatch):
    """As ComfyUI marks a layer whose weights it has not loaded."""
    patcher.model.diffusion_model.out[2].prev_comfy_cast_weights = False


def elsewhere(patcher, monkeypatch):
    """A weight that another node has moved."""
    with torch.inference_mode():
        patcher.model.diffusion_model.out[2].to("meta")


def full(patcher, monkeypatch):
    """Another device without memory."""
    real = comfy.model_management.get_free_memory

    def free(device, torch_free_too=False):
        if device != ANOTHER:
            return real(device, torch_free_too)
        return (1000, 1000) if torch_free_too else 1000

    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)


@pytest.mark.parametrize(
    ("state", "why"),
    [(None, None), (paged, "dynamic-vram"), (streaming, "all weights"), (elsewhere, "all weights"), (full, "backward")],
)
def test_copies_that_can_do_no_backward(pack_module, sd15, another_copy, monkeypatch, caplog, state, why):
    """They are left out, and the log says why."""
    caplog.set_level("INFO")
    options = {"multigpu_clones": {sd15.load_device: sd15, ANOTHER: another_copy}, "multigpu_thread_pool": None}
    if state is not None:
        state(another_copy, monkeypatch)
    found = pack_module("attention.gradient").copies_for_gradients(sd15.model, options, (1, 4, 8, 8))
    assert found == ([another_copy] if state is None else [])
    lines = [record.message for record in caplog.records if "does no updates" in record.message]
    assert [why in line for line in lines] == ([] if state is None else [True])
    assert all(str(ANOTHER) in line for line in lines)


def test_paged_copies_are_read_again(wide, split, passes, make_windows, dynamic):
    """With dynamic VRAM, on every device, once each; the picture is that of one device without it."""
    graph = wide.but(windows=make_windows(), steps=1, iterations=1)
    expected = graph.core(graph.patched())
    passes.clear()
    model, reads = dynamic()
    on_two = split(model)
    (copy,) = on_two.get_additional_models_with_key("multigpu")
    assert torch.equal(graph.core(graph.but(model=on_two).patched()), expected)
    assert sorted(passes.of("descent").values()) == [1, 1]
    assert all(one.model not in (model.model, copy.model) for one in passes)
    assert torch.equal(graph.but(model=on_two).ksampler(), expected)
    assert [paged for _, paged in reads] == [True, False, False]
    assert on_two.get_additional_models_with_key("multigpu") == [copy]  # the node's own output is left alone


def test_a_copy_made_of_a_guided_model_is_read_again(wide, split, passes, make_windows, dynamic):
    """It is paged though the model that it is made of is not; and so it is once another node has paged it again."""
    graph = wide.but(windows=make_windows(), steps=1, iterations=1)
    model, _ = dynamic()
    on_two = split(graph.but(model=model).patched())
    for _ in range(2):
        graph.core(on_two)
        assert sorted(passes.of("descent").values()) == [1, 1]
        passes.clear()
        (copy,) = on_two.get_additional_models_with_key("multigpu")
        copy.model.dynamic_vbars = {}


def test_copies_without_work_are_not_read_again(wide, split, dynamic):
    """One picture in one piece; and AD Optimize Latent."""
    model, reads = dynamic()
    on_two = split(model)
    graph = wide.but(model=on_two, latent={"samples": torch.zeros(1, 4, 8, 8)}, steps=1, iterations=1)
    graph.core(graph.patched())
    comfy_nodes.NODE_CLASS_MAPPINGS["ADOptimizeLatent"].execute(
        model=on_two, style=graph.style, latent_image=graph.latent, seed=1, start_from="noise", steps=1,
        learning_rate=0.1, iterations=1, content_weight=0.0, attention_scale=1.0, content_loss="query",
        lr_schedule="constant", conditioning=graph.positive,
    )  # fmt: skip
    assert [paged for _, paged in reads] == [True, False]


@pytest.mark.parametrize("paged", [True, False])
def test_comfyui_can_unload_copies_after_a_run(wide, split, make_windows, dynamic, load_sd15, paged):
    """The guided clone that they were matched to is gone with the run; what is left knows their weights."""
    comfy.model_management.unload_all_models()
    model = dynamic()[0] if paged else load_sd15()
    if not paged:
        model.cached_patcher_init = (lambda name: load_sd15(), ("small_sd15",))
    graph = wide.but(model=split(model), windows=make_windows(), steps=1, iterations=1)
    graph.ksampler()
    gc.collect()
    loaded = list(comfy.model_management.current_loaded_models)
    assert {one.device for one in loaded} == {torch.device("cpu"), ANOTHER}
    models = [one.model.model for one in loaded]
    assert all(one.model_loaded_weight_memory > 0 for one in models)
    for device in (torch.device("cpu"), ANOTHER):
        comfy.model_management.free_memory(1e30, device)
    assert all(one.model_loaded_weight_memory == 0 for one in models)


def test_what_was_read_of_references_is_gone_while_the_picture_moves(pack_module, wide, split, passes, random_latent):
    """A thread of ComfyUI keeps what it has given back until its next work is done."""
    latent = {"samples": torch.zeros(1, 4, 8, 8)}
    graph = pooled(pack_module, wide.but(latent=latent, steps=1, iterations=1), *(random_latent(i) for i in (1, 2)))
    captured, kept, alive = pack_module("attention.capture"), [], []
    passes.before = lambda one: alive.append(one.kind == "descent" and any(feature() is not None for feature in kept))
    real = captured.LayerFeatures.__init__

    def noting(self, *args, **kwargs):
        real(self, *args, **kwargs)
        if threading.current_thread() is not threading.main_thread():
            kept.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captured.LayerFeatures, "__init__", noting)
        graph.core(graph.but(model=split(graph.model)).patched())
    assert kept and alive and not any(alive)


def test_without_such_copies_the_model_works_alone(wide, split, passes, make_windows, monkeypatch):
    """The copy goes on to denoise."""
    graph = wide.but(windows=make_windows(), steps=1, iterations=1)
    expected = graph.core(graph.patched())
    patched = graph.but(model=split(graph.model)).patched()
    passes.clear()
    full(None, monkeypatch)
    assert torch.equal(graph.core(patched), expected)
    assert passes.of("descent") == {graph.model.model: 2}
    assert len(passes.of("denoising")) == 2
