"""The bench's tables, goals and presets, from numbers that are given; and programs that fail beside others."""

from __future__ import annotations

import pytest
import torch
from benchmark import cases, measuring, presets, processes, results

CPU = torch.device("cpu")


def counted(network: str, side: int, dtype: str, **gigabytes: float) -> results.Result:
    """A row of counted memory."""
    return results.Result(cases.Case(cases.COUNT, network, side, dtype), gigabytes=gigabytes)


def timed(dtype: str = "fp32", cosine: float | None = None, network: str = "toy", **seconds: float) -> results.Result:
    """A row of measured times, underscores for spaces."""
    values = {name.replace("_", " "): {"seconds": value} for name, value in seconds.items()}
    return results.Result(cases.Case(cases.CPU, network, 64, dtype), values, cosine)


def test_the_setting_that_fits_first_is_held_against_the_card() -> None:
    """Weights, pass and 15 %."""
    row = counted("SDXL", 1024, "fp16", weights=4.0, fast=4.0, between=2.5, small=1.0)
    assert list(results.goals([row])) == [
        "SDXL 1024 fp16: 7.5 GB of card memory (between), goal 8: met",
        "SDXL 1024 fp16: small takes 0.25 of the memory of fast, goal 0.3: met",
    ]
    row = counted("FLUX", 512, "fp8", weights=12.0, fast=5.0, small=3.0)
    assert list(results.goals([row])) == [
        "FLUX 512 fp8: 17.2 GB of card memory (small), goal 16: NOT MET",
        "FLUX 512 fp8: small takes 0.60 of the memory of fast, goal 0.5: NOT MET",
    ]


def test_goals_of_time_and_gradient() -> None:
    assert list(results.goals([timed(cosine=0.99951, network="SD1.5", fast=2.0, small=3.0)])) == [
        "SD1.5 64 fp32, CPU: small takes 1.50 of the time of fast, goal 1.35: NOT MET",
        "SD1.5 64 fp32, CPU: the gradient's cosine is 0.999510, goal 0.999: met",
    ]
    assert list(results.goals([timed(fast=2.0, small=3.0)])) == []
    (line,) = results.goals([timed("fp16", cosine=0.98)])
    assert line.endswith("goal 0.99: NOT MET")
    assert list(results.goals([timed("fp8", cosine=0.5)])) == []


def columns(text: str, name: str) -> list[str]:
    """What stands behind a name in the first table that has it."""
    line = next(line for line in text.splitlines() if line[: results.FIRST].rstrip() == name)
    return line[results.FIRST :].split()


def test_times_are_shares_of_the_plain_methods() -> None:
    row = timed(plain_iteration=2.0, floor=1.0, fast=1.5, small=1.8, step=3.0, plain_step=4.0, run=30.0, plain_run=60.0)
    text = "\n".join(results.time_table([row]))
    assert columns(text, "toy 64 fp32, CPU") == ["2.00", "0.50", "0.75", "0.90", "0.75", "0.50", "1.20"]


def test_without_a_plain_method_shares_are_of_the_floor() -> None:
    text = "\n".join(results.time_table([timed(floor=2.0, fast=3.0, step=9.0)]))
    assert columns(text, "toy 64 fp32, CPU *") == ["2.00", "1.00", "1.50", "-", "-", "-", "-"]


def test_what_failed_is_named_and_the_rest_shown() -> None:
    row = timed(plain_iteration=2.0, fast=1.5)
    row.errors = {"small": "out of memory"}
    text = results.text([row, counted("toy", 64, "fp32", weights=1.0, fast=0.4, small=0.1)])
    assert "toy 64 fp32, CPU: small: out of memory" in text
    assert columns(text, "toy 64 fp32, CPU")[2] == "0.75"
    assert columns(text, "toy 64 fp32")[-1] == "0.25"


def test_a_program_that_fails_does_not_stop_those_beside_it() -> None:
    calls: list[str] = []

    def failing() -> None:
        calls.append("failing")
        raise torch.OutOfMemoryError("of 3 GB in /somewhere")

    measured = measuring.Measured()
    programs = {"failing": lambda: failing, "long": lambda: lambda: calls.append("long")}
    programs["working"] = lambda: lambda: calls.append("working")
    measuring.side_by_side(measured, programs, CPU, rounds=2, once=("long",))
    assert measured.errors == {"failing": "out of memory"}
    assert set(measured.values) == {"working", "long"}
    assert calls == ["failing", "working", "long", "working"]
    assert measuring.reason(ValueError("first line\nsecond")) == "ValueError: first line"


@pytest.mark.parametrize("path", ["/home/name/comfy/x.py", r"C:\Users\name\comfy", "~/models/a b"])
def test_paths_are_taken_out_of_what_is_reported(path: str) -> None:
    said = processes.scrubbed({"error": f"cannot read {path}: it is 1/2 empty", "value": 0.5})
    assert "name" not in said["error"] and "models" not in said["error"]
    assert said["error"].endswith("empty") and "1/2" in said["error"]
    assert said["value"] == 0.5


def test_a_card_is_measured_with_dynamic_vram_and_without() -> None:
    chosen = cases.chosen(quick=False, card=True, full_size=False)
    both = {dynamic: {(c.network, c.side, c.dtype) for c in chosen if c.kind == cases.CARD and c.dynamic == dynamic}
            for dynamic in (False, True)}  # fmt: skip
    assert both[False] == both[True] >= {
        ("SD1.5", 512, "fp16"), ("SDXL", 1024, "bf16"), ("FLUX", 512, "fp8"), ("FLUX", 1024, "fp8"),
    }  # fmt: skip
    assert "--disable-dynamic-vram" in processes.arguments_of(next(c for c in chosen if c.kind == cases.CARD))
    quick = cases.chosen(quick=True, card=True, full_size=False)
    assert {c.kind for c in quick} == {cases.COUNT, cases.CPU}


def test_a_presets_shares_are_of_the_best_ones() -> None:
    best = presets.Row([10.0, 12.0], [0.5, 1.0], [0.1, 0.2])
    draft = presets.Row([3.0, 2.5], [0.6, 2.0], [0.3, 0.2])
    assert draft.against(best) == pytest.approx((0.25, 1.6, 2.0))
    rows = dict.fromkeys(presets.PRESETS, best) | {"draft": draft}
    line = next(line for line in presets.table(rows).splitlines() if line.startswith("draft"))
    assert line.split() == ["draft", "10", "6", "0.20", "0%", "0.25", "1.60", "2.00", "0.25"]
