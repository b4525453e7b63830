"""The shipped templates and blueprints against the schema of their nodes: nothing is missing, everything fits."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Iterator
from itertools import combinations, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import kornia
import pytest
import torch
import torch.nn.functional as F
from demo import CHECKPOINT
from host.comfy_env import CHECKOUT
from host.workflow_api import CHOICES_WITH_INPUTS, INPUT_SIDE, NOTES, input_specifications, is_widget, to_api
from PIL import Image
from workflow_builder.boxes import BLUEPRINTS
from workflow_builder.saved import CATEGORY, OUTPUT_SIDE

TEMPLATES = sorted((CHECKOUT / "workflows").glob("*.json"))
BOXES = sorted((CHECKOUT / "subgraphs").glob("*.json"))
MODEL_WIDGETS = {
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "vae_name": "vae",
    "control_net_name": "controlnet",
}
"""Widgets that name a model file, and the folder in which it belongs."""

VALUE_TYPES = {
    "INT": int,
    "FLOAT": (int, float),
    "STRING": str,
    "COMBO": str,
    CHOICES_WITH_INPUTS: str,
    "BOOLEAN": bool,
}
TITLE_HEIGHT, SLOT_HEIGHT, FIRST_SLOT = 30, 20, 14
NODES_ON_SHOW = 8
WIRE_POINTS = 60
THUMBNAIL_BYTES, THUMBNAIL_SIDE = 60_000, 512

Point = tuple[float, float]
Rectangle = tuple[float, float, float, float]


class Link(NamedTuple):
    """A link, of the workflow itself or of the inside of a box."""

    id: int
    origin_id: int
    origin_slot: int
    target_id: int
    target_slot: int
    type: str


@pytest.fixture(scope="module")
def node_classes(pack: ModuleType) -> dict[str, type]:
    """Every node of the pack and of ComfyUI itself, by id."""
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(params=[*TEMPLATES, *BOXES], ids=lambda path: f"{path.parent.name}/{path.stem}")
def shipped_file(request: pytest.FixtureRequest) -> Path:
    """Each template and each blueprint in turn."""
    return request.param


@pytest.fixture
def workflow(shipped_file: Path) -> dict[str, Any]:
    """Each of them, parsed."""
    return json.loads(shipped_file.read_text(encoding="utf-8"))


@pytest.fixture(params=TEMPLATES, ids=lambda path: path.stem)
def template_file(request: pytest.FixtureRequest) -> Path:
    """Each template in turn."""
    return request.param


@pytest.fixture
def template(template_file: Path) -> dict[str, Any]:
    """Each of them, parsed."""
    return json.loads(template_file.read_text(encoding="utf-8"))


def insides(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """What the boxes of a workflow hold."""
    return workflow.get("definitions", {}).get("subgraphs", [])


def graphs(workflow: dict[str, Any]) -> Iterator[tuple[list[dict[str, Any]], list[Link]]]:
    """Nodes and links of the workflow itself, and of each box's inside."""
    yield workflow["nodes"], [Link(*link) for link in workflow["links"]]
    for inside in insides(workflow):
        yield inside["nodes"], [Link(**link) for link in inside["links"]]


def prompt_of(workflow: dict[str, Any], node_classes: dict[str, type]) -> dict[str, Any]:
    """The workflow as the server runs it, boxes opened."""
    known = {name: {"input": node_class.INPUT_TYPES()} for name, node_class in node_classes.items()}
    return to_api(workflow, known)


def inputs_of(node_class: type) -> dict[str, list[Any]]:
    """The specification of every input, in order."""
    return input_specifications({"input": node_class.INPUT_TYPES()})


def type_of(specification: list[Any]) -> str:
    """The type of an input; the older form of a combo is a list of its choices."""
    return "COMBO" if isinstance(specification[0], list) else specification[0]


def test_the_readme_lists_them() -> None:
    """One row of its tables for each, and no other."""
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    for heading, files in (("Templates", TEMPLATES), ("Boxes", BOXES)):
        table = readme.split(f"\n## {heading}\n")[1].split("\n## ")[0]
        rows = re.findall(r"^\| \*\*(.+?)\*\* \|", table, re.MULTILINE)
        assert sorted(rows) == sorted(path.stem for path in files)


def test_templates_are_numbered() -> None:
    """The front end sorts them by name: in the order in which to try them."""
    assert [path.stem[:3] for path in TEMPLATES] == [f"{number:02} " for number in range(1, len(TEMPLATES) + 1)]


