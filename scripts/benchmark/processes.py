"""Run cases, each group with its command line in a process of its own: what ends one process leaves the rest."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .cases import CARD, Case
from .results import Result

WORKER = Path(__file__).with_name("worker.py")
MARK = "BENCH "
"""Begins the lines of the worker's output that are for us."""
ATTENTION = "--use-pytorch-cross-attention"
PATH = re.compile(r"(?:\b[A-Za-z]:)?(?:[\\/][^\s\\/:'\"]+){2,}[\\\\/]?")


def scrubbed(value: Any) -> Any:
    """A value with no path in its texts, which may tell a name."""
    if isinstance(value, str):
        return PATH.sub("<path>", value)
    if isinstance(value, dict):
        return {key: scrubbed(each) for key, each in value.items()}
    return value


def arguments_of(case: Case) -> tuple[str, ...]:
    """ComfyUI's command line for a case."""
    if case.kind != CARD:
        return ("--cpu", ATTENTION)
    return (ATTENTION,) if case.dynamic else (ATTENTION, "--disable-dynamic-vram")


def run(
    cases: Sequence[Case], folder: Path, more: Sequence[str], tell: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[Result]]:
    """The machines as they were found, one for each command line, and the results of all cases.

    Args:
        cases: to be measured.
        folder: for ComfyUI's files and for weights.
        more: of ComfyUI's command line.
        tell: is told of each case that is done.
    """
    machines: dict[tuple[str, ...], dict[str, Any]] = {}
    results: list[Result] = []
    for arguments in dict.fromkeys(arguments_of(case) for case in cases):
        pending = [case for case in cases if arguments_of(case) == arguments]
        while pending:
            done = 0
            for content in worker(pending, folder, (*arguments, *more)):
                if "machine" in content:
                    machines[arguments] = content["machine"]
                    continue
                done += "case" in content
                result = Result.read(content) if "case" in content else Result(pending[done], errors=content)
                tell(result.case.name + (f": {len(result.errors)} errors" if result.errors else ""))
                results.append(result)
            pending = pending[done + 1 :]
    return list(machines.values()), results


def worker(cases: Sequence[Case], folder: Path, arguments: Sequence[str]) -> Iterator[dict[str, Any]]:
    """What the process says; if it ends before all cases are done, at last why, as the error of the next case."""
    log, done = folder / "worker.log", 0
    given = json.dumps([asdict(case) for case in cases])
    command = [sys.executable, str(WORKER), str(folder), given, "--", *arguments]
    with (
        log.open("w+", encoding="utf-8", errors="replace") as errors,
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, encoding="utf-8") as process,
    ):
        for line in process.stdout:
            if line.startswith(MARK):
                content = scrubbed(json.loads(line[len(MARK) :]))
                done += "case" in content
                yield content
    if done < len(cases):
        last = (log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or [""])[-1]
        yield {"process": f"ended with {process.returncode}: {scrubbed(last)[:200]}"}
