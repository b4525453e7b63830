"""One command that shows attention distillation: a picture with the texture of a reference picture.

    python scripts/demo.py [--reference FILE] [--seed N] [--size PIXELS] [--port N] [--keep]

The first run sets up a real ComfyUI (see comfy_env.py), writes a small checkpoint and a reference picture by
formula, and starts the server. The workflow is the template "02 Texture, Coarse to Fine". Results:
output/demo.png and output/demo-compare.png.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from host.comfy_env import CHECKOUT, HOME, SetupError, leave, provision, rerun_in

if TYPE_CHECKING:
    import numpy as np
    from host.comfy_server import ComfyServer
    from PIL import Image

WORKFLOW = CHECKOUT / "workflows" / "01 Texture from a Picture.json"
COARSE_TO_FINE = CHECKOUT / "workflows" / "02 Texture, Coarse to Fine.json"
SIZE, SHOWN = 1024, 512
"""Pixels of a side: of the picture, and on the sheet that compares."""
PREVIEWS = ["--preview-method", "latent2rgb"]
"""ComfyUI shows none by default; the demo model's are in true colours."""
OUTPUT = CHECKOUT / "output"
BASE = HOME / "server"
CHECKPOINT = "attention_distillation_demo.safetensors"
SAMPLE, CHOSEN = "ad_demo_reference.png", "ad_demo_chosen.png"
"""Names in the server's input folder: the picture made by formula, and the one given by --reference."""
LARGEST_REFERENCE = 2048
NUMBER = r"([\d.]+)"
SUMMARY = re.compile(f"Attention distillation: .* {NUMBER} s each; .*, {NUMBER} -> {NUMBER} within the last update")
LABELS = ("reference", "without guidance", "with guidance")


def size_in_pixels(text: str) -> int:
    """The value of --size."""
    size = int(text)
    if size < 128 or size % 64:
        raise argparse.ArgumentTypeError(f"{size} is not possible; give a multiple of 64, at least 128")
    return size


def size_to_double(text: str) -> int:
    """The value of --size: a quarter of it, made first, must be a multiple of 64 for its edges to fit together."""
    size = size_in_pixels(text)
    if size < 512 or size % 256:
        raise argparse.ArgumentTypeError(f"{size} is not possible; give a multiple of 256, at least 512")
    return size


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Make a picture with the texture of a reference picture.")
    parser.add_argument("--reference", type=Path, help="any picture file; without it one is made by formula")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another picture (default: 0)")
    parser.add_argument("--size", type=size_to_double, default=SIZE, help=f"in pixels, side (default: {SIZE})")
    parser.add_argument("--port", type=int, help="the server's port (default: any free one)")
    parser.add_argument("--keep", action="store_true", help="leave the server running until Ctrl-C")
    options = parser.parse_args()
    if not 0 <= options.seed < 2**64:
        parser.error(f"--seed is {options.seed}; it must be 0 to 2^64 - 1")
    if options.port is not None and not 1 <= options.port <= 65535:
        parser.error(f"--port is {options.port}; it must be 1 to 65535")
    if options.reference and not options.reference.is_file():
        parser.error(f"--reference: there is no file {options.reference}")
    return options


def prepare_base(base: Path, reference: Path | None = None) -> str:
    """Put checkpoint and reference into the server's folders; return the reference's name there.

    Both that are made by formula are made anew if the formula's file is newer.
    """
    from demo_model import demo_checkpoint, sample_reference

    checkpoint, sample = base / "models" / "checkpoints" / CHECKPOINT, base / "input" / SAMPLE
    if outdated(checkpoint, demo_checkpoint.__file__):
        print("Writing the demo checkpoint ...", flush=True)
        demo_checkpoint.write_demo_checkpoint(checkpoint)
    if any(outdated(sample, str(formula)) for formula in sample_reference.FORMULAS.glob("*.py")):
        sample_reference.write_sample_reference(sample)
    if reference is None:
        return SAMPLE
    write_reference(reference, base / "input" / CHOSEN)
    return CHOSEN


def outdated(file: Path, formula: str) -> bool:
    """Whether a made file is missing or older than the code that makes it."""
    return not file.is_file() or file.stat().st_mtime < Path(formula).stat().st_mtime


