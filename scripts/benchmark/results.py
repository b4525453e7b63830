"""What the cases came to, as text: tables of ratios, goals, and what went wrong."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .cases import CARD, COUNT, Case

FIRST, WIDTH = 42, 11
"""Of the names and the columns, in letters."""
RESERVE = 1.15
"""Of a card's memory, over weights and the pass: for all else that lies there."""
CARDS = {("SD1.5", 512, "fp16"): 6, ("SDXL", 1024, "fp16"): 8, ("FLUX", 512, "fp8"): 16}
"""Gigabytes that these are to fit into."""
LARGEST_SHARE = {"SD1.5": 0.3, "SDXL": 0.3, "FLUX": 0.5}
"""What `memory` small may take of what fast does; the toy is not judged."""
SLOWEST = 1.35
"""Times the seconds of fast, likewise."""
CLOSEST = {"fp32": 0.999, "fp16": 0.99}
"""The least cosine of a gradient with that of fp32; other formats are shown and not judged."""


@dataclass
class Result:
    """A case, and what is known of it: see `measuring.Measured` and `counting.count`."""

    case: Case
    values: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    cosine: float | None = None
    errors: Mapping[str, str] = field(default_factory=dict)
    gigabytes: Mapping[str, float] | None = None

    @classmethod
    def read(cls, content: Mapping[str, Any]) -> Result:
        """As the worker writes it."""
        return cls(Case(**content["case"]), **{key: value for key, value in content.items() if key != "case"})

    def seconds(self, program: str) -> float | None:
        """Of one run of a program."""
        return self.values.get(program, {}).get("seconds")

    def ratio(self, program: str, to: str) -> float | None:
        """Of the seconds of two programs."""
        ours, theirs = self.seconds(program), self.seconds(to)
        return None if ours is None or theirs is None else ours / theirs

    @property
    def base(self) -> str:
        """What iterations are held against: transformers have no plain method."""
        return "plain iteration" if self.seconds("plain iteration") is not None else "floor"


def row(name: str, *values: float | str | None) -> str:
    """A line of a table; what is not known is a dash."""
    texts = ("-" if v is None else v if isinstance(v, str) else f"{v:.2f}" for v in values)
    return name.ljust(FIRST) + "".join(text.rjust(WIDTH) for text in texts)


def counted_table(results: Iterable[Result]) -> Iterator[str]:
    """Memory counted on tensors without values."""
    found = [(result, result.gigabytes) for result in results if result.gigabytes]
    if not found:
        return
    yield "Memory of one iteration, in GB beside the weights, counted on tensors without values."
    yield row("", "weights", "plain", "fast", "between", "small", "fast/plain", "small/fast")
    for result, gb in found:
        plain, fast, small = gb.get("plain"), gb["fast"], gb["small"]
        ratio = None if plain is None else fast / plain
        yield row(result.case.name, gb["weights"], plain, fast, gb.get("between"), small, ratio, small / fast)


def time_table(results: Iterable[Result]) -> Iterator[str]:
    """Time, as shares of the plain method's."""
    found = [result for result in results if result.values]
    if not found:
        return
    yield "Time as a share of the plain method's: of one iteration, of a guided step, of a run."
    yield "The floor is one bare forward and backward; shares are of it where a star is: there is no plain method."
    yield row("", "plain, s", "floor", "fast", "small", "step", "run", "small/fast")
    for result in found:
        base = result.base
        star = "" if base == "plain iteration" else " *"
        yield row(
            result.case.name + star, result.seconds(base), result.ratio("floor", base), result.ratio("fast", base),
            result.ratio("small", base), result.ratio("step", "plain step"), result.ratio("run", "plain run"),
            result.ratio("small", "fast"),
        )  # fmt: skip


def device_table(results: Iterable[Result]) -> Iterator[str]:
    """What the card itself says of memory, and the gradients."""
    found = [result for result in results if result.case.kind != COUNT and (result.values or result.cosine is not None)]
    if not found:
        return
    yield "Memory in GB beside the weights, as the device counts it; seconds; the gradient's cosine with that of fp32."
    yield row("", "plain", "fast", "small", "run", "fast, s", "step, s", "run, s", "cosine")
    for result in found:
        peaks = (result.values.get(name, {}).get("peak") for name in ("plain iteration", "fast", "small", "run"))
        cosine = None if result.cosine is None else f"{result.cosine:.6f}"
        seconds = (result.seconds(name) for name in ("fast", "step", "run"))
        yield row(result.case.name, *peaks, *seconds, cosine)


def goals(results: Iterable[Result]) -> Iterator[str]:
    """Each goal with its number."""
    for result in results:
        case, gb = result.case, result.gigabytes
        if gb:
            yield from _memory_goals(case, gb)
        slower = result.ratio("small", "fast")
        if slower is not None and case.network in LARGEST_SHARE:
            yield verdict(f"{case.name}: small takes {slower:.2f} of the time of fast", slower, SLOWEST)
        least = CLOSEST.get(case.dtype)
        if result.cosine is not None and least is not None:
            met = "met" if result.cosine >= least else "NOT MET"
            yield f"{case.name}: the gradient's cosine is {result.cosine:.6f}, goal {least}: {met}"


def _memory_goals(case: Case, gb: Mapping[str, float]) -> Iterator[str]:
    card = CARDS.get((case.network, case.side, case.dtype))
    if card is not None:
        settings = [name for name in ("fast", "between", "small") if name in gb]
        needed = {name: RESERVE * (gb["weights"] + gb[name]) for name in settings}
        best = next((name for name in settings if needed[name] <= card), settings[-1])
        yield verdict(f"{case.name}: {needed[best]:.1f} GB of card memory ({best})", needed[best], card)
    most = LARGEST_SHARE.get(case.network)
    if most is not None:
        share = gb["small"] / gb["fast"]
        yield verdict(f"{case.name}: small takes {share:.2f} of the memory of fast", share, most)


def verdict(what: str, value: float, most: float) -> str:
    """A line on a goal that is an upper bound."""
    return f"{what}, goal {most}: {'met' if value <= most else 'NOT MET'}"


def failures(results: Iterable[Result]) -> Iterator[str]:
    """What has no number, and why."""
    for result in results:
        for program, reason in result.errors.items():
            yield f"{result.case.name}: {program}: {reason}"


def text(results: list[Result]) -> str:
    """Everything, for people."""
    parts = [list(table(results)) for table in (counted_table, time_table, device_table)]
    parts += [["Goals", *(f"  {line}" for line in goals(results))]]
    missing = [f"  {line}" for line in failures(results)]
    if missing:
        parts.append(["Without a number", *missing])
    if any(result.case.kind == CARD for result in results):
        shown = [result for result in results if result.case.kind == CARD]
        right = sum(not result.errors for result in shown)
        parts.append([f"On the card: {right} of {len(shown)} rows without an error."])
    return "\n\n".join("\n".join(part) for part in parts if part)
