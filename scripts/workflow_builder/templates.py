"""The templates, in the order in which to try them: a few nodes each, and a note that says what matters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from . import boxes
from .graph import GAP, Box, Graph, Node

MakeBox = Callable[[dict[str, Any]], Box]

HUGGING_FACE = "https://huggingface.co"
SD15 = f"{HUGGING_FACE}/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/v1-5-pruned-emaonly-fp16.safetensors"
SDXL = f"{HUGGING_FACE}/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/sd_xl_base_1.0.safetensors"
FLUX = f"{HUGGING_FACE}/Comfy-Org/flux1-dev/resolve/main/flux1-dev.safetensors"
FLUX_CLIP = f"{HUGGING_FACE}/comfyanonymous/flux_text_encoders/resolve/main/clip_l.safetensors"
FLUX_T5 = f"{HUGGING_FACE}/comfyanonymous/flux_text_encoders/resolve/main/t5xxl_fp16.safetensors"
FLUX_VAE = f"{HUGGING_FACE}/Comfy-Org/Lumina_Image_2.0_Repackaged/resolve/main/split_files/vae/ae.safetensors"
CANNY = (
    f"{HUGGING_FACE}/comfyanonymous/ControlNet-v1-1_fp16_safetensors/resolve/main/"
    "control_v11p_sd15_canny_fp16.safetensors"
)

WIDE_GAP = 140
NARROW, BOX, SHOWN = 320, 300, 235
"""Widths in the canvas's units: of loaders and the note, of the box, of pictures."""
OWN_PICTURE = "A picture of your own: add **Load Image**, and link it to **your picture**."


class Template(NamedTuple):
    """One file: its title, its graph, and what app mode shows of it."""

    title: str
    graph: Graph
    extra: dict[str, Any]


def loader(graph: Graph, kind: str, directory: str = "checkpoints", /, **urls: str) -> Node:
    """A loader of model files, each with the address that the missing-model dialog offers."""
    files = {name: url.rsplit("/", 1)[1] for name, url in urls.items()}
    node = graph.add(kind, at_least=(NARROW, 0), **files)
    node.models = [{"name": files[name], "url": url, "directory": directory} for name, url in urls.items()]
    return node


def note(graph: Graph, text: str, height: int = 290) -> Node:
    """What to do, and what matters."""
    written = Node("MarkdownNote", {"text": text.strip() + "\n"}, [], "What to do", (NARROW, height))
    graph.nodes.append(written)
    return written


def pictures(graph: Graph, box: Node, shown: dict[str, str], prefix: str) -> list[Node]:
    """A column of what comes out of a box: the first picture is saved, the others are only shown."""
    (first, title), *others = shown.items()
    large, small = (316, 260) if len(shown) == 2 else (252, 180)
    save = graph.add("SaveImage", title=title, images=box[first], filename_prefix=prefix, at_least=(SHOWN, large))
    previews = [
        graph.add("PreviewImage", title=title, images=box[name], at_least=(SHOWN, small)) for name, title in others
    ]
    return [save, *previews]


def arrange(graph: Graph, left: list[Node], box: Node, right: list[Node]) -> None:
    """In three columns; wires of several loaders or to three pictures would cross where they have little room."""
    gaps = [WIDE_GAP if len(left) > 3 else GAP, WIDE_GAP if len(right) > 2 else GAP]
    graph.arrange(left, [box], right, gaps=gaps)


def app(box: Node, outputs: list[Node], numbers: dict[int, int]) -> dict[str, Any]:
    """What app mode shows: the box's settings, and its pictures."""
    settings = [socket.name for socket in box.box.sockets if socket.is_setting]
    return {
        "linearData": {
            "inputs": [[str(numbers[id(box)]), name] for name in settings],
            "outputs": [str(numbers[id(node)]) for node in outputs],
        }
    }


