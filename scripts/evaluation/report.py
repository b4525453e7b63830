"""The table, what the patch distance has in common with the networks, and the goals of the demo's picture."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import rows
from .cells import Cell, read_cell

COLUMNS = {
    "patch_distance": "patches",
    "coherence": "unlike",
    "completeness": "lacking",
    "copy_score": "copied",
    "sharpness": "sharp",
    "gram": "Gram",
    "st_lpips": "ST-LPIPS",
    "style_vector": "style",
}
NETWORKS = ("gram", "st_lpips", "style_vector")
WIDTH, FIRST = 9, 28
"""Of columns, and of the rows' names, in letters."""

MOST = {"coherence": 0.16, "copy_score": 0.5}
LEAST = {"sharpness": 0.45}
SECONDS = 300
"""The goals for coarse to fine, of each reference and seed; seconds on two quiet processor cores."""

FEWEST = 5
"""Rows that a rank correlation needs."""


def table(cells: Iterable[Cell]) -> str:
    """One block of rows for each reference and seed. What was not measured is left open."""
    blocks: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        blocks.setdefault((cell.reference, cell.seed), []).append(cell)
    lines = ["".ljust(FIRST) + "".join(title.rjust(WIDTH) for title in (*COLUMNS.values(), "pixels", "seconds"))]
    for (reference, seed), block in blocks.items():
        lines += ["", f"{reference}, seed {seed}"]
        for cell in block:
            lines += [line(cell), *extras(cell)]
    return "\n".join(lines)


def line(cell: Cell) -> str:
    """One row."""
    values = (cell.values.get(name, math.nan) for name in COLUMNS)
    texts = ["" if math.isnan(value) else f"{value:.3f}" for value in values]
    return cell.row.ljust(FIRST) + "".join(text.rjust(WIDTH) for text in (*texts, str(cell.size), seconds(cell)))


def seconds(cell: Cell) -> str:
    """Only of pictures that the server made; with a star where the machine had other work."""
    return f"{cell.seconds:.0f}{'*' if cell.shared else ''}" if cell.row in rows.MAKERS else ""


def extras(cell: Cell) -> Iterator[str]:
    """What is measured of one kind of picture only."""
    values = cell.values
    if "seams" in values:
        yield f"  its seams: {values['seams']:.2f}"
    if "border_value" in values:
        least, greatest = values["border_least"], values["border_greatest"]
        yield f"  its border: {values['border_value']:.2f} (inside {least:.2f} to {greatest:.2f})"
    if "edges_kept" in values:
        yield f"  of the photo kept: layout {values['kept']:.2f}, edges {values['edges_kept']:.2f}"


def rank_correlations(cells: Iterable[Cell]) -> dict[str, dict[str, float]]:
    """Spearman's, of the patch distance with each network's over a reference's rows; by network and reference."""
    from scipy.stats import spearmanr

    found: dict[str, dict[str, float]] = {network: {} for network in NETWORKS}
    by_reference: dict[str, list[Cell]] = {}
    for cell in cells:
        # What is measured against something else, and the reference itself, are no pictures to be ranked.
        if cell.row not in (rows.VAE_ALONE, rows.MOVED, *rows.PHOTOS, *rows.PROMPTS):
            by_reference.setdefault(cell.reference, []).append(cell)
    for network in NETWORKS:
        for reference, group in by_reference.items():
            pairs = [(c.values["patch_distance"], c.values[network]) for c in group if network in c.values]
            if len(pairs) >= FEWEST:
                found[network][reference] = float(spearmanr(*zip(*pairs, strict=True)).statistic)
    return found


def rank_table(cells: list[Cell]) -> str:
    """The rank correlations as text."""
    found = rank_correlations(cells)
    lines = ["Do the networks rank the pictures as the patch distance does? 1 is the same order (Spearman)"]
    for reference in dict.fromkeys(cell.reference for cell in cells):
        values = [found[network].get(reference) for network in NETWORKS]
        if None not in values:
            texts = (f"{COLUMNS[name]} {value:.2f}" for name, value in zip(NETWORKS, values, strict=True))
            lines.append(f"  {reference.ljust(FIRST - 2)}{'   '.join(texts)}")
    return "\n".join(lines) if len(lines) > 1 else ""


