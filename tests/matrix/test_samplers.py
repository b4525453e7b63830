"""Every sampler and scheduler of ComfyUI: one update for each step, on the sampler's state."""

import re

import comfy.k_diffusion.sampling
import comfy.samplers
import pytest
import torch
from recorder import Recorder, run_with, schedule

import nodes as comfy_nodes

REFUSED = {"sa_solver", "uni_pc", "uni_pc_bh2"}
ALLOWED = [name for name in comfy.samplers.SAMPLER_NAMES if name not in REFUSED]
OWN_STEPS = {"dpm_fast", "dpm_adaptive"}
STOCHASTIC = ("ancestral", "sde", "seeds", "ddpm", "lcm", "sa_solver")
STEPS = 4


@pytest.fixture(scope="module")
def small(graph, random_latent):
    """A guided graph at 8x8, one iteration a step."""
    changed = graph.but(latent={"samples": torch.zeros(1, 4, 8, 8)}, steps=STEPS, iterations=1)
    return changed.styled(random_latent(1, (1, 4, 8, 8)))


def updates(log):
    """How many updates the last run reported."""
    return int(re.findall(r"(\d+) updates of", log)[-1])


@pytest.mark.parametrize("name", ALLOWED)
def test_every_sampler(name, small, caplog):
    caplog.set_level("INFO")
    graph = small.but(sampler=name)
    guided, unguided = graph.ksampler(), graph.core()
    assert torch.isfinite(guided).all()
    assert (guided - unguided).abs().mean() > 1e-2
    if name not in OWN_STEPS:
        assert updates(caplog.text) == STEPS
    if any(word in name for word in STOCHASTIC):
        assert torch.equal(guided, graph.ksampler())
    assert torch.equal(graph.but(iterations=0).ksampler(), unguided)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_samplers_say_why(name, small):
    with pytest.raises(ValueError, match=f"sampler: {name} is not supported .*: it corrects the picture after"):
        small.but(sampler=name).ksampler()


@pytest.mark.parametrize("name", comfy.samplers.SCHEDULER_NAMES)
def test_every_scheduler(name, small, caplog):
    caplog.set_level("INFO")
    graph = small.but(scheduler=name, steps=5)
    sigmas = comfy.samplers.calculate_sigmas(graph.model.get_model_object("model_sampling"), name, 5)
    assert torch.isfinite(graph.ksampler()).all()
    assert updates(caplog.text) == len(sigmas) - 1


@pytest.mark.parametrize("scheduler", comfy.samplers.SCHEDULER_NAMES)
def test_every_sampler_with_every_scheduler(scheduler, small, pack_module):
    """One update for each step, at the noise level that the step leads to."""
    sigmas, model = schedule(small, scheduler, 3), constant(small.model)
    for name in ALLOWED:
        if name not in OWN_STEPS:
            recorder = Recorder()
            _, shown = run_with(recorder, small, name, pack_module, sigmas, model)
            levels = torch.tensor([level for level, _ in recorder.states])
            torch.testing.assert_close(levels, sigmas[1:], msg=lambda text, name=name: f"{name}: {text}")
            assert len(shown) == len(levels), name


@pytest.mark.parametrize("name", ALLOWED)
def test_a_run_that_changes_nothing_is_the_hosts(name, small, pack_module):
    """To the last bit, and the callback, which is progress and preview, comes as often."""
    sigmas = schedule(small, "normal", 4)
    result, shown = run_with(Recorder(), small, name, pack_module, sigmas)
    expected, shown_by_host = run_with(None, small, name, pack_module, sigmas)
    assert torch.equal(result, expected)
    assert len(shown) == len(shown_by_host)


@pytest.mark.parametrize("name", [name for name in ALLOWED if name != "dpm_adaptive"])
def test_the_update_is_on_the_state(name, small, pack_module):
    """Samplers show their state in the callback of each step: it must be what was updated, and nothing else."""
    recorder = Recorder()
    sigmas = schedule(small, "normal")
    result, shown = run_with(recorder, small, name, pack_module, sigmas)
    states = [x for _, x in recorder.states]
    assert len(states) == len(shown)
    if name not in ("sa_solver_pece", "deis", "ipndm", "ipndm_v"):  # these show a prediction, or the initial noise
        assert all(torch.equal(state, x) for state, x in zip(states, shown[1:], strict=False))
    assert torch.equal(small.model.model.process_latent_out(states[-1]), result)
    assert [level for level, _ in recorder.states] == sorted((level for level, _ in recorder.states), reverse=True)
    if name != "dpm_fast":
        torch.testing.assert_close(torch.tensor([level for level, _ in recorder.states]), sigmas[1:])


