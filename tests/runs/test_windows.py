"""Windows: pictures larger than the model's native size, against a plain loop over windows."""

from dataclasses import replace

import comfy.controlnet
import comfy.model_management
import comfy.samplers
import plain_method as plain
import pytest
import torch
from steps import RMS_TOLERANCE, recording_euler

import nodes as comfy_nodes

DENOISED_TOLERANCE = 1e-3  # float32 in two orders of summation; the values are near 10


@pytest.fixture
def make_windows(pack_module):
    """A function that makes an AD_WINDOWS; sizes in pixels, 8 to a latent pixel."""
    return pack_module("guidance.windows").Windows


def corners(length: int, size: int, stride: int) -> list[int]:
    """Where windows begin, written plainly: step by step until one reaches the border, which the last one touches."""
    found = [0]
    while found[-1] + size < length:
        found.append(min(found[-1] + stride, length - size))
    return found


def crops(height: int, width: int, size: int, stride: int) -> list[tuple[slice, slice]]:
    """The windows of a picture as slices of its last two axes, latent pixels."""
    rows, columns = corners(height, size, stride), corners(width, size, stride)
    return [(slice(y, y + size), slice(x, x + size)) for y in rows for x in columns]


def average(like: torch.Tensor, pieces: list[tuple[tuple[slice, slice], torch.Tensor]]) -> torch.Tensor:
    """The plain average of overlapping pieces, [b c h w]."""
    total, count = torch.zeros_like(like), torch.zeros_like(like)
    for (rows, columns), piece in pieces:
        total[..., rows, columns] += piece
        count[..., rows, columns] += 1
    return total / count


@pytest.mark.parametrize(
    ("length", "size", "stride", "starts"),
    [
        (64, 64, 8, (0,)),
        (40, 64, 8, (0,)),
        (65, 64, 8, (0, 1)),
        (80, 64, 8, (0, 8, 16)),
        (21, 8, 4, (0, 4, 8, 12, 13)),
        (20, 8, 8, (0, 8, 12)),
        (3, 1, 1, (0, 1, 2)),
    ],
)
def test_where_windows_begin(pack_module, length, size, stride, starts):
    assert pack_module("guidance.windows").window_starts(length, size, stride) == starts


@pytest.mark.parametrize(
    ("height", "width", "count"), [(64, 192, 17), (192, 64, 17), (64, 64, 1), (30, 50, 1), (71, 65, 4), (40, 100, 6)]
)
def test_windows_cover_the_picture(make_windows, height, width, count):
    """One axis, both, neither; odd sizes; windows larger than the picture. All windows have one size."""
    layout = make_windows(512, 64).place(height, width, 8)
    assert len(layout.windows) == count
    assert layout.is_whole == (count == 1)
    picture = torch.zeros(height, width)
    for window in layout.windows:
        assert window.of(picture).shape == (min(64, height), min(64, width))
        window.of(picture).add_(1)
    assert picture.min() == 1 or count > 1
    assert picture.min() >= 1


@pytest.mark.parametrize("resolution", [(10, 21), (80, 168), (30, 50), (5, 7)])
def test_maps_are_cut_like_the_picture(make_windows, resolution):
    """A mask or label map of any resolution: each latent pixel of a window sees what it sees in the whole picture."""
    layout = make_windows(64, 32).place(10, 21, 8)
    rows, columns = resolution
    image = torch.arange(rows * columns, dtype=torch.float32).reshape(1, 1, rows, columns)
    on_latent = torch.nn.functional.interpolate(image, (10, 21), mode="nearest")
    for window in layout.windows:
        seen = torch.nn.functional.interpolate(layout.of_map(window, image), (8, 8), mode="nearest")
        assert torch.equal(seen, window.of(on_latent))


CASES = {
    "adain, cfg 7.5": ({"cfg": 7.5}, (1, 4, 10, 13)),
    "no adain, panorama": ({"adain": False}, (1, 4, 8, 19)),
    "batch of 2, content": ({"content_loss": "query_edges"}, (2, 4, 13, 8)),
    "regions": ({}, (1, 4, 9, 14)),
}


