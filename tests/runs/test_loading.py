"""Which patcher is loaded for gradients, and how: whole, never paged, and with room for the backward pass."""

import gc
import logging
import re

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP
from small_models import with_lora
from small_vae import small_kl

GB = 1024**3
SHAPE = (1, 4, 16, 16)  # of the graph's latent


@pytest.fixture
def loading(pack_module):
    return pack_module("attention.gradient.loading")


@pytest.fixture
def memory(pack_module):
    return pack_module("attention.gradient.memory")


class TextEncoder(torch.nn.Module):
    """Of 16 MB, through ComfyUI's own patcher."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2048, 2048, bias=False)


def patcher_of(model):
    device = comfy.model_management.get_torch_device()
    return ModelPatcher(model, load_device=device, offload_device=device)


@pytest.fixture
def others():
    """A text encoder and a VAE, loaded; ComfyUI's list of loaded models is what it was afterwards."""
    before = comfy.model_management.current_loaded_models[:]
    vae, encoder = small_kl().patcher, patcher_of(TextEncoder())
    comfy.model_management.current_loaded_models.clear()
    comfy.model_management.load_models_gpu([vae, encoder])
    yield [vae, encoder]
    comfy.model_management.current_loaded_models[:] = before


def is_loaded(*patchers):
    return [any(one.model is patcher for one in comfy.model_management.current_loaded_models) for patcher in patchers]


@pytest.fixture
def total_memory(monkeypatch):
    """Give the device so much memory, of which ComfyUI's loaded models take their part."""

    def give(total):
        def free(device=None, torch_free_too=False):
            left = total - sum(one.model_loaded_memory() for one in comfy.model_management.current_loaded_models)
            return (left, left) if torch_free_too else left

        monkeypatch.setattr(comfy.model_management, "get_free_memory", free)

    return give


def test_what_stands_in_the_way_of_the_backward_is_unloaded(styled, memory, others, total_memory, caplog):
    """With room for the weights and a forward pass alone; the log says what was reckoned."""
    sizes = [patcher.model_size() for patcher in (*others, styled.model)]
    total_memory(sum(sizes) + comfy.model_management.minimum_inference_memory())
    caplog.set_level(logging.INFO)
    styled.but(steps=1).core()
    assert is_loaded(*others) == [True, True]
    assert memory.activation_bytes(styled.model.model, SHAPE) == 16 * 16 * 4 * memory.ACTIVATION_BYTES
    whole = styled.but(latent={"samples": torch.zeros(1, 4, 16, 48)}, steps=1, iterations=1)
    whole.ksampler()
    assert is_loaded(*others) == [False, False]
    assert any(one.model.is_clone(styled.model) for one in comfy.model_management.current_loaded_models)
    (line,) = [record.message for record in caplog.records if "room for gradients" in record.message]
    needed, weights, free, count = map(float, re.findall(r"[\d.]+", line))
    assert needed == pytest.approx(3 * 16 * 16 * 4 * memory.ACTIVATION_BYTES / GB, abs=0.01)
    assert weights == pytest.approx(sizes[2] / GB, abs=0.01)
    assert free == pytest.approx(comfy.model_management.minimum_inference_memory() / GB + sum(sizes[:2]) / GB, abs=0.01)
    assert count == 2


def test_nothing_is_unloaded_without_need(styled, others, total_memory):
    total_memory(64 * GB)
    styled.but(steps=1, iterations=1).ksampler()
    assert is_loaded(*others) == [True, True]


def test_no_more_is_unloaded_than_needed(sd15, memory, others, total_memory):
    """The model is loaded already, so that its weights need no room: one byte is missing, one layer is unloaded."""
    comfy.model_management.load_models_gpu([sd15])
    sizes = [patcher.loaded_size() for patcher in (*others, sd15)]
    reckoned = memory.activation_bytes(sd15.model, SHAPE)
    needed = reckoned + comfy.model_management.extra_reserved_memory()
    total_memory(sum(sizes) + needed)
    assert memory.make_room(sd15.clone(), reckoned, reckoned, {})
    assert [patcher.loaded_size() for patcher in (*others, sd15)] == sizes
    total_memory(sum(sizes) + needed - 1)
    assert memory.make_room(sd15.clone(), reckoned, reckoned, {})
    after = [patcher.loaded_size() for patcher in (*others, sd15)]
    assert [now < before for now, before in zip(after, sizes, strict=True)].count(True) == 1
    assert after[2] == sizes[2]


