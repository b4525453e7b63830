"""What a run found, in three forms: for people, for programs, and for the issue form. No names, no paths."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from .results import Result, text

DIGITS = 5
"""Significant ones: a whole report must fit into an issue."""


def as_json(machines: Sequence[dict[str, Any]], results: Sequence[Result]) -> dict[str, Any]:
    """All numbers of a run, and the machines that they were measured on."""
    return shortened({"machines": list(machines), "results": [asdict(result) for result in results]})


def shortened(value: Any) -> Any:
    """A value with its numbers cut to some digits."""
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}")
    if isinstance(value, dict):
        return {key: shortened(each) for key, each in value.items()}
    return [shortened(each) for each in value] if isinstance(value, list) else value


def as_text(machines: Sequence[dict[str, Any]], results: list[Result]) -> str:
    """The machines, and the tables."""
    blocks = ["\n".join(f"{name}: {value}" for name, value in machine.items()) for machine in machines]
    return "\n\n".join([*blocks, text(results)]) + "\n"


def as_issue(machines: Sequence[dict[str, Any]], results: list[Result]) -> str:
    """The same, and the numbers for programs in the last line: plain text, as the form takes it."""
    return f"{as_text(machines, results)}\n{json.dumps(as_json(machines, results))}\n"
