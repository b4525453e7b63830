"""What a picture is held against, from what the references offer to a window, and what comes of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..attention.bank import TokenBank
from ..attention.capture import LayerFeatures
from ..attention.noise import NoiseLevel
from .windows import Layout, Window


@dataclass(frozen=True)
class Losses:
    """Loss of one iteration, scalars in fp32 or better; `style` and `content` are before weighting."""

    total: torch.Tensor
    style: torch.Tensor
    content: torch.Tensor


@dataclass(frozen=True)
class Offer:
    """What the references offer at one noise level, to the whole picture and all its windows.

    Attributes:
        level: the noise level.
        style: by layer, what the picture's queries may look at.
        content: of each content part, its latent as the model is shown it, [b c h w] in k-diffusion space.
    """

    level: NoiseLevel
    style: Mapping[int, TokenBank]
    content: Sequence[torch.Tensor]


@dataclass(frozen=True)
class ContentTarget:
    """What one content part asks of one window.

    Attributes:
        weight: of the part.
        features: by layer, where the part is held at all.
        coverage: how much each token is held, by layer, [b or 1, t]; None is all alike.
        edges: where the content loss goes by the content's edges: how firmly each token is held, by layer, [b, t].
    """

    weight: float
    features: Mapping[int, LayerFeatures]
    coverage: Mapping[int, torch.Tensor | None]
    edges: Mapping[int, torch.Tensor]


@dataclass(frozen=True)
class WindowTargets:
    """What one window of the picture is held against.

    Attributes:
        window: where it lies on the picture.
        style: by layer, what the window's queries may look at.
        content: what is held of the content, by part.
    """

    window: Window
    style: Mapping[int, TokenBank]
    content: Sequence[ContentTarget]


@dataclass(frozen=True)
class Targets:
    """What some windows of the picture are held against in one pass.

    Attributes:
        level: the noise level.
        layout: how windows lie on the picture.
        conds: text condition as apply_model takes it, for the windows one after the other along the batch.
        windows: targets of each.
        items: which pictures of the batch the pass is on.
    """

    level: NoiseLevel
    layout: Layout
    conds: dict[str, Any] = field(repr=False)
    windows: Sequence[WindowTargets]
    items: slice
