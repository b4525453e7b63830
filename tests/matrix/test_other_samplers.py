"""Samplers in the ways that other packs write them: guided as the plain one is, or stopped where it would be lost."""

import copy

import comfy.samplers
import pytest
import torch
from guided import Graph
from recorder import Recorder, run_with, schedule

import nodes as comfy_nodes

STEPS = 4


@pytest.fixture(scope="module")
def small(graph, random_latent) -> Graph:
    """A guided graph at 8x8, one iteration a step."""
    changed = graph.but(latent={"samples": torch.zeros(1, 4, 8, 8)}, steps=STEPS, iterations=1)
    return changed.styled(random_latent(1, (1, 4, 8, 8)))


def one_stage(shown, own=lambda x: x):
    """Euler that shows the model `shown` of its state, which it holds as `own` of the noise."""

    def sample_one_stage(model, x, sigmas, extra_args=None, callback=None, disable=None):
        kind, x = x.dtype, own(x)
        for i in range(len(sigmas) - 1):
            denoised = model(shown(x), sigmas[i] * x.new_ones(len(x), dtype=kind), **extra_args)
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        return x.to(kind)

    return sample_one_stage


def sample_variance_preserving(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Its state is the model's input, of unit variance; the callback comes at the end of a step."""
    scales = (1 + sigmas**2).sqrt()
    y = x / scales[0]
    for i in range(len(sigmas) - 1):
        denoised = model(y * scales[i], sigmas[i] * x.new_ones(len(x)), **extra_args)
        noise = (y * scales[i] - denoised) / sigmas[i]
        y = (denoised + noise * sigmas[i + 1]) / scales[i + 1]
        callback({"x": y, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
    return y * scales[-1]


def sample_from_a_saved_copy(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Shows its own tensor and goes on from a copy made before the call."""
    for i in range(len(sigmas) - 1):
        start = x.detach().clone()
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        x = start + (start - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def two_stages(shown, own=lambda x: x):
    """The midpoint method, which shows the model `shown` of its state and of the point halfway."""

    def sample_two_stages(model, x, sigmas, extra_args=None, callback=None, disable=None):
        kind, x = x.dtype, own(x)
        for i in range(len(sigmas) - 1):
            ones, step = x.new_ones(len(x), dtype=kind), sigmas[i + 1] - sigmas[i]
            denoised = model(shown(x), sigmas[i] * ones, **extra_args)
            slope = (x - denoised) / sigmas[i]
            halfway = sigmas[i] + step / 2
            half = x + slope * (step / 2)
            x = x + (half - model(shown(half), halfway * ones, **extra_args)) / halfway * step
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        return x.to(kind)

    return sample_two_stages


def sample_rows_of_stages(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """The midpoint method as tableaus are written: float64, one tensor of stages and one of their slopes."""
    kind, x = x.dtype, x.to(torch.float64)
    stages, slopes = torch.zeros(2, *x.shape, dtype=x.dtype), torch.zeros(2, *x.shape, dtype=x.dtype)
    tableau = ((), (0.5,))
    for i in range(len(sigmas) - 1):
        start, step = x.clone(), sigmas[i + 1] - sigmas[i]
        for row, weights in enumerate(tableau):
            level = sigmas[i] + step * sum(weights)
            stages[row] = start
            for column, weight in enumerate(weights):
                stages[row] += step * weight * slopes[column]
            denoised = model(stages[row].to(kind), level * x.new_ones(len(x), dtype=kind), **extra_args)
            slopes[row] = (stages[row] - denoised) / level
        x = start + step * slopes[1]
        callback({"x": x.to(kind), "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
    return x.to(kind)


def sample_noise_again(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Keeps the model's answer alone, with new noise: the update reaches the picture through the model."""
    generator = torch.Generator().manual_seed(5)
    for i in range(len(sigmas) - 1):
        denoised = model(x.double().float(), sigmas[i] * x.new_ones(len(x)), **extra_args)
        x = denoised + torch.randn(x.shape, generator=generator).to(x) * sigmas[i + 1]
    return x


def sample_noise_again_plainly(model, x, sigmas, extra_args=None, callback=None, disable=None):
    generator = torch.Generator().manual_seed(5)
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        x = torch.randn(x.shape, generator=generator).to(x).mul_(sigmas[i + 1]).add_(denoised)
    return x


PLAIN = one_stage(lambda x: x)
HALF_STEPS = two_stages(lambda x: x)
WAYS = {
    "a clone": (one_stage(torch.clone), PLAIN),
    "a view": (one_stage(lambda x: x[:]), PLAIN),
    "float32 of float64": (one_stage(torch.Tensor.float, torch.Tensor.double), PLAIN),
    "a copy written into": (one_stage(lambda x: torch.empty_like(x).copy_(x)), PLAIN),
    "a clone of a cast": (one_stage(lambda x: x.to(torch.float32).clone(), torch.Tensor.double), PLAIN),
    "bfloat16 of float32": (one_stage(torch.Tensor.bfloat16), PLAIN),
    "rescaled": (sample_variance_preserving, PLAIN),
    "two stages, clones": (two_stages(torch.clone), HALF_STEPS),
    "two stages, float64": (two_stages(torch.Tensor.float, torch.Tensor.double), HALF_STEPS),
    "rows of stages": (sample_rows_of_stages, HALF_STEPS),
    "noised again": (sample_noise_again, sample_noise_again_plainly),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_picture_is_that_of_the_plain_sampler(way, small, pack_module):
    """With the same updates, and they move it."""
    sigmas = schedule(small, "normal", STEPS)
    written, plain = map(comfy.samplers.KSAMPLER, WAYS[way])
    expected, unguided, recorder = Recorder(0.5, range(1, 9)), Recorder(), Recorder(0.5, range(1, 9))
    picture = run_with(expected, small, plain, pack_module, sigmas)[0]
    found = run_with(recorder, small, written, pack_module, sigmas)[0]
    near = {"rtol": 0, "atol": 0.7 if "bfloat16" in way else 2e-4, "check_dtype": False}
    torch.testing.assert_close(found, picture, **near)
    for (_, state), (_, of_plain) in zip(recorder.states, expected.states, strict=True):
        torch.testing.assert_close(state, of_plain, **near)
    untouched = run_with(unguided, small, written, pack_module, sigmas)[0]
    assert torch.equal(untouched, run_with(None, small, written, pack_module, sigmas)[0])
    assert (picture - untouched).abs().mean() > 0.3


@pytest.mark.parametrize("way", ["float32 of float64", "rows of stages"])
def test_guidance_itself(way, small):
    """The same with the real updates."""
    written, plain = map(comfy.samplers.KSAMPLER, WAYS[way])
    torch.testing.assert_close(small.guider(written), small.guider(plain), rtol=0, atol=1e-3)


@pytest.mark.parametrize("second", [0.25, -0.4, -0.5])
@pytest.mark.parametrize("way", ["float32 of float64", "rescaled", "rows of stages", "noised again"])
def test_two_guidances_in_a_row(way, second, small, pack_module):
    """Each updates every state, the inner one first; the second may pull back."""
    sampling, sigmas, results = pack_module("guidance.sampling"), schedule(small, "normal", STEPS), []
    for function in WAYS[way]:
        inner, outer = Recorder(0.5, range(1, 9)), Recorder(second, (2, 3))
        sampler = sampling.guide_sampler(comfy.samplers.KSAMPLER(function), lambda *_, run=inner: run)
        results.append(run_with(outer, small, sampler, pack_module, sigmas)[0])
        for i, ((_, first), (_, then)) in enumerate(zip(inner.states, outer.states, strict=True)):
            torch.testing.assert_close(first + 0.5, then, msg=f"state {i}")
    torch.testing.assert_close(*results, rtol=0, atol=2e-4)


def test_a_mask(small, pack_module, random_latent):
    """A copy of the state is moved where the mask lets it, and nowhere else."""
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1
    sigmas, latent = schedule(small, "normal", STEPS), random_latent(7, (1, 4, 8, 8))
    updates = range(1, 9)
    pictures = [
        run_with(Recorder(0.5, updates), small, comfy.samplers.KSAMPLER(way), pack_module, sigmas, None, latent, mask)
        for way in WAYS["float32 of float64"]
    ]
    torch.testing.assert_close(pictures[0][0], pictures[1][0], rtol=0, atol=2e-4)


def sample_predict_correct(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """One evaluation a step, on the prediction, is used to correct it and to predict the next."""
    slope, start = 0.0, x
    torch.manual_seed(0)
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        shown, now = x, to_noise(x, denoised, sigmas[i])
        if i > 0:
            x = start + (slope + to_noise(start, denoised, sigmas[i - 1])) / 2 * (sigmas[i] - sigmas[i - 1])
            x = x + 0.01 * torch.randn_like(shown)  # made in the shape of what was shown, not of its values
        callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        slope, start = to_noise(x, denoised, sigmas[i]) if i > 0 else now, x
        x = x + slope * (sigmas[i + 1] - sigmas[i])
    return x


def sample_predict_correct_in_noise(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """The same, in noises worked out from the prediction, which the update cancels out of."""
    start, before = x, 0.0
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
        noise = (x - denoised) / sigmas[i]
        if i > 0:
            x = start + (before + noise) / 2 * (sigmas[i] - sigmas[i - 1])
        start, before = x, noise
        x = x + noise * (sigmas[i + 1] - sigmas[i])
    return x


def to_noise(x, denoised, sigma):
    return (x - denoised) / sigma


def sample_shake(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Shows its state with something added, and goes on from the state."""
    for i in range(len(sigmas) - 1):
        denoised = model(x + 0.01 * torch.randn_like(x), sigmas[i] * x.new_ones(len(x)), **extra_args)
        x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
    return x


def sample_by_numpy(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Its steps are no operations of torch's."""
    for i in range(len(sigmas) - 1):
        denoised = model(x, sigmas[i] * torch.ones(len(x)), **extra_args).numpy()
        own, level, then = x.numpy().copy(), float(sigmas[i]), float(sigmas[i + 1])
        x = torch.from_numpy(own + (own - denoised) / level * (then - level))
    return x


def restart(levels, copy=False):
    """Euler along its own levels, which lead back up; where they do, noise is added."""

    def sample_restart(model, x, sigmas, extra_args=None, callback=None, disable=None):
        path = torch.tensor(levels(sigmas.tolist()))
        for i in range(len(path) - 1):
            if path[i + 1] > path[i]:
                x = x + torch.randn_like(x) * (path[i + 1] ** 2 - path[i] ** 2).sqrt()
            else:
                denoised = model(x.clone() if copy else x, path[i] * x.new_ones(len(x)), **extra_args)
                x = x + (x - denoised) / path[i] * (path[i + 1] - path[i])
        return x

    return sample_restart


def detail(amount, first=0):
    """Euler inside of a sampler that tells the model of less or more noise than there is, from a step on."""

    def sample_detail(model, x, sigmas, extra_args=None, callback=None, disable=None):
        def lying(x, sigma, **options):
            step = (sigmas >= sigma * 0.9999).sum() - 1
            return model(x, sigma * (1 - amount) if step >= first else sigma, **options)

        return PLAIN(lying, x, sigmas, extra_args, callback, disable)

    return sample_detail


def sample_past_the_model(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Calls what is inside of the model that it is given."""
    inner = lambda x, sigma, model_options, seed, **_: model.inner_model(x, sigma, model_options, seed)  # noqa: E731
    return PLAIN(inner, x, sigmas, extra_args, callback, disable)


STEPS_BETWEEN = "it makes steps of its own between the sigmas"
NEVER_SHOWN = "it is at sigma .* and never showed the model a picture of that noise level"
LOST = "it does not go on from the picture that it shows the model"
REFUSED = {
    "predictor-corrector": (sample_predict_correct, LOST, 3),
    "predictor-corrector in noise": (sample_predict_correct_in_noise, LOST, 2),
    "shown with something added": (sample_shake, LOST, 3),
    "a saved copy": (sample_from_a_saved_copy, LOST, 2),
    "numpy": (sample_by_numpy, LOST, 2),
    "restart to an earlier level": (restart(lambda s: [*s[:3], *s[1:]]), "it calls the model twice at sigma", 2),
    "restart to a level of its own": (restart(lambda s: [*s[:3], (s[1] + s[2]) / 2, *s[2:]]), STEPS_BETWEEN, 3),
    "restart further up": (restart(lambda s: [*s[:4], (s[1] + s[2]) / 2, *s[3:]]), "it goes back from sigma", 3),
    "steps of its own, shown as copies": (restart(lambda s: [s[0], s[1], s[1] * 0.9, *s[2:]], True), STEPS_BETWEEN, 3),
    "less noise": (detail(0.1), "it was to start at sigma 14.61 and showed the model 13.15", 1),
    "more noise": (detail(-0.1), "it was to start at sigma 14.61 and showed the model 16.08", 1),
    "less noise, later": (detail(0.1, 1), "it showed the model sigma .* before", 2),
    "more noise, later": (detail(-0.1, 1), NEVER_SHOWN, 2),
    "past the model": (sample_past_the_model, NEVER_SHOWN, 1),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_lost_is_stopped(kind, small, pack_module):
    """By name, in the step that shows it: so many calls of the model at most."""
    function, why, calls = REFUSED[kind]
    made, model = [], small.model.clone()
    model.set_model_unet_function_wrapper(
        lambda apply, args: made.append(1) or apply(args["input"], args["timestep"], **args["c"])
    )
    sampler, sigmas = comfy.samplers.KSAMPLER(function), schedule(small, "normal", STEPS)
    with pytest.raises(ValueError, match=f"sampler: {why}.*; {function.__name__} is not supported .* euler"):
        run_with(Recorder(0.5, range(9)), small, sampler, pack_module, sigmas, model)
    assert len(made) <= calls


def test_without_guidance_at_its_states_nothing_is_lost(small, pack_module):
    """Outside of start_percent and end_percent other samplers may go on from where they like."""

    class Never(Recorder):
        def reached(self, _level):
            return False

    sigmas, sampler = schedule(small, "normal", STEPS), comfy.samplers.KSAMPLER(sample_predict_correct)
    expected = run_with(None, small, sampler, pack_module, sigmas)[0]
    assert torch.equal(run_with(Never(), small, sampler, pack_module, sigmas)[0], expected)


def test_a_name_of_comfyui_is_not_enough(small, pack_module):
    """Another pack's function of the name of one of ComfyUI's, which makes two calls a step, is not taken for it."""

    def sample_heun(*args, **kwargs):
        return PLAIN(*args, **kwargs)

    sigmas, results = schedule(small, "normal", STEPS), []
    for function in (sample_heun, PLAIN):
        recorder = Recorder(0.5, range(9))
        results.append(run_with(recorder, small, comfy.samplers.KSAMPLER(function), pack_module, sigmas)[0])
        assert len(recorder.states) == STEPS
    assert torch.equal(*results)


def test_what_a_sampler_writes_to_its_model_arrives(small, pack_module, random_latent):
    """It may change what a mask keeps, and take away what it has put there."""

    def sample_and_write(model, x, sigmas, **options):
        model.latent_image, model.noise = model.latent_image * 0.5, -model.noise
        model.mark = 1
        assert copy.copy(model).mark == 1
        del model.mark
        assert not hasattr(model, "mark")
        return PLAIN(model, x, sigmas, **options)

    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1
    sampler, sigmas = comfy.samplers.KSAMPLER(sample_and_write), schedule(small, "normal", STEPS)
    expected, found = (
        run_with(run, small, sampler, pack_module, sigmas, None, random_latent(7, (1, 4, 8, 8)), mask)[0]
        for run in (None, Recorder())
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_a_sampler_is_copied_with_all_that_it_has(small, pack_module):
    class Marked(comfy.samplers.KSAMPLER):
        def max_denoise(self, model_wrap, sigmas):
            return False

    sampler = Marked(PLAIN, inpaint_options={"random": True})
    sampler.mark = object()
    sampling = pack_module("guidance.sampling")
    sampling.check_sampler(sampler)
    guided = sampling.guide_sampler(sampler, None)
    assert type(guided) is Marked and guided.mark is sampler.mark and guided.inpaint_options == {"random": True}
    assert sampler.sampler_function is PLAIN is guided.sampler_function.__wrapped__
    assert guided.sampler_function.__name__ == "sample_one_stage"

    class Own(comfy.samplers.KSAMPLER):
        def sample(self, *args, **kwargs):
            return super().sample(*args, **kwargs)

    with pytest.raises(ValueError, match="sampler: Own is not a sampler of ComfyUI's usual kind"):
        sampling.check_sampler(Own(PLAIN))


def sa_solver(graph, **options):
    """What ComfyUI's SamplerSASolver node makes."""
    made = {"eta": 1.0, "sde_start_percent": 0.2, "sde_end_percent": 0.8, "s_noise": 1.0, "predictor_order": 3}
    made |= {"corrector_order": 4, "use_pece": False, "simple_order_2": False, **options}
    with torch.inference_mode():
        return comfy_nodes.NODE_CLASS_MAPPINGS["SamplerSASolver"].execute(graph.model, **made)[0]


@pytest.mark.parametrize(
    "options", [{"use_pece": True}, {"corrector_order": 0}, {"use_pece": True, "corrector_order": 0}]
)
def test_options_decide_about_sa_solver(options, small, pack_module):
    """Each update arrives in the result as it is, only smaller, on a model whose answer does not depend on it."""
    pack_module("guidance.sampling").check_sampler(sa_solver(small, **options))
    model = small.model.clone()
    model.set_model_sampler_cfg_function(lambda args: args["input"] * 1.0, disable_cfg1_optimization=True)
    sigmas = schedule(small, "normal", 5)[:-1]
    without, changed = (
        run_with(run, small, sa_solver(small, **options), pack_module, sigmas, model)[0]
        for run in (Recorder(), Recorder(0.5, (2,)))
    )
    arrived = changed - without
    assert (arrived > 1e-4).all() and arrived.std() < 1e-4


def test_sa_solver_with_a_corrector_is_refused(small):
    with pytest.raises(ValueError, match=r"sampler: sa_solver is not .*; use sa_solver_pece \(use_pece\), or a corr"):
        small.guider(sa_solver(small))


def test_unsampling_is_refused(small, pack_module):
    """FlipSigmas: before anything runs, and in words that say what to do."""
    node = comfy_nodes.NODE_CLASS_MAPPINGS
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match=r"sigmas: they rise from 0.0001 to .* without"),
    ):
        node["SamplerCustom"].execute(
            small.patched(), False, 1, 1.0, small.positive, small.negative, comfy.samplers.sampler_object("euler"),
            node["FlipSigmas"].execute(schedule(small, "normal", STEPS))[0], small.latent,
        )  # fmt: skip


def test_noise_is_not_guided(small, caplog):
    """A state at the model's largest noise level, or above: said in the log."""
    caplog.set_level("INFO")
    for name in ("euler", "heun"):
        with torch.inference_mode():
            comfy_nodes.NODE_CLASS_MAPPINGS["SamplerCustom"].execute(
                small.patched(), True, 1, 1.0, small.positive, small.negative, comfy.samplers.sampler_object(name),
                torch.tensor([40.0, 20.0, 14.614641, 5.0, 0.0]), small.latent,
            )  # fmt: skip
        assert "2 states at the model's largest noise level" in caplog.text
        assert " 2 updates of" in caplog.text
        caplog.clear()


def test_notes_that_a_sampler_takes_stay_what_they_are(small, pack_module):
    """Copies of its own tensor, taken before the model sees it."""
    notes = []

    def sample_and_note(model, x, sigmas, **options):
        def noting(x, sigma, **extra):
            before = x.clone()
            answer = model(x, sigma, **extra)
            notes.append(x - before)
            return answer

        return PLAIN(noting, x, sigmas, **options)

    sampler = comfy.samplers.KSAMPLER(sample_and_note)
    run_with(Recorder(0.5, range(1, 9)), small, sampler, pack_module, schedule(small, "normal", STEPS))
    assert [round(float(note.mean()), 3) for note in notes] == [0, 0.5, 0.5, 0.5]


# Their trial points lie at noise levels of the sampler's own steps, or their steps at others.
NOT_FOLLOWED = {
    "heun", "heunpp2", "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpm_2_ancestral", "dpm_fast",
    "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "sa_solver", "sa_solver_pece", "uni_pc", "uni_pc_bh2",
}  # fmt: skip
FOLLOWED = {
    "euler_ancestral_cfg_pp", "lms", "dpm_2", "dpmpp_2m_sde", "dpmpp_sde", "ddpm", "lcm", "ipndm_v", "deis",
    "res_multistep_ancestral", "gradient_estimation_cfg_pp", "er_sde", "seeds_3",
}  # fmt: skip


def sample_inside(*args, inner, **options):
    """Calls the sampler that it is given, as those do that add something to any sampler."""
    return inner.sampler_function(*args, **inner.extra_options, **options)


@pytest.mark.parametrize("name", sorted(NOT_FOLLOWED | FOLLOWED))
def test_comfyuis_samplers_inside_of_another_packs(name, small, pack_module):
    """Nothing is known of them then: the same picture as when it is, or an error, never another picture."""
    inner, sigmas = comfy.samplers.sampler_object(name), schedule(small, "normal", STEPS)
    sampler = comfy.samplers.KSAMPLER(sample_inside, {"inner": inner}, inner.inpaint_options)

    def picture(sampler):
        pack_module("guidance.sampling").check_sampler(sampler)
        return run_with(Recorder(0.5, range(1, 9)), small, sampler, pack_module, sigmas)[0]

    if name in NOT_FOLLOWED:
        with pytest.raises(ValueError, match=f"sampler: .*({name}|sample_inside) is not supported"):
            picture(sampler)
    else:
        assert torch.equal(picture(sampler), picture(inner))


def test_a_unipc_of_another_pack_is_refused(small):
    def sample_my_uni_pc(*args, **kwargs):
        return PLAIN(*args, **kwargs)

    with pytest.raises(ValueError, match=r"sampler: sample_my_uni_pc is not supported .*: it corrects the picture"):
        small.guider(comfy.samplers.KSAMPLER(sample_my_uni_pc))


def test_what_a_sampler_works_out_is_not_changed_by_looking(pack_module):
    """Operations in place on what does not come from the picture, with what does: done once, as without."""
    x = torch.full((1, 1, 2, 2), 10.0)
    with pack_module("guidance.lineage").Lineage(x) as lineage:
        with lineage.aside():
            lineage.update(x, x + 1)
        high, low, total = torch.ones_like(x, dtype=torch.bool), torch.zeros_like(x, dtype=torch.bool), x.new_zeros(4)
        high &= x > 10.5
        low |= x < 10.5
        total += x.flatten()
        total[0] = x[0, 0, 0, 0] * 2
        torch.add(total, 1, out=total)
    assert high.all()
    assert not low.any()
    assert total.tolist() == [23, 12, 12, 12]
