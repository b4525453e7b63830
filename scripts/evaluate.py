"""How close the pack's applications come to a reference on the demo model: one table of patch distances.

    python scripts/evaluate.py [--reference FILE] [--size PIXELS] [--seed N] [--quick]

Every picture comes from a shipped workflow, run through a real server (see demo.py). The distance is that of
patch_distance.py, to the reference after the same VAE's encode and decode. Without --reference the picture made by
formula is used, and beside it two photos from ../shared/references where that folder exists. Ends with an error if
guided sampling or optimisation is not closer than KV injection, or KV injection not closer than nothing.

At the default size it takes under 10 minutes on two processor cores.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import demo
from host.comfy_env import CHECKOUT, SetupError, leave, provision, rerun_in

if TYPE_CHECKING:
    from collections.abc import Iterator

    import numpy as np
    from host.comfy_server import ComfyServer

WORKFLOWS = CHECKOUT / "workflows"
PHOTOS = CHECKOUT.parent / "shared" / "references"
PHOTO_NAMES = ("texture-rust.jpg", "style-starry-night.jpg")
SIZE = 256
LATENT = 8
"""Pixels to a latent pixel of the demo model."""

STRIDES = 8
"""How often a window moves on until it has moved by its own size."""

STEPS = {"sampling": 40, "optimisation": 100}
QUICK_STEPS = {"sampling": 12, "optimisation": 40}
NOTHING, FLAT, INJECTION = "nothing", "a flat picture", "Inject Reference KV"
GUIDED, OPTIMISED = "guided sampling", "optimisation"
WINDOWS, SEAMS, TILE, BORDER = "windows, 3:2", "  its seams", "seamless tile", "  its border"
WIDTHS = (22, 26)
"""Of the table's first column and of the others, in letters."""

NOTE = """
its seams: squared differences across borders of windows, relative to those elsewhere
its border: differences across the border when the tile is repeated (least and greatest inside), relative to the mean

Settings, and the paper's where they differ:
  guided sampling   {sampling} steps (paper: 50), learning rate 0.05, 3 iterations, cfg 1, no AdaIN
  optimisation      {optimisation} steps (paper: 300), learning rate 0.05, constant
  windows           {sampling} steps (paper: 50), 2 iterations, stride an eighth of the window
  seamless tile     as guided sampling
  injection         {sampling} steps, strength 1
  pictures          {size} pixels (paper: 512), seed {seed}"""


class Border(NamedTuple):
    """How visible a tile's border is, relative to the mean difference inside."""

    value: float
    least: float
    greatest: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.least:.2f} to {self.greatest:.2f})"


Prompt = dict[str, Any]
Column = dict[str, float | Border]
"""The values of one reference, by row."""


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Print how close each application comes to a reference.")
    parser.add_argument("--reference", type=Path, help="any picture file, instead of the usual ones")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other pictures (default: 0)")
    parser.add_argument("--size", type=demo.size_in_pixels, default=SIZE, help=f"in pixels, side (default: {SIZE})")
    parser.add_argument("--quick", action="store_true", help="few steps and one reference, for a first look")
    options = parser.parse_args()
    if options.reference and not options.reference.is_file():
        parser.error(f"--reference: there is no file {options.reference}")
    return options


