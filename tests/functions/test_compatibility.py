"""README's table of ComfyUI versions, as a run of the tests writes it."""

import subprocess
import sys
from pathlib import Path

import pytest
from host import compatibility
from host.comfy_env import VERSIONS, ComfyEnv

TEXT = f"Before\n{compatibility.START}{compatibility.HEAD}| 0.24.0 | x |\n| 0.5.0 | old |\n{compatibility.END}\nAfter\n"
TESTS = """
import pytest
def test_right(): pass
def test_right_too(): pass
def test_wrong(): assert False
@pytest.fixture
def broken(): raise OSError
def test_error(broken): pass
@pytest.mark.skip
def test_left_out(): pass
"""


def test_a_row_takes_the_place_of_its_older_one_and_newer_versions_come_first():
    text = compatibility.with_row(TEXT, "0.30.0", "| 0.30.0 | y |")
    text = compatibility.with_row(text, "0.5.0", "| 0.5.0 | new |")
    before, table = text.split(compatibility.HEAD)
    assert before == f"Before\n{compatibility.START}"
    assert table == f"| 0.30.0 | y |\n| 0.24.0 | x |\n| 0.5.0 | new |\n{compatibility.END}\nAfter\n"
    with pytest.raises(ValueError, match="no place for the table"):
        compatibility.with_row("# README", "0.30.0", "| 0.30.0 | y |")


def test_a_run_of_pytest_is_recorded_as_it_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    file, report, readme = tmp_path / "test_some.py", tmp_path / "tests.xml", tmp_path / "README.md"
    file.write_text(TESTS, encoding="utf-8")
    options = [f"--junit-xml={report}", "--rootdir", str(tmp_path), "-c", "/dev/null", "-p", "no:cacheprovider"]
    subprocess.run([sys.executable, "-m", "pytest", "-q", *options, str(file)], capture_output=True, cwd=tmp_path)
    assert compatibility.counts(report) == (2, 2, 1)
    readme.write_text(TEXT, encoding="utf-8")
    monkeypatch.setattr(compatibility, "README", readme)
    compatibility.record("0.30.0", ComfyEnv(Path(sys.executable), tmp_path), "the smoke subset", report)
    row = next(line for line in readme.read_text(encoding="utf-8").splitlines() if line.startswith("| 0.30.0"))
    assert "| the smoke subset | 2 | 2 | 1 |" in row


def test_readme_holds_what_was_run_on_each_version():
    """The newest first, and no column empty."""
    text = compatibility.README.read_text(encoding="utf-8")
    table = text.split(compatibility.START)[1].split(compatibility.END)[0]
    assert table.startswith(compatibility.HEAD)
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    newest_first = sorted(VERSIONS, key=lambda name: [int(part) for part in name.split(".")], reverse=True)
    assert [row[0] for row in rows] == newest_first
    assert all(len(row) == len(compatibility.COLUMNS) and all(row) for row in rows), rows