def write_reference(source: Path, target: Path) -> None:
    """Any picture as an upright RGB file of moderate size; what is transparent becomes white."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(source) as opened:
            picture = ImageOps.exif_transpose(opened).convert("RGBA")
    except (UnidentifiedImageError, OSError) as error:
        raise SetupError(f"{source} cannot be read as a picture: {error}") from error
    picture.thumbnail((LARGEST_REFERENCE, LARGEST_REFERENCE), Image.Resampling.LANCZOS)
    white = Image.new("RGBA", picture.size, "white")
    Image.alpha_composite(white, picture).convert("RGB").save(target)


def find(prompt: dict[str, Any], class_type: str) -> str:
    """The id of the only node of a type."""
    (found,) = (number for number, node in prompt.items() if node["class_type"] == class_type)
    return found


def texture_prompt(server: ComfyServer, reference: str, seed: int, workflow: Path) -> dict[str, Any]:
    """A shipped texture workflow as an API prompt, with the demo's checkpoint, the reference and the seed put in.

    Only what it saves is made: previews are left out.
    """
    from host.workflow_api import to_api

    prompt = to_api(json.loads(workflow.read_text(encoding="utf-8")), server.object_info())
    prompt = {number: node for number, node in prompt.items() if node["class_type"] != "PreviewImage"}
    prompt[find(prompt, "CheckpointLoaderSimple")]["inputs"]["ckpt_name"] = CHECKPOINT
    prompt[find(prompt, "ADExampleReference")] = {"class_type": "LoadImage", "inputs": {"image": reference}}
    for node in prompt.values():
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] = seed
    return prompt


def guided_prompt(
    server: ComfyServer, reference: str, seed: int, size: int, workflow: Path = WORKFLOW
) -> dict[str, Any]:
    """A texture workflow with reference, seed and size put in; the reference is read at the size of the picture."""
    prompt = texture_prompt(server, reference, seed, workflow)
    prompt[find(prompt, "EmptyLatentImage")]["inputs"].update(width=size, height=size)
    inputs = prompt[find(prompt, "ADCaptureReferenceAttention")]["inputs"]
    scaled = {"image": inputs.pop("image"), "upscale_method": "lanczos", "megapixels": (size / 1024) ** 2}
    prompt["scaled"] = {"class_type": "ImageScaleToTotalPixels", "inputs": {**scaled, "resolution_steps": 8}}
    prompt["encoded"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["scaled", 0], "vae": inputs.pop("vae")}}
    inputs["latent"] = ["encoded", 0]
    return prompt


def coarse_to_fine_prompt(server: ComfyServer, reference: str, seed: int, size: int) -> dict[str, Any]:
    """The workflow that doubles the picture twice as an API prompt, with reference, seed and size put in."""
    prompt = texture_prompt(server, reference, seed, COARSE_TO_FINE)
    prompt[find(prompt, "PrimitiveInt")]["inputs"]["value"] = size
    return prompt


def unguided_prompt(prompt: dict[str, Any]) -> dict[str, Any]:
    """The same without guidance."""
    prompt = copy.deepcopy(prompt)
    for node in prompt.values():
        if node["class_type"] == "ADGuidedKSampler":
            node["inputs"]["iterations"] = 0
    return prompt


def reference_prompt(prompt: dict[str, Any]) -> dict[str, Any]:
    """Only the reference, encoded and decoded by the same VAE: what a perfect texture would look like."""
    prompt = copy.deepcopy(prompt)
    *_, largest = (number for number, node in prompt.items() if node["class_type"] == "VAEEncode")
    prompt[find(prompt, "VAEDecode")]["inputs"]["samples"] = [largest, 0]
    return prompt


def make_picture(server: ComfyServer, prompt: dict[str, Any], title: str) -> Image.Image:
    """Run a prompt that saves one picture, showing its progress."""
    from PIL import Image

    start = time.monotonic()
    terminal = sys.stdout.isatty()
    print(f"{title} ...", flush=True)

    def show(_node: str, step: int, steps: int) -> None:
        passed = time.monotonic() - start
        if terminal:
            bar = "#" * (30 * step // steps)
            print(f"\r  [{bar:30}] step {step} of {steps}, {passed:.0f} s", end="", flush=True)
        elif step % 10 == 0 or step == steps:
            print(f"  step {step} of {steps}, {passed:.0f} s", flush=True)

    record = server.run(prompt, show)
    if terminal:
        print("\r\033[K", end="", flush=True)
    (picture,) = server.images(record)
    return Image.open(io.BytesIO(picture)).convert("RGB")


def compare(pictures: list[Image.Image], size: int) -> Image.Image:
    """The pictures side by side, each with its label."""
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    gap, band = 8, 36
    font = ImageFont.load_default(size=20)
    sheet = Image.new("RGB", (len(pictures) * (size + gap) + gap, size + band + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, label) in enumerate(zip(pictures, LABELS, strict=True)):
        left = gap + number * (size + gap)
        fitted = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
        sheet.paste(fitted, (left, band))
        draw.text((left + size // 2, band // 2), label, fill="black", font=font, anchor="mm")
    return sheet


def as_array(picture: Image.Image) -> np.ndarray:
    """[H, W, 3] in 0..1."""
    import numpy as np

    return np.asarray(picture, dtype=np.float32) / 255


def run_summary(log: str) -> tuple[float, float, float]:
    """Of the last guided run, out of the server's log: loss before and after its last update, seconds for an update."""
    seconds, first, last = SUMMARY.findall(log)[-1]
    return float(first), float(last), float(seconds)


