"""A sampler that notes its states, and how near a guided step of the pack must come to the plain reading's."""

import comfy.samplers

RMS_TOLERANCE = 8e-3  # of one guided step at lr 0.05 from the same state; see tests/plain_method.py


def recording_euler(states: list) -> comfy.samplers.KSAMPLER:
    """Euler as a custom sampler that notes its state before and after each model call, k-diffusion space."""

    def sample_euler(model, x, sigmas, extra_args, callback, disable):
        for i in range(len(sigmas) - 1):
            before = x.clone()
            denoised = model(x, sigmas[i] * x.new_ones([x.shape[0]]), **extra_args)
            states.append((float(sigmas[i]), before, x.clone()))
            x = x + (x - denoised) / sigmas[i] * (sigmas[i + 1] - sigmas[i])
        states.append((float(sigmas[-1]), x.clone(), None))
        return x

    return comfy.samplers.KSAMPLER(sample_euler)
