"""Gradients through half-precision models.

The loss is a mean over about a million elements, so its gradients are near 1e-6, where fp16 has no digits left. The
loss is multiplied before backward and the gradient divided after it, in fp32.
"""

import contextlib
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import torch
from comfy.model_base import BaseModel

from ..attention.gradient import saved_activations

FP16_START = 2.0**16
BACKOFF = 2.0**4


class HasTotal(Protocol):
    """Anything with a scalar loss to go down."""

    total: torch.Tensor


Loss = TypeVar("Loss", bound=HasTotal)


class LossScale:
    """Finds the gradient of a loss, at a scale that neither underflows nor overflows. Lives through one run."""

    def __init__(
        self, model_dtype: torch.dtype, saved: Callable[[], AbstractContextManager] = contextlib.nullcontext
    ) -> None:
        """Only fp16 needs a scale: bf16 has the range of fp32.

        Args:
            model_dtype: of the computation.
            saved: keeps what autograd saves of a pass, `attention.gradient.saved_activations` of the model.
        """
        self.value = FP16_START if model_dtype == torch.float16 else 1.0
        self._saved = saved

    @classmethod
    def of(cls, model: BaseModel) -> "LossScale":
        """That of a run on ComfyUI's model."""
        return cls(model.get_dtype_inference(), functools.partial(saved_activations, model))

    def gradient(self, compute_loss: Callable[[torch.Tensor], Loss], z: torch.Tensor) -> tuple[torch.Tensor, Loss]:
        """The gradient of compute_loss(z).total with respect to z, in z's dtype, and the loss itself.

        It may hold NaN or infinite values: without a scale nobody looks here, since that is to wait for the device.
        """
        while True:
            with self._saved():
                loss = compute_loss(z)
                (gradient,) = torch.autograd.grad(loss.total * self.value, z)
            gradient = gradient / self.value
            if self.value <= 1 or torch.isfinite(gradient).all() or not torch.isfinite(loss.total):
                return gradient, loss
            self.value /= BACKOFF
