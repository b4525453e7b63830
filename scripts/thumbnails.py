"""Make the thumbnails of the templates: each template is run on a real server with the demo model.

    python scripts/thumbnails.py [NUMBER ...]

The demo model stands in for the template's checkpoint. It knows patches and neither objects nor prompts, so what it is
given differs from the template, the same way in all:

- Pictures are SIDE pixels wide, and the settings are those that suit it.
- What begins from noise is made at half the size first, and doubled: as 02 does.
- What a prompt would say, or a ControlNet's outlines keep, comes from a picture. Wherever there is one it is painted by
  AD Optimize Latent, as in 04 but without a content loss: the demo model can neither denoise a picture that is no
  texture, nor tell its shapes from its colours.
- Apply AD Guidance with a KSampler is AD-Guided KSampler: the same picture.

Each thumbnail is square: what comes out, and in a frame what went in.
"""

from __future__ import annotations

import argparse
import copy
import io
import json
from typing import TYPE_CHECKING, Any, NamedTuple

from demo import BASE, CHECKOUT, CHECKPOINT, find, prepare_base
from host.comfy_env import provision, rerun_in

if TYPE_CHECKING:
    from host.comfy_server import ComfyServer
    from PIL import Image

WORKFLOWS = CHECKOUT / "workflows"
SIDE, SHOWN, INSET, BORDER = 512, 400, 120, 4
"""Pixels of a picture that is made; of the thumbnail, of a picture in a frame, and of the frame."""
LOADERS = {
    "CheckpointLoaderSimple": (0, 1, 2),
    "UNETLoader": (0,),
    "DualCLIPLoader": (1,),
    "VAELoader": (2,),
}
"""Of nodes that load: which of the demo checkpoint's outputs stand in for theirs."""
FIRST = {"steps": 20, "learning_rate": 0.1, "iterations": 8, "adain": True, "denoise": 1.0}
LATER = {"steps": 12, "learning_rate": 0.05, "iterations": 6, "adain": False, "denoise": 0.4}
PAINTING = {"steps": 40, "learning_rate": 0.05, "iterations": 1, "start_from": "latent", "content_weight": 0.0}
"""Settings that suit the demo model: at half the size, after doubling, and on a picture."""
SAMPLING = {"cfg": 1.0, "scheduler": "karras", "sampler_name": "euler"}

Prompt = dict[str, Any]


class Thumbnail(NamedTuple):
    """What is shown of a template.

    Attributes:
        result: title of the node that shows what came out.
        insets: example pictures to show in frames, what went in.
        examples: of the template's example pictures, which to take another for: old and new.
        begins: an example picture that takes a prompt's place.
        beside: title of the node whose picture takes the right half.
        side: of the picture.
        part: how much of the picture's side is shown.
        optimised: AD Optimize Latent takes the sampler's place: with regions it leaves no grey places.
    """

    result: str
    insets: tuple[str, ...]
    examples: tuple[tuple[str, str], ...] = ()
    begins: str = ""
    beside: str = ""
    side: int = SIDE
    part: float = 1.0
    optimised: bool = False


