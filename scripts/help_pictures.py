"""Make the pictures of the nodes' help pages, with the demo model on a real server.

    python scripts/help_pictures.py [NODE ...]

Each picture shows what its node does. They are written to web/docs/images/, without any text in them: what is to be
seen stands in the pages, in every language.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from demo import BASE, CHECKOUT, CHECKPOINT, prepare_base
from host.comfy_env import provision, rerun_in

if TYPE_CHECKING:
    from pathlib import Path

    from host.comfy_server import ComfyServer
    from PIL import Image

IMAGES = CHECKOUT / "web" / "docs" / "images"
SIDE, TILE, GAP, BACKGROUND = 256, 230, 6, (60, 60, 60)
"""Pixels of a picture that is made, of one that is shown, and between those."""
COLUMNS = 2
"""Tiles in a row: the panel that shows them is 250 pixels wide."""
LARGEST = 60_000
"""Of a file, in bytes."""
GUIDED = {
    "sampler_name": "euler",
    "scheduler": "karras",
    "steps": 20,
    "cfg": 1,
    "denoise": 1,
    "learning_rate": 0.1,
    "iterations": 8,
    "adain": False,
    "content_weight": 0.25,
    "attention_scale": 1,
    "content_loss": "query",
    "start_percent": 0,
    "end_percent": 1,
    "lr_schedule": "linear",
}
"""What suits the demo model."""

EXAMPLES = (
    *(f"texture: {name}" for name in ("scales", "pebbles", "wood", "weave", "two")),
    *("style: brush strokes", "style: watercolour", "scene: still life", "labels: halves", "labels: disc"),
)

Output = list[Any]
"""A node's number and which of its outputs."""


class Graph:
    """An API prompt that grows: every call adds a node and gives its first output."""

    def __init__(self) -> None:
        self.nodes: dict[str, Any] = {}
        self.model, self.clip, self.vae = (
            [self.add("CheckpointLoaderSimple", ckpt_name=CHECKPOINT)[0], slot] for slot in range(3)
        )  # fmt: skip
        self.empty = self.add("CLIPTextEncode", clip=self.clip, text="")

    def add(self, class_type: str, **inputs: Any) -> Output:
        """One more node, unless there is the same already."""
        node = {"class_type": class_type, "inputs": inputs}
        for number, known in self.nodes.items():
            if known == node:
                return [number, 0]
        number = str(len(self.nodes) + 1)
        self.nodes[number] = node
        return [number, 0]

    def example(self, picture: str, width: int = SIDE, height: int = SIDE) -> Output:
        """One of the example pictures, IMAGE."""
        image = self.add("ADExampleReference", picture=picture)
        return self.add(
            "ImageScale", image=image, upscale_method="area", width=width, height=height, crop="center"
        )  # fmt: skip

    def encoded(self, image: Output) -> Output:
        """LATENT of a picture."""
        return self.add("VAEEncode", pixels=image, vae=self.vae)

    def reference(self, image: Output) -> Output:
        """AD_REFERENCE of a picture."""
        inputs = {"latent": self.encoded(image), "layers": "auto", "weight": 1, "conditioning": self.empty}
        return self.add("ADCaptureReferenceAttention", model=self.model, **inputs)

    def guided(self, image: Output, width: int = SIDE, **settings: Any) -> Output:
        """LATENT of a new texture of a picture."""
        latent = self.add("EmptyLatentImage", width=width, height=SIDE, batch_size=1)
        inputs = {"model": self.model, "positive": self.empty, "negative": self.empty, "latent_image": latent}
        inputs |= {"seed": 0, "style": self.reference(image), **GUIDED}
        return self.add("ADGuidedKSampler", **(inputs | settings))

    def optimised(self, image: Output, latent: Output, **settings: Any) -> Output:
        """LATENT of a picture in the look of another, or of a new texture."""
        inputs = {name: GUIDED[name] for name in ("attention_scale", "content_loss", "lr_schedule")}
        inputs |= {"model": self.model, "seed": 0, "learning_rate": 0.05, "iterations": 1, "conditioning": self.empty}
        inputs |= {"style": self.reference(image), "latent_image": latent}
        return self.add("ADOptimizeLatent", **(inputs | settings))

    def texture(self, image: Output, **settings: Any) -> Output:
        """LATENT of a new texture of a picture, optimised from noise."""
        noise = self.add("EmptyLatentImage", width=SIDE, height=SIDE, batch_size=1)
        return self.optimised(image, noise, start_from="noise", steps=300, content_weight=0, **settings)

    def decoded(self, latent: Output, vae: Output | None = None) -> Output:
        """IMAGE of a latent."""
        return self.add("VAEDecode", samples=latent, vae=vae or self.vae)