def run_demo(server: ComfyServer, reference: str, seed: int, size: int) -> None:
    """Make the pictures, write them and print the numbers."""
    prompt = coarse_to_fine_prompt(server, reference, seed, size)
    decoded = make_picture(server, reference_prompt(prompt), "Reference through the VAE")
    plain = make_picture(server, unguided_prompt(prompt), "Sampling without guidance")
    start = time.monotonic()
    guided = make_picture(server, prompt, "Sampling with guidance, small first")
    seconds = time.monotonic() - start

    OUTPUT.mkdir(exist_ok=True)
    guided.save(OUTPUT / "demo.png")
    compare([decoded, plain, guided], SHOWN).save(OUTPUT / "demo-compare.png")
    first, last, each = run_summary(server.log())
    print(f"\nloss     {first:.4f} -> {last:.4f} within the last update: it falls where all is well")
    print(f"seconds  {seconds:.0f} for the guided picture, {each:.2f} an update of its last sampler\n")
    print(table({"with guidance": guided, "without guidance": plain}, decoded))
    print(f"\n{OUTPUT / 'demo.png'}\n{OUTPUT / 'demo-compare.png'}", flush=True)


def table(pictures: dict[str, Image.Image], reference: Image.Image) -> str:
    """How close each picture is to the reference, and a flat picture, which any texture should beat."""
    from demo_model import patch_distance

    target = as_array(reference)
    arrays = {name: as_array(picture) for name, picture in pictures.items()}
    arrays["a flat picture"] = patch_distance.flat_picture(target)
    lines = [f"{'':18}{'unlike':>9}{'lacking':>9}{'copied':>9}{'sharp':>9}"]
    for name, array in arrays.items():
        lines.append(f"{name:18}" + "".join(f"{value:9.2f}" for value in patch_distance.compare(array, target)))
    lines.append(
        "unlike: patches that the reference does not have; lacking: patches of it that are missing; 0 is best."
    )
    lines.append("copied: below 0.5 the picture is new, 1 is a copy. sharp: 1 is as sharp as the reference.")
    return "\n".join(lines)


def main() -> None:
    """Provision, then run in the provisioned Python."""
    options = parse_arguments()
    start = time.monotonic()
    env = provision()
    rerun_in(env, __file__, sys.argv[1:])

    from host.comfy_server import ComfyServer, PromptError, ServerError, device_arguments, stop_signals_raise

    try:
        with stop_signals_raise():
            reference = prepare_base(BASE, options.reference)
            print("Starting ComfyUI ...", flush=True)
            arguments = [*device_arguments(), *PREVIEWS]
            with ComfyServer(env.comfyui, BASE, port=options.port, arguments=arguments) as server:
                run_demo(server, reference, options.seed, options.size)
                print(f"{time.monotonic() - start:.0f} s in all")
                if options.keep:
                    print(f"ComfyUI is running at {server.url} - Ctrl-C stops it.", flush=True)
                    while True:
                        server.check_alive()
                        time.sleep(1)
    except (ServerError, PromptError) as error:
        leave(error)


if __name__ == "__main__":
    try:
        main()
    except (SetupError, OSError) as error:
        leave(error)
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        sys.exit(130)
