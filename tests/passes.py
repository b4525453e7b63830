"""What passes through a model's network during a run, noted by a hook of torch; nothing is changed by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher


@dataclass(frozen=True)
class Pass:
    """One forward pass of the network.

    Attributes:
        reads: made by the pack to read attention; else it is the host's denoising.
        with_gradient: of the picture being made, not of a reference.
        x: what the network was shown, with what an inpainting model sees beside it.
        sigma: noise level, as the transformer options say.
        text: the condition.
        control: whether a ControlNet takes part.
        options: the transformer options.
        noted: whatever the caller wanted to know.
    """

    reads: bool
    with_gradient: bool
    x: torch.Tensor
    sigma: float
    text: torch.Tensor
    control: bool
    options: dict[str, Any] = field(repr=False)
    noted: Any = None


class Passes(list[Pass]):
    """The passes of a run, in order."""

    @property
    def reading(self) -> list[Pass]:
        """Those of the pack."""
        return [one for one in self if one.reads]

    @property
    def denoising(self) -> list[Pass]:
        """Those of the host."""
        return [one for one in self if not one.reads]


@contextmanager
def watched(model: ModelPatcher, note: Callable[[], Any] = lambda: None) -> Iterator[Passes]:
    """Note every pass of a UNet; the pack's passes are those outside inference mode."""
    passes = Passes()

    def before(_module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        options = kwargs["transformer_options"]
        passes.append(
            Pass(
                reads=not torch.is_inference_mode_enabled(),
                with_gradient=args[0].requires_grad,
                x=args[0].detach().clone(),
                sigma=float(options["sigmas"].flatten()[0]),
                text=kwargs["context"].detach().clone(),
                control=kwargs["control"] is not None,
                options=options,
                noted=note(),
            )
        )

    handle = model.model.diffusion_model.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield passes
    finally:
        handle.remove()