def capture(graph: Graph) -> list[Output]:
    references = [graph.example(f"texture: {name}") for name in ("scales", "pebbles", "weave")]
    return [picture for image in references for picture in (image, graph.decoded(graph.guided(image)))]


def sampler(graph: Graph) -> list[Output]:
    image = graph.example("texture: scales")
    return [image, *(graph.decoded(graph.guided(image, iterations=count)) for count in (0, 8))]


def optimise(graph: Graph) -> list[Output]:
    texture, style, scene = map(graph.example, ("texture: scales", "style: brush strokes", "scene: still life"))
    content = {"content": graph.reference(scene), "content_weight": 0.25}
    painted = graph.optimised(style, graph.encoded(scene), start_from="latent", steps=200, **content)
    return [texture, graph.decoded(graph.texture(texture)), style, graph.decoded(painted)]


def adain(graph: Graph) -> list[Output]:
    picture, reference = graph.example("scene: still life"), graph.example("style: brush strokes")
    latents = {"latent": graph.encoded(picture), "reference": graph.encoded(reference)}
    made = [graph.decoded(graph.add("ADAdaINLatent", strength=strength, **latents)) for strength in (0.5, 1)]
    return [picture, reference, *made]


def regions(graph: Graph) -> list[Output]:
    image, halves, disc = map(graph.example, ("texture: two", "labels: halves", "labels: disc"))
    labels = graph.add("ADRegions", reference_labels=halves, target_labels=disc)
    return [image, halves, disc, graph.decoded(graph.texture(image, regions=labels))]


