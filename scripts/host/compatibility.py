"""The table of ComfyUI versions in README: what was run on which, as the latest run of the tests left it."""

from __future__ import annotations

import datetime
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from .comfy_env import CHECKOUT, ComfyEnv

README = CHECKOUT / "README.md"
START, END = "<!-- compatibility, written by scripts/test.py --record -->\n", "<!-- end of compatibility -->"
COLUMNS = ("ComfyUI", "torch", "Python", "What was run", "Passed", "Failed", "Skipped", "Date")
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}\n"


def counts(report: Path) -> tuple[int, int, int]:
    """Passed, failed and skipped tests of a JUnit report, as pytest writes it."""
    suites = ElementTree.parse(report).getroot().iter("testsuite")
    found = [[int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")] for suite in suites]
    tests, failures, errors, skipped = (sum(column) for column in zip(*found, strict=True))
    return tests - failures - errors - skipped, failures + errors, skipped


def with_row(text: str, version: str, row: str) -> str:
    """README with the version's row in place of its older one; newer versions come first.

    Raises:
        ValueError: the text has no such table.
    """
    if START not in text or END not in text:
        raise ValueError(f"README has no place for the table: {START.strip()}")
    before, rest = text.split(START, 1)
    table, after = rest.split(END, 1)
    rows = {line.split("|")[1].strip(): line for line in table.splitlines()[2:]}
    rows[version] = row
    newest_first = sorted(rows, key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    return f"{before}{START}{HEAD}" + "".join(f"{rows[name]}\n" for name in newest_first) + END + after


def record(version: str, env: ComfyEnv, what: str, report: Path) -> None:
    """Write what a run of the tests found into README's table.

    Args:
        version: of ComfyUI.
        env: that it ran in.
        what: was run, for people.
        report: pytest's JUnit report of it.
    """
    asks = "import platform, torch; print(torch.__version__.split('+')[0], platform.python_version())"
    torch, python = subprocess.run([env.python, "-c", asks], capture_output=True, text=True, check=True).stdout.split()
    date = datetime.date.today().isoformat()
    cells = (version, torch, python, what, *counts(report), date)
    text = README.read_text(encoding="utf-8")
    README.write_text(with_row(text, version, f"| {' | '.join(map(str, cells))} |"), encoding="utf-8")