def build(case, graph, random_latent, pack_module):
    """A graph for a case, and the plain reading's reference, content, settings and target labels for the same."""
    changes, shape = CASES[case]
    reference, content, labels = plain.Reference(random_latent(10)), None, None
    graph = graph.styled(reference.latent).but(latent={"samples": torch.zeros(shape)}, **changes)
    if "content" in case:
        content = random_latent(20, (1, *shape[1:]))
        graph = graph.but(content=graph.capture(content))
    if case == "regions":
        labels = (torch.arange(shape[3]) >= 7).long().expand(shape[2], -1)
        reference = replace(reference, labels=(torch.arange(16) >= 5).long()[:, None].expand(-1, 16))
        regions = pack_module("attention.regions").Regions(reference.labels[None], labels[None], 2)
        graph = graph.but(regions=regions)
    settings = plain.Settings(
        layers=tuple(range(1, 7)), adain=changes.get("adain", True), content_weight=0.25 if content is not None else 0,
        content_loss=changes.get("content_loss", "query"),
    )  # fmt: skip
    return graph, reference, content, settings, labels


def plain_step(unet, z, sigma, model_sigmas, reference, noises, settings, content, labels, windows):
    """A guided step in windows: each is updated on its own from the same z, [b 4 h w] in model space."""
    pieces, edges = [], None if content is None else plain.edges_of(plain.LATENT_SCALE * content)
    for rows, columns in windows:
        own = noises if content is None else replace(noises, content=noises.content[..., rows, columns])
        step = plain.guided_step(
            unet, z[..., rows, columns], sigma, model_sigmas, torch.zeros(1, 77, 768), [reference], own, settings,
            None if content is None else content[..., rows, columns], None if labels is None else labels[rows, columns],
            edges=None if edges is None else edges[..., rows, columns],
        )  # fmt: skip
        pieces.append(((rows, columns), step.after))
    return average(z, pieces)


@pytest.mark.parametrize("case", CASES)
def test_each_step_matches_a_plain_loop_over_windows(case, graph, random_latent, pack_module, make_windows):
    graph, reference, content, settings, labels = build(case, graph, random_latent, pack_module)
    graph = graph.but(windows=make_windows(64, 32, 4), steps=2)
    states = []
    result = graph.guider(recording_euler(states))
    model = graph.model.model
    unet, model_sigmas = plain.ordinary_copy(model.diffusion_model), model.model_sampling.sigmas.clone()
    states[-1] = (*states[-1][:2], model.process_latent_in(result))
    windows = crops(*result.shape[-2:], 8, 4)
    with torch.inference_mode(False):
        for number, (sigma, before, after) in enumerate(states[1:]):
            scale = (max(sigma, float(model_sigmas[0])) ** 2 + 1) ** 0.5
            noises = plain.draw_noises(graph.seed, number, [reference], content, settings)
            expected = plain_step(
                unet, before.clone() / scale, sigma, model_sigmas, reference, noises, settings, content, labels, windows
            )
            rms = (after.clone() / scale - expected).square().mean().sqrt()
            assert rms < RMS_TOLERANCE, f"sigma {sigma}: rms {rms}"


def first_denoised(graph):
    """What the model makes of the initial noise: (x, sigma, denoised), k-diffusion space."""
    seen = []

    def sample_euler(model, x, sigmas, extra_args, callback, disable):
        seen.extend((x.clone(), float(sigmas[0]), model(x, sigmas[:1].expand(x.shape[0]), **extra_args)))
        return x

    graph.but(steps=1, iterations=1).guider(comfy.samplers.KSAMPLER(sample_euler))
    return seen


@pytest.mark.parametrize(("shape", "at_once"), [((1, 4, 10, 21), 8), ((1, 4, 9, 13), 1), ((2, 4, 8, 21), 6)])
def test_denoising_is_the_average_of_windows(styled, make_windows, shape, at_once):
    graph = styled.but(latent={"samples": torch.zeros(shape)}, windows=make_windows(64, 32, at_once), cfg=7.5)
    x, sigma, denoised = first_denoised(graph)
    model = graph.model.model
    sigmas, unet = model.model_sampling.sigmas, model.diffusion_model
    with torch.inference_mode():
        pieces = [
            (crop, plain.denoise(unet, x[(..., *crop)], sigma, sigmas, 7.5, graph.positive[0][0], graph.negative[0][0]))
            for crop in crops(*shape[-2:], 8, 4)
        ]
    assert (denoised - average(x, pieces)).abs().max() < DENOISED_TOLERANCE
    whole = first_denoised(graph.but(windows=None))[2]
    assert (denoised - whole).abs().max() > 10 * DENOISED_TOLERANCE