def windows(graph: Graph) -> list[Output]:
    in_windows = graph.add("ADWindows", size=SIDE, stride=SIDE // 4)
    return [graph.decoded(graph.guided(graph.example("texture: scales"), width=3 * SIDE, windows=in_windows))]


def injection(graph: Graph) -> list[Output]:
    image = graph.example("texture: scales")
    settings = {"strength": 1, "start_percent": 0, "end_percent": 1}
    injected = graph.add("ADInjectReferenceKV", model=graph.model, style=graph.reference(image), **settings)
    made = [graph.guided(image, iterations=0), graph.guided(image, iterations=0, model=injected), graph.guided(image)]
    return [image, *map(graph.decoded, made)]


def tiling(graph: Graph) -> list[Output]:
    image = graph.example("texture: scales")
    number, _ = graph.add("ADSeamlessTiling", model=graph.model, vae=graph.vae, axes="both")
    seamless = graph.guided(image, model=[number, 0])
    return [graph.decoded(graph.guided(image)), graph.decoded(seamless, vae=[number, 1])]


def decoder(graph: Graph) -> list[Output]:
    image = graph.add("ADExampleReference", picture="texture: scales")
    latent = graph.encoded(image)
    trained = graph.add("ADFinetuneVAEDecoder", vae=graph.vae, image=image, steps=75, learning_rate=0.0001)
    shown = [image, graph.decoded(latent), graph.decoded(latent, vae=trained)]
    return [graph.add("ImageCrop", image=each, width=SIDE // 2, height=SIDE // 2, x=200, y=200) for each in shown]


def examples(graph: Graph) -> list[Output]:
    return [graph.example(picture) for picture in EXAMPLES]


def attention_map(graph: Graph) -> list[Output]:
    image = graph.example("texture: two")
    style, latent = graph.reference(image), graph.guided(image)
    inputs = {"model": graph.model, "style": style, "latent": latent, "conditioning": graph.empty, "layer": "mean"}
    number, _ = graph.add("ADAttentionMap", **inputs)
    return [image, [number, 1], graph.decoded(latent), [number, 0]]


def beside(pictures: list[Image.Image], columns: int = COLUMNS, tile: int = TILE) -> Image.Image:
    """Pictures in rows, each as wide as `tile`, its own height kept in proportion; a short last row in the middle."""
    from PIL import Image

    shown = [
        picture.resize((tile, tile * picture.height // picture.width), Image.Resampling.LANCZOS) for picture in pictures
    ]
    height, rows = shown[0].height, -(-len(shown) // columns)
    sheet = Image.new("RGB", (columns * (tile + GAP) - GAP, rows * (height + GAP) - GAP), BACKGROUND)
    for number, picture in enumerate(shown):
        row, column = divmod(number, columns)
        missing = columns - min(columns, len(shown) - row * columns)
        sheet.paste(picture, (column * (tile + GAP) + missing * (tile + GAP) // 2, row * (height + GAP)))
    return sheet


def four_times(pictures: list[Image.Image]) -> Image.Image:
    """Each picture as a tile, two by two."""
    from PIL import Image

    def tiled(picture: Image.Image) -> Image.Image:
        sheet = Image.new("RGB", (2 * picture.width, 2 * picture.height))
        for corner in range(4):
            sheet.paste(picture, (corner % 2 * picture.width, corner // 2 * picture.height))
        return sheet

    return beside([tiled(picture) for picture in pictures])


def with_windows(pictures: list[Image.Image]) -> Image.Image:
    """The wide picture, and three neighbouring windows drawn in."""
    from PIL import ImageDraw

    (picture,) = pictures
    draw = ImageDraw.Draw(picture)
    for number, colour in enumerate(("white", "yellow", "orange")):
        left = SIDE + number * SIDE // 4
        draw.rectangle((left, 2 * number, left + SIDE - 1, SIDE - 1 - 2 * number), outline=colour, width=2)
    return beside([picture], columns=1, tile=2 * TILE)


def small(pictures: list[Image.Image]) -> Image.Image:
    """Many pictures."""
    return beside(pictures, tile=150)


Drawing = Callable[[list["Image.Image"]], "Image.Image"]
PICTURES: dict[str, tuple[Callable[[Graph], list[Output]], Drawing]] = {
    "ADCaptureReferenceAttention": (capture, beside),
    "ADGuidedKSampler": (sampler, beside),
    "ADOptimizeLatent": (optimise, beside),
    "ADAdaINLatent": (adain, beside),
    "ADRegions": (regions, beside),
    "ADWindows": (windows, with_windows),
    "ADInjectReferenceKV": (injection, beside),
    "ADSeamlessTiling": (tiling, four_times),
    "ADFinetuneVAEDecoder": (decoder, beside),
    "ADAttentionMap": (attention_map, beside),
    "ADExampleReference": (examples, small),
}
"""What is run for each node, and how its pictures are put together."""


def run(server: ComfyServer, outputs: Callable[[Graph], list[Output]]) -> list[Image.Image]:
    """The pictures of a graph, in order."""
    from PIL import Image

    graph = Graph()
    saved = [
        graph.add("SaveImage", images=output, filename_prefix=f"help-{i}")[0] for i, output in enumerate(outputs(graph))
    ]
    record = server.run(graph.nodes)
    files = [server.images({"outputs": {number: record["outputs"][number]}})[0] for number in saved]
    return [Image.open(io.BytesIO(file)).convert("RGB") for file in files]


def save(picture: Image.Image, file: Path) -> int:
    """Write a picture in the best quality that is small enough; its size in bytes."""
    for quality in range(85, 40, -5):
        picture.save(file, quality=quality, optimize=True)
        if (size := file.stat().st_size) <= LARGEST:
            break
    return size


def main() -> None:
    """Provision, then run in the provisioned Python."""
    parser = argparse.ArgumentParser(description="Make the pictures of the help pages.")
    parser.add_argument("node", nargs="*", help="only these (default: all)")
    chosen = parser.parse_args().node
    env = provision()
    rerun_in(env, __file__, chosen)

    from host.comfy_server import ComfyServer, device_arguments, stop_signals_raise

    IMAGES.mkdir(parents=True, exist_ok=True)
    prepare_base(BASE)
    with stop_signals_raise(), ComfyServer(env.comfyui, BASE, arguments=device_arguments()) as server:
        for name in chosen or PICTURES:
            outputs, drawing = PICTURES[name]
            picture = drawing(run(server, outputs))
            print(json.dumps({"picture": name, "bytes": save(picture, IMAGES / f"{name}.jpg")}), flush=True)


if __name__ == "__main__":
    main()
