"""scripts/evaluate.py at few steps: numbers are in their bands, rows in the order they must have."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import demo
import evaluate
import folder_paths
import numpy as np
import pytest
from evaluation import measures, packages, report, rows, sheet
from evaluation.cells import Bench, Cell, Reference
from evaluation.networks import Networks
from evaluation.rivals import FeedForward
from host import comfy_server
from host.comfy_server import ComfyServer
from PIL import Image

COMFYUI = Path(folder_paths.__file__).resolve().parent
SEED = 0
SETTINGS = rows.Settings(evaluate.QUICK_SIZE, **evaluate.QUICK_STEPS)
ROWS = [row for row in rows.TEXTURES if row not in (rows.LARGE, rows.KV_GUIDED)]
BANDS = {
    (rows.VAE_ALONE, "patch_distance"): (0.18, 0.25),
    (rows.MOVED, "coherence"): (0.1, 0.35),
    (rows.MOVED, "copy_score"): (0.7, 1.0),
    (rows.NOTHING, "patch_distance"): (2.2, 2.5),
    (rows.INJECTION, "patch_distance"): (1.9, 2.3),
    (rows.GUIDED, "patch_distance"): (0.95, 1.25),
    (rows.OPTIMISED, "patch_distance"): (0.7, 1.0),
    (rows.TILE, "patch_distance"): (0.8, 1.15),
}
"""Seen: 0.21, 2.35, 2.14, 1.11, 0.85, 0.96. Two machines do not make the same picture to the last digit."""

Cells = dict[str, Cell]


@pytest.fixture(scope="module")
def networks() -> Networks:
    """The networks that measure, fetched once."""
    return Networks(packages.provide())


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """The scales."""
    file, formula = evaluate.picture_file(evaluate.DEFAULT, tmp_path_factory.mktemp("references"))
    return Reference(evaluate.DEFAULT, file, formula)


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, networks: Networks, reference: Reference) -> Iterator[Bench]:
    """On a server with the demo's checkpoint."""
    base = tmp_path_factory.mktemp("evaluate")
    demo.prepare_base(base)
    (base / "input" / reference.given).write_bytes(reference.file.read_bytes())
    forward = FeedForward(packages.provide(), networks)
    with ComfyServer(COMFYUI, base, arguments=["--cpu"]) as server:
        yield Bench(server, tmp_path_factory.mktemp("cells"), SETTINGS, networks, forward)


@pytest.fixture(scope="module")
def cells(bench: Bench, reference: Reference) -> Cells:
    """Every row of the scales."""
    made = {row: bench.cell(reference, row, SEED, resume=False) for row in ROWS}
    print("\n" + report.table(made.values()))
    return made


def test_nothing_is_in_the_wrong_order(cells: Cells) -> None:
    """Guided sampling and optimisation beat KV injection, and that beats nothing."""
    assert list(report.complaints(cells.values())) == []


def test_numbers_are_in_their_bands(cells: Cells) -> None:
    found = {(row, column): cells[row].values[column] for row, column in BANDS}
    assert {key: value for key, value in found.items() if not BANDS[key][0] <= value <= BANDS[key][1]} == {}


def test_guided_pictures_beat_a_flat_one(cells: Cells) -> None:
    """A texture, and not only its mean colour; as a tile too. Windows take more steps than this form has."""
    for row in (rows.GUIDED, rows.OPTIMISED, rows.TILE, rows.COARSE):
        assert cells[row].values["patch_distance"] < cells[rows.FLAT].values["patch_distance"], row


def test_coarse_to_fine_makes_a_new_texture(cells: Cells) -> None:
    """Closer than sampling alone, and no copy of the layout."""
    made = cells[rows.COARSE].values
    print(f"\n{made}")
    assert made["patch_distance"] < cells[rows.NOTHING].values["patch_distance"] / 2
    assert made["copy_score"] < 0.5


def test_windows_and_tiles_have_no_seam(cells: Cells) -> None:
    """Across borders of windows the picture changes no more than elsewhere; so it does round the tile's edge."""
    assert cells[rows.WINDOWS].values["seams"] < 1.2
    tile = cells[rows.TILE].values
    assert tile["border_least"] <= tile["border_value"] <= tile["border_greatest"]


def test_a_finished_cell_is_kept(bench: Bench, reference: Reference, cells: Cells) -> None:
    """--resume reads it; another seed would have been made."""
    kept = bench.cell(reference, rows.FEED_FORWARD, SEED, resume=True)
    assert kept == cells[rows.FEED_FORWARD]
    other = bench.cell(reference, rows.FEED_FORWARD, SEED + 1, resume=True)
    assert other.values != kept.values and other.recipe != kept.recipe