def test_blueprints_are_one_box_each() -> None:
    """With a name that is the file's, a description, a folder in the node library, and words to be found by."""
    assert len(BOXES) == len(BLUEPRINTS)
    for path in BOXES:
        workflow = json.loads(path.read_text(encoding="utf-8"))
        (node,), (inside,) = workflow["nodes"], workflow["definitions"]["subgraphs"]
        assert node["type"] == inside["id"] and inside["name"] == path.stem
        assert workflow["extra"]["BlueprintDescription"] == inside["description"]
        assert (
            inside["description"].endswith(".")
            and "attention distillation" in workflow["extra"]["BlueprintSearchAliases"]
        )
        assert inside["category"] == CATEGORY


def test_every_node_is_known(workflow: dict[str, Any], node_classes: dict[str, type]) -> None:
    """Only nodes of the pack and of ComfyUI itself, and boxes of the file."""
    boxes = {inside["id"] for inside in insides(workflow)}
    types = {node["type"] for nodes, _ in graphs(workflow) for node in nodes}
    assert types <= node_classes.keys() | NOTES | boxes
    assert boxes <= types


def test_uses_the_pack(workflow: dict[str, Any]) -> None:
    """Our nodes carry the pack's name, which the front end shows where the pack is missing."""
    ours = [node for nodes, _ in graphs(workflow) for node in nodes if node["type"].startswith("AD")]
    assert ours
    assert {node["properties"]["cnr_id"] for node in ours} == {"comfyui-attention-distillation"}


def test_values_fit(workflow: dict[str, Any], node_classes: dict[str, type]) -> None:
    """Each of its type, in its range or among its choices; what the boxes are set to counts."""
    for number, node in prompt_of(workflow, node_classes).items():
        for name, specification in inputs_of(node_classes[node["class_type"]]).items():
            value = node["inputs"].get(name)
            if not is_widget(specification) or isinstance(value, list):
                continue
            kind, options = type_of(specification), dict(*specification[1:])
            where = f"{number} {node['class_type']}.{name} = {value!r}"
            assert isinstance(value, VALUE_TYPES[kind]), where
            assert isinstance(value, bool) == (kind == "BOOLEAN"), where
            if kind in ("INT", "FLOAT"):
                assert options.get("min", value) <= value <= options.get("max", value), where
            if kind == CHOICES_WITH_INPUTS:
                assert value in [choice["key"] for choice in options["options"]], where
            if kind == "COMBO" and name not in MODEL_WIDGETS:
                assert value in (options.get("options") or specification[0]), where


def test_everything_needed_is_there(
    workflow: dict[str, Any], node_classes: dict[str, type], shipped_file: Path
) -> None:
    """Nothing is left for the artist to wire before the first run; a blueprint lacks what its wires will bring."""
    brought = {"model", "clip", "vae", "samples", "mask"} if shipped_file in BOXES else set()
    for node in prompt_of(workflow, node_classes).values():
        required = node_classes[node["class_type"]].INPUT_TYPES()["required"]
        missing = {name for name in required.keys() - node["inputs"].keys() if required[name][0] != "COMFY_AUTOGROW_V3"}
        assert missing <= brought, node["class_type"]


def test_links_of_the_prompt_fit(workflow: dict[str, Any], node_classes: dict[str, type]) -> None:
    """Every link joins an output and an input of its type, through the walls of boxes too."""
    prompt = prompt_of(workflow, node_classes)
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if not isinstance(value, list):
                continue
            source = prompt[value[0]]["class_type"]
            kind = node_classes[source].RETURN_TYPES[value[1]]
            specification = inputs_of(node_classes[node["class_type"]]).get(name)
            wanted = type_of(specification) if specification else "FLOAT,INT,BOOLEAN"  # an input that grows by use
            assert kind in wanted.split(","), f"{source} to {node['class_type']}.{name}"