def prompts(server: ComfyServer, reference: str, seed: int, size: int, steps: dict[str, int]) -> dict[str, Prompt]:
    """The prompt of each application, by its row in the table."""
    sampling, optimisation = {"steps": steps["sampling"]}, {"steps": steps["optimisation"]}

    def shipped(name: str, **changes: dict[str, int]) -> Prompt:
        prompt = demo.guided_prompt(server, reference, seed, size, WORKFLOWS / f"{name}.json")
        for class_type, inputs in changes.items():
            prompt[demo.find(prompt, class_type)]["inputs"].update(inputs)
        return {number: node for number, node in prompt.items() if node["class_type"] != "PreviewImage"}

    guided = shipped("texture_from_reference", ADGuidedKSampler=sampling)
    return {
        NOTHING: demo.unguided_prompt(guided),
        INJECTION: injection_prompt(guided),
        GUIDED: guided,
        OPTIMISED: shipped("texture_by_optimisation", ADOptimizeLatent=optimisation),
        WINDOWS: shipped(
            "large_texture",
            ADGuidedKSampler=sampling,
            ADWindows={"size": size, "stride": size // STRIDES},
            EmptyLatentImage={"width": size * 3 // 2},
        ),
        TILE: shipped("seamless_tile", ADGuidedKSampler=sampling),
    }


def injection_prompt(guided: Prompt) -> Prompt:
    """Sampling without guidance, with the reference's keys and values injected."""
    prompt = demo.unguided_prompt(guided)
    inputs = prompt[demo.find(prompt, "ADGuidedKSampler")]["inputs"]
    settings = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    prompt["injection"] = {
        "class_type": "ADInjectReferenceKV",
        "inputs": {"model": inputs["model"], "style": inputs["style"], **settings},
    }
    inputs["model"] = ["injection", 0]
    return prompt


def differences(picture: np.ndarray, axis: int) -> np.ndarray:
    """Absolute differences across each border between latent pixels, the last one round the picture's edge.

    Other neighbours are left out: the decoder makes steps of different sizes inside a latent pixel.

    Args:
        picture: [H W 3].
        axis: 0 downwards, 1 across.

    Returns:
        [borders, length of the other axis, 3].
    """
    import numpy as np

    rows = np.moveaxis(picture, axis, 0)
    return np.abs(np.roll(rows, -1, axis=0) - rows)[LATENT - 1 :: LATENT]


def seams(picture: np.ndarray, size: int, stride: int) -> float:
    """Mean squared difference across the borders of windows along the width, relative to that elsewhere."""
    squares = (differences(picture, 1)[:-1] ** 2).mean((1, 2))
    starts = range(0, picture.shape[1] - size + 1, stride)
    ends = {border for start in starts for border in (start, start + size)} - {0, picture.shape[1]}
    at_border = [(number + 1) * LATENT in ends for number in range(len(squares))]
    return float(squares[at_border].mean() / squares[[not border for border in at_border]].mean())


def tile_border(picture: np.ndarray) -> Border:
    """How visible the border is when the picture is repeated: of both axes the one that is seen more."""
    across = []
    for axis in (0, 1):
        means = differences(picture, axis).mean((1, 2))
        inside = means[:-1] / means[:-1].mean()
        across.append(Border(means[-1] / means[:-1].mean(), inside.min(), inside.max()))
    return max(across)


def evaluate(server: ComfyServer, reference: str, seed: int, size: int, steps: dict[str, int]) -> Column:
    """Make all pictures for one reference; the values of its column, by row."""
    from demo_model.patch_distance import flat_picture, patch_distance

    def make(prompt: Prompt, title: str) -> np.ndarray:
        return demo.as_array(demo.make_picture(server, prompt, title))

    wanted = prompts(server, reference, seed, size, steps)
    target = make(demo.reference_prompt(wanted[GUIDED]), "the reference through the VAE")
    values: Column = {FLAT: patch_distance(flat_picture(target), target)}
    for row, prompt in wanted.items():
        picture = make(prompt, row)
        values[row] = patch_distance(picture, target)
        if row == WINDOWS:
            values[SEAMS] = seams(picture, size, size // STRIDES)
        if row == TILE:
            values[BORDER] = tile_border(picture)
    return values


def table(columns: dict[str, Column]) -> str:
    """The values as text."""

    def line(first: str, others: list[object]) -> str:
        cells = (f"{other:.3f}" if isinstance(other, float) else str(other) for other in others)
        return first.ljust(WIDTHS[0]) + "".join(cell.rjust(WIDTHS[1]) for cell in cells)

    rows = (NOTHING, FLAT, INJECTION, GUIDED, OPTIMISED, WINDOWS, SEAMS, TILE, BORDER)
    lines = [line("patch distance", list(columns))]
    lines += [line(row, [values[row] for values in columns.values()]) for row in rows]
    return "\n".join(lines)


def complaints(columns: dict[str, Column]) -> Iterator[str]:
    """What is in another order than it must be."""
    for name, values in columns.items():
        for better, worse in ((GUIDED, INJECTION), (OPTIMISED, INJECTION), (INJECTION, NOTHING)):
            if not values[better] < values[worse]:
                yield f"{name}: {better} ({values[better]:.3f}) is not closer than {worse} ({values[worse]:.3f})."


def references(options: argparse.Namespace) -> dict[str, Path | None]:
    """The pictures to evaluate by name; None is the one made by formula."""
    if options.reference:
        return {options.reference.name: options.reference}
    photos = [] if options.quick else [PHOTOS / name for name in PHOTO_NAMES]
    return {"sample reference": None, **{photo.name: photo for photo in photos if photo.is_file()}}


def main() -> None:
    """Provision, then run in the provisioned Python."""
    options = parse_arguments()
    env = provision()
    rerun_in(env, __file__, sys.argv[1:])

    from host.comfy_server import ComfyServer, PromptError, ServerError, stop_signals_raise

    columns: dict[str, Column] = {}
    steps = QUICK_STEPS if options.quick else STEPS
    try:
        with stop_signals_raise():
            demo.prepare_base(demo.BASE)
            with ComfyServer(env.comfyui, demo.BASE) as server:
                for name, file in references(options).items():
                    print(f"\n{name}", flush=True)
                    reference = demo.prepare_base(demo.BASE, file)
                    columns[name] = evaluate(server, reference, options.seed, options.size, steps)
    except (ServerError, PromptError) as error:
        leave(error)
    print(f"\n{table(columns)}\n{NOTE.format(**steps, size=options.size, seed=options.seed)}")
    if found := list(complaints(columns)):
        sys.exit("\n" + "\n".join(found))


if __name__ == "__main__":
    try:
        main()
    except (SetupError, OSError) as error:
        leave(error)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
