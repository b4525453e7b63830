"""Every sampler and scheduler of ComfyUI: one update for each step, on the sampler's state."""

import re

import comfy.k_diffusion.sampling
import comfy.samplers
import pytest
import torch

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


class Recorder:
    """A run that changes nothing and notes what it is given."""

    def __init__(self):
        self.states = []

    def is_active(self, _level):
        return True

    def update(self, x, level):
        self.states.append((level, x.clone()))
        return x.clone()

    def report(self):
        pass


@pytest.mark.parametrize(
    "name",
    [
        "euler",
        "heun",
        "heunpp2",
        "exp_heun_2_x0",
        "dpm_2",
        "dpm_2_ancestral",
        "dpmpp_2s_ancestral",
        "dpmpp_sde",
        "seeds_3",
        "dpm_fast",
    ],
)
def test_the_update_is_on_the_state(name, small, pack_module):
    """These samplers show their state in the callback of each step: it must be what was updated, and nothing else."""
    sampling, recorder, shown = pack_module("guidance.sampling"), Recorder(), []
    sampler = comfy.samplers.sampler_object(name)
    guided = sampling.guide_sampler(sampler, lambda *_: recorder)
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(small.model)
        guider.set_conds(small.positive, small.negative)
        guider.set_cfg(1.0)
        sigmas = comfy.samplers.calculate_sigmas(small.model.get_model_object("model_sampling"), "normal", 7)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        result = guider.sample(
            noise, torch.zeros_like(noise), guided, sigmas, seed=1, disable_pbar=True,
            callback=lambda step, x0, x, total: shown.append(x.clone()),
        )  # fmt: skip
    states = [x for _, x in recorder.states]
    assert len(states) == len(shown)
    assert all(torch.equal(state, x) for state, x in zip(states, shown[1:], strict=False))
    assert torch.equal(small.model.model.process_latent_out(states[-1]), result)
    assert [level for level, _ in recorder.states] == sorted((level for level, _ in recorder.states), reverse=True)
    if name != "dpm_fast":
        torch.testing.assert_close(torch.tensor([level for level, _ in recorder.states]), sigmas[1:])


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


def test_churn_is_refused(small):
    sampler = comfy.samplers.ksampler("euler", {"s_churn": 1.0})
    with pytest.raises(ValueError, match=r"s_churn: 1.0 is not supported"):
        small.guider(sampler)