def test_both_ends_know_each_link(workflow: dict[str, Any]) -> None:
    """In each graph, the ends of a box's inside among them."""
    for nodes, links in graphs(workflow):
        by_id = {node["id"]: node for node in nodes}
        for link in links:
            if link.target_id != OUTPUT_SIDE:
                assert by_id[link.target_id]["inputs"][link.target_slot]["link"] == link.id
            if link.origin_id != INPUT_SIDE:
                assert link.id in by_id[link.origin_id]["outputs"][link.origin_slot]["links"]
    for inside in insides(workflow):
        for side, own, other in (("inputs", "origin_id", "origin_slot"), ("outputs", "target_id", "target_slot")):
            end = INPUT_SIDE if side == "inputs" else OUTPUT_SIDE
            for slot, socket in enumerate(inside[side]):
                found = [link["id"] for link in inside["links"] if (link[own], link[other]) == (end, slot)]
                assert socket["linkIds"] == found and found, f"{inside['name']}: {socket['name']}"


def test_nothing_has_to_be_fetched_but_models(template: dict[str, Any], node_classes: dict[str, type]) -> None:
    """No picture files; a loader says where each of its files comes from and belongs."""
    prompt = prompt_of(template, node_classes)
    assert not {"LoadImage", "LoadImageMask"} & {node["class_type"] for node in prompt.values()}
    for nodes, _ in graphs(template):
        for node in nodes:
            inputs = prompt.get(str(node["id"]), {}).get("inputs", {})
            files = [(inputs[widget], folder) for widget, folder in MODEL_WIDGETS.items() if widget in inputs]
            models = node["properties"].get("models", [])
            assert [(model["name"], model["directory"]) for model in models] == files
            assert CHECKPOINT not in [name for name, _ in files]
            for model in models:
                assert model["url"].startswith("https://") and model["url"].endswith(f"/{model['name']}")


def test_settings_are_those_of_the_table(node_classes: dict[str, type]) -> None:
    """What README says for each task is what the templates are set to."""
    textures = {"learning_rate": 0.05, "iterations": 3, "steps": 50, "cfg": 1, "adain": False}
    prompts = {"learning_rate": 0.015, "iterations": 3, "steps": 50, "cfg": 7.5, "adain": True}
    expected = {
        "01": textures,
        "05": textures | {"iterations": 2},
        "06": textures,
        "07": textures,
        "13": textures,
        "14": textures,
        "03": prompts,
        "09": prompts | {"iterations": 2, "cfg": 7},
        "10": prompts | {"iterations": 2, "cfg": 1, "learning_rate": 0.01, "scheduler": "simple"},
        "12": prompts | {"denoise": 0.8},
        "04": {"learning_rate": 0.05, "iterations": 1, "steps": 200, "content_weight": 0.25, "start_from": "latent"},
        "15": {"learning_rate": 0.05, "iterations": 1, "steps": 200, "content_weight": 0.25, "start_from": "latent"},
        "08": {"learning_rate": 0.05, "iterations": 1, "steps": 300, "start_from": "noise"},
    }
    for number, settings in expected.items():
        (path,) = (path for path in TEMPLATES if path.stem.startswith(number))
        prompt = prompt_of(json.loads(path.read_text(encoding="utf-8")), node_classes)
        kinds = ("ADGuidedKSampler", "ADOptimizeLatent")
        (inputs,) = (node["inputs"] for node in prompt.values() if node["class_type"] in kinds)
        assert {name: inputs[name] for name in settings} == settings, path.stem


def rectangle(node: dict[str, Any]) -> Rectangle:
    """Left, top, right and bottom of a node, its title included."""
    (x, y), (width, height) = node["pos"], node["size"]
    return x, y - TITLE_HEIGHT, x + width, y + height


def wire(link: Link, nodes: dict[int, dict[str, Any]]) -> list[Point]:
    """Points along a link as the front end draws it."""
    source, target = nodes[link.origin_id], nodes[link.target_id]
    x0, y0 = source["pos"][0] + source["size"][0], source["pos"][1] + FIRST_SLOT + SLOT_HEIGHT * link.origin_slot
    x1, y1 = target["pos"][0], target["pos"][1] + FIRST_SLOT + SLOT_HEIGHT * link.target_slot
    bend = math.dist((x0, y0), (x1, y1)) / 4
    points = []
    for step in range(WIRE_POINTS + 1):
        t = step / WIRE_POINTS
        weights = ((1 - t) ** 3, 3 * (1 - t) ** 2 * t, 3 * (1 - t) * t**2, t**3)
        across, down = (x0, x0 + bend, x1 - bend, x1), (y0, y0, y1, y1)
        points.append(
            (sum(map(float.__mul__, weights, map(float, across))), sum(map(float.__mul__, weights, map(float, down))))
        )
    return points