def one_box(title: str, make: MakeBox, text: str, shown: dict[str, str], prefix: str, *, url: str = SD15,
            more: Callable[[Graph], tuple[dict[str, Any], list[Node]]] = lambda graph: ({}, []), note_height: int = 290,
            **settings: Any) -> Callable[[dict[str, Any]], Template]:  # fmt: skip
    """A template with a checkpoint, a box, and its pictures.

    Args:
        title: also the name of the file.
        make: the box.
        text: the note.
        shown: of the box's outputs, those to show, with a title each; the first is saved.
        prefix: of the files that are saved.
        url: where the checkpoint comes from.
        more: adds further nodes; gives inputs of the box, and nodes for the first column.
        note_height: of the note.
        settings: what the box is set to.
    """

    def build(info: dict[str, Any]) -> Template:
        graph = Graph(info)
        load = loader(graph, "CheckpointLoaderSimple", ckpt_name=url)
        inputs, column = more(graph)
        box = graph.use(make, at_least=(BOX, 0), model=load["MODEL"], clip=load["CLIP"], vae=load["VAE"], **inputs,
                        **settings)  # fmt: skip
        right = pictures(graph, box, shown, prefix)
        arrange(graph, [load, *column, note(graph, text, note_height)], box, right)
        return finished(title, graph, box, right)

    return build


def finished(title: str, graph: Graph, box: Node, right: list[Node]) -> Template:
    """With what app mode shows. Nodes are numbered in the order in which they were added."""
    numbers = {id(node): number for number, node in enumerate(graph.nodes, 1)}
    return Template(title, graph, app(box, right, numbers))


RESULT = {"picture": "New picture", "reference": "Reference"}

TEXTURE = f"""
## Texture from a Picture

A new picture with the texture of yours, in another arrangement.

1. **Load Checkpoint**: any SD 1.5 checkpoint.
2. **Run**.

{OWN_PICTURE}

- **style strength** 0.05: lower takes less of it, too high gives noise.
- **steps**, **pulls per step**: best 50 and 3; usual 25 and 3 at strength 0.1; a draft 10 and 6 at 0.2.
- **seed**: another one, another picture.
"""

FINE = f"""
## Texture, Coarse to Fine

Made small first, so that large shapes come right; each of two doublings adds detail. The edges fit together.

1. **Load Checkpoint**: any SD 1.5 checkpoint.
2. **Run**.

{OWN_PICTURE}

- **style strength** 0.1 first, 0.05 later: lower takes less of it, too high gives noise.
- **made anew** 0.4: how much each doubling changes.
- **size** 1024: of the finished picture.
"""

STYLE = """
## Style from a Picture

What the prompt says, with the colours and the brush of your picture.

1. **Load Checkpoint**: any {family} checkpoint.
2. **prompt**: what to show, without style words.
3. **Run**.

A picture of your own: add **Load Image**, and link it to **your picture**.

- **style strength** 0.015: higher takes more of the style and less of the prompt.
- **take its colours**: off leaves the prompt's own.
- **follow the prompt** {cfg}: higher keeps closer to it.
"""

STYLE_FLUX = """
## Style from a Picture, with FLUX

What the prompt says, with the colours and the brush of your picture.

1. **Load Diffusion Model**, **Load CLIP (Dual)**, **Load VAE**: the files of FLUX.1-dev.
2. **prompt**: what to show, without style words.
3. **Run**.

A picture of your own: add **Load Image**, and link it to **your picture**.

- **style strength** 0.01: higher takes more of the style and less of the prompt.
- **take its colours**: off leaves the prompt's own.
- **width**, **height** 512: larger takes much more memory.
"""

PHOTO = """
## Photo in a Style

Your photo, with the colours and the brush of your style.

1. **Load Checkpoint**: any SD 1.5 checkpoint.
2. **Run**.

Pictures of your own: add **Load Image** twice, and link them to **your photo** and **your style**.

- **style strength** 0.05: higher goes further from the photo.
- **keep structure** 0.25: higher keeps more of the photo.
- **keep colours** 0: at 1 the photo's own come back.
"""

OWN_COLOURS = """
## Style without its Colours

Your photo with the brush of your style, in its own colours. Needs ComfyUI 0.20.1 or newer.

1. **Load Checkpoint**: any SD 1.5 checkpoint.
2. **Run**.

Pictures of your own: add **Load Image** twice, and link them to **your photo** and **your style**.

- **style strength** 0.05: higher goes further from the photo.
- **keep structure** 0.25: higher keeps more of the photo.
- **keep colours** 1: each place has its own; at 0 only the palette is the photo's.
"""