def constant(model):
    """The model with a prediction that does not depend on the picture: what is left of a change is in the state."""
    clone = model.clone()
    clone.set_model_unet_function_wrapper(lambda _apply_model, given: given["input"])  # the network need not run
    clone.set_model_sampler_cfg_function(lambda args: args["input"] * 1.0, disable_cfg1_optimization=True)
    return clone


KEEPS = [name for name in ALLOWED if "cfg_pp" not in name and name not in ("lcm", "dpm_adaptive")]


@pytest.mark.parametrize("name", [*KEEPS, *sorted(REFUSED)])
def test_the_sampler_goes_on_from_the_update(name, small, pack_module):
    """What is added to a state arrives in the result, smaller, as the state itself does.

    The samplers that are refused drop it or take it for the opposite. (lcm takes the prediction alone into the next
    step, the cfg_pp kinds one that depends on the picture, dpm_adaptive chooses its steps by the picture.)
    """
    model, sigmas = constant(small.model), schedule(small, "normal")[:-1]
    without, changed = (
        run_with(Recorder(add, at=(2,)), small, name, pack_module, sigmas, model)[0] for add in (0.0, 0.5)
    )
    arrived = changed - without
    assert ((arrived > 1e-4).all() and arrived.std() < 1e-4) == (name in KEEPS)


def test_what_the_update_is_given_of_an_inpainted_picture(small, pack_module, random_latent):
    """The blend that the model is shown, and where it may move; the callback goes on counting."""
    recorder, latent = Recorder(add=0.5, at=range(1, 9)), random_latent(7, (1, 4, 8, 8))
    mask = torch.zeros(1, 1, 8, 8)
    mask[..., :3] = 1
    _, shown = run_with(recorder, small, "euler", pack_module, schedule(small, "normal"), latent=latent, mask=mask)
    kept = small.model.model.process_latent_in(latent)
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    assert len(shown) == len(recorder.states) == 7
    for (level, x), movable in zip(recorder.states, recorder.movable, strict=True):
        assert torch.equal(movable, mask.expand_as(movable))
        torch.testing.assert_close(x[..., 3:], (kept + level * noise)[..., 3:], rtol=0, atol=1e-4)
    for before, state in zip(recorder.states, shown[1:], strict=False):
        torch.testing.assert_close(state[..., :3], before[1][..., :3] + 0.5)  # moved here, and nowhere else
        assert (state - before[1])[..., 3:].abs().mean() < 0.45


def test_dpm_adaptive_is_updated_at_each_accepted_step(small, caplog, monkeypatch):
    caplog.set_level("INFO")
    accepted = []
    real = comfy.k_diffusion.sampling.PIDStepSizeController.propose_step

    def counting(self, error):
        accept = real(self, error)
        accepted.append(accept)
        return accept

    monkeypatch.setattr(comfy.k_diffusion.sampling.PIDStepSizeController, "propose_step", counting)
    small.but(sampler="dpm_adaptive").ksampler()
    assert updates(caplog.text) == sum(map(bool, accepted)) > 1


def custom(trial):
    """Euler as another pack might write it, with a trial call at a noise level of its own choice."""

    def sample_of_another_pack(model, x, sigmas, extra_args=None, callback=None, disable=None):
        s_in = x.new_ones([x.shape[0]])
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * s_in, **extra_args)
            d = (x - denoised) / sigmas[i]
            if trial is not None and sigmas[i + 1] > 0:
                level = trial(sigmas[i], sigmas[i + 1])
                model(x + d * (level - sigmas[i]), level * s_in, **extra_args)
            x = x + d * (sigmas[i + 1] - sigmas[i])
        return x

    return comfy.samplers.KSAMPLER(sample_of_another_pack)


def test_samplers_of_other_packs(small, caplog):
    """The first call at each sigma is taken for the state; where that cannot be, the run ends with an error."""
    caplog.set_level("INFO")
    expected = small.guider()
    assert torch.equal(small.guider(custom(None)), expected)
    assert torch.equal(small.guider(custom(lambda now, then: (now * then).sqrt())), expected)
    assert updates(caplog.text) == STEPS
    with pytest.raises(ValueError, match="sampler: it calls the model twice at sigma"):
        small.guider(custom(lambda now, then: then))

    def skips_levels(model, x, sigmas, **options):
        return comfy.k_diffusion.sampling.sample_euler(model, x, sigmas[[0, -1]], **options)

    with pytest.raises(ValueError, match="sampler: it showed the model only 1 of the 4 noise levels"):
        small.guider(comfy.samplers.KSAMPLER(skips_levels))

    class Own(comfy.samplers.Sampler):
        pass

    with pytest.raises(ValueError, match="sampler: Own is not a sampler of ComfyUI's usual kind"):
        small.guider(Own())