def test_what_the_conditions_bring_along_stays(sd15, memory, others, total_memory):
    total_memory(0)
    reckoned = memory.activation_bytes(sd15.model, SHAPE)
    assert not memory.make_room(sd15, reckoned, reckoned, {"positive": [{"additional_models": others[1]}]})
    assert is_loaded(*others) == [False, True]


def test_a_frame_axis_and_a_batch_count(sd15, memory):
    each = memory.activation_bytes(sd15.model, (1, 4, 8, 8))
    assert memory.activation_bytes(sd15.model, (3, 4, 1, 8, 16)) == 6 * each
    assert memory.activation_bytes(sd15.model, (1, 4, 8, 8), "small") == memory.SMALL_SHARE * each


def test_windows_need_the_room_of_a_pass(pack_module, styled, loading, monkeypatch):
    """Not of the whole picture; and of two guidances, one in windows, the whole picture's counts."""
    asked, loaded, windows = [], [], pack_module("guidance.windows").Windows(64, 32, 4)
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda size, *_, **__: asked.append(size) or [])
    comfy.model_management.load_models_gpu([styled.model])
    in_windows, whole = styled.but(windows=windows).patched(), styled.patched()
    both = styled.but(windows=windows, model=whole).patched()
    for patched in (in_windows, whole, both):
        (wrapper,) = patched.get_wrappers(WrappersMP.PREPARE_SAMPLING, loading.KEY)
        wrapper(lambda *_, **options: loaded.append(options["force_full_load"]), patched, (1, 4, 8, 64), {})
    per_pixel = 4 * pack_module("attention.gradient.memory").ACTIVATION_BYTES
    assert asked[1] - asked[0] == (64 - 4 * 8) * 8 * per_pixel
    assert asked[2] == asked[1]
    assert loaded == [True] * 3
    assert windows.largest_pass((9, 4, 1, 8, 64), pixels=8) == (9, 4, 1, 8, 8)
    assert windows.largest_pass((1, 4, 8, 8), pixels=8) == (1, 4, 8, 8)


def asked_of_comfyui(model, loading, memory):
    """The shape, and whether to load all, that ComfyUI is asked for."""
    (wrapper,) = loading.ready_for_gradients(model, memory=memory).get_wrappers(
        WrappersMP.PREPARE_SAMPLING, loading.KEY
    )
    asked = []
    wrapper(lambda _model, shape, _conds, **options: asked.append((shape, options)), model, SHAPE, {})
    ((shape, options),) = asked
    return tuple(shape), options.get("force_full_load", False)


@pytest.mark.parametrize("setting", ["auto", "small", "fast"])
def test_weights_stay_where_they_are_only_if_they_do_not_fit(load_sd15, loading, memory, others, total_memory, setting):
    """Beside the least that a pass can do with. ComfyUI is then asked for the memory of that, by the shape."""
    model = load_sd15()
    least = {"fast": 0}.get(setting, memory.activation_bytes(model.model, SHAPE, "small"))
    fits = model.model_size() + least + comfy.model_management.extra_reserved_memory()
    total_memory(fits)
    assert asked_of_comfyui(model, loading, setting) == (SHAPE, True)
    total_memory(fits - 1)
    (batch, *rest), whole = asked_of_comfyui(model, loading, setting)
    assert (rest, whole) == (list(SHAPE[1:]), False)
    block = memory.largest_block(model.model, lambda block: sum(weight.nbytes for weight in block.parameters()))
    left = [model.model.memory_required([count, *rest]) for count in (batch - 1, batch)]
    assert left[0] < least + block <= left[1]


def test_weights_that_are_cast_for_each_call_count(load_sd15, memory):
    """Autograd saves what they are cast to: of all, or of the largest block, where blocks are run again."""
    plain, model = load_sd15().model, load_sd15().model
    with torch.inference_mode():
        model.half()
    model.manual_cast_dtype = torch.float32
    network, largest = model.diffusion_model, memory.largest_block(model, lambda block: numbers(block))
    assert memory.activation_bytes(model, SHAPE) - memory.activation_bytes(plain, SHAPE) == 4 * numbers(network)
    small = [memory.activation_bytes(each, SHAPE, "small") for each in (plain, model)]
    assert small[1] - small[0] == pytest.approx(4 * largest)
    assert 0 < largest < numbers(network) / 5


def numbers(module):
    return sum(weight.numel() for weight in module.parameters())