def test_the_sheet_shows_what_there_is(bench: Bench, reference: Reference, cells: Cells) -> None:
    """Every row but the flat picture and the moved reference has its place, behind the reference."""
    found = report.finished(bench.folder, [reference.name], SETTINGS.checkpoint)
    shown = sheet.contact_sheet(found, [reference], bench.folder)
    columns = [row for row in rows.SHOWN if row in ROWS and row not in (rows.FLAT, rows.MOVED)]
    assert shown.width == sheet.place(len(columns) + 1)
    left, top = sheet.place(columns.index(rows.COARSE) + 1), sheet.BAND + sheet.place(0)
    coarse = sheet.tile(cells[rows.COARSE].file(bench.folder), sheet.TILE)
    there = shown.crop((left, top, left + sheet.TILE, top + sheet.TILE))
    assert np.array_equal(np.asarray(there), np.asarray(coarse))


@pytest.mark.skipif(not hasattr(signal, "SIGSTOP"), reason="no way to halt a process")
def test_a_busy_server_is_waited_for(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not answer in time is not an error, as long as it lives: a long run must not end for it."""
    monkeypatch.setattr(comfy_server, "ANSWER_SECONDS", 0.5)
    bench.server.process.send_signal(signal.SIGSTOP)
    try:
        assert bench.server.history("anything") is None
    finally:
        bench.server.process.send_signal(signal.SIGCONT)


def cell(row: str, seconds: float = 1, shared: bool = False, **values: float) -> Cell:
    """One that was not made."""
    return Cell("x", row, 0, 512, "c", "r", values, seconds, shared)


def test_the_wrong_order_is_told() -> None:
    distances = {
        rows.NOTHING: 2.0, rows.INJECTION: 1.0, rows.KV_GUIDED: 1.2, rows.GUIDED: 1.0, rows.OPTIMISED: 0.5
    }  # fmt: skip
    assert list(report.complaints(cell(row, patch_distance=value) for row, value in distances.items())) == [
        "x: guided sampling (1.000) is not closer than Inject Reference KV (1.000).",
        "x: KV guidance (1.200) is not closer than Inject Reference KV (1.000).",
    ]


def test_goals_are_judged() -> None:
    """Each by itself; seconds on a busy machine only where even they are few enough."""
    values = {"coherence": 0.17, "copy_score": 0.5, "sharpness": 0.44}
    told = report.verdict(cell(rows.LARGE, 301, **values))
    assert told == "unlike 0.17 NOT MET, copied 0.50 met, sharp 0.44 NOT MET, 301 s NOT MET"
    assert report.verdict(cell(rows.LARGE, 301, shared=True, **values)).endswith(
        "not judged, the machine had other work"
    )
    assert report.verdict(cell(rows.LARGE, 300, shared=True, **values)).endswith("300 s met")


def test_strengths_are_judged() -> None:
    """A distance that rises on the way is told of; without all strengths nothing is."""
    values = [{"patch_distance": patches, "edges_kept": 0.9} for patches in (0.6, 0.4, 0.5)]
    made = [cell(row, **each) for row, each in zip(rows.STRENGTHS, values, strict=True)]
    assert report.strengths(made).endswith("patches 0.60 0.40 0.50 DOES NOT FALL, edges 0.90 0.90 0.90")
    made[2].values["patch_distance"] = 0.3
    assert report.strengths(made).endswith("0.30 falls, edges 0.90 0.90 0.90")
    assert report.strengths(made[:2]) == ""


def test_edges_that_are_kept_are_seen() -> None:
    """In other colours, at another size and a place beside too; strokes beside them count against."""
    picture = np.full((256, 256, 3), 0.2)
    picture[64:192, 96:160] = 0.9
    assert measures.edges_kept(picture, picture) == pytest.approx(1)
    assert measures.edges_kept(np.full_like(picture, 0.5), picture) == 0
    assert measures.edges_kept(1 - 0.5 * picture, picture.repeat(2, 0).repeat(2, 1)) == pytest.approx(1)
    assert measures.edges_kept(np.roll(picture, 8, axis=1), picture) == pytest.approx(1)
    moved = measures.edges_kept(np.roll(picture, 32, axis=1), picture)
    strokes = picture + 0.5 * noise(32, 32)
    assert moved < 0.8 and measures.edges_kept(strokes, picture) < 0.8


def test_ranks_are_compared() -> None:
    """The same order is 1, the opposite one is -1; what is not a variant of the texture does not count."""
    textures = (rows.GUIDED, rows.NOTHING, rows.FLAT, rows.INJECTION, rows.OPTIMISED)
    values = [{"patch_distance": i, "gram": i**2, "st_lpips": -i, "style_vector": abs(i - 2)} for i in range(5)]
    made = [cell(row, **each) for row, each in zip(textures, values, strict=True)]
    made.append(cell(rows.VAE_ALONE, patch_distance=0, gram=99, st_lpips=99, style_vector=99))
    found = {network: values["x"] for network, values in report.rank_correlations(made).items()}
    assert found == pytest.approx({"gram": 1, "st_lpips": -1, "style_vector": 0})


def test_networks_know_a_copy_and_a_style(networks: Networks, reference: Reference) -> None:
    """A copy is at 0, a mirror image has the same style, noise has another."""
    picture = demo.as_array(Image.open(reference.file))
    other = np.random.default_rng(0).random(picture.shape)
    seen, mirrored, noise = (networks.see(each) for each in (picture, picture[:, ::-1], other))
    assert networks.distances(seen, seen) == pytest.approx((0, 0, 0), abs=1e-6)
    for near, far in zip(networks.distances(mirrored, seen), networks.distances(noise, seen), strict=True):
        assert 0 < near < far


def test_words_and_photo_reach_their_places(bench: Bench, reference: Reference) -> None:
    """The words are the positive prompt alone; photo and reference each take their example's place."""
    settings = SETTINGS._replace(prompt="a lighthouse", content="photo.png", checkpoint=demo.CHECKPOINT)
    prompt = rows.make_prompt(bench.server, rows.PROMPTED, reference.given, SEED, settings)
    texts = [node["inputs"]["text"] for node in prompt.values() if node["class_type"] == "CLIPTextEncode"]
    assert texts.count("a lighthouse") == 1 and len(texts) == 3
    painted = rows.make_prompt(bench.server, rows.PAINTED, reference.given, SEED, settings)
    optimise = painted[demo.find(painted, "ADOptimizeLatent")]["inputs"]
    sources = {name: sources_of(painted, optimise[name][0]) for name in ("style", "content", "latent_image")}
    assert sources == {"style": {reference.given}, "content": {"photo.png"}, "latent_image": {"photo.png"}}
    half = rows.make_prompt(bench.server, "photo, edges held, 1/2", reference.given, SEED, settings)
    changed = half[demo.find(half, "ADOptimizeLatent")]["inputs"]
    assert changed == optimise | {"content_loss": "query_edges", "learning_rate": 0.5 * optimise["learning_rate"]}


def sources_of(prompt: rows.Prompt, number: str) -> set[str]:
    """The picture files that a node's inputs come from."""
    node = prompt[number]
    if node["class_type"] == "LoadImage":
        return {node["inputs"]["image"]}
    links = (value[0] for value in node["inputs"].values() if isinstance(value, list))
    return {file for link in links for file in sources_of(prompt, link)}


def noise(*shape: int) -> np.ndarray:
    """Latent pixels as blocks, [H W 3]."""
    blocks = np.random.default_rng(0).random((*shape, 3))
    return blocks.repeat(measures.LATENT, 0).repeat(measures.LATENT, 1)


def test_a_seam_is_seen() -> None:
    """A step of brightness at a border of windows, and at the border of a tile."""
    picture = noise(32, 48)
    assert 0.8 < measures.seams(picture, 256, 64) < 1.25
    assert measures.seams(picture + (np.arange(384) >= 64)[:, None], 256, 64) > 1.5
    border = measures.tile_border(picture)
    assert border.least <= border.value <= border.greatest
    ramp = measures.tile_border(picture + np.linspace(0, 3, 384)[:, None])
    assert ramp.value > ramp.greatest


def test_options_decide_what_is_made() -> None:
    """A photo and words have rows of their own; without networks there is no rival."""
    options = SimpleNamespace(content="a", prompt="b", quick=False, without_networks=True, rows=None)
    assert {rows.PAINTED, rows.PROMPTED, rows.LARGE} <= set(evaluate.rows_of(options))
    assert rows.FEED_FORWARD not in evaluate.rows_of(options)
    options.rows = [rows.GUIDED]
    assert evaluate.rows_of(options) == [rows.GUIDED]
