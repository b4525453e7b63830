"""A batch as one picture moving: what each frame looks at, that the first one is as if alone, and off is off."""

import functools
import math

import comfy.sd
import pytest
import small_models
import torch
import torch.nn.functional as F
from demo_model.patch_distance import nearest, patches, prepare
from demo_model.sample_reference import formulas
from guided import Graph
from passes import watched

import nodes as comfy_nodes

LAYERS, TEXT = (3, 9), 11
SIZES = ((6, 8), (8, 4))
WEIGHTS = (2.0, 0.5)
FRAMES = 0.7


@pytest.fixture(scope="module")
def flux(tmp_path_factory):
    """A tiny FLUX: text and picture share their attention, at half the latent's size."""
    return small_models.load(small_models.MODELS["FLUX.1-dev"], tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def make_objective(pack_module):
    """`make_objective(model, style, cond, shape, **settings)`: of a run on a model, inside `differentiable`."""

    def make(model, style, cond, shape, regions=None, content=None, **settings):
        layers = pack_module("attention.layers").list_layers(model.diffusion_model)
        return pack_module("guidance.objective").Objective(
            model, layers, style=style, content=content, regions=regions, latent=torch.zeros(shape),
            settings=pack_module("guidance.settings").GuidanceSettings(**settings),
            conds=pack_module("attention.conditioning").from_socket(cond),
        )  # fmt: skip

    return make


def at_tokens(of_picture, of_text):
    """Behind the text's tokens those of the picture, [b rows columns] -> [b t]."""
    flat = of_picture.flatten(1)
    return torch.cat([flat.new_full((len(flat), TEXT), of_text) if of_text is not None else
                      flat.mean(dim=1, keepdim=True).expand(-1, TEXT), flat], dim=1)  # fmt: skip


def everywhere():
    """Logits' bias of each reference's tokens and of the frame before's, and each token's weight in the loss."""
    biases = [torch.tensor(math.log(weight)).expand(3, 1, 1) for weight in WEIGHTS]
    return biases, torch.zeros(3, 1, 1), torch.ones(3, 1)


def in_places(masks):
    """The same where the references count in places of their own, [b 4 6] each."""
    covered = torch.stack([at_tokens(mask, None) for mask in masks])
    there = covered > 0
    same = (there[:, 1:, :, None] == there[:, :-1, None, :]).all(dim=0)
    largest = covered.amax(dim=0)[..., None]
    before = torch.cat([torch.zeros(1, *same.shape[1:]), same.float()]).log() + largest.log()
    biases = [(weight * c).log()[..., None] for weight, c in zip(WEIGHTS, covered, strict=True)]
    return biases, before, covered.sum(dim=0).clamp(max=1)


def in_regions(references, targets):
    """The same with label maps: [1 rows columns] of each reference, [b 4 6] of the picture; text has one of its own."""
    own = at_tokens(targets, 9)
    biases = []
    for weight, labels in zip(WEIGHTS, references, strict=True):
        offered = at_tokens(labels, 9)
        allowed = (own[..., None] == offered[:, None]) | (own == 9)[..., None] | (offered == 9)[:, None]
        biases.append((weight * allowed.float()).log())
    same = (own[1:, :, None] == own[:-1, None, :]).float()
    return biases, torch.cat([same[:1], same]).log(), torch.ones(3, 1)


def written_out(own, bank, biases, before, in_shares, scale):
    """The targets of three frames in a layer: each looks at the one before beside the references."""
    sizes = [TEXT + rows * columns // 4 for rows, columns in SIZES]
    references = list(zip(bank.k.split(sizes, dim=2), bank.v.split(sizes, dim=2), biases, WEIGHTS, strict=True))
    targets = []
    for n in range(3):
        looked_at = [(k, v, bias[n % len(bias)], weight) for k, v, bias, weight in references]
        if n > 0:
            bias = before[n] + (0 if in_shares else math.log(FRAMES))
            looked_at.append((own.k[n - 1 : n], own.v[n - 1 : n], bias, FRAMES))
        logits = [scale * own.q[n] @ k[0].mT * own.q.shape[-1] ** -0.5 for k, *_ in looked_at]
        values = torch.cat([v[0] for _, v, *_ in looked_at], dim=1)
        if in_shares:
            total = sum(weight for *_, weight in looked_at)
            parts = [one.softmax(dim=-1) * weight / total for one, (*_, weight) in zip(logits, looked_at, strict=True)]
            attention = torch.cat(parts, dim=-1)
        else:
            biased = [one + bias for one, (_, _, bias, _) in zip(logits, looked_at, strict=True)]
            attention = torch.cat(biased, dim=-1).softmax(dim=-1).nan_to_num()
        targets.append(attention @ values)
    return torch.stack(targets).detach()


@pytest.mark.parametrize("kind", ["amount", "share", "places", "places of frames", "regions", "regions of frames"])
def test_each_frame_looks_at_the_one_before_as_at_one_more_reference(
    pack_module, flux, make_objective, random_latent, kind
):
    """Loss and gradient against attention written out; nothing flows back to the frame before."""
    reference, noises = pack_module("attention.reference"), pack_module("attention.noise")
    per_frame = 3 if kind.endswith("frames") else 1
    masks, regions, expected = [None, None], None, everywhere()
    if kind.startswith("places"):
        masks = [torch.zeros(per_frame, 4, 6), torch.zeros(per_frame, 4, 6)]
        masks[0][:, :2], masks[1][..., 3:], masks[1][..., 5] = 1, 0.5, 0.25
        if per_frame == 3:
            masks[0][1] = masks[0][1].flip(0)
            masks[0][2], masks[1][2] = 0, 0
            masks[0][2, 0] = 1
        expected = in_places([mask.expand(3, -1, -1) for mask in masks])
    if kind.startswith("regions"):
        labels = [torch.arange(h * w // 4).reshape(1, h // 2, w // 2) % 2 for h, w in SIZES]
        maps = torch.zeros(per_frame, 4, 6, dtype=torch.int64)
        maps[..., 3:] = 1
        if per_frame == 3:
            maps[1] = 1
        expected = in_regions(labels, maps.expand(3, -1, -1))
        full = torch.cat([label.repeat_interleave(12 // label.shape[1], 1).repeat_interleave(12 // label.shape[2], 2)
                          for label in labels])  # fmt: skip
        regions = pack_module("attention.regions").Regions(full, maps, 2)
    style = reference.Reference(tuple(
        reference.ReferencePart(random_latent(seed, (1, 16, *size)), LAYERS, weight, target_mask=mask,
                                balance="share" if kind == "share" else "amount")
        for seed, size, weight, mask in zip((1, 2), SIZES, WEIGHTS, masks, strict=True)
    ))  # fmt: skip
    cond, shape = small_models.MODELS["FLUX.1-dev"].cond(3), (3, 16, 8, 12)
    with pack_module("attention.gradient").differentiable(flux.model):
        objective = make_objective(
            flux.model, style, cond, shape, regions, frames=FRAMES, attention_scale=1.3, content_weight=0.0
        )
        level = noises.NoiseLevel.of(flux.model, 0.5, torch.zeros(1))
        targets = objective.targets(objective.offer(level, noises.StepNoise(0)))
        features = objective.features(random_latent(5, shape).requires_grad_(), targets)
        loss = objective.losses(features, targets).total
        outs = [features[0][index].out for index in LAYERS]
        found = torch.autograd.grad(loss, outs, retain_graph=True)
        total = 0
        for index, out in zip(LAYERS, outs, strict=True):
            bank = targets.windows[0].style[index]
            target = written_out(features[0][index], bank, *expected[:2], kind == "share", 1.3)
            total = total + ((out - target).abs().mean(dim=(1, 3)) * expected[2]).mean(dim=1).sum()
    assert loss.item() == pytest.approx(total.item(), rel=1e-5)
    for gradient, plainly in zip(found, torch.autograd.grad(total, outs), strict=True):
        assert (gradient != plainly).float().mean() < 0.01  # signs of errors that are all but 0


def test_what_a_style_goes_away_from_does_not_make_a_frame_before_count_more(pack_module):
    """It is everywhere; the style to come near to counts a quarter at one token, and so does the frame before."""
    k = torch.zeros(1, 1, 2, 4)
    bank = pack_module("attention.bank").TokenBank(k, k, counts={0: 1, 1: 1}, weights=torch.tensor([1.0, -0.5]))
    at_tokens = bank.of_parts((0, 1), torch.tensor([[0.25, 1.0], [1.0, 1.0]]).log())
    found = at_tokens.with_frame_before(k, k, 2.0).weights
    torch.testing.assert_close(found, torch.tensor([[0.25, -0.5, 0.5], [1.0, -0.5, 2.0]]))


@pytest.fixture(scope="module")
def descend(pack_module, sd15_float64, make_objective):
    """`descend(start, **settings)`: a step of the optimisation in float64, model space; each frame is its content."""
    optimise, reference = pack_module("guidance.optimise"), pack_module("attention.reference")
    model = sd15_float64.model
    generator = torch.Generator().manual_seed(1)
    style, cond = 5 * torch.randn(1, 4, 4, 4, generator=generator), [[torch.zeros(1, 77, 768), {}]]

    def run(start, movable=None, regions=None, **settings):
        one = functools.partial(reference.ReferencePart, layers=(4, 6))
        style_of, content = (reference.Reference((one(latent.double()),)) for latent in (style, start / 0.18215))
        settings = {"learning_rate": 0.05, "iterations": 1, **settings}
        own = pack_module("guidance.settings").GuidanceSettings(**settings)
        sampler = optimise.OptimiseSampler(
            style=style_of, content=content, regions=None, settings=own, optimise=optimise.OptimiseSettings(steps=1)
        )
        motion = pack_module("guidance.sequence").motion_of(own, content, start)
        with pack_module("attention.gradient").differentiable(model):
            objective = make_objective(model, style_of, cond, start.shape, regions, content, **settings)
            sigmas = optimise.optimise_sigmas(model.model_sampling, 1).tolist()
            return sampler.descend(objective, start, sigmas, movable, motion=motion)

    return run


def test_a_frame_depends_on_those_before_it_alone(descend):
    """The first one is as if alone, and none is touched by what comes later; each holds on to what the last became."""
    wide = torch.randn(4, 4, 6, generator=torch.Generator().manual_seed(0)).double()
    start = torch.stack([wide[..., n : n + 4] for n in range(3)])
    made = descend(start, frames=1.0)
    torch.testing.assert_close(descend(start[:1])[0], made[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(descend(start[:2], frames=1.0), made[:2], rtol=0, atol=1e-6)
    each_for_itself = descend(start)
    torch.testing.assert_close(each_for_itself[0], made[0], rtol=0, atol=1e-6)
    assert (each_for_itself - made)[1:].abs().mean(dim=(1, 2, 3)).min() > 1e-3
    changes = made - start
    whole_steps = 2 * changes[1, ..., :3] - changes[0, ..., 1:]  # half of it is the frame before's
    torch.testing.assert_close(whole_steps.abs(), torch.full_like(whole_steps, 0.05), rtol=0, atol=1e-3)


def test_frames_are_not_drawn_to_each_other_where_styles_have_places(descend, pack_module):
    """What moves may leave its region: each value makes a whole step of its own."""
    wide = torch.randn(4, 4, 5, generator=torch.Generator().manual_seed(0)).double()
    start = torch.stack([wide[..., n : n + 4] for n in range(2)])
    one = torch.zeros(1, 4, 4, dtype=torch.long)
    made = descend(start, regions=pack_module("attention.regions").Regions(one, one, 1), frames=1.0)
    torch.testing.assert_close((made - start).abs(), torch.full_like(start, 0.05), rtol=0, atol=1e-3)
    assert ((descend(start, frames=1.0) - start)[1].abs() < 0.049).any()


def test_what_a_mask_keeps_is_not_drawn_to_the_frame_before(descend):
    """Of a picture that stands, where the mask lets but the first frame move."""
    start = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0)).double().expand(2, -1, -1, -1)
    movable = torch.tensor([1.0, 0.0]).double()[:, None, None, None].expand_as(start)
    made = descend(start, movable, frames=1.0)
    assert made[1].equal(start[1])
    assert (made[0] - start[0]).abs().min() > 0.04


@pytest.fixture(scope="module")
def moving(graph, random_latent):
    """A guided graph on three frames, one step."""
    start = random_latent(3, (3, 4, 8, 8))
    content = graph.capture(random_latent(4, (1, 4, 8, 8)).expand(3, -1, -1, -1))
    return graph.but(latent={"samples": start}, steps=1, iterations=1, content=content).styled(
        random_latent(1, (1, 4, 8, 8))
    )


def test_all_frames_get_one_noise(moving):
    """The sampler's, and that of a content reference; without frames each its own."""
    zeros = torch.zeros(3, 4, 8, 8)
    for frames in (0.0, 1.0):
        with watched(moving.model) as passes:
            moving.but(latent={"samples": zeros}, frames=frames).ksampler()
        of_content = [one for one in passes.reading if len(one.x) == 3 and not one.with_gradient]
        assert len(of_content) == 1
        for x in (passes.denoising[0].x, of_content[0].x):
            assert x[:1].expand(3, -1, -1, -1).equal(x) == (frames > 0)
            assert x[0].std() > 0.5


def test_noise_goes_with_the_content(moving, random_latent):
    """Of the content reference, if it moves, or else of the latent that sampling starts from."""
    zeros = torch.zeros(2, 4, 8, 8)
    wide = random_latent(6, (1, 4, 8, 9))[0]
    pan = torch.stack([wide[..., :8], wide[..., 1:]])
    for start, content in ((zeros, moving.capture(pan)), (pan, None)):
        with watched(moving.model) as passes:
            moving.but(latent={"samples": start}, content=content, frames=1.0).ksampler()
        of_content = [one.x for one in passes.reading if len(one.x) == 2 and not one.with_gradient]
        assert len(of_content) == (0 if content is None else 1)
        x = passes.denoising[0].x
        for shown in (x, *of_content):  # with a noise of at least 0.03
            torch.testing.assert_close(shown[1, ..., :-1], shown[0, ..., 1:], rtol=0, atol=1e-4)
        assert (x[1, ..., -1] - x[0, ..., -1]).abs().mean() > 0.5


def test_off_and_a_single_picture_are_as_without(moving):
    """To the last bit; and the guider does with frames what the KSampler does."""
    off = moving.ksampler()
    assert torch.equal(moving.but(frames=0.0).ksampler(), off), "the input's default"
    on = moving.but(frames=2.0).ksampler()
    assert not torch.equal(on[2], off[2])
    assert torch.equal(moving.but(frames=2.0).guider(), on)
    samples = moving.latent["samples"][:1]
    single = moving.but(latent={"samples": samples}, content=None)
    assert torch.equal(single.but(frames=2.0).ksampler(), single.ksampler())


def test_in_windows_each_holds_on_to_its_own_part(moving, pack_module, random_latent):
    """The first frame moves as without frames, the others do not."""
    windows = pack_module("guidance.windows").Windows(64, 32)
    same = random_latent(7, (1, 4, 8, 12)).expand(2, -1, -1, -1)
    graph = moving.but(latent={"samples": same}, content=None, windows=windows, denoise=0.5)
    states = {}
    for frames in (0.0, 1.0):
        states[frames] = graph.but(frames=frames, seed=5).ksampler()
    first, second = (states[1.0] - states[0.0]).abs().mean(dim=(1, 2, 3)).tolist()
    assert first < 0.02 * second


def test_what_is_not_allowed(moving):
    with pytest.raises(ValueError, match=r"frames: 4\.5 is not allowed; use 0 to 4"):
        moving.but(frames=4.5).patched()


def beyond_the_content(frames, content, pan):
    """How much each frame differs from the one before where both show the same, beyond what the content does."""
    found, own = ((one[1:, :, :-pan] - one[:-1, :, pan:]).abs().mean() for one in (frames, content))
    return (found - own).item()


def half_size_distance(picture, reference):
    """The patch distance at one of its three sizes: seconds sooner."""
    ours, theirs = (patches(F.avg_pool2d(prepare(one.numpy()), 2)) for one in (picture, reference))
    return nearest(ours, theirs) + nearest(theirs, ours)


class Film:
    """Frames of a scene in the look of pebbles, on the demo model, whose latent pixels are 8 pixels wide."""

    SIZE = 96

    def __init__(self, pack, file):
        self.pack = pack
        self.model, clip, self.vae, _ = comfy.sd.load_checkpoint_guess_config(file)
        self.scene, pebbles = (
            torch.from_numpy(formulas().PICTURES[name]()).float() for name in ("scene: still life", "texture: pebbles")
        )
        self.reference = self.vae.encode(pebbles[None, 160:352, 160:352])
        self.look = self.vae.decode(self.reference)[0]
        self.prompt = clip.encode_from_tokens_scheduled(clip.tokenize(""))

    def sampled(self, latent, **settings):
        """By AD-Guided KSampler."""
        graph = Graph(
            self.pack, self.model, self.prompt, self.prompt, {"samples": latent}, seed=1, steps=5, sampler="ddim",
            scheduler="ddim_uniform", denoise=0.6, settings={"iterations": 1, "adain": False},
        ).styled(self.reference, balance="share")  # fmt: skip
        return graph.but(**settings).ksampler()

    def optimised(self, latent, **settings):
        """By AD Optimize Latent."""
        capture, node = (comfy_nodes.NODE_CLASS_MAPPINGS[f"AD{name}"]
                         for name in ("CaptureReferenceAttention", "OptimizeLatent"))  # fmt: skip
        style = capture.execute(self.model, {"samples": self.reference}, "auto", 1.0, balance="share")[0]
        return node.execute(
            model=self.model, style=style, latent_image={"samples": latent}, seed=1, start_from="latent", steps=6,
            learning_rate=0.1, iterations=1, content_weight=0.0, attention_scale=1.0, content_loss="query",
            lr_schedule="cosine", conditioning=self.prompt, **settings,
        )[0]["samples"]  # fmt: skip


@pytest.fixture(scope="module")
def film(pack, demo_file):
    with torch.inference_mode():
        return Film(pack, demo_file)


@pytest.mark.parametrize(("how", "pan"), [("sampled", 2), ("sampled", 8), ("optimised", 8)])
@torch.inference_mode()
def test_texture_does_not_boil_on_a_pan(film, how, pan):
    """Less than half of it is left, at the patch distance of a picture for itself."""
    content = torch.stack([film.scene[192 : 192 + film.SIZE, x : x + film.SIZE] for x in (0, pan)])
    start = film.vae.encode(content)
    make, seen = getattr(film, how), film.vae.decode(start).clamp(0, 1)
    each, held = (film.vae.decode(make(start, frames=frames)).clamp(0, 1) for frames in (0.0, 1.0))
    assert beyond_the_content(held, seen, pan) < 0.5 * beyond_the_content(each, seen, pan)
    assert half_size_distance(held[1], film.look) < 1.1 * half_size_distance(each[1], film.look)