def goals(cells: Iterable[Cell]) -> str:
    """Which goals each picture made coarse to fine meets."""
    lines = [
        f"Goals of coarse to fine: unlike at most {MOST['coherence']}, copied at most {MOST['copy_score']}, sharp at "
        f"least {LEAST['sharpness']}, at most {SECONDS} seconds on two quiet cores"
    ]
    for cell in cells:
        if cell.row in (rows.COARSE, rows.LARGE):
            lines.append(f"  {cell.reference}, seed {cell.seed}, {cell.size} pixels: {verdict(cell)}")
    return "\n".join(lines) if len(lines) > 1 else ""


def strengths(cells: Iterable[Cell]) -> str:
    """Whether more style strength brings a photo nearer to the style, and what it costs in edges."""
    groups: dict[tuple[str, int], list[Cell]] = {}
    for cell in cells:
        if cell.row in rows.STRENGTHS:
            groups.setdefault((cell.reference, cell.seed), []).append(cell)
    lines = ["Style strength with edges held, 1/4, 1/2 and 1: the distance should fall, and the edges should stay"]
    for (reference, seed), group in groups.items():
        by_row = {cell.row: cell.values for cell in group}
        if len(by_row) == len(rows.STRENGTHS):
            distances, edges = (
                [by_row[row][key] for row in rows.STRENGTHS] for key in ("patch_distance", "edges_kept")
            )
            told = "falls" if distances == sorted(distances, reverse=True) else "DOES NOT FALL"
            lines.append(f"  {reference}, seed {seed}: patches {spaced(distances)} {told}, edges {spaced(edges)}")
    return "\n".join(lines) if len(lines) > 1 else ""


def spaced(values: Iterable[float]) -> str:
    """Numbers in a row."""
    return " ".join(f"{value:.2f}" for value in values)


def verdict(cell: Cell) -> str:
    """Each goal with its value."""
    found = [(name, cell.values[name], cell.values[name] <= most) for name, most in MOST.items()]
    found += [(name, cell.values[name], cell.values[name] >= least) for name, least in LEAST.items()]
    texts = [f"{COLUMNS[name]} {value:.2f} {'met' if met else 'NOT MET'}" for name, value, met in found]
    if cell.shared and cell.seconds > SECONDS:
        texts.append(f"{cell.seconds:.0f} s not judged, the machine had other work")
    else:
        texts.append(f"{cell.seconds:.0f} s {'met' if cell.seconds <= SECONDS else 'NOT MET'}")
    return ", ".join(texts)


def complaints(cells: Iterable[Cell]) -> Iterator[str]:
    """What is in another order than it must be."""
    distances = {(cell.reference, cell.seed, cell.row): cell.values["patch_distance"] for cell in cells}
    order = (
        *((rows.GUIDED, rows.INJECTION), (rows.OPTIMISED, rows.INJECTION), (rows.INJECTION, rows.NOTHING)),
        *((rows.GUIDED, rows.KV_GUIDED), (rows.KV_GUIDED, rows.INJECTION)),
    )
    for reference, seed in dict.fromkeys(key[:2] for key in distances):
        for better, worse in order:
            ours, theirs = (distances.get((reference, seed, row)) for row in (better, worse))
            if ours is not None and theirs is not None and not ours < theirs:
                yield f"{reference}: {better} ({ours:.3f}) is not closer than {worse} ({theirs:.3f})."


def finished(folder: Path, references: list[str], checkpoint: str) -> list[Cell]:
    """What a folder holds of these references with this checkpoint: by reference, seed and row, the largest first."""
    cells = [cell for file in sorted(folder.glob("*.json")) if (cell := read_cell(file)) is not None]
    cells = [cell for cell in cells if cell.reference in references and cell.checkpoint == checkpoint]
    return sorted(
        cells, key=lambda each: (references.index(each.reference), each.seed, rows.SHOWN.index(each.row), -each.size)
    )


def machine() -> dict[str, str | int | None]:
    """What the seconds were measured on."""
    import torch

    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = torch.cuda.get_device_name() if device is not None and device.type == "cuda" else str(device or "cpu")
    return {"device": name, "cores": os.cpu_count(), "torch": torch.__version__, "system": platform.platform()}