def test_masks_areas_and_strengths_of_conditions(styled, make_windows, encode_random):
    """Three prompts: everywhere, by a soft mask, and in an area; the last begins only later and does not count."""
    mask = torch.linspace(0, 1, 20).expand(1, 8, 20)
    options = [
        {"strength": 0.5},
        {"mask": mask, "mask_strength": 0.8},
        {"area": (8, 8, 0, 0), "strength": 2.0},
        {"start_percent": 0.5},
    ]
    positive = [[encode_random(30 + i)[0][0], option] for i, option in enumerate(options)]
    latent = {"samples": torch.zeros(1, 4, 8, 20)}
    graph = styled.but(positive=positive, latent=latent, windows=make_windows(64, 48, 2))
    x, sigma, denoised = first_denoised(graph)
    area = torch.zeros(8, 20)
    area[:, :8] = 2.0
    area[:, 7] = 1.0  # ComfyUI softens the last quarter of an area that ends inside the picture, here two columns
    weights = [torch.full((8, 20), 0.5), 0.8 * mask[0], area]
    model = graph.model.model
    sigmas, unet = model.model_sampling.sigmas, model.diffusion_model
    pieces = []
    with torch.inference_mode():
        for rows, columns in crops(8, 20, 8, 6):
            outs = [
                weight[rows, columns]
                * plain.denoise(unet, x[..., rows, columns], sigma, sigmas, 1.0, text, graph.negative[0][0])
                for weight, (text, _) in zip(weights, positive, strict=False)
            ]
            pieces.append(((rows, columns), sum(outs) / sum(weights)[rows, columns]))
    assert (denoised - average(x, pieces)).abs().max() < DENOISED_TOLERANCE


def test_batched_windows_are_windows_one_by_one(pack_module, sd15_float64, random_latent, encode_zeros, make_windows):
    """In float64, to the last digits: with content, half masked, so that some windows have none of it."""
    reference, run = pack_module("attention.reference"), pack_module("guidance.run")
    model, layers = sd15_float64.model, tuple(range(1, 7))
    mask = torch.zeros(1, 64, 128)
    mask[..., :40] = 1
    own = pack_module("guidance.settings").GuidanceSettings(learning_rate=0.05)
    conds = pack_module("attention.conditioning").from_socket([[encode_zeros()[0][0].double(), {}]])
    x = random_latent(5, (1, 4, 8, 16)).double() * 0.18215 * 3
    results = []
    for at_once in (1, 2, 8):
        with pack_module("attention.gradient").differentiable(model), torch.no_grad():
            objective = pack_module("guidance.objective").Objective(
                model, pack_module("attention.layers").list_layers(model.diffusion_model),
                style=reference.Reference((reference.ReferencePart(random_latent(1), layers),)),
                content=reference.Reference(
                    (reference.ReferencePart(random_latent(2, (1, 4, 8, 16)), layers, mask=mask),)
                ),
                settings=own, conds=conds, latent=torch.zeros_like(x),
            )  # fmt: skip
        noise = pack_module("attention.noise").StepNoise(0)
        guided = run.GuidedRun(objective, own, noise, [14.6, 2.0], make_windows(64, 32, at_once))
        results.append((guided.update(x, 2.0), [found.total for found in guided.log.iterations]))
    assert (results[0][0] - x).abs().mean() > 0.05
    for result, losses in results[1:]:
        assert (result - results[0][0]).abs().max() < 1e-6
        assert losses == pytest.approx(results[0][1], rel=1e-9)


def test_a_picture_no_larger_than_a_window_is_made_as_without(styled, make_windows, random_latent):
    """Bit for bit, content included."""
    graph = styled.but(content=styled.capture(random_latent(2)), cfg=7.5, steps=2)
    without = graph.ksampler()
    for size in (128, 512):
        assert torch.equal(graph.but(windows=make_windows(size, 64)).ksampler(), without)


def test_guider_ksampler_and_model_patch_are_one(styled, make_windows):
    graph = styled.but(windows=make_windows(64, 32), latent={"samples": torch.zeros(1, 4, 8, 13)}, steps=2)
    with_ksampler = graph.ksampler()
    assert torch.equal(with_ksampler, graph.guider())
    assert torch.equal(with_ksampler, graph.core(graph.patched()))


