"""scripts/evaluate.py at few steps: the applications come in the order they must, and tiles have no seam."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import demo
import evaluate
import folder_paths
import numpy as np
import pytest
from host.comfy_server import ComfyServer

COMFYUI = Path(folder_paths.__file__).resolve().parent
SEED, SIZE = 0, 256


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with the demo's checkpoint and sample reference."""
    base = tmp_path_factory.mktemp("evaluate")
    assert demo.prepare_base(base) == demo.SAMPLE
    with ComfyServer(COMFYUI, base, arguments=["--cpu"]) as running:
        yield running


@pytest.fixture(scope="module")
def column(server: ComfyServer) -> evaluate.Column:
    """The values for the sample reference."""
    values = evaluate.evaluate(server, demo.SAMPLE, SEED, SIZE, evaluate.QUICK_STEPS)
    print("\n" + evaluate.table({"sample": values}))
    return values


def test_nothing_is_in_the_wrong_order(column: evaluate.Column) -> None:
    """Guided sampling and optimisation beat KV injection, and that beats nothing."""
    assert list(evaluate.complaints({"sample": column})) == []


def test_guided_pictures_beat_a_flat_one(column: evaluate.Column) -> None:
    """A texture, and not only its mean colour; in windows and as a tile too."""
    for row in (evaluate.GUIDED, evaluate.OPTIMISED, evaluate.WINDOWS, evaluate.TILE):
        assert column[row] < column[evaluate.FLAT], row


def test_windows_and_tiles_have_no_seam(column: evaluate.Column) -> None:
    """Across borders of windows the picture changes no more than elsewhere; so it does round the tile's edge."""
    assert column[evaluate.SEAMS] < 1.2
    border = column[evaluate.BORDER]
    assert border.least <= border.value <= border.greatest


def test_the_wrong_order_is_told() -> None:
    values = {evaluate.NOTHING: 2.0, evaluate.INJECTION: 1.0, evaluate.GUIDED: 1.0, evaluate.OPTIMISED: 0.5}
    assert list(evaluate.complaints({"x": values})) == [
        "x: guided sampling (1.000) is not closer than Inject Reference KV (1.000)."
    ]


def noise(*shape: int) -> np.ndarray:
    """Latent pixels as blocks, [H W 3]."""
    blocks = np.random.default_rng(0).random((*shape, 3))
    return blocks.repeat(evaluate.LATENT, 0).repeat(evaluate.LATENT, 1)


def test_a_seam_is_seen() -> None:
    """A step of brightness at a border of windows, and at the border of a tile."""
    picture = noise(32, 48)
    assert 0.8 < evaluate.seams(picture, 256, 64) < 1.25
    assert evaluate.seams(picture + (np.arange(384) >= 64)[:, None], 256, 64) > 1.5
    border = evaluate.tile_border(picture)
    assert border.least <= border.value <= border.greatest
    ramp = evaluate.tile_border(picture + np.linspace(0, 3, 384)[:, None])
    assert ramp.value > ramp.greatest
