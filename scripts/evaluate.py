"""The benchmark: what the pack makes of a reference, beside what others make of it, measured and shown.

    python scripts/evaluate.py [--references NAME or FILE ...] [--checkpoint FILE] [--prompt TEXT] [--content FILE]
                               [--content-weight W] [--size PIXELS] [--seeds N ...] [--rows ROW ...]
                               [--quick] [--resume]

Every picture of the pack's comes from a shipped workflow, run through a real server (see demo.py), with the demo model
or with a checkpoint of your own. Into output/evaluation/: evaluation.txt (the table), evaluation.json, sheet.jpg and
each picture. docs/EVALUATION.md says what the columns mean. Ends with an error if guided sampling or optimisation is
not closer than KV injection, KV injection not closer than nothing, or KV guidance not between injection and guidance.

The networks that measure are fetched at the first run (85 MB); --without-networks leaves their columns out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import demo
from evaluation import rows
from host.comfy_env import HOME, SetupError, leave, provision, rerun_in

if TYPE_CHECKING:
    from evaluation.cells import Bench, Reference

OUTPUT = demo.OUTPUT / "evaluation"
BASE = HOME / "evaluation"
SIZE, QUICK_SIZE = 512, 256
QUICK_STEPS = {"sampling": 12, "optimisation": 40, "stride": 2, "coarse": 4}
DEFAULT = "texture: scales"
CONTENT = "ad_evaluate_content.png"

NOTE = """
* not all of the processor was at hand: these seconds say little.
Distances (patches, its halves unlike and lacking, Gram, ST-LPIPS, style) are to the reference after the VAE; 0: a copy.
copied: above 0.5 the layout is the reference's. sharp: 1 is as sharp as the reference.
seams, border: contrast there over that elsewhere.
The reference through the VAE is compared with the reference itself: it is how far any picture of this VAE can come.
The reference, moved by 3 in 128, has no fault: its distance is that of patches on a grid that it does not meet."""


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Measure what the pack makes of reference pictures, and show it.")
    parser.add_argument(
        "--references", nargs="+", default=[DEFAULT], help=f'files, or names of the pack\'s own (default: "{DEFAULT}")'
    )
    parser.add_argument("--checkpoint", type=Path, help="an SD1.5 checkpoint instead of the demo model")
    parser.add_argument("--prompt", default="", help="also make what these words say; needs --checkpoint")
    parser.add_argument("--content", help='also paint this photo: a file, or "scene: still life"')
    parser.add_argument(
        "--content-weight", type=float, default=rows.Settings(SIZE).content_weight,
        help="how firmly the photo is held (default: the template's 0.25; the demo model needs 0.001 or so)",
    )  # fmt: skip
    parser.add_argument("--size", type=size_of_pictures, help=f"in pixels, side (default: {SIZE})")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="other seeds, other pictures (default: 0)")
    parser.add_argument("--rows", nargs="+", choices=rows.SHOWN, metavar="ROW", help="only these rows are made")
    parser.add_argument("--quick", action="store_true", help=f"few steps, {QUICK_SIZE} pixels, for a first look")
    parser.add_argument("--resume", action="store_true", help="keep the pictures that an earlier run has finished")
    parser.add_argument("--without-networks", action="store_true", help="fetch nothing; leave their columns out")
    parser.add_argument("--output", type=Path, default=OUTPUT, help="another folder for the results")
    parser.add_argument("--docs", action="store_true", help="write the results into docs/ too")
    options = parser.parse_args()
    if options.checkpoint and not options.checkpoint.is_file():
        parser.error(f"--checkpoint: there is no file {options.checkpoint}")
    if options.prompt and not options.checkpoint:
        parser.error("--prompt needs --checkpoint: the demo model has no text encoder")
    return options


def settings_of(options: argparse.Namespace) -> rows.Settings:
    """What all pictures of a run are made with."""
    size = options.size or (QUICK_SIZE if options.quick else SIZE)
    return rows.Settings(
        size,
        **(QUICK_STEPS if options.quick else {}),
        checkpoint=options.checkpoint.name if options.checkpoint else demo.CHECKPOINT,
        prompt=options.prompt,
        content=CONTENT if options.content else "",
        content_weight=options.content_weight,
    )


def rows_of(options: argparse.Namespace) -> list[str]:
    """The rows that are made, what tells most first."""
    wanted = [*rows.TEXTURES, *(rows.PHOTOS if options.content else ()), *(rows.PROMPTS if options.prompt else ())]
    if options.quick:
        wanted.remove(rows.LARGE)
    if options.without_networks:
        wanted = [row for row in wanted if row not in (rows.FEED_FORWARD, rows.PHOTO_FORWARD, rows.PROMPT_FORWARD)]
    return [row for row in wanted if row in (options.rows or wanted)]


def picture_file(given: str, folder: Path) -> tuple[Path, bool]:
    """A picture by the pack's own name or by its file, as a PNG; and whether it is the pack's own.

    Raises:
        SetupError: there is neither.
    """
    from demo_model.sample_reference import formulas
    from evaluation.cells import save_picture

    pictures = formulas().PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    if given in pictures:
        file = folder / f"{given.replace(': ', '-').replace(' ', '-')}.png"
        save_picture(pictures[given](), file)
        return file, True
    if not Path(given).is_file():
        raise SetupError(f"{given} is neither a file nor one of: {', '.join(pictures)}")
    file = folder / f"{Path(given).stem}.png"
    demo.write_reference(Path(given), file)
    return file, False


def clear(folder: Path) -> None:
    """Take an earlier run's pictures and numbers away."""
    for file in (*folder.glob("*.png"), *folder.glob("*.json")):
        file.unlink()


