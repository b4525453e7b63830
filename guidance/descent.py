"""The descent on a latent, of guided sampling and optimisation alike: gradient, Adam, mask, Cancel, number range."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from comfy import model_management

from .loss_scale import LossScale
from .objective import Losses, Objective, Targets


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

    def iterate(self, objective: Objective, targets: Targets, iterations: int) -> list[Losses]:
        """Move the latent towards targets; to be called inside `differentiable`.

        Args:
            objective: says how far the latent is from them.
            targets: of the windows that the latent holds.

        Returns:
            The losses of each iteration, before its update, on the device.
        """
        scale = targets.level.scale  # z / scale is in k-diffusion space, which the model is fed from

        def compute_loss(z: torch.Tensor) -> Losses:
            return objective.losses(objective.features(z / scale, targets), targets)

        self._adam.param_groups[0]["lr"] = self.learning_rate
        found = []
        for _ in range(iterations):
            model_management.throw_exception_if_processing_interrupted()
            self.z.grad, losses = self._gradient.gradient(compute_loss, self.z)
            before = None if self._movable is None else self.z.detach().clone()
            self._adam.step()
            if before is not None:
                with torch.no_grad():
                    self.z.copy_(masked(before, self.z, self._movable))
            found.append(losses)
        return found


def observe(observer: Observer, step: int, sigma: float, found: Sequence[Sequence[Losses]], count: int) -> None:
    """Tell an observer of the iterations of a step; the only place where losses are read from the device.

    Args:
        found: the iterations of each pass over some of the picture's windows.
        count: pictures times windows that they sum up.
    """
    of_passes = [torch.stack([torch.stack((f.style, f.content, f.total)) for f in one]) for one in found]
    for iteration, (style, content, total) in enumerate((sum(of_passes) / count).tolist()):
        observer(Iteration(step, iteration, sigma, style, content, total))