def test_no_step_no_update(small, random_latent):
    """A schedule of one noise level, such as the rest of a split one: the core result."""
    latent = {"samples": random_latent(5, (1, 4, 8, 8))}
    graph = small.but(latent=latent)
    node = comfy_nodes.NODE_CLASS_MAPPINGS["SamplerCustom"]
    for name in ("euler", "heun", "dpm_fast"):
        for sigmas in ([0.0], [3.0]):
            with torch.inference_mode():
                guided, plain = (
                    node.execute(
                        model, True, 1, 1.0, graph.positive, graph.negative, comfy.samplers.sampler_object(name),
                        torch.tensor(sigmas), graph.latent,
                    )[0]["samples"] for model in (graph.patched(), graph.model)
                )  # fmt: skip
            assert torch.equal(guided, plain)


@pytest.mark.parametrize("sigmas", [[5.0, 2.0], [5.0, 0.0], [40.0, 3.0, 1.0], [5.0, 2.0, 0.5]])
def test_sigmas_given_by_hand(small, sigmas, caplog):
    """One step, an end above 0, a start above the model's: one update for each step, of other packs' samplers too."""
    caplog.set_level("INFO")

    def sample_of_another_pack(*args, **kwargs):
        return comfy.k_diffusion.sampling.sample_heun(*args, **kwargs)

    samplers = [comfy.samplers.sampler_object(name) for name in ("euler", "heun", "dpmpp_2m", "sa_solver_pece")]
    if len(sigmas) == 2:
        samplers.append(comfy.samplers.KSAMPLER(sample_of_another_pack))
    node = comfy_nodes.NODE_CLASS_MAPPINGS["SamplerCustom"]
    for sampler in samplers:
        with torch.inference_mode():
            made = node.execute(
                small.patched(), True, 1, 1.0, small.positive, small.negative, sampler, torch.tensor(sigmas),
                small.latent,
            )[0]["samples"]  # fmt: skip
        assert torch.isfinite(made).all()
        assert updates(caplog.text) == len(sigmas) - 1


def test_steps_that_cannot_be_found(small):
    """heunpp2 looks for the last sigma by its value."""
    node = comfy_nodes.NODE_CLASS_MAPPINGS["SamplerCustom"]
    sampler = comfy.samplers.sampler_object("heunpp2")
    with torch.inference_mode(), pytest.raises(ValueError, match=r"sampler: 1 of its 2 steps could be found"):
        node.execute(
            small.patched(), True, 1, 1.0, small.positive, small.negative, sampler, torch.tensor([5.0, 2.0, 2.0]),
            small.latent,
        )  # fmt: skip


def test_an_eta_above_one_is_refused(small):
    with pytest.raises(ValueError, match=r"eta: 1.5 is not supported .*; use 0 to 1"):
        small.guider(comfy.samplers.ksampler("dpmpp_2s_ancestral", {"eta": 1.5}))
    assert torch.isfinite(small.guider(comfy.samplers.ksampler("dpmpp_2s_ancestral", {"eta": 0.5}))).all()


def test_a_sampler_that_changes_the_size(small, random_latent, caplog):
    """LCM Upscale: fine without a content reference, which could not follow."""
    from comfy_extras.nodes_advanced_samplers import SamplerLCMUpscale

    caplog.set_level("INFO")
    sampler = SamplerLCMUpscale.execute(1.5, -1, "bislerp")[0]
    assert small.guider(sampler).shape == (1, 4, 12, 12)
    assert updates(caplog.text) == STEPS
    with pytest.raises(ValueError, match=r"content: the sampler has changed the picture's size from \[8, 8\]"):
        small.but(content=small.capture(random_latent(2, (1, 4, 8, 8)))).guider(sampler)


def test_churn_is_refused(small):
    sampler = comfy.samplers.ksampler("euler", {"s_churn": 1.0})
    with pytest.raises(ValueError, match=r"s_churn: 1.0 is not supported"):
        small.guider(sampler)