def size_of_pictures(text: str) -> int:
    """The value of --size: a quarter of it, made first where it is coarse to fine, must be a multiple of 64."""
    size = int(text)
    if size < 256 or size % 256:
        raise argparse.ArgumentTypeError(f"{size} is not possible; give a multiple of 256")
    return size


def prepare(options: argparse.Namespace) -> tuple[list[Reference], Path | None]:
    """Put checkpoint, references and photo into the server's folders."""
    from evaluation.cells import Reference

    if not options.resume:
        clear(options.output)
    demo.prepare_base(BASE)
    if options.checkpoint:
        link = BASE / "models" / "checkpoints" / options.checkpoint.name
        link.unlink(missing_ok=True)
        try:
            os.link(options.checkpoint.resolve(), link)
        except OSError:  # on another disk
            shutil.copyfile(options.checkpoint, link)
    references = []
    for given in options.references:
        file, formula = picture_file(given, options.output / "references")
        references.append(Reference(given if formula else file.stem, file, formula))
        if [each.name for each in references].count(references[-1].name) > 1:
            raise SetupError(f"Two references are called {references[-1].name}; rename one.")
        shutil.copyfile(file, BASE / "input" / references[-1].given)
    content = picture_file(options.content, options.output / "references")[0] if options.content else None
    if content:
        shutil.copyfile(content, BASE / "input" / CONTENT)
    return references, content


def run(bench: Bench, references: list[Reference], options: argparse.Namespace) -> None:
    """Make what is missing, row by row."""
    for row in rows_of(options):
        for seed in options.seeds:
            for reference in references:
                cell = bench.cell(reference, row, seed, options.resume)
                print(f"  {reference.name}, {row}: patch distance {cell.values['patch_distance']:.3f}", flush=True)


def conclude(options: argparse.Namespace, references: list[Reference]) -> None:
    """Write and print what there is in the folder; raise SystemExit where the order is wrong."""
    from evaluation import report, sheet

    names = [reference.name for reference in references]
    cells = report.finished(options.output, names, settings_of(options).checkpoint)
    if not cells:
        return
    parts = [report.table(cells), NOTE.strip(), report.rank_table(cells), report.goals(cells), report.strengths(cells)]
    text = "\n\n".join(part for part in parts if part) + "\n"
    (options.output / "evaluation.txt").write_text(text, encoding="utf-8")
    summary = {"cells": [asdict(cell) for cell in cells], "rank_correlations": report.rank_correlations(cells)}
    summary["machine"] = report.machine()
    (options.output / "evaluation.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    sheet.contact_sheet(cells, references, options.output).save(options.output / "sheet.jpg", quality=88)
    if options.docs:
        sheet.write_docs(cells, references, options.output, text)
    print(f"\n{text}\n{options.output}")
    if found := list(report.complaints(cells)):
        sys.exit("\n" + "\n".join(found))


def main() -> None:
    """Provision, then run in the provisioned Python."""
    options = parse_arguments()
    env = provision()
    rerun_in(env, __file__, sys.argv[1:])

    from evaluation import packages
    from evaluation.cells import Bench
    from evaluation.networks import Networks
    from evaluation.rivals import FeedForward
    from host.comfy_server import ComfyServer, PromptError, ServerError, stop_signals_raise

    networks = forward = None
    if not options.without_networks:
        networks = Networks(packages.provide())
        forward = FeedForward(packages.provide(), networks)
    references, content = prepare(options)
    try:
        with stop_signals_raise(), ComfyServer(env.comfyui, BASE) as server:
            run(Bench(server, options.output, settings_of(options), networks, forward, content), references, options)
    except (ServerError, PromptError) as error:
        leave(error)
    finally:
        conclude(options, references)


if __name__ == "__main__":
    try:
        main()
    except (SetupError, OSError) as error:
        leave(error)
    except KeyboardInterrupt:
        print("\nStopped. What is finished is kept: --resume goes on from there.", file=sys.stderr)
        sys.exit(130)
