"""Make the pictures, measure each as soon as it is there, and keep both, so that an interrupted run can go on."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import demo
import numpy as np
from demo_model.patch_distance import SIZE, flat_picture, read_picture, sharpness

from . import rows
from .measures import measure, seams, tile_border
from .rivals import FeedForward, noise

if TYPE_CHECKING:
    from host.comfy_server import ComfyServer

    from .networks import Networks, Seen

OUTSIDE = (rows.FEED_FORWARD, rows.PROMPT_FORWARD, rows.PHOTO_FORWARD, rows.PHOTO_ALONE)
"""Rows whose pictures no VAE has made."""
MOVED_BY = 3
"""Pixels of the size at which patches are compared: odd, and no multiple of a patch's stride on any scale."""


@dataclass
class Cell:
    """One picture and what was measured of it."""

    reference: str
    row: str
    seed: int
    size: int
    checkpoint: str
    recipe: str
    """Of everything that the picture depends on; another recipe is another picture."""
    values: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    shared: bool = False
    """Whether other programs had a part of the processor meanwhile, so that the seconds say little."""

    def file(self, folder: Path) -> Path:
        """Where the picture is; its numbers are beside it."""
        name = f"{self.reference}, {self.row}, {self.size}, {self.seed}"
        return folder / ("".join(letter if letter.isalnum() else "-" for letter in name) + ".png")


@dataclass
class Reference:
    """A picture to be measured against: its name, its file, and its name in the server's input folder."""

    name: str
    file: Path
    formula: bool
    """Whether it is one of the pack's own."""

    @property
    def given(self) -> str:
        return f"ad_evaluate_{hashlib.sha256(self.file.read_bytes()).hexdigest()[:12]}.png"