PALETTE = """
## Palette from a Picture

Your photo in the colours of your style; shapes, brush and light stay. Needs no checkpoint, but ComfyUI 0.20.1 or newer.

1. **Run**.

Pictures of your own: add **Load Image** twice, and link them to **your photo** and **your style**.

- **palette strength** 1: lower leaves some of the photo's own colours.
- **keep light** 1: at 0 light and contrast are the style's, too.
- **how** mkl_lab: reinhard_lab is gentler, histogram bolder.
"""

LARGE = f"""
## Large Texture

Larger than the model's own size: made in windows that overlap, so no seams remain.

1. **Load Checkpoint**: any SD 1.5 checkpoint.
2. **Run**.

{OWN_PICTURE}

- **width**, **height**: time grows with the area, memory does not.
- **window** 512: 1024 for SDXL.
- **window step** 64: 128 is faster, seams may show.
"""

TILE = f"""
## Seamless Tile

A texture that repeats without a seam.

1. **Load Checkpoint**: any SD 1.5 checkpoint.
2. **Run**.

{OWN_PICTURE}

- **style strength** 0.05: lower takes less of it, too high gives noise.
- **repeats in**: both directions, or only one.
- **width**, **height**: multiples of 64.
"""

TWO = """
## Two Textures by Labels

Where the map is white, the texture of your picture's white part; where it is black, that of the black part.

1. **Load Checkpoint**: any SD 1.5 checkpoint.
2. **Run**.

Pictures of your own: add **Load Image** for **your picture**, **its labels** and **map of the new picture**. Paint \
labels in plain colours without soft edges; there may be more than two.

- **style strength** 0.05: lower takes less of it.
- **steps** 50: more come closer to it.
- **seed**: another one, another picture.
"""

OPTIMISED = f"""
## Texture by Optimisation

No sampling: noise is changed until its attention matches that of your picture.

1. **Load Checkpoint**: any SD 1.5 checkpoint.
2. **Run**.

{OWN_PICTURE}

- **style strength** 0.05: too high gives jitter.
- **steps** 300: more come closer to it.
- **how it ends**: cosine leaves less jitter.
"""

CONTROL = """
## Style with ControlNet

The outlines of your picture, what the prompt says, the look of your style.

1. **Load Checkpoint**: any SD 1.5 checkpoint. **Load ControlNet Model**: Canny for SD 1.5.
2. **Run**.

Pictures of your own: add **Load Image** for **your picture** and **your style**.

- **style strength** 0.015: higher takes more of the style and less of the prompt.
- **keep outlines** 1: lower lets them give way.
- **follow the prompt** 7.5: higher keeps closer to it.
"""

PAINT = """
## Paint in a Style

Only the masked part is made anew, in your style.

1. **Load Checkpoint**: an ordinary SD 1.5 one.
2. **prompt**: what to show there. **Run**.

Your own: link **Load Image** to **your picture** and **part to paint**, and paint in its **Open in Mask Editor**.

- **made anew** 0.8: lower keeps more of what was there.
- **style strength** 0.015: higher takes more of the style and less of the prompt.
- **follow the prompt** 7.5: higher keeps closer to it.
"""

SHARPER = f"""
## Sharper Decoding

The decoder is trained on your picture for a moment; it then draws fine detail as your picture has it.

1. **Load Checkpoint**: any SD 1.5 checkpoint.
2. **Run**, and compare.

{OWN_PICTURE}

- **training steps** 75: more is sharper and slower.
- **training rate** 0.0001: too high gives false colours.
- **style strength** 0.05: lower takes less of it.
"""

MAP = """
## Attention Map

Your picture is painted with a chart of colours; each place of the new one shows the colour of the place that it looks \
at, brighter where it is sure. The labels of your picture are carried over in the same way.

1. **Load Checkpoint**: any SD 1.5 checkpoint.
2. **Run**.

- **layer** mean: or the number of one layer, from 0.
- **style strength** 0.05: lower takes less of it.
- **seed**: another one, another picture.
"""