BRUSH, COLOURS, SCENE = "style: brush strokes", "style: watercolour", "scene: still life"
SCALES, WOOD = "texture: scales", "texture: wood"
THUMBNAILS = {
    "01": Thumbnail("New picture", ("texture: pebbles",), ((SCALES, "texture: pebbles"),)),
    "02": Thumbnail("New picture", (SCALES,), side=1024, part=0.75),
    "03": Thumbnail("New picture", (BRUSH,), begins=COLOURS),
    "04": Thumbnail("Photo in the style", (BRUSH, SCENE)),
    "05": Thumbnail("New picture", ("texture: weave",), ((SCALES, "texture: weave"),)),
    "06": Thumbnail("Repeated 2 x 2", (SCALES,)),
    "07": Thumbnail("New picture", ("texture: two", "labels: disc"), optimised=True),
    "08": Thumbnail("New picture", (SCALES,)),
    "09": Thumbnail("New picture", (COLOURS,), ((BRUSH, COLOURS),), begins=BRUSH),
    "10": Thumbnail("New picture", (WOOD,), ((BRUSH, WOOD),), begins=SCENE),
    "11": Thumbnail("New picture", (COLOURS, SCENE), ((BRUSH, COLOURS),), begins=SCENE),
    "12": Thumbnail("Painted", (BRUSH,), begins=SCENE),
    "13": Thumbnail("Plain", (SCALES,), beside="Sharper", part=0.5),
    "14": Thumbnail("New picture", ("texture: two",), beside="Where it looks"),
    "15": Thumbnail("Photo in the style", (BRUSH, SCENE)),
    "16": Thumbnail("Photo in its colours", (COLOURS, SCENE)),
}
"""By the number that a template's name begins with."""


