"""Seamless tiles on transformers: the model is shown its picture rolled, and no edge of it is an edge for long."""

import functools
from types import SimpleNamespace

import comfy.controlnet
import comfy.model_management
import guided
import pytest
import small_models
import torch
from host_reads import counted

import nodes

SIZE = (16, 24)
SIGMA = 0.6
SLOPE = 4.0  # of what a model is made to add from its top left to its bottom right


@pytest.fixture(scope="module")
def rolling(pack_module):
    return pack_module("tiling.rolling")


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    return functools.cache(lambda name: small_models.load(small_models.MODELS[name], tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def token(pack_module):
    return lambda model: pack_module("attention.architectures").token_width(model.model.diffusion_model)


def random(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def graph_of(pack, model, small, **changes):
    latent = {"samples": small.as_host(torch.zeros(2, small.channels, *SIZE))}
    graph = guided.Graph(pack, model, small.cond(1), small.cond(2), latent, steps=3, scheduler="simple")
    return graph.but(content_weight=0.0, adain=False, **changes)


def border_steps(picture):
    """How far the pictures jump from one edge to the other beside how far they mostly do, by rows and by columns."""
    found = []
    for dim in (-2, -1):
        steps = (picture - picture.roll(1, dim)).abs().movedim(dim, 0).flatten(1).mean(dim=1)
        found.append(float(steps[0] / steps[1:].median()))
    return found


def sloping(model):
    """While open, the model's answer rises from its top left to its bottom right: it knows where a place is."""

    def rise(_module, _args, answer):
        height, width = answer.shape[-2:]
        return answer + SLOPE * (torch.linspace(-1, 1, height)[:, None] + torch.linspace(-1, 1, width))

    return model.model.diffusion_model.register_forward_hook(rise)


def call(model, small, x, sigma=SIGMA, **beside):
    """One call of a model as a sampler makes it, with the wrappers that are on it."""
    comfy.model_management.load_models_gpu([model])
    options = {"wrappers": model.wrappers, **beside.pop("options", {})}
    ((text, more),) = small.cond(1)
    with torch.inference_mode():
        return model.model.apply_model(
            x, torch.full((len(x),), sigma), c_crossattn=text, y=more["pooled_output"], guidance=torch.ones(1),
            num_tokens=text.shape[1], transformer_options=options, **beside,
        )  # fmt: skip


JOINED = {"none": (), "both": (0, 1), "horizontal": (1,)}  # rows, columns


@pytest.mark.parametrize(
    ("name", "axes", "guides"),
    [
        ("FLUX.1-dev", ("none", "both"), False),
        ("SD3", ("both",), False),
        ("Z-Image", ("both", "horizontal"), True),
    ],
)
def test_the_border_is_a_place_like_others(name, axes, guides, rolling, load, token, pack):
    """Of a model that draws its edges apart; along an axis that is not joined they stay apart."""
    model, small = load(name), small_models.MODELS[name]
    graph = graph_of(pack, model, small, iterations=1)
    style = graph.capture(random(5, 1, small.channels, 8, 8), layers=str(small.auto[-1]))
    before = graph.core() if guides else None
    hook = sloping(model)
    try:
        for chosen in axes:
            tiled = model if chosen == "none" else rolling.roll_model(model, chosen, token(model))
            run = graph.but(model=tiled, style=style)
            for dim, step in enumerate(border_steps(run.ksampler() if guides else run.core())):
                assert step <= 1.05 if dim in JOINED[chosen] else step > 4, (chosen, dim, step)
    finally:
        hook.remove()
    if guides:
        assert torch.equal(graph.core(), before)


def test_offsets(rolling):
    """Whole tokens, never none, the same for a noise level, all over the picture; apart for denoising and reading."""
    both, wide, high = (rolling.Rolling(axes, 2) for axes in ("both", "horizontal", "vertical"))
    levels = torch.linspace(0.01, 1, 200).tolist()
    denoising, reading = ([both.offset(level, SIZE, purpose) for level in levels] for purpose in rolling.Pass)
    assert {n for n, _ in denoising} == {*range(2, 16, 2)} and {n for _, n in denoising} == {*range(2, 24, 2)}
    assert denoising == [both.offset(level, SIZE, rolling.Pass.DENOISING) for level in levels] != reading
    assert [wide.offset(level, SIZE, rolling.Pass.READING) for level in levels] == [(0, n) for _, n in reading]
    assert [high.offset(level, SIZE, rolling.Pass.READING) for level in levels] == [(n, 0) for n, _ in reading]
    assert both.offset(0.5, (2, 2), rolling.Pass.READING) == (0, 0)
    wide.check_size((15, 24))
    with pytest.raises(ValueError, match="latent_image: it is 15 latent pixels high, which is no multiple of 2"):
        both.offset(0.5, (15, 24), rolling.Pass.READING)


@pytest.mark.parametrize("name", ["FLUX.1-dev", "Qwen-Image"])
def test_a_call_is_rolled_and_rolled_back(name, rolling, load, token):
    """To the last bit what the plain model makes of the rolled picture; also where pictures have a frame."""
    model, small = load(name), small_models.MODELS[name]
    tiled = rolling.roll_model(rolling.roll_model(model, "vertical", 2), "both", token(model))
    x = small.as_host(random(3, 1, small.channels, *SIZE))
    down, across = rolling.of_model(tiled).offset(SIGMA, SIZE, rolling.Pass.DENOISING)
    plain = call(model, small, x.roll((down, across), (-2, -1))).roll((-down, -across), (-2, -1))
    assert torch.equal(call(tiled, small, x), plain)
    assert not torch.allclose(plain, call(model, small, x), atol=1e-3)
    assert not model.wrappers and rolling.of_model(model) is None


def test_what_an_inpainting_model_sees_is_rolled_too(rolling):
    seen = {}

    def executor(x, t, c_concat, *args, **kwargs):
        seen.update(x=x, beside=c_concat)
        return x

    x, beside = random(1, 2, 4, *SIZE), random(2, 2, 5, *SIZE)
    wrapper = rolling._RolledModel(rolling.Rolling("horizontal", 2))
    assert torch.equal(wrapper(executor, x, torch.full((2,), SIGMA), beside, None, None, {}), x)
    _, across = wrapper.rolling.offset(SIGMA, SIZE, rolling.Pass.DENOISING)
    assert torch.equal(seen["x"], x.roll(across, -1)) and torch.equal(seen["beside"], beside.roll(across, -1))


@pytest.mark.parametrize("name", ["FLUX.1-dev", "Z-Image"])
def test_features_lie_on_the_picture_as_it_is(name, rolling, load, pack_module):
    """Those of the picture's tokens are what the model makes of the rolled picture, rolled back; so is the gradient."""
    model, small = load(name).model, small_models.MODELS[name]
    conditioning, capture = pack_module("attention.conditioning"), pack_module("attention.capture")
    layer = pack_module("attention.layers").list_layers(model.diffusion_model)[-2]
    x, offset, tokens = random(3, 1, small.channels, *SIZE), (6, 10), (-3, -5)
    comfy.model_management.load_models_gpu([load(name)])

    def read(x, offset):
        gradient = pack_module("attention.gradient")
        with gradient.differentiable(model), gradient.saved_activations(model):
            z = x.clone().requires_grad_()
            encoded = conditioning.encode(model, conditioning.from_socket(small.cond(3)), z.detach(), size=SIZE)
            conds = conditioning.for_pass(encoded, SIGMA, 1)
            found = capture.capture_features(model, z, torch.tensor(SIGMA), conds, [layer], offset=offset)[layer.index]
            return found, torch.autograd.grad(found.out.square().sum(), z)[0]

    (found, gradient), (expected, expected_gradient) = read(x, offset), read(x.roll(offset, (-2, -1)), (0, 0))
    for of_picture, rolled in ((found.k, expected.k), (found.out, expected.out)):
        picture = slice(found.start, found.start + 8 * 12)
        back = rolled[..., picture, :].unflatten(-2, (8, 12)).roll(tokens, (-3, -2)).flatten(-3, -2)
        assert torch.equal(of_picture[..., picture, :], back)
        assert torch.equal(of_picture[..., : found.start, :], rolled[..., : found.start, :])
        assert torch.equal(of_picture[..., picture.stop :, :], rolled[..., picture.stop :, :])
        assert found.start > 0 and not torch.equal(back, rolled[..., picture, :])
    scale = float(expected_gradient.abs().max())
    torch.testing.assert_close(gradient, expected_gradient.roll((-6, -10), (-2, -1)), rtol=0, atol=1e-4 * scale)


def test_what_guided_passes_are_shown(rolling, load, pack):
    """Picture and content rolled alike and otherwise than in denoising, the style as it is."""
    name = "Z-Image"
    model, small = load(name), small_models.MODELS[name]
    tiled = rolling.roll_model(model, "both", 2)
    latents = random(6, 1, small.channels, 8, 8), random(7, 1, small.channels, *SIZE)
    graph = graph_of(pack, tiled, small, iterations=1, steps=2).but(content_weight=1.0)
    style, content = (graph.capture(latent, layers=str(small.auto[-1])) for latent in latents)
    shown = []
    handle = model.model.diffusion_model.register_forward_pre_hook(
        lambda _module, args, kwargs: shown.append((args[0].detach().clone(), kwargs["transformer_options"]["sigmas"])),
        with_kwargs=True,
    )
    try:
        graph.but(style=style, content=content, latent={"samples": torch.zeros(1, small.channels, *SIZE)}).ksampler()
    finally:
        handle.remove()
    last = [x for x, sigma in shown if float(sigma.flatten()[0]) == 0]
    of_style, of_content, picture = last
    offset = rolling.Rolling("both", 2).offset(0.0, SIZE, rolling.Pass.READING)
    assert torch.equal(of_style, model.model.process_latent_in(latents[0]))
    assert torch.equal(of_content, model.model.process_latent_in(latents[1]).roll(offset, (-2, -1)))
    assert picture.shape == of_content.shape


def test_an_iteration_reads_nothing(rolling, load, pack):
    """How far the picture is rolled is known of a noise level from its first pass on."""
    small = small_models.MODELS["Z-Image"]
    graph = graph_of(pack, rolling.roll_model(load("Z-Image"), "both", 2), small, steps=1)
    graph = graph.but(style=graph.capture(random(6, 1, small.channels, 8, 8), layers=str(small.auto[-1])))
    with counted() as few:
        graph.but(iterations=1).ksampler()
    with counted() as many:
        graph.but(iterations=3).ksampler()
    assert few and not many - few


def test_optimisation_is_rolled_too(rolling, load, pack):
    """By another offset at each noise level; the first pass shows the noise that the plain model is shown, rolled."""
    small = small_models.MODELS["Z-Image"]
    tiled = rolling.roll_model(load("Z-Image"), "both", 2)
    latent = {"samples": torch.zeros(1, small.channels, *SIZE)}
    settings = {name: value for name, value in guided.DEFAULTS.items() if not name.endswith("_percent")}
    del settings["adain"]

    def shown(model):
        passes = []
        style = guided.Graph(pack, model, *[None] * 3).capture(random(6, 1, small.channels, 8, 8), layers="1")
        handle = model.model.diffusion_model.register_forward_pre_hook(
            lambda _module, args, kwargs: passes.append((args[0].detach().clone(), args[0].requires_grad, kwargs)),
            with_kwargs=True,
        )
        try:
            with torch.inference_mode():
                nodes.NODE_CLASS_MAPPINGS["ADOptimizeLatent"].execute(
                    model=model, style=style, latent_image=latent, seed=1, start_from="noise", steps=1,
                    lr_schedule="constant", conditioning=small.cond(1), **{**settings, "content_weight": 0.0},
                )  # fmt: skip
        finally:
            handle.remove()
        return next((x, float(more["transformer_options"]["sigmas"][0])) for x, grad, more in passes if grad)

    (plain, sigma), (found, _) = shown(load("Z-Image")), shown(tiled)
    offset = rolling.of_model(tiled).offset(sigma, SIZE, rolling.Pass.READING)
    assert torch.equal(found, plain.roll(offset, (-2, -1))) and all(offset)


def test_refused_at_the_start(rolling, load, pack, nothing_loads):
    """Whatever lies on the picture and is not rolled with it."""
    name = "Z-Image"
    small = small_models.MODELS[name]
    tiled = rolling.roll_model(load(name), "both", 2)
    graph = graph_of(pack, tiled, small)

    def told(**options):
        return [[text, {**more, **options}] for text, more in small.cond(1)]

    beside = {
        "control": comfy.controlnet.ControlBase(),
        "area": (8, 8, 0, 0),
        "reference_latents": [torch.zeros(1, 16, *SIZE)],
    }
    for key, value in beside.items():
        with pytest.raises(ValueError, match="it comes from Seamless Tiling, which rolls the picture"):
            graph.but(positive=told(**{key: value})).core()
    for options in (
        {"context_handler": object()},
        {"transformer_options": {"easycache": type("EasyCacheHolder", (), {})()}},
        {"transformer_options": {"patches": {"double_block": [type("ZImageControlPatch", (), {})()]}}},
    ):
        with pytest.raises(ValueError, match="would stay where it is"):
            model = tiled.clone()
            model.model_options = {**model.model_options, **options}
            graph.core(model)
    for shape, message in {(1, 16, 15, 24): "it is 15 latent pixels high", (1, 16, 3, 16, 24): "is no picture"}.items():
        with pytest.raises(ValueError, match=f"latent_image: .*{message}"):
            graph.but(latent={"samples": torch.zeros(shape)}).core()
    with pytest.raises(ValueError, match="axes: diagonal is not allowed"):
        rolling.roll_model(tiled, "diagonal", 2)
    with pytest.raises(ValueError, match="ControlNet would stay where it is"):
        rolling._RolledModel(rolling.Rolling("both", 2))(None, None, None, control={"input": []})


def test_the_node_takes_transformers(rolling, load, pack, pack_module):
    from small_vae import SMALL_VAES

    node, vae = nodes.NODE_CLASS_MAPPINGS["ADSeamlessTiling"], SMALL_VAES["taesd"]()
    model, tiled = node.execute(load("FLUX.1-dev"), vae, "vertical").result
    assert rolling.of_model(model) == rolling.Rolling("vertical", 2) and rolling.is_tiled(model)
    assert tiled.patcher.object_patches["taesd_decoder.1.padding"] == (0, 1)
    checks = pack_module("guidance.checks")
    with pytest.raises(ValueError, match="windows: the model comes from Seamless Tiling"):
        checks.check_windows(model, {}, torch.Size((1, 16, *SIZE)))
    unknown = SimpleNamespace(model=SimpleNamespace(diffusion_model=torch.nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="model: Linear is not supported"):
        node.execute(unknown, vae, "both")
