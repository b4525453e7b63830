"""Work spread over the copies of a model that ComfyUI's MultiGPU CFG Split has made, one on each further device.

What is independent of each other in an update of guidance is handed out: readings of references, chunks of windows,
pictures of a batch. Which piece goes to which copy is settled beforehand, and results come in the order of the pieces:
the picture does not depend on which device is done first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch

from ..attention.devices import on_device
from ..attention.gradient import gradients_on
from ..attention.noise import NoiseLevel, Purpose, StepNoise
from .objective import Objective, Offer

Piece = TypeVar("Piece")
Result = TypeVar("Result")


class Threads(Protocol):
    """ComfyUI's MultiGPUThreadPool: a thread for each device, which hands over its results in order."""

    def submit(self, device: torch.device, fn: Callable, *args: Any) -> None: ...

    def get_result(self, device: torch.device) -> tuple[Any, Exception | None]: ...


@dataclass(frozen=True)
class Copy:
    """A copy of a run's model on another device.

    Attributes:
        objective: the run's, of this copy.
        device: its own, by which its thread is known.
    """

    objective: Objective
    device: torch.device


class Spread:
    """A run's model and its copies. Without copies all is done on the model itself, and there are no threads.

    Attributes:
        objectives: of the model, then of each copy.
        devices: the same way round.
    """

    def __init__(self, objective: Objective, copies: Sequence[Copy] = (), threads: Threads | None = None) -> None:
        """
        Args:
            objective: of the model itself.
            threads: with copies, those that ComfyUI keeps for their devices.
        """
        self.objectives = [objective, *(copy.objective for copy in copies)]
        self.devices = [objective.device, *(copy.device for copy in copies)]
        self._threads = threads

    def __len__(self) -> int:
        """How many can work side by side."""
        return len(self.objectives)

    @property
    def modules(self) -> list[torch.nn.Module]:
        """All that has weights, for `differentiable`, which the main thread holds around all this."""
        return [module for objective in self.objectives for module in objective.modules]

    def each(self, job: Callable[[int, Piece], Result], pieces: Sequence[Piece]) -> list[Result]:
        """What a job makes of each piece, in their order; the results lie on the picture's device.

        Args:
            job: called with the number of a copy, 0 is the model itself, and a piece; in that copy's thread, where
                gradients are on. It brings to the copy's device what it takes from elsewhere.

        Raises:
            BaseException: what the first piece that failed has raised, Cancel for one, once all threads are done:
                none is still at work when the model is put back, and none leaves a result to be taken for a later one.
        """
        shares = [range(number, len(pieces), len(self)) for number in range(min(len(self), len(pieces)))]

        def work(number: int) -> "_Done":
            done = _Done({})
            with gradients_on():
                for place in shares[number]:
                    try:
                        done.results[place] = on_device(job(number, pieces[place]), self.devices[0])
                    except BaseException as error:  # ComfyUI's Cancel is no Exception
                        done.failed = (place, error)
                        break
            return done

        away = range(1, len(shares))
        for number in away:
            self._threads.submit(self.devices[number], work, number)
        outcomes = [(work(0), None)] if shares else []
        outcomes += [self._threads.get_result(self.devices[number]) for number in away]
        for _, error in outcomes:
            if error is not None:  # of the thread itself
                raise error
        failed = [done.failed for done, _ in outcomes if done.failed is not None]
        if failed:
            raise min(failed, key=lambda one: one[0])[1]
        results = {place: result for done, _ in outcomes for place, result in done.results.items()}
        return [results[place] for place in range(len(pieces))]

    def offer(self, level: NoiseLevel, noise: StepNoise) -> Offer:
        """What the references offer at a noise level, on the picture's device; see `Objective.offer`.

        A reading goes through the model, so the parts of the style are spread.
        """
        first = self.objectives[0]
        if len(self) == 1:
            return first.offer(level, noise)
        levels = [on_device(level, device) for device in self.devices]

        def read(copy: int, part: int) -> Any:
            (features,) = self.objectives[copy].style.read(levels[copy], noise, Purpose.STYLE, [part])
            return features

        return first.offer(level, noise, self.each(read, range(len(first.style.parts))))


@dataclass
class _Done:
    """What one copy has done: results by the piece's place, and what the piece that failed has raised."""

    results: dict[int, Any]
    failed: tuple[int, BaseException] | None = None