def test_a_model_that_was_loaded_in_part_before_is_loaded_whole(pack_module, styled, load_sd15):
    """By a plain run that had little memory; guided, it is the same as ever."""
    streamed = pack_module("attention.gradient.streamed").streamed
    model = load_sd15()
    with torch.inference_mode():
        model.partially_load(model.load_device, 8e6)
    assert 0 < model.loaded_size() < model.model_size()
    assert streamed(model.model)
    graph = styled.but(latent={"samples": torch.zeros(1, 4, 8, 8)}, steps=1, iterations=1)
    assert torch.equal(graph.but(model=model).ksampler(), graph.ksampler())
    assert not streamed(model.model)


def test_weights_on_another_device_are_refused(loading, load_sd15):
    model = load_sd15()
    loading.check_loaded(model)
    model.model.diffusion_model.out[2].to("meta")
    with pytest.raises(ValueError, match=r"model: .* those of diffusion_model.out.2 are on meta"):
        loading.check_loaded(model)


def test_dynamic_vram_reads_the_checkpoint_once(styled, dynamic):
    """Whatever clones are guided, each with its own patches: the picture is that of an ordinary patcher."""
    model, reads = dynamic()
    graph, pictures = styled.but(latent={"samples": torch.zeros(1, 4, 8, 8)}, steps=1, iterations=1), []
    for strength in (1.0, 0.5):
        pictures.append(graph.but(model=with_lora(model, strength)).ksampler())
        assert torch.equal(pictures[-1], graph.but(model=with_lora(styled.model, strength)).ksampler())
    assert not torch.equal(*pictures)
    assert torch.equal(graph.but(model=model).ksampler(), graph.ksampler())
    assert [paged for _, paged in reads] == [False]


def test_the_copy_goes_with_the_model(loading, dynamic):
    """Held as long as the dynamic model lives, for its next clone; not longer."""
    model, reads = dynamic()
    loading.ready_for_gradients(model.clone())
    ((copy, _),) = reads
    gc.collect()
    assert copy() is not None
    assert loading.ready_for_gradients(model.clone()).model is copy()
    del model
    gc.collect()
    assert copy() is None


def test_comfyui_can_unload_what_a_run_has_loaded(styled, dynamic):
    """The guided clone is gone with the run; the patcher that is left knows the weights that are loaded."""
    comfy.model_management.unload_all_models()
    model, reads = dynamic()
    graph = styled.but(model=model, latent={"samples": torch.zeros(1, 4, 8, 8)}, steps=1, iterations=1)
    for _ in range(2):
        graph.ksampler()
        gc.collect()
        (loaded,) = comfy.model_management.current_loaded_models
        real = reads[0][0]()
        assert loaded.model.model is real and real.model_loaded_weight_memory > 0
    comfy.model_management.free_memory(1e30, torch.device("cpu"))
    assert real.model_loaded_weight_memory == 0
    assert len(reads) == 1


def test_a_loader_that_cannot_read_again_is_refused(styled, dynamic):
    model, _ = dynamic()
    model.cached_patcher_init = None
    with pytest.raises(ValueError, match=r"model: .* start ComfyUI with --disable-dynamic-vram, or load the model"):
        styled.but(model=model).patched()


def test_guidance_twice_asks_for_room_once(loading, sd15):
    once = loading.ready_for_gradients(sd15)
    twice = loading.ready_for_gradients(once)
    for patcher, count in ((once, 1), (twice, 2)):
        (wrapper,) = patcher.get_wrappers(WrappersMP.PREPARE_SAMPLING, loading.KEY)
        assert len(wrapper.passes) == count
    assert not sd15.get_wrappers(WrappersMP.PREPARE_SAMPLING, loading.KEY)


@pytest.mark.parametrize(("room", "whole"), [(0, False), (GB * 1000, True)])
def test_copies_on_other_devices_are_loaded_whole_where_they_fit(styled, loading, monkeypatch, room, whole):
    """MultiGPU CFG Split: what has no room on its own device is loaded as ComfyUI would without guidance."""
    copy, seen = styled.model.clone(), []
    copy.load_device = torch.device("cpu:0")

    def free(device=None, torch_free_too=False):
        left = room if device == copy.load_device else 1000 * GB
        return (left, left) if torch_free_too else left

    monkeypatch.setattr(comfy.model_management, "get_free_memory", free)
    model = loading.ready_for_gradients(styled.model)
    model.set_additional_models("multigpu", [copy])
    (prepare,) = model.get_wrappers(WrappersMP.PREPARE_SAMPLING, loading.KEY)
    prepare(lambda *args, **kwargs: seen.append(kwargs.get("force_full_load", False)), model, SHAPE, {})
    assert seen == [whole]