def test_windows_of_two_applications_do_not_nest(styled, make_windows, monkeypatch):
    """Guidance by two styles: the picture is denoised in windows once."""
    graph = styled.but(windows=make_windows(64, 32), latent={"samples": torch.zeros(1, 4, 8, 16)}, steps=1)
    passes = count_passes(monkeypatch, graph.model.model)
    twice = graph.but(model=graph.patched())
    twice.core(twice.patched())
    assert passes["denoising"] == [3]


def count_passes(monkeypatch, model):
    """Batch sizes of all passes: those of the picture with and without gradient."""
    passes = {"denoising": [], "distilling": []}
    real = model.apply_model

    def counting(x, *args, **kwargs):
        if "attn1" not in kwargs["transformer_options"].get("patches_replace", {}):
            passes["denoising"].append(x.shape[0])
        elif torch.is_grad_enabled():
            passes["distilling"].append(x.shape[0])
        return real(x, *args, **kwargs)

    monkeypatch.setattr(model, "apply_model", counting)
    return passes


@pytest.mark.parametrize(("batch", "width"), [(1, 24), (1, 64), (2, 24), (9, 16)])
def test_the_peak_is_set_by_the_window_batch(styled, make_windows, monkeypatch, batch, width):
    """However long the picture, no pass holds more pictures than asked for, or one window of each."""
    graph = styled.but(latent={"samples": torch.zeros(batch, 4, 8, width)}, steps=1, iterations=1)
    passes = count_passes(monkeypatch, styled.model.model)
    graph.but(windows=make_windows(64, 32, 4)).ksampler()
    count = batch * len(crops(8, width, 8, 4))
    for kind in ("denoising", "distilling"):
        assert max(passes[kind]) == max(batch, min(4, count))
        assert sum(passes[kind]) == count


@pytest.mark.parametrize(("free_windows", "batch", "count"), [(100, 1, 8), (100, 3, 2), (5.5, 1, 5), (0.2, 1, 1)])
def test_as_many_windows_as_memory_allows(pack_module, make_windows, sd15, monkeypatch, free_windows, batch, count):
    """At most `at_once` pictures; less where memory is short; never none. Memory is counted in windows."""
    windows = pack_module("guidance.windows")
    bytes_each = pack_module("attention.gradient.memory").ACTIVATION_BYTES
    per_window = 64 * 64 * 4 * bytes_each  # fp32; the memory_usage_factor of SD1.5 is 1
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: free_windows * per_window)
    picture, first = torch.zeros(batch, 4, 64, 192), make_windows().place(64, 192, 8).windows[0]
    assert windows.distilled_at_once(sd15.model, picture, first, make_windows().at_once) == count


@pytest.mark.parametrize("sampler", ["euler_ancestral", "dpmpp_2m_sde", "ddim", "lcm"])
def test_samplers(styled, make_windows, sampler, caplog):
    """The sampler's state stays one picture, so every supported sampler works, stochastic ones too."""
    caplog.set_level("INFO")
    latent = {"samples": torch.zeros(1, 4, 8, 13)}
    result = styled.but(sampler=sampler, windows=make_windows(64, 40), latent=latent, iterations=1).ksampler()
    assert torch.isfinite(result).all()
    assert "3 updates of 1 iterations" in caplog.text


def test_an_inpainting_mask_moves_only_what_is_painted(styled, make_windows, random_latent, monkeypatch):
    """Two pictures with a mask each; windows in which neither may move are not distilled."""
    start = random_latent(7, (2, 4, 8, 24))
    mask = torch.zeros(2, 1, 64, 192)
    mask[0, ..., :48] = 1
    mask[1, ..., 48:80] = 1
    passes = count_passes(monkeypatch, styled.model.model)
    graph = styled.but(latent={"samples": start, "noise_mask": mask}, windows=make_windows(64, 32, 2), iterations=1)
    guided = graph.ksampler()
    distilled = len(passes["distilling"])
    unguided = graph.core()
    painted = torch.nn.functional.max_pool2d(mask, 8).expand(2, 4, -1, -1) > 0
    assert torch.isfinite(guided).all()
    assert torch.equal(guided[~painted], unguided[~painted])
    assert (guided[painted] - unguided[painted]).abs().mean() > 0.1
    assert distilled == 3 * graph.steps  # of the five windows, those at 0, 4 and 8


