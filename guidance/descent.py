"""The descent on a latent, of guided sampling and optimisation alike: gradient, Adam, mask, Cancel, number range."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from comfy import model_management

from ..attention.gradient import explain_not_finite
from .loss_scale import LossScale
from .motion import Motion
from .objective import Objective
from .targets import Losses, Targets


@dataclass(frozen=True)
class Iteration:
    """What one iteration of Adam found, before its update. Losses are of one picture and window, on average.

    Attributes:
        step: of the sampler or of the optimisation, from 0.
        iteration: within the step, from 0.
        sigma: noise level that the picture was treated at.
        style, content: losses before weighting.
        total: what went down.
    """

    step: int
    iteration: int
    sigma: float
    style: float
    content: float
    total: float


Observer = Callable[[Iteration], None]


class Found(NamedTuple):
    """What one iteration found of a pass, before its update; on the device.

    Attributes:
        losses: summed over the pass's windows and pictures.
        broken: whether the picture and the gradient hold NaN or infinite values, [2], bool.
    """

    losses: Losses
    broken: torch.Tensor


def masked(before: torch.Tensor, after: torch.Tensor, movable: torch.Tensor | None) -> torch.Tensor:
    """What a change comes to where only some may move: [b c h w] with movable 0 to 1, broadcast; exact at 0 and 1."""
    return after if movable is None else torch.lerp(before, after, movable.to(after))


def within(movable: torch.Tensor | None, reach: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor | None:
    """How far each element may move where both a noise mask and the reach of the references say so, as `like`."""
    both = [mask.to(like).expand_as(like) for mask in (movable, reach) if mask is not None]
    return torch.stack(both).prod(dim=0) if both else None


class Descent:
    """Adam on one latent, in model space, fp32 or better. Its state lives as long as this object."""

    def __init__(
        self,
        z: torch.Tensor,
        *,
        learning_rate: float,
        gradient: LossScale,
        movable: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            z: [b c h w]; changed in place. An ordinary tensor, not one made in inference mode.
            learning_rate: of the next iterations; may be set anew at any time.
            gradient: finds the gradient; shared over a run.
            movable: how far each element may move, 0 to 1, [b or 1, 1 or c, h, w]; None lets all move.
        """
        self.z = z
        self.learning_rate = learning_rate
        self._gradient = gradient
        self._movable = movable
        self._adam = torch.optim.Adam([z], lr=learning_rate)

    def iterate(self, objective: Objective, targets: Targets, iterations: int) -> list[Found]:
        """Move the latent towards targets; to be called inside `differentiable`.

        Nothing is read from the device. A gradient that is not finite spoils the latent: `observe` raises then.

        Args:
            objective: says how far the latent is from them.
            targets: of the windows that the latent holds.
        """
        scale = targets.level.scale  # z / scale is in k-diffusion space, which the model is fed from

        def compute_loss(z: torch.Tensor) -> Losses:
            return objective.losses(objective.features(z / scale, targets), targets)

        self._adam.param_groups[0]["lr"] = self.learning_rate
        found = []
        for _ in range(iterations):
            model_management.throw_exception_if_processing_interrupted()
            self.z.grad, losses = self._gradient.gradient(compute_loss, self.z)
            found.append(Found(losses, _broken(self.z.detach(), self.z.grad)))
            before = None if self._movable is None else self.z.detach().clone()
            self._adam.step()
            if before is not None:
                with torch.no_grad():
                    self.z.copy_(masked(before, self.z, self._movable))
        return found

    @torch.no_grad()
    def hold(self, motion: Motion, start: torch.Tensor, firmness: float) -> None:
        """Draw what has become of each frame to what has become of the one before, see `Motion.held`.

        Args:
            start: what the latent was, [b c h w].
        """
        held = start + motion.held(self.z - start, firmness)
        self.z.copy_(masked(self.z, held, self._movable))


def _broken(*tensors: torch.Tensor) -> torch.Tensor:
    """Of each tensor, whether it holds NaN or infinite values, bool."""
    return torch.stack([~torch.isfinite(tensor).all() for tensor in tensors])


def observe(observer: Observer, step: int, sigma: float, found: Sequence[Sequence[Found]], count: int) -> None:
    """Tell an observer of the iterations of a step; here alone, once a step, is read what they found.

    Args:
        found: the iterations of each pass over some of the picture's windows.
        count: pictures times windows that they sum up.

    Raises:
        RuntimeError: a gradient was not finite, so the picture is lost; says whose NaN it is.
    """
    numbers = [torch.stack([_numbers(losses, broken) for losses, broken in one]) for one in found]
    for iteration, (style, content, total, picture, gradient) in enumerate((sum(numbers) / count).tolist()):
        if gradient:
            raise RuntimeError(explain_not_finite(picture=not picture, loss=math.isfinite(total)))
        observer(Iteration(step, iteration, sigma, style, content, total))


def _numbers(losses: Losses, broken: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.stack((losses.style, losses.content, losses.total)), broken.to(losses.total)])