def meet(a: list[Point], b: list[Point]) -> bool:
    """Whether two lines of points cross."""

    def side(p: Point, q: Point, r: Point) -> float:
        return (q[0] - p[0]) * (r[1] - p[1]) - (q[1] - p[1]) * (r[0] - p[0])

    return any(
        side(p, q, r) * side(p, q, s) < 0 and side(r, s, p) * side(r, s, q) < 0
        for p, q in pairwise(a)
        for r, s in pairwise(b)
    )


def test_no_node_covers_another(workflow: dict[str, Any]) -> None:
    """In boxes too."""
    for nodes, _ in graphs(workflow):
        for one, other in combinations(nodes, 2):
            a, b = rectangle(one), rectangle(other)
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, f"{one['type']} {one['id']} and {other['type']} {other['id']} overlap"


def test_few_nodes_and_tidy_wires(template: dict[str, Any]) -> None:
    """There is a note; no wire crosses another or runs behind a node."""
    nodes = {node["id"]: node for node in template["nodes"]}
    assert sum(node["type"] in NOTES for node in nodes.values()) == 1
    assert len(nodes) <= NODES_ON_SHOW
    links = [Link(*link) for link in template["links"]]
    wires = {link: wire(link, nodes) for link in links}
    for link, points in wires.items():
        for number, node in nodes.items():
            left, top, right, bottom = rectangle(node)
            behind = any(left < x < right and top < y < bottom for x, y in points)
            assert not behind, f"link {link.id} runs behind node {number}"
    for one, other in combinations(links, 2):
        same = (one.origin_id, one.origin_slot) == (other.origin_id, other.origin_slot)
        assert same or not meet(wires[one], wires[other]), f"links {one.id} and {other.id} cross"


def test_note_names_what_the_canvas_shows(template: dict[str, Any], node_classes: dict[str, type]) -> None:
    """Bold words in the note are titles of nodes, settings or sockets of the box, or parts of the front end."""
    (note,) = (node for node in template["nodes"] if node["type"] in NOTES)
    shown = {"Run", "Load Image", "Open in Mask Editor"}
    for node in template["nodes"]:
        shown |= {socket.get("label", socket["name"]) for socket in node["inputs"]}
        known = node_classes.get(node["type"])
        schema = getattr(known, "SCHEMA", None) or getattr(known, "GET_SCHEMA", lambda: None)()
        shown |= {node.get("title"), schema.display_name if schema else None, *TITLES.get(node["type"], ())}
    words = set(re.findall(r"\*\*(.+?)\*\*", note["widgets_values"][0]))
    assert words <= shown | {"style strength"}, words - shown
    assert len(re.findall(r"^- \*\*", note["widgets_values"][0], re.MULTILINE)) == 3, "three settings, a line each"


TITLES = {
    "CheckpointLoaderSimple": ("Load Checkpoint",),
    "UNETLoader": ("Load Diffusion Model",),
    "DualCLIPLoader": ("Load CLIP (Dual)",),
    "VAELoader": ("Load VAE",),
    "ControlNetLoader": ("Load ControlNet Model",),
}
"""What the front end calls the loaders."""


def test_has_a_thumbnail(template_file: Path) -> None:
    """A small picture of the same name, which the template browser shows."""
    path = template_file.with_suffix(".jpg")
    with Image.open(path) as image:
        assert image.format == "JPEG"
        assert max(image.size) <= THUMBNAIL_SIDE
    assert path.stat().st_size <= THUMBNAIL_BYTES


def made(prompt: dict[str, Any], number: str, node_classes: dict[str, type], known: dict[str, Any]) -> list[Any]:
    """The outputs of a node of a prompt, run here; `known` holds those that are there already, by number."""
    if number not in known:
        node = prompt[number]
        node_class = node_classes[node["class_type"]]
        inputs = {
            name: made(prompt, value[0], node_classes, known)[value[1]] if isinstance(value, list) else value
            for name, value in node["inputs"].items()
        }
        for name, specification in inputs_of(node_class).items():
            if specification[0] == CHOICES_WITH_INPUTS:
                inputs[name] = {name: inputs[name]}
        known[number] = node_class.execute(**inputs).result
    return known[number]


def numbers_of(prompt: dict[str, Any], kind: str) -> list[str]:
    """Of the nodes of a class."""
    return [number for number, node in prompt.items() if node["class_type"] == kind]


