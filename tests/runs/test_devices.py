"""What devices cannot do is not asked of them: Apple GPUs have no float64, and pool only sizes that divide.

The meta device stands for the model's: tensors there have shapes and no values, and do not mix with those of the CPU.
To read a value there is an error, so what runs here waits for no device.
"""

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")
PICTURE = (1, 4, 9, 11)


class Watching(TorchDispatchMode):
    """Notes each operation on the device that Apple GPUs do not have, and how often maps are worked out anywhere.

    And each copy to the device that the program waits for.
    """

    def __init__(self) -> None:
        super().__init__()
        self.forbidden: list[str] = []
        self.on_device = 0
        self.pooled = 0
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Callable, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, torch.Tensor)]
        pools = "adaptive_max_pool2d" in str(func) or "adaptive_avg_pool2d" in str(func)
        self.pooled += pools
        if str(func) in ("aten.copy_.default", "aten._to_copy.default"):
            source = args[0] if "_to_copy" in str(func) else args[1]
            at_once = (kwargs or {}).get("non_blocking") or args[2:3] == (True,)
            if source.device != DEVICE and result.device == DEVICE and not at_once:
                self.waited.append(str(func))
        if any(tensor.device == DEVICE for tensor in tensors):
            self.on_device += 1
            if pools or any(tensor.dtype == torch.float64 for tensor in tensors):
                self.forbidden.append(str(func))
        return result


@pytest.fixture(scope="module")
def model(load_sd15):
    """The small SD1.5 on the device."""
    model = load_sd15().model
    with torch.inference_mode():
        model.to(DEVICE)
    return model


@pytest.mark.parametrize(("windowed", "placed"), [(False, False), (True, False), (True, True)])
def test_masks_and_regions(model, pack_module, random_latent, encode_zeros, windowed, placed):
    """Sizes that do not divide, weights, masks on style and content, three regions or a place and share for each style.

    And maps are worked out once.
    """
    reference, noises = pack_module("attention.reference"), pack_module("attention.noise")
    regions, windows = pack_module("attention.regions"), pack_module("guidance.windows")
    descent, scale = pack_module("guidance.descent"), pack_module("guidance.loss_scale").LossScale
    mask = torch.zeros(1, 30, 50)
    mask[..., :33] = 1
    place, other = (mask, mask.flip(2) / 2) if placed else (None, None)
    balance = "share" if placed else "amount"
    style = reference.Reference((
        reference.ReferencePart(random_latent(1, (1, 4, 7, 10)), (2, 5), 2.0, mask, None, place, balance),
        reference.ReferencePart(random_latent(3, (1, 4, 6, 6)), (5,), target_mask=other),
    ))  # fmt: skip
    content = reference.Reference(
        (reference.ReferencePart(random_latent(2, PICTURE), (1, 5), mask=mask, target_mask=other),)
    )
    labels = (torch.arange(40) * 3 // 40).expand(36, 40)
    layout = windows.Windows(64, 32).place(*PICTURE[-2:], 8) if windowed else windows.whole(*PICTURE[-2:])
    some = layout.windows[:2]
    with pack_module("attention.gradient").differentiable(model), Watching() as seen:
        made = pack_module("guidance.objective").Objective(
            model, pack_module("attention.layers").list_layers(model.diffusion_model), style=style, content=content,
            settings=pack_module("guidance.settings").GuidanceSettings(memory="small" if windowed else "fast"),
            conds=pack_module("attention.conditioning").from_socket(encode_zeros()),
            latent=torch.zeros(PICTURE, device=DEVICE),
            regions=None if placed else regions.Regions(torch.stack([labels, labels.flip(1)]), labels[None].flip(2), 3),
        )  # fmt: skip
        pooled, waited = [], []
        for step in range(2):
            level = noises.NoiseLevel.of(model, 2.0, torch.zeros(PICTURE, device=DEVICE), smallest=0.03)
            noise = noises.StepNoise(0, step=step)
            stats = made.statistics(level, noise)
            made.reach(*PICTURE[-2:])
            made.recoloured(windows.cut(torch.zeros(PICTURE, device=DEVICE), some), stats, layout, some, None)
            targets = made.targets(made.offer(level, noise), layout, some)
            z = windows.cut(torch.zeros(PICTURE, device=DEVICE), some).requires_grad_()
            movable = torch.ones_like(z)
            downward = descent.Descent(z, learning_rate=0.05, gradient=scale(torch.float32), movable=movable)
            found = downward.iterate(made, targets, 2)
            pooled.append(seen.pooled)
            waited.append(len(seen.waited))
    assert z.grad.device == found[1].losses.total.device == DEVICE
    assert z.grad.shape == z.shape
    assert waited[1] == waited[0]
    assert seen.on_device > 1000
    assert seen.forbidden == []
    assert 0 < pooled[0] == pooled[1]
