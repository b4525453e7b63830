"""The presets and what they cost: time and likeness with the demo model, as shares of the best one's."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

import demo
from host.comfy_env import HOME, SetupError

if TYPE_CHECKING:
    import numpy as np
    from host.comfy_server import ComfyServer

BASE = HOME / "presets"
SIZE = 256
REFERENCES = ["texture: scales", "texture: pebbles"]
BEST = "best"


@dataclass(frozen=True)
class Preset:
    """Settings of AD-Guided KSampler for a texture."""

    steps: int
    iterations: int
    learning_rate: float
    start_percent: float = 0.0


PRESETS = {
    BEST: Preset(50, 3, 0.05),
    "usual": Preset(25, 3, 0.10),
    "draft": Preset(10, 6, 0.20),
    "(two pulls)": Preset(50, 2, 0.10),
    "(short and late)": Preset(20, 3, 0.10, 0.4),
}
"""The named ones, and others that were thought of."""


@dataclass
class Row:
    """What a preset came to, of each picture; all in the same order of references and seeds."""

    seconds: list[float] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    copied: list[float] = field(default_factory=list)

    def against(self, best: Row) -> tuple[float, float, float]:
        """Shares of the best preset's: of all seconds, of its distance on average, and where that was largest."""
        shares = [ours / theirs for ours, theirs in zip(self.distances, best.distances, strict=True)]
        return sum(self.seconds) / sum(best.seconds), mean(shares), max(shares)


def run(comfyui: Path, seeds: Sequence[int], references: Sequence[str], as_json: bool) -> None:
    """Make all pictures, and print the table.

    Raises:
        SetupError: a reference is not one of the pack's.
    """
    from host.comfy_server import ComfyServer, PromptError, ServerError, stop_signals_raise

    demo.prepare_base(BASE)
    given = {name: put(name, BASE / "input") for name in references}
    rows = {name: Row() for name in PRESETS}
    try:
        with stop_signals_raise(), ComfyServer(comfyui, BASE) as server:
            for file in given.values():
                target = picture(server, demo.reference_prompt(prompt_of(server, file, 0, PRESETS[BEST])))
                for seed in seeds:
                    for name, preset in PRESETS.items():
                        add(rows[name], server, prompt_of(server, file, seed, preset), target)
    except (ServerError, PromptError) as error:
        raise SetupError(str(error)) from error
    print(json.dumps({name: asdict(row) for name, row in rows.items()}, indent=1) if as_json else table(rows))


def put(name: str, folder: Path) -> str:
    """One of the pack's own pictures as a file in the server's input folder: its name there."""
    from demo_model.sample_reference import formulas
    from PIL import Image

    pictures = formulas().PICTURES
    if name not in pictures:
        raise SetupError(f"--references: {name} is none of: {', '.join(pictures)}")
    file = f"ad_preset_{name.replace(': ', '_').replace(' ', '_')}.png"
    Image.fromarray((pictures[name]() * 255).round().astype("uint8")).save(folder / file)
    return file


def prompt_of(server: ComfyServer, reference: str, seed: int, preset: Preset) -> dict:
    """Template 01 with a preset's settings."""
    prompt = demo.guided_prompt(server, reference, seed, SIZE)
    prompt[demo.find(prompt, "ADGuidedKSampler")]["inputs"].update(asdict(preset))
    return prompt


def picture(server: ComfyServer, prompt: dict) -> np.ndarray:
    """[H W 3] in 0..1."""
    import io

    from PIL import Image

    (file,) = server.images(server.run(prompt))
    return demo.as_array(Image.open(io.BytesIO(file)).convert("RGB"))


def clock(server: ComfyServer) -> float:
    """In seconds: on a card those that pass; on the processor those of the server's own work, whatever else runs."""
    import psutil

    if "--cpu" not in server.arguments:
        return time.monotonic()
    spent = psutil.Process(server.process.pid).cpu_times()
    return spent.user + spent.system


def add(row: Row, server: ComfyServer, prompt: dict, target: np.ndarray) -> None:
    """Make a picture and note what it came to."""
    from demo_model.patch_distance import compare

    before = clock(server)
    found = picture(server, prompt)
    row.seconds.append(clock(server) - before)
    closeness = compare(found, target)
    row.distances.append(closeness.patch_distance)
    row.copied.append(closeness.copy_score)
    print(f"  {row.seconds[-1]:.0f} s, distance {row.distances[-1]:.3f}", file=sys.stderr, flush=True)


def table(rows: dict[str, Row]) -> str:
    """One line for each preset."""
    best = rows[BEST]
    lines = [
        f"Presets for textures, {len(best.seconds)} pictures of {SIZE} pixels each, as shares of what {BEST} takes",
        f"{'':20}{'steps':>7}{'iterations':>12}{'rate':>7}{'from':>7}{'time':>8}{'distance':>10}{'worst':>8}{'copied':>8}",
    ]
    for name, row in rows.items():
        preset = PRESETS[name]
        settings = f"{preset.steps:7}{preset.iterations:12}{preset.learning_rate:7.2f}{preset.start_percent:7.0%}"
        spent, distance, worst = row.against(best)
        lines.append(f"{name:20}{settings}{spent:8.2f}{distance:10.2f}{worst:8.2f}{mean(row.copied):8.2f}")
    lines.append("distance: to the reference, by patches; worst: of one picture. copied: above 0.5 is a copy.")
    return "\n".join(lines)