def flux(info: dict[str, Any]) -> Template:
    """FLUX has its loaders apart."""
    graph = Graph(info)
    unet = loader(graph, "UNETLoader", "diffusion_models", unet_name=FLUX)
    clip = loader(graph, "DualCLIPLoader", "text_encoders", clip_name1=FLUX_CLIP, clip_name2=FLUX_T5)
    clip.inputs["type"] = "flux"
    vae = loader(graph, "VAELoader", "vae", vae_name=FLUX_VAE)
    make = partial(boxes.style_from_picture, iterations=2, flux=True)
    box = graph.use(make, at_least=(BOX, 0), model=unet["MODEL"], clip=clip["CLIP"], vae=vae["VAE"],
                    style_strength=0.01, follow_the_prompt=1.0,
                    prompt="a fox under an old oak tree, falling leaves")  # fmt: skip
    right = pictures(graph, box, RESULT, "ad_flux")
    arrange(graph, [unet, clip, vae, note(graph, STYLE_FLUX)], box, right)
    return finished("10 Style from a Picture (FLUX)", graph, box, right)


def net(graph: Graph) -> tuple[dict[str, Any], list[Node]]:
    """The loader of a ControlNet."""
    load = loader(graph, "ControlNetLoader", "controlnet", control_net_name=CANNY)
    return {"control_net": load["CONTROL_NET"]}, [load]


def disc_mask(graph: Graph) -> tuple[dict[str, Any], list[Node]]:
    """A mask out of the example labels."""
    mask = graph.use(boxes.example_mask, at_least=(NARROW, 0))
    return {"mask": mask["mask"]}, [mask]


def palette(info: dict[str, Any]) -> Template:
    """No model is loaded."""
    graph = Graph(info)
    box = graph.use(boxes.palette, at_least=(BOX, 0))
    right = pictures(graph, box, {"picture": "Photo in its colours", "photo": "Photo", "style": "Style"}, "ad_palette")
    arrange(graph, [note(graph, PALETTE)], box, right)
    return finished("16 Palette from a Picture", graph, box, right)


SDXL_BOX = partial(boxes.style_from_picture, iterations=2)
TEMPLATES: list[Callable[[dict[str, Any]], Template]] = [
    one_box("01 Texture from a Picture", boxes.texture, TEXTURE, RESULT, "ad_texture"),
    one_box("02 Texture, Coarse to Fine", boxes.coarse_to_fine, FINE, RESULT, "ad_fine"),
    one_box("03 Style from a Picture (SD1.5)", boxes.style_from_picture, STYLE.format(family="SD 1.5", cfg=7.5), RESULT,
            "ad_style"),
    one_box("04 Photo in a Style", boxes.photo_in_style, PHOTO,
            {"picture": "Photo in the style", "photo": "Photo", "style": "Style"}, "ad_photo"),
    one_box("05 Large Texture", boxes.large_texture, LARGE, RESULT, "ad_large"),
    one_box("06 Seamless Tile", boxes.seamless_tile, TILE,
            {"tile": "Tile", "repeated": "Repeated 2 x 2", "reference": "Reference"}, "ad_tile"),
    one_box("07 Two Textures by Labels", boxes.two_textures, TWO,
            {"picture": "New picture", "reference": "Reference", "map": "Map"}, "ad_two"),
    one_box("08 Texture by Optimisation", boxes.texture_by_optimisation, OPTIMISED, RESULT, "ad_optimised"),
    one_box("09 Style from a Picture (SDXL)", SDXL_BOX, STYLE.format(family="SDXL", cfg=7), RESULT, "ad_sdxl",
            url=SDXL, width=1024, height=1024, follow_the_prompt=7.0,
            prompt="a mountain village by a lake, wooden boats"),
    flux,
    one_box("11 Style with ControlNet", boxes.style_with_controlnet, CONTROL,
            {"picture": "New picture", "outlines": "Outlines", "style": "Style"}, "ad_outlines", more=net),
    one_box("12 Paint in a Style", boxes.paint_in_style, PAINT,
            {"picture": "Painted", "before": "Before", "style": "Style"}, "ad_painted", more=disc_mask),
    one_box("13 Sharper Decoding", boxes.sharper_decoding, SHARPER,
            {"sharper": "Sharper", "plain": "Plain", "reference": "Reference"}, "ad_sharper"),
    one_box("14 Attention Map", boxes.attention_map, MAP,
            {"picture": "New picture", "map": "Where it looks", "carried": "Labels carried over"}, "ad_map"),
    one_box("15 Style without its Colours", boxes.own_colours, OWN_COLOURS,
            {"picture": "Photo in the style", "photo": "Photo", "style": "Style"}, "ad_own_colours"),
    palette,
]  # fmt: skip