def ycbcr(picture: torch.Tensor) -> torch.Tensor:
    """[1 H W 3] in 0..1 as light and two chroma channels, ITU-R BT.601; written out here."""
    light = picture @ torch.tensor([0.299, 0.587, 0.114])
    return torch.stack([light, 0.564 * (picture[..., 2] - light), 0.713 * (picture[..., 0] - light)], dim=-1)


def statistics_in_lab(picture: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and covariance of the colours of a picture [1 H W 3], CIE Lab."""
    colours = kornia.color.rgb_to_lab(picture.movedim(-1, 1)).flatten(2)[0]
    return colours.mean(dim=1), colours.cov(correction=0)


def soft_picture(seed: int) -> torch.Tensor:
    """Colours that go together in their own way, [1 64 64 3]."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.rand(1, 8, 8, 3, generator=generator) @ torch.rand(3, 3, generator=generator)
    colours = 0.15 + 0.6 * colours / colours.amax()
    return F.interpolate(colours.movedim(-1, 1), size=64, mode="bilinear").movedim(1, -1)


class Colours(NamedTuple):
    """What a box makes of colours, pictures of one size, [1 H W 3].

    Attributes:
        before, taken: what is recoloured, and the colours that it is given.
        recoloured: what comes of it.
        exchanged: the light of one picture with the chroma of another.
        result: what comes out of the box.
    """

    before: torch.Tensor
    taken: torch.Tensor
    recoloured: torch.Tensor
    exchanged: torch.Tensor
    result: torch.Tensor

    @classmethod
    def of(cls, name: str, node_classes: dict[str, type], decoded: torch.Tensor | None = None) -> Colours:
        """Of a shipped box, by ComfyUI's own nodes, from two small pictures.

        `decoded` takes the place of what its VAE decodes.
        """
        file = CHECKOUT / "subgraphs" / f"{name}.json"
        prompt = prompt_of(json.loads(file.read_text(encoding="utf-8")), node_classes)
        known = {number: [decoded] for number in numbers_of(prompt, "VAEDecode")}
        known |= {number: [soft_picture(seed)] for seed, number in enumerate(numbers_of(prompt, "ADExampleReference"))}
        (last,), (transfer,) = (numbers_of(prompt, kind) for kind in ("ImageBlend", "ColorTransfer"))
        (result,), (recoloured,) = (made(prompt, number, node_classes, known) for number in (last, transfer))
        links = (prompt[transfer]["inputs"][name] for name in ("image_target", "image_ref"))
        before, taken = (known[number][output] for number, output in links)
        return cls(before, taken, recoloured, known[prompt[last]["inputs"]["image2"][0]][0], result)

    def check(self, light: torch.Tensor, chroma: torch.Tensor) -> None:
        """Colours are those that were to be taken, as far as screens have them; light and chroma are exact there."""
        sets = [statistics_in_lab(each) for each in (self.before, self.recoloured, self.taken)]
        for (was, own, wanted), most in zip(zip(*sets, strict=True), (0.05, 0.1), strict=True):
            assert (own - wanted).norm() < most * (was - wanted).norm()
        y, cb, cr = torch.cat([ycbcr(light)[..., :1], ycbcr(chroma)[..., 1:]], dim=-1).unbind(-1)
        exact = torch.stack([y + 1.403 * cr, y - 0.344 * cb - 0.714 * cr, y + 1.773 * cb], dim=-1)
        torch.testing.assert_close(self.exchanged, exact.clamp(0, 1), rtol=0, atol=2e-3)
        torch.testing.assert_close(self.result, self.exchanged, rtol=0, atol=1e-6)


def test_a_palette_is_taken_and_the_light_stays(node_classes: dict[str, type]) -> None:
    found = Colours.of("Palette from a Picture", node_classes)
    found.check(light=found.before, chroma=found.recoloured)
    assert (ycbcr(found.result)[..., 0] - ycbcr(found.before)[..., 0]).abs().mean() < 1 / 255, "clipped at most"
    assert (found.result - found.before).abs().mean() > 0.05


def test_own_colours_are_kept_in_their_places(node_classes: dict[str, type]) -> None:
    decoded = torch.rand(1, 512, 512, 3, generator=torch.Generator().manual_seed(0))
    found = Colours.of("Style without its Colours", node_classes, decoded)
    found.check(light=decoded, chroma=found.taken)