def test_cancel_between_windows(styled, make_windows, monkeypatch):
    model = styled.model.model
    parameters = dict(model.named_parameters())
    real, calls = model.apply_model, []

    def pressing_cancel(*args, **kwargs):
        calls.append(0)
        if len(calls) == 2:
            comfy.model_management.interrupt_current_processing()
        return real(*args, **kwargs)

    monkeypatch.setattr(model, "apply_model", pressing_cancel)
    graph = styled.but(latent={"samples": torch.zeros(1, 4, 8, 40)}, windows=make_windows(64, 32, 1))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        graph.ksampler()
    assert len(calls) == 2
    assert all(p is parameters[name] for name, p in model.named_parameters())


def seam_ratio(graph, make_windows, size, stride):
    """Variance of the gradient across window borders over that elsewhere; size and stride in latent pixels."""
    result = graph.but(windows=make_windows(8 * size, 8 * stride)).ksampler()
    variance = (result[..., 1:] - result[..., :-1]).square().mean(dim=(0, 1, 2))  # [width - 1]
    starts = corners(result.shape[-1], size, stride)
    borders = {start - 1 for start in starts[1:]} | {start + size - 1 for start in starts[:-1]}
    at_border = torch.tensor([column in borders for column in range(len(variance))])
    return variance[at_border].mean() / variance[~at_border].mean()


def test_no_seams(styled, make_windows):
    """A picture that darkens from side to side, where AdaIN of each window pulls its own way: windows that only touch
    show, windows that overlap as the paper's do (stride an eighth of the size) do not."""
    ramp = torch.linspace(-8, 8, 64).expand(1, 4, 16, 64)
    graph = styled.but(latent={"samples": ramp}, denoise=0.4, steps=2, iterations=1, learning_rate=0.015, seed=1)
    assert seam_ratio(graph, make_windows, 16, 2) < 1.1
    assert seam_ratio(graph, make_windows, 16, 16) > 1.5


@pytest.fixture
def larger(unsampled):
    """A graph larger than a window; the test fails if the model is loaded or run."""
    return unsampled.but(latent={"samples": torch.zeros(1, 4, 8, 20)})


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        ({"size": 512, "stride": 520}, "stride: 520 is not allowed with windows of 512 pixels, it would leave gaps"),
        ({"size": 64, "stride": 0}, r"stride: 0 is not allowed .* use 1 to 64 \(size\)"),
        ({"size": 0, "stride": 0}, "size: 0 is not allowed; use 1 pixel or more"),
    ],
)
def test_the_node_refuses(pack, inputs, says):
    with pytest.raises(ValueError, match=says):
        comfy_nodes.NODE_CLASS_MAPPINGS["ADWindows"].execute(**inputs)


@pytest.mark.parametrize("way", ["ksampler", "guider", "patched_core"])
@pytest.mark.parametrize(
    ("option", "what"),
    [
        ({"control": comfy.controlnet.ControlBase()}, "a ControlNet"),
        ({"gligen": ("position", None, [])}, "GLIGEN boxes"),
        ({"default": True}, "a default conditioning"),
    ],
    ids=["control", "gligen", "default"],
)
def test_conditions_that_cannot_be_cut(larger, make_windows, encode_zeros, way, option, what):
    graph = larger.but(windows=make_windows(64, 32), negative=[[encode_zeros()[0][0], option]])
    run = {
        "ksampler": graph.ksampler,
        "guider": graph.guider,
        "patched_core": lambda: graph.core(graph.patched()),
    }[way]
    with pytest.raises(ValueError, match=f"windows: the negative conditioning holds {what}"):
        run()


def test_windows_on_a_tiled_model(larger, make_windows, pack_module):
    tiled = pack_module("tiling.circular").tile_model(larger.model, "both")
    with pytest.raises(ValueError, match="windows: the model comes from Seamless Tiling"):
        larger.but(model=tiled, windows=make_windows(64, 32)).ksampler()


def test_the_node(pack, make_windows):
    node = comfy_nodes.NODE_CLASS_MAPPINGS["ADWindows"]
    assert node.execute(size=512, stride=64)[0] == make_windows(512, 64)
    for node_id in ("ADLossGuider", "ADGuidedKSampler", "ADApplyGuidance"):
        schema = comfy_nodes.NODE_CLASS_MAPPINGS[node_id].define_schema()
        assert [given.id for given in schema.inputs][-6:] == [
            "content", "regions", "windows", "lr_schedule", "memory", "frames",
        ]  # fmt: skip
        assert schema.inputs[-4].io_type == node.define_schema().outputs[0].io_type == "AD_WINDOWS"
