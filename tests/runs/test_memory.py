"""What a pass keeps for its backward: counted before it, and how much less it is when blocks are run again."""

import pytest
import torch
from benchmark import counting
from benchmark.results import LARGEST_SHARE

SIDES = {"SD1.5": (512, torch.float16), "SDXL": (1024, torch.float16), "FLUX": (512, torch.bfloat16)}


@pytest.mark.parametrize("name", SIDES)
def test_the_count_is_what_a_pass_takes(pack, pack_module, name):
    """Within 10 % of all memory that is alive at once, whatever is run again; and that is less each time."""
    gradient, count = pack_module("attention.gradient"), pack_module("attention.gradient.count")
    one = counting.CountedPass(pack, name, *SIDES[name])
    peaks = []
    for again in one.choices:
        with gradient.differentiable(one.model):
            with counting.FusedAttention(), count.count_saved(one.model.diffusion_model, one.choices[-1]) as saved:
                features = one.loss(one.x.clone().requires_grad_())
            del features
        peaks.append(one.peak(again))
        assert saved.peak(again) == pytest.approx(peaks[-1], rel=0.1)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < LARGEST_SHARE[name] * peaks[0]