class Bench:
    """Makes cells on a server and keeps them in a folder."""

    def __init__(
        self,
        server: ComfyServer,
        folder: Path,
        settings: rows.Settings,
        networks: Networks | None,
        forward: FeedForward | None,
        content: Path | None = None,
    ) -> None:
        self.server, self.folder, self.settings = server, folder, settings
        self.networks, self.forward, self.content = networks, forward, content
        self.targets: dict[tuple[str, int], np.ndarray] = {}
        self.known: dict[bytes, Seen] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def cell(self, reference: Reference, row: str, seed: int, resume: bool) -> Cell:
        """The picture and the numbers of one cell; a finished one is read if `resume` says so."""
        size = self.settings.size * (2 if row == rows.LARGE else 1)
        prompt = None
        if row in rows.MAKERS:
            prompt = rows.make_prompt(self.server, row, reference.given, seed, self.settings)
        recipe = self.recipe(reference, row, seed, size, prompt)
        cell = Cell(reference.name, row, seed, size, self.settings.checkpoint, recipe)
        if resume and (kept := read_cell(cell.file(self.folder).with_suffix(".json"))) and kept.recipe == cell.recipe:
            return kept
        target = self.target(reference, size)  # first: the model is loaded, and does not count
        picture = self.timed(cell, lambda: self.picture(reference, row, seed, size, prompt))
        content = read_picture(str(self.content)) if row in rows.PHOTOS else None
        original = read_picture(str(reference.file))
        against = original if row == rows.VAE_ALONE else target
        seen = self.through_vae(picture, size) if row in OUTSIDE else picture
        cell.values = measure(seen, against, original, content)
        cell.values["sharpness"] = sharpness(picture, original)
        if self.networks is not None:
            cell.values |= self.networks.distances(self.networks.see(seen), self.seen(against))._asdict()
        if row == rows.WINDOWS:
            cell.values["seams"] = seams(picture, size, self.settings.window_stride)
        if row == rows.TILE:
            cell.values |= {f"border_{name}": value for name, value in tile_border(picture)._asdict().items()}
        save_picture(picture, cell.file(self.folder))
        text = json.dumps(asdict(cell), indent=1)
        cell.file(self.folder).with_suffix(".json").write_text(text, encoding="utf-8")
        return cell

    def timed(self, cell: Cell, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Make a picture; note the seconds, and whether the machine had other work."""
        start = time.monotonic()
        picture = make()
        cell.seconds = time.monotonic() - start
        cores = os.cpu_count() or 1
        threads = int(os.environ.get("OMP_NUM_THREADS", cores))
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
        cell.shared = threads < cores or load > cores + 0.5
        return picture

    def picture(self, reference: Reference, row: str, seed: int, size: int, prompt: rows.Prompt | None) -> np.ndarray:
        """[H W 3] in 0..1."""
        if prompt is not None:
            return demo.as_array(demo.make_picture(self.server, prompt, f"{reference.name}: {row}, seed {seed}"))
        if row == rows.VAE_ALONE:
            return self.target(reference, size)
        if row == rows.FLAT:
            return flat_picture(self.target(reference, size))
        if row == rows.MOVED:
            return np.roll(self.target(reference, size), (MOVED_BY * size // SIZE,) * 2, axis=(0, 1))
        if row == rows.PHOTO_ALONE:
            return read_picture(str(self.content))
        sources = {rows.FEED_FORWARD: lambda: noise(seed), rows.PHOTO_FORWARD: lambda: read_picture(str(self.content))}
        content = sources[row]() if row in sources else self.unguided(reference, seed)
        return demo.as_array(self.forward(content, read_picture(str(reference.file)), size))

    def unguided(self, reference: Reference, seed: int) -> np.ndarray:
        """What the prompt alone makes."""
        return read_picture(str(self.cell(reference, rows.PROMPT_ALONE, seed, resume=True).file(self.folder)))

    def target(self, reference: Reference, size: int) -> np.ndarray:
        """The reference after the VAE's encode and decode at a size."""
        key = (reference.name, size)
        if key not in self.targets:
            prompt = rows.target_prompt(self.server, reference.given, size, self.settings)
            picture = demo.make_picture(self.server, prompt, f"{reference.name} through the VAE, {size} pixels")
            self.targets[key] = demo.as_array(picture)
        return self.targets[key]

    def through_vae(self, picture: np.ndarray, size: int) -> np.ndarray:
        """What the VAE leaves of a picture that no VAE has made; without it, it would be sharper than all it meets."""
        name = f"ad_evaluate_{hashlib.sha256(picture.tobytes()).hexdigest()[:12]}.png"
        save_picture(picture, self.server.base / "input" / name)
        prompt = rows.target_prompt(self.server, name, size, self.settings)
        return demo.as_array(demo.make_picture(self.server, prompt, "  through the VAE"))

    def seen(self, picture: np.ndarray) -> Seen:
        """What the networks make of a reference, which is asked for again and again."""
        key = hashlib.sha256(picture.tobytes()).digest()
        if key not in self.known:
            self.known[key] = self.networks.see(picture)
        return self.known[key]

    def recipe(self, reference: Reference, row: str, seed: int, size: int, prompt: rows.Prompt | None) -> str:
        """A hash of what a cell depends on: its graph, the files that it reads, and whether networks measure it."""
        checkpoint = self.server.base / "models" / "checkpoints" / self.settings.checkpoint
        weights = [self.settings.checkpoint, checkpoint.stat().st_size]
        graph = rows.unfolded(prompt) if prompt else [row, seed, row in OUTSIDE]
        content = hashlib.sha256(self.content.read_bytes()).hexdigest() if self.content else ""
        return hashlib.sha256(
            json.dumps([graph, reference.given, size, weights, content, self.networks is not None]).encode()
        ).hexdigest()


def read_cell(file: Path) -> Cell | None:
    """A finished cell, if there is one."""
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    return Cell(**content) if "recipe" in content else None


def save_picture(picture: np.ndarray, file: Path) -> None:
    """[H W 3] in 0..1 as a PNG."""
    from PIL import Image

    Image.fromarray((picture.clip(0, 1) * 255).round().astype(np.uint8)).save(file)