def on_the_demo_model(prompt: Prompt) -> None:
    """Put the demo checkpoint in the place of everything that is loaded."""
    loaders = {number: LOADERS[node["class_type"]] for number, node in prompt.items() if node["class_type"] in LOADERS}
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list) and value[0] in loaders:
                node["inputs"][name] = ["demo", loaders[value[0]][value[1]]]
    for number in loaders:
        del prompt[number]
    prompt["demo"] = {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": CHECKPOINT}}


def go_round(prompt: Prompt, class_type: str, **outputs: Any) -> None:
    """Take a node out; `outputs` names for each of its outputs, in order, the input that takes its place."""
    for number in [number for number, node in prompt.items() if node["class_type"] == class_type]:
        sources = [prompt[number]["inputs"][name] for name in outputs.values()]
        del prompt[number]
        for node in prompt.values():
            for name, value in node["inputs"].items():
                if isinstance(value, list) and value[0] == number:
                    node["inputs"][name] = sources[value[1]]


def as_one_node(prompt: Prompt) -> None:
    """AD-Guided KSampler in the place of KSampler and Apply AD Guidance: the same picture."""
    for number in [number for number, node in prompt.items() if node["class_type"] == "ADApplyGuidance"]:
        guidance = prompt.pop(number)["inputs"]
        sampler = prompt[find(prompt, "KSampler")]
        sampler["class_type"], sampler["inputs"] = "ADGuidedKSampler", sampler["inputs"] | guidance


def encoded(prompt: Prompt, image: list[Any], vae: list[Any], side: int) -> list[Any]:
    """LATENT of a picture at this size."""
    scaled, latent = f"scaled-{image}-{side}", f"encoded-{image}-{vae}-{side}"
    inputs = {"image": image, "upscale_method": "area", "width": side, "height": side, "crop": "center"}
    prompt[scaled] = {"class_type": "ImageScale", "inputs": inputs}
    prompt[latent] = {"class_type": "VAEEncode", "inputs": {"pixels": [scaled, 0], "vae": vae}}
    return [latent, 0]


def captured(prompt: Prompt, style: list[Any], side: int) -> list[Any]:
    """The same reference, seen at this size."""
    inputs = dict(prompt[style[0]]["inputs"])
    if "image" in inputs:
        inputs["latent"] = encoded(prompt, inputs.pop("image"), inputs.pop("vae"), side)
    number = f"{style[0]}-{side}"
    prompt[number] = {"class_type": "ADCaptureReferenceAttention", "inputs": inputs}
    return [number, 0]


def doubled(prompt: Prompt, number: str, side: int) -> list[Any]:
    """LATENT out of a smaller run of a sampler or an optimisation."""
    first = copy.deepcopy(prompt[number])
    inputs = first["inputs"]
    inputs.pop("windows", None)
    inputs["style"] = captured(prompt, inputs["style"], side // 2)
    empty = {"width": side // 2, "height": side // 2, "batch_size": 1}
    prompt[f"{number}-noise"] = {"class_type": "EmptyLatentImage", "inputs": empty}
    inputs["latent_image"] = [f"{number}-noise", 0]
    if first["class_type"] == "ADGuidedKSampler":
        inputs |= FIRST | {"lr_schedule": "linear"} | SAMPLING
    else:
        inputs |= {"steps": 150, "lr_schedule": "linear"}
    prompt[f"{number}-first"] = first
    larger = {"samples": [f"{number}-first", 0], "upscale_method": "bicubic", "scale_by": 2.0}
    prompt[f"{number}-doubled"] = {"class_type": "LatentUpscaleBy", "inputs": larger}
    return [f"{number}-doubled", 0]


def as_optimisation(prompt: Prompt, number: str) -> Prompt:
    """AD Optimize Latent in the place of a node that guides, without its content; its inputs."""
    given = prompt[number]["inputs"]
    inputs = {name: given[name] for name in ("model", "style", "seed", "latent_image", "regions") if name in given}
    inputs["conditioning"] = given.get("conditioning", given.get("positive"))
    inputs |= {"attention_scale": 1.0, "content_loss": "query", "lr_schedule": "linear"} | PAINTING
    prompt[number] = {"class_type": "ADOptimizeLatent", "inputs": inputs}
    return inputs


def painted(prompt: Prompt, number: str, shown: Thumbnail) -> None:
    """AD Optimize Latent on a picture, in the place of a node that guides."""
    inputs = as_optimisation(prompt, number)
    if prompt[inputs["latent_image"][0]]["class_type"] == "EmptyLatentImage":
        inputs["latent_image"] = encoded(prompt, ["content", 0], ["demo", 2], shown.side)
    inputs["style"] = captured(prompt, inputs["style"], shown.side)


def suited(prompt: Prompt, shown: Thumbnail) -> Prompt:
    """The template's prompt for the demo model."""
    on_the_demo_model(prompt)
    go_round(prompt, "ModelSamplingFlux", MODEL="model")
    go_round(prompt, "ControlNetApplyAdvanced", positive="positive", negative="negative")
    as_one_node(prompt)
    for node in prompt.values():
        if node["class_type"] == "ADExampleReference":
            picture = node["inputs"]["picture"]
            node["inputs"]["picture"] = dict(shown.examples).get(picture, picture)
        if node["class_type"] == "ADWindows":
            node["inputs"] |= {"size": shown.side // 2, "stride": shown.side // 4}
        if node["class_type"] == "ImageScaleToTotalPixels":
            node["inputs"]["megapixels"] = (shown.side / 1024) ** 2
    if "PrimitiveInt" in {node["class_type"] for node in prompt.values()}:  # coarse to fine as it is
        prompt[find(prompt, "PrimitiveInt")]["inputs"]["value"] = shown.side
        return prompt
    prompt["content"] = {"class_type": "ADExampleReference", "inputs": {"picture": shown.begins or SCENE}}
    for number, node in list(prompt.items()):
        if node["class_type"] in ("ADGuidedKSampler", "ADOptimizeLatent"):
            suit(prompt, number, shown)
        if node["class_type"] == "ADAttentionMap":
            node["inputs"]["style"] = captured(prompt, node["inputs"]["style"], shown.side)
    return prompt


def suit(prompt: Prompt, number: str, shown: Thumbnail) -> None:
    """Size and settings of one node that guides."""
    inputs = prompt[number]["inputs"]
    if shown.begins or "content" in inputs:
        painted(prompt, number, shown)
        return
    windows = [node["inputs"]["size"] for node in prompt.values() if node["class_type"] == "ADWindows"]
    style = inputs["style"]
    if shown.optimised:
        inputs = as_optimisation(prompt, number)
        inputs["start_from"] = "noise"
    inputs["latent_image"] = doubled(prompt, number, shown.side)
    inputs["style"] = captured(prompt, style, (windows or [shown.side])[0])
    if prompt[number]["class_type"] == "ADOptimizeLatent":
        inputs |= {"start_from": "latent", "lr_schedule": "linear", "steps": 100}
    else:
        inputs |= LATER | {"lr_schedule": "linear"} | SAMPLING


def run(server: ComfyServer, number: str) -> Image.Image:
    """A template's thumbnail."""
    from host.workflow_api import to_api
    from PIL import Image

    (file,) = WORKFLOWS.glob(f"{number} *.json")
    workflow, shown = json.loads(file.read_text(encoding="utf-8")), THUMBNAILS[number]
    titles = {node.get("title", ""): str(node["id"]) for node in workflow["nodes"]}
    prompt = suited(to_api(workflow, server.object_info()), shown)
    wanted = {title: titles[title] for title in (shown.result, shown.beside) if title}
    unwanted = [key for key, node in prompt.items() if node["class_type"] in ("SaveImage", "PreviewImage")]
    for key in set(unwanted) - set(wanted.values()):
        del prompt[key]
    insets = [(f"inset-{index}", picture) for index, picture in enumerate(shown.insets)]
    for key, picture in insets:
        prompt[f"{key}-picture"] = {"class_type": "ADExampleReference", "inputs": {"picture": picture}}
        prompt[key] = {"class_type": "PreviewImage", "inputs": {"images": [f"{key}-picture", 0]}}
    record = server.run(prompt)

    def picture(key: str) -> Image.Image:
        of_node = {"outputs": {key: record["outputs"][key]}}
        (content,) = server.images(of_node) or server.images(of_node, "temp")
        return Image.open(io.BytesIO(content)).convert("RGB")

    pictures = [picture(key) for key in wanted.values()]
    return composed(pictures, [picture(key) for key, _ in insets], shown.part)


def composed(pictures: list[Image.Image], insets: list[Image.Image], part: float) -> Image.Image:
    """One picture, or the left half of one and the right half of another; below on the left what went in, framed."""
    from PIL import Image, ImageOps

    def fitted(picture: Image.Image) -> Image.Image:
        side = round(min(picture.size) * part)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side))
        return square.resize((SHOWN, SHOWN), Image.Resampling.LANCZOS)

    sheet = fitted(pictures[0])
    if len(pictures) > 1:
        right = (SHOWN // 2 + BORDER // 2, 0, SHOWN, SHOWN)
        sheet.paste("white", (SHOWN // 2 - BORDER // 2, 0, *right[2:]))
        sheet.paste(fitted(pictures[1]).crop(right), right[:2])
    side = INSET if len(insets) == 1 else INSET * 5 // 6
    for number, inset in enumerate(insets):
        framed = ImageOps.expand(ImageOps.fit(inset, (side, side), Image.Resampling.LANCZOS), BORDER, "white")
        sheet.paste(framed, (8 + number * (side + 2 * BORDER + 4), SHOWN - side - 2 * BORDER - 8))
    return sheet


def main() -> None:
    """Provision, then run in the provisioned Python."""
    parser = argparse.ArgumentParser(description="Make the thumbnails of the templates.")
    parser.add_argument("number", nargs="*", choices=[*THUMBNAILS, []], help="only these (default: all)")
    chosen = parser.parse_args().number or list(THUMBNAILS)
    env = provision()
    rerun_in(env, __file__, chosen)

    from host.comfy_server import ComfyServer, device_arguments, stop_signals_raise

    prepare_base(BASE)
    with stop_signals_raise(), ComfyServer(env.comfyui, BASE, arguments=device_arguments()) as server:
        for number in chosen:
            (template,) = WORKFLOWS.glob(f"{number} *.json")
            file = template.with_suffix(".jpg")
            run(server, number).save(file, quality=82, optimize=True)
            print(json.dumps({"thumbnail": file.name, "bytes": file.stat().st_size}), flush=True)


if __name__ == "__main__":
    main()
