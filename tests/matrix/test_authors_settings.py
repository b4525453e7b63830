"""What the authors' SDXL and FLUX programs do beside the method: sizes told, distilled guidance, the end of a flow."""

import pytest
import small_models
import torch
from guided import Graph

SIZE = (8, 12)


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    """Tiny models by name, each loaded once."""
    made = {}

    def get(name):
        if name not in made:
            made[name] = small_models.load(small_models.MODELS[name], tmp_path_factory.mktemp("models"))
        return made[name]

    return get


def reader_of(pack_module, model, small, latent, own=None, sampler_options=None):
    """A reader of one reference for a picture of SIZE, and what its pass is told."""
    reference = pack_module("attention.reference")
    conditioning = pack_module("attention.conditioning")
    layers = pack_module("attention.layers").list_layers(model.model.diffusion_model)
    ((text, options),) = small.cond(3)
    sampler = conditioning.from_socket([[text, {**options, **(sampler_options or {})}]])
    part = reference.ReferencePart(latent, (0,), conditioning=own)
    return pack_module("attention.reader").ReferenceReader(
        model.model, layers, reference.Reference((part,)), sampler, torch.zeros(1, small.channels, *SIZE)
    )


@pytest.mark.parametrize("name", ["SDXL", "SDXL refiner"])
def test_a_reference_of_another_size_is_told_the_pictures(pack_module, load, name):
    """The size vector: height and width of the picture, unless a condition of its own says another."""
    small, model = small_models.MODELS[name], load(name)
    with torch.inference_mode():
        told = [
            reader_of(pack_module, model, small, torch.zeros(1, 4, *size)).parts[0].conds[0]["model_conds"]["y"].cond
            for size in (SIZE, (16, 6))
        ]
        assert torch.equal(*told)
        embedded = model.model.embedder(torch.tensor([8.0 * SIZE[0]]))
        assert torch.equal(told[0][:, small.pooled : small.pooled + 256], embedded)
        ((text, options),) = small.cond(3)
        own = [[text, {**options, "height": 1024, "width": 512}]]
        (part,) = reader_of(pack_module, model, small, torch.zeros(1, 4, 16, 6), own).parts
        y = part.conds[0]["model_conds"]["y"].cond
        assert torch.equal(y[:, small.pooled : small.pooled + 256], model.model.embedder(torch.tensor([1024.0])))


@pytest.mark.parametrize(
    ("own", "sampler", "expected"),
    [(None, {"guidance": 3.5}, 1.0), (None, {}, 1.0), ({}, {"guidance": 3.5}, 1.0), ({"guidance": 2.0}, {}, 2.0)],
    ids=["the sampler's", "the sampler's, unsaid", "its own, unsaid", "its own"],
)
def test_distilled_guidance_is_one_in_the_passes(pack_module, load, own, sampler, expected):
    """FLUX: 3.5 is for the sampler; what a condition on the Capture node says itself, holds."""
    small, model = small_models.MODELS["FLUX.1-dev"], load("FLUX.1-dev")
    ((text, options),) = small.cond(4)
    socket = None if own is None else [[text, {**options, **own}]]
    with torch.inference_mode():
        (part,) = reader_of(pack_module, model, small, torch.zeros(1, 16, 4, 4), socket, sampler).parts
    assert part.conds[0]["model_conds"]["guidance"].cond.tolist() == [expected]


def test_the_pictures_own_pass_has_distilled_guidance_one(pack, load, custom_samplers, random_latent):
    """In a whole run: 3.5 while denoising, 1.0 in every pass that reads attention."""
    small, model = small_models.MODELS["FLUX.1-dev"], load("FLUX.1-dev")
    ((text, options),) = small.cond(3)
    cond = [[text, {**options, "guidance": 3.5}]]
    graph = Graph(pack, model, cond, cond, {"samples": torch.zeros(1, 16, *SIZE)}, steps=1, scheduler="simple")
    graph, told = graph.styled(random_latent(1, (1, 16, 4, 4))).but(iterations=1), []

    def note(_module, _args, kwargs):
        told.append((torch.is_inference_mode_enabled(), kwargs["guidance"].flatten()[0].item()))

    handle = model.model.diffusion_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        graph.ksampler()
    finally:
        handle.remove()
    assert {guidance for denoising, guidance in told if denoising} == {3.5}
    assert [guidance for denoising, guidance in told if not denoising] == [1.0, 1.0]


FLOWS = [
    "SD3", "FLUX.1-dev", "Chroma", "Lumina 2", "Z-Image", "AuraFlow", "Qwen-Image", "Wan 2.1", "Krea 2", "Anima",
    "HiDream", "HunyuanImage 2.1", "Lens",
]  # fmt: skip


@pytest.mark.parametrize("name", [*FLOWS, "SD1.5", "SD2, v-prediction", "SDXL"])
def test_the_last_state_is_treated_where_its_model_ends(pack, pack_module, load, custom_samplers, random_latent, name):
    """Flow models at sigma 0, with the clean reference; models of noise and velocity at their smallest sigma."""
    small, model = small_models.MODELS[name], load(name)
    cond, latent = small.cond(3), small.as_host(torch.zeros(1, small.channels, 8, 8))
    graph = Graph(pack, model, cond, cond, {"samples": latent}, steps=1, scheduler="simple")
    graph = graph.but(iterations=1, adain=False).styled(small.as_host(random_latent(1, (1, small.channels, 8, 8))))
    seen = []

    def note(_module, args):
        if not torch.is_inference_mode_enabled():
            seen.append((args[0].detach().clone(), float(args[1].flatten()[0]), args[0].requires_grad))

    handle = model.model.diffusion_model.register_forward_pre_hook(note)
    try:
        picture = graph.ksampler()
    finally:
        handle.remove()
    assert torch.isfinite(picture).all()
    sampling = model.model.model_sampling
    smallest = 0.0 if name in FLOWS else float(sampling.sigma_min)
    timestep = float(sampling.timestep(torch.tensor(smallest)))
    assert [t for _, t, _ in seen] == pytest.approx([timestep, timestep], abs=1e-6)
    (reference, _, _), _ = seen
    clean = model.model.process_latent_in(small.as_host(random_latent(1, (1, small.channels, 8, 8))))
    assert torch.allclose(reference, clean, atol=1e-5) == (name in FLOWS)


def test_texts_of_several_lengths_with_a_content(pack, load, custom_samplers, random_latent, nothing_loads):
    """Each of the sampler's prompts may be in force beside the content: all their lengths are compared at the start."""
    small, model = small_models.MODELS["FLUX.1-dev"], load("FLUX.1-dev")
    ((text, options),) = small.cond(3)
    early, late = {**options, "end_percent": 0.5}, {**options, "start_percent": 0.5}
    ranged = [[text, early], [torch.cat([text, text], dim=1), late]]
    latent = {"samples": torch.zeros(1, 16, *SIZE)}
    graph = Graph(pack, model, ranged, ranged, latent, steps=2, scheduler="simple").but(iterations=1)
    graph = graph.styled(random_latent(1, (1, 16, 4, 4)))
    graph = graph.but(content=graph.capture(random_latent(2, (1, 16, *SIZE))))
    with pytest.raises(ValueError, match="content: its text condition has 11 or 22 tokens, the picture's has 11 or 22"):
        graph.ksampler()
