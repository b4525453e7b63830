"""A run that notes its states in place of guidance, and a sampler run on the small SD1.5 with it."""

import comfy.samplers
import torch


class Recorder:
    """A run that notes what it is given, and adds a number to the state of some updates."""

    def __init__(self, add=0.0, at=()):
        self.states, self.movable = [], []
        self._add, self._at = add, at

    def reached(self, _level):
        return True

    def update(self, x, level, movable=None):
        self.states.append((level, x.clone()))
        self.movable.append(movable)
        return x + self._add if len(self.states) in self._at else x.clone()

    def report(self):
        pass


def schedule(graph, name, steps=7):
    """The noise levels of one of ComfyUI's schedulers."""
    return comfy.samplers.calculate_sigmas(graph.model.get_model_object("model_sampling"), name, steps)


def run_with(recorder, graph, sampler, pack_module, sigmas, model=None, latent=None, mask=None):
    """A sampler's result in the model's scale, and the states that its callback was shown; None is the host alone.

    sampler: an object, or one of ComfyUI's names.
    """
    shown = []
    if isinstance(sampler, str):
        sampler = comfy.samplers.sampler_object(sampler)
    if recorder is not None:
        sampler = pack_module("guidance.sampling").guide_sampler(sampler, lambda *_: recorder)
    with torch.inference_mode():
        guider = comfy.samplers.CFGGuider(model or graph.model)
        guider.set_conds(graph.positive, graph.negative)
        guider.set_cfg(1.0)
        noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
        result = guider.sample(
            noise, torch.zeros_like(noise) if latent is None else latent, sampler, sigmas, seed=1, disable_pbar=True,
            denoise_mask=mask, callback=lambda step, x0, x, total: shown.append(x.clone()),
        )  # fmt: skip
    return result, shown
