"""What a pass keeps for its backward: counted before it, and how much less it is when blocks are run again."""

import full_size
import pytest
import torch
import torch.nn.functional as F
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

SIDES = {"SD1.5": (512, torch.float16), "SDXL": (1024, torch.float16), "FLUX": (512, torch.bfloat16)}
LARGEST_SHARE = {"SD1.5": 0.3, "SDXL": 0.3, "FLUX": 0.5}
"""What may be left of the plain peak when all blocks are run again."""


class LiveBytes(TorchDispatchMode):
    """Follows all memory that torch hands out, and the most of it that is alive at once."""

    def __init__(self, weights):
        super().__init__()
        self._weights = {weight.untyped_storage()._cdata for weight in weights}
        self._alive, self._sum, self.peak = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                known = self._alive.get(storage._cdata)
                if storage._cdata not in self._weights and (known is None or known[0].expired()):
                    self._sum += storage.nbytes() - (0 if known is None else known[1])
                    self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._sum > self.peak:  # it may be less: what is gone is still in the sum
            self._alive = {key: entry for key, entry in self._alive.items() if not entry[0].expired()}
            self._sum = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._sum)
        return out


def flash_attention(q, k, v, **_):
    """On the meta device torch would write attention out; cards compute it in one kernel that keeps no logits."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]


@pytest.mark.parametrize("name", SIDES)
def test_the_count_is_what_a_pass_takes(pack_module, monkeypatch, name):
    """Within 10 % of all memory that is alive at once, whatever is run again; and that is less each time."""
    side, dtype = SIDES[name]
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash_attention)
    gradient, count = pack_module("attention.gradient"), pack_module("attention.gradient.count")
    capture, losses = pack_module("attention.capture"), pack_module("losses.distillation")
    architectures = pack_module("attention.architectures")
    model = full_size.make(name, dtype)
    (x, conds), sigma = full_size.inputs(name, side, dtype), torch.tensor(0.6, device=full_size.META)
    network = model.diffusion_model
    layers = architectures.list_layers(network)[-architectures.auto_layer_count(network) :]

    def loss_of(z, again=()):
        found = capture.capture_features(model, z, sigma, conds, layers, again=again).values()
        targets = [losses.distillation_target(each.q, each.k.detach(), each.v.detach()) for each in found]
        loss = sum(losses.distillation_loss(each.out, target) for each, target in zip(found, targets, strict=True))
        return loss, found

    choices, peaks = architectures.blocks(network), []
    for again in ((), *choices):
        with gradient.differentiable(model):
            with count.count_saved(network, choices[-1]) as saved:
                features = loss_of(x.clone().requires_grad_())
            del features
            live = LiveBytes([*model.parameters(), *model.buffers()])
            with gradient.saved_activations(model), live:
                z = x.clone().requires_grad_()
                torch.autograd.grad(loss_of(z, again)[0], z)
        peaks.append(live.peak)
        assert saved.peak(again) == pytest.approx(live.peak, rel=0.1)
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[-1] < LARGEST_SHARE[name] * peaks[0]
