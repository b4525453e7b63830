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
    """Of the function, and of the search for a gradient that asks it."""
    z = torch.full((3,), value, requires_grad=True)

    class Loss:
        total = property(lambda self: loss(z))

    explain = pack_module("attention.gradient").explain_not_finite
    assert says in explain(z, loss(z))
    with pytest.raises(RuntimeError, match=says):
        pack_module("guidance.loss_scale").LossScale(torch.float32).gradient(lambda _: Loss(), z)


def test_a_number_format_is_blamed_only_for_the_models_own_nan(pack_module):
    """And it says what to try where the plain run fails too."""
    explain = pack_module("attention.gradient").explain_not_finite
    ours, theirs = explain(torch.ones(1), torch.tensor(NAN)), explain(torch.tensor([NAN]), torch.tensor(NAN))
    assert "choose other layers" in ours and "choose other layers" not in theirs
    assert "attention" not in theirs.removeprefix("Attention distillation: ")
    assert "First make the graph work without it" in theirs
