"""Whose NaN it is: said by one function, from the picture, its loss and its gradient."""

import pytest
import torch

NAN, INF = float("nan"), float("inf")
BEFORE = "the picture was NaN or infinite before guidance came to it"
CASES = {
    "the picture came in so": (NAN, lambda z: z.square().sum(), BEFORE),
    "infinite": (INF, lambda z: z.square().sum(), BEFORE),
    "in the forward pass": (1.0, lambda z: (z * INF).sum(), "the model's attention holds NaN or infinite values"),
    "only in the backward": (0.0, lambda z: z.sqrt().sum(), "the model's attention gave NaN or infinite gradients"),
}


@pytest.mark.parametrize(("value", "loss", "says"), CASES.values(), ids=CASES)
def test_what_is_said(pack_module, value, loss, says):
    """Of what a step found on the device, once its iterations are over: the first that went wrong counts.

    The other window is fine, and so is what the observer hears of before.
    """
    descent, scale = pack_module("guidance.descent"), pack_module("guidance.loss_scale").LossScale(torch.float32)
    losses, told = pack_module("guidance.objective").Losses, []

    def found(value, loss):
        z = torch.full((3,), value, requires_grad=True)
        gradient, total = scale.gradient(lambda z: losses(loss(z), loss(z).detach(), torch.zeros(())), z)
        return descent.Found(total, descent._broken(z.detach(), gradient))

    fine, broken = found(1.0, lambda z: z.square().sum()), found(value, loss)
    after = found(NAN, lambda z: z.square().sum())  # the picture is lost from then on
    with pytest.raises(RuntimeError, match=says):
        descent.observe(told.append, 0, 2.0, [[fine, fine, fine], [fine, broken, after]], 2)
    assert [iteration.iteration for iteration in told] == [0]


def test_a_number_format_is_blamed_only_for_the_models_own_nan(pack_module):
    """And it says what to try where the plain run fails too."""
    explain = pack_module("attention.gradient").explain_not_finite
    ours, theirs = explain(picture=True, loss=False), explain(picture=False, loss=False)
    assert "choose other layers" in ours and "choose other layers" not in theirs
    assert "attention" not in theirs.removeprefix("Attention distillation: ")
    assert "First make the graph work without it" in theirs
