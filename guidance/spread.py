"""Work spread over the copies of a model that ComfyUI's MultiGPU CFG Split has made, one on each further device.

What is independent of each other in an update of guidance is handed out: readings of references, chunks of windows,
pictures of a batch. Which piece goes to which copy is settled beforehand, and results come in the order of the pieces:
the picture does not depend on which device is done first.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import torch

from ..attention.devices import on_device
from ..attention.gradient import gradients_on
from ..attention.noise import NoiseLevel, Purpose, StepNoise
from .objective import Objective
from .targets import Offer

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
            job: called with the number of a copy, 0 is the model itself, and a piece; in that copy's thread, in which
                gradients are on, or in this one. It brings to the copy's device what it takes from elsewhere.

        Raises:
            BaseException: what the first piece that failed has raised, Cancel for one, once all threads are done:
                none is still at work when the model is put back, and none leaves a result to be taken for a later one.
        """
        if len(self) == 1:
            return [job(0, piece) for piece in pieces]
        away = range(1, min(len(self), len(pieces)))
        work = functools.partial(self._work, job, pieces)
        for number in away:
            self._threads.submit(self.devices[number], work, number)
        outcomes = [(work(0), None), *(self._threads.get_result(self.devices[number]) for number in away)]
        of_threads = [error for _, error in outcomes if error is not None]
        if of_threads:
            try:
                raise of_threads[0]
            finally:
                of_threads.clear()
                outcomes.clear()
        results = {place: result for (made, _), _ in outcomes for place, result in made.items()}
        failed = sorted((of_one for (_, of_one), _ in outcomes if of_one is not None), key=lambda of_one: of_one.place)
        for (made, _), _ in outcomes:
            made.clear()  # a thread keeps what it has given back until its next work is done
        outcomes.clear()
        if failed:
            try:
                raise failed[0].error
            finally:
                failed.clear()  # an error that is known to a frame that it passed through would keep the frames' memory
        return [results[place] for place in range(len(pieces))]

    def _work(
        self, job: Callable[[int, Piece], Result], pieces: Sequence[Piece], number: int
    ) -> "tuple[dict[int, Result], _Failed | None]":
        """One copy's share of the pieces: results by place, up to the first that fails."""
        results = {}
        with gradients_on():
            for place in range(number, len(pieces), len(self)):
                try:
                    results[place] = on_device(job(number, pieces[place]), self.devices[0])
                except BaseException as error:  # ComfyUI's Cancel is no Exception
                    return results, _Failed(place, error)
        return results, None

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


class _Failed(NamedTuple):
    """What a piece has raised, and its place among all."""

    place: int
    error: BaseException
