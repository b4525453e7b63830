"""scripts/bench.py in its quick form: what its numbers must be by construction, and what its report holds."""

from __future__ import annotations

import getpass
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import comfyui_version
import pytest
import torch
from benchmark import cases, processes, results
from conftest import CHECKOUT, COMFYUI

ISSUE = 65536
"""Characters that an issue may have."""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file for the issue form."""
    return tmp_path_factory.mktemp("bench") / "report.md"


@pytest.fixture(scope="module")
def bench(report: Path) -> dict:
    """What the command prints with --json."""
    command = [sys.executable, str(CHECKOUT / "scripts" / "bench.py"), "--quick", "--json", "--report", str(report)]
    environment = {**os.environ, "COMFYUI_PATH": str(COMFYUI), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return json.loads(ran.stdout)


@pytest.fixture(scope="module")
def found(bench: dict) -> dict[tuple, results.Result]:
    """The results by kind, network and number format."""
    read = [results.Result.read(content) for content in bench["results"]]
    return {(one.case.kind, one.case.network, one.case.dtype): one for one in read}


def test_every_row_has_all_its_numbers(found: dict) -> None:
    toy = found[cases.CPU, "toy", "fp32"]
    assert {name: one.errors for name, one in found.items() if one.errors} == {}
    programs = {"floor", "fast", "small", "step", "run", "plain iteration", "plain step", "plain run"}
    assert set(toy.values) == programs
    assert all(value["seconds"] > 0 for value in toy.values.values())
    counted = {"weights", "fast", "small"}
    assert all(set(one.gigabytes) >= counted for key, one in found.items() if key[0] == cases.COUNT)


def test_memory_is_what_it_must_be(found: dict) -> None:
    """Counted, so the same on every machine: README names these numbers."""
    sd15 = found[cases.COUNT, "SD1.5", "fp16"].gigabytes
    assert sd15["weights"] == pytest.approx(1.60, abs=0.01)
    assert sd15["fast"] == pytest.approx(0.72, abs=0.02)
    assert sd15["small"] <= 0.3 * sd15["fast"]
    assert sd15["small"] < sd15["between"] < sd15["fast"] < sd15["plain"]
    flux = found[cases.COUNT, cases.SHORT, "bf16"].gigabytes
    assert flux["small"] < 0.8 * flux["fast"]  # of all 57 blocks at most half, which test_memory.py holds
    assert "plain" not in flux


def test_weights_in_fp8_are_kept_for_the_backward_in_what_they_are_computed_in(found: dict) -> None:
    """Unless blocks are run again: up to twice the bytes of the weights come on top, and few with `small`."""
    fp8, bf16 = (found[cases.COUNT, cases.SHORT, dtype].gigabytes for dtype in ("fp8", "bf16"))
    assert 2 * fp8["weights"] == pytest.approx(bf16["weights"])
    assert 1.2 < (fp8["fast"] - bf16["fast"]) / fp8["weights"] < 2
    assert fp8["small"] == pytest.approx(bf16["small"], rel=0.1)


def test_the_gradient_is_the_plain_methods(found: dict) -> None:
    assert found[cases.CPU, "toy", "fp32"].cosine > 0.9999


def test_the_report_tells_of_the_machine_and_not_of_its_owner(bench: dict, report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    fields = dict(re.findall(r"^([\w ]+): (.+)$", text, re.MULTILINE))
    assert fields["ComfyUI"] == comfyui_version.__version__
    assert fields["torch"] == torch.__version__
    assert len(text) < ISSUE // 4  # a card has more rows
    assert fields["command line"] == "--cpu --use-pytorch-cross-attention"
    assert re.search(rf'^version = "{fields["pack"]}"$', (CHECKOUT / "pyproject.toml").read_text(), re.MULTILINE)
    assert "small takes" in text and "NOT MET" not in text
    assert json.loads(text.splitlines()[-1]) == bench
    said = text.replace("/root", "") if getpass.getuser() == "root" else text
    assert not [secret for secret in (str(CHECKOUT), str(COMFYUI), str(Path.home()), os.sep + "tmp") if secret in said]


def test_a_process_that_ends_leaves_an_error_for_each_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here ComfyUI does not know an option."""
    monkeypatch.setenv("COMFYUI_PATH", str(COMFYUI))
    told: list[str] = []
    two = cases.COUNTED[:2]
    machines, found = processes.run(two, tmp_path, ["--no-such-option"], told.append)
    assert machines == []
    assert [one.case for one in found] == list(two)
    assert all(re.match("ended with 2: .*--no-such-option", one.errors["process"]) for one in found)
    assert len(told) == 2
