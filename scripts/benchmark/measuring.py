"""Time and memory of programs, side by side, each of which may fail without the others."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from comfy import model_management

Program = Callable[[], Any]
GIGABYTE = 1024**3


@dataclass
class Measured:
    """What became of a case.

    Attributes:
        values: by program, "seconds" and "peak", the gigabytes beside the weights, where the device counts them.
        cosine: of the gradient with that of fp32.
        errors: why a program has no values.
    """

    values: dict[str, dict[str, float]] = field(default_factory=dict)
    cosine: float | None = None
    errors: dict[str, str] = field(default_factory=dict)

    def attempt(self, name: str, program: Program) -> Any:
        """What a program returns; None, and an entry in `errors`, if it fails."""
        try:
            return program()
        except Exception as error:  # on somebody's machine anything can be missing: the rest goes on
            self.errors[name] = reason(error)
            return None
        finally:
            free()


def reason(error: Exception) -> str:
    """An error in one short line."""
    if isinstance(error, model_management.OOM_EXCEPTION | MemoryError):
        return "out of memory"
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def free() -> None:
    """Give back what is no longer used, so that one program does not pay for another."""
    gc.collect()
    model_management.soft_empty_cache()


def synchronise(device: torch.device) -> None:
    """Wait until a device has done all its work."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def memory_of(device: torch.device) -> Any:
    """torch's module that counts a device's memory, if there is one (MPS has no peak)."""
    backend = getattr(torch, device.type)
    return backend if hasattr(backend, "max_memory_allocated") else None


def side_by_side(
    measured: Measured,
    programs: Mapping[str, Callable[[], Program]],
    device: torch.device,
    rounds: int,
    once: Collection[str] = (),
) -> None:
    """Run each program `rounds` times, taking turns; the fastest round counts, and its most memory.

    Args:
        measured: to be filled.
        programs: each prepares a run, which is not timed, and returns it.
        device: that they run on.
        rounds: of turns.
        once: programs that only take part in the last.
    """
    for number in range(rounds):
        for name, prepare in programs.items():
            if name in measured.errors or (name in once and number + 1 < rounds):
                continue
            found = measured.attempt(name, lambda prepare=prepare: one_run(prepare, device))
            if found is not None:
                known = measured.values.setdefault(name, found)
                known["seconds"] = min(known["seconds"], found["seconds"])


def one_run(prepare: Callable[[], Program], device: torch.device) -> dict[str, float]:
    """Seconds, and gigabytes on the device beside what was there before.

    On the processor they are seconds of its work, summed over threads: other programs hardly count then.
    """
    counter = memory_of(device)
    before = counter.memory_allocated() if counter else 0
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    program = prepare()
    if counter:
        counter.reset_peak_memory_stats()
    synchronise(device)
    start = clock()
    program()
    synchronise(device)
    found = {"seconds": clock() - start}
    if counter:
        found["peak"] = (counter.max_memory_allocated() - before) / GIGABYTE
    return found
