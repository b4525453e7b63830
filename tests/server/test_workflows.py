"""The shipped workflows against the schema of the nodes they hold: nothing is missing and everything fits."""

from __future__ import annotations

import asyncio
import json
import re
from itertools import combinations
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from demo import CHECKPOINT
from host.comfy_env import CHECKOUT
from host.workflow_api import NOTES, extra_values, input_specifications, is_widget, to_api
from PIL import Image

WORKFLOWS = sorted((CHECKOUT / "workflows").glob("*.json"))
MODEL_WIDGETS = {
    "ckpt_name": "checkpoints",
    "unet_name": "diffusion_models",
    "clip_name1": "text_encoders",
    "clip_name2": "text_encoders",
    "vae_name": "vae",
    "control_net_name": "controlnet",
}
"""Widgets that name a model file, and the folder in which it belongs."""

FILE_WIDGETS = {*MODEL_WIDGETS, "image"}
"""Their choices are the files on the machine."""

VALUE_TYPES = {"INT": int, "FLOAT": (int, float), "STRING": str, "COMBO": str, "BOOLEAN": bool}
EXTRA_VALUES = {"fixed", "increment", "decrement", "randomize", "image"}
"""What the front end saves behind a seed, and behind a file that can be uploaded."""

TITLE_HEIGHT = 30
THUMBNAIL_BYTES, THUMBNAIL_SIDE = 60_000, 512


@pytest.fixture(scope="module")
def node_classes(pack: ModuleType) -> dict[str, type]:
    """Every node of the pack and of ComfyUI itself, by id."""
    import nodes

    asyncio.run(nodes.init_builtin_extra_nodes())
    return nodes.NODE_CLASS_MAPPINGS


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow_file(request: pytest.FixtureRequest) -> Path:
    """Each workflow in turn."""
    return request.param


@pytest.fixture
def workflow(workflow_file: Path) -> dict[str, Any]:
    """Each workflow in turn, parsed."""
    return json.loads(workflow_file.read_text(encoding="utf-8"))


def server_nodes(workflow: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes that run on the server."""
    return [node for node in workflow["nodes"] if node["type"] not in NOTES]


def inputs_of(node_class: type) -> dict[str, list[Any]]:
    """The specification of every input, in order."""
    return input_specifications({"input": node_class.INPUT_TYPES()})


def type_of(specification: list[Any]) -> str:
    """The type of an input; the older form of a combo is a list of its choices."""
    return "COMBO" if isinstance(specification[0], list) else specification[0]


def test_the_readme_lists_the_workflows() -> None:
    """One row of its table for each, and no other."""
    readme = (CHECKOUT / "README.md").read_text(encoding="utf-8")
    table = readme.split("\n## Workflows\n")[1].split("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == [path.stem for path in WORKFLOWS]


def test_every_node_is_registered(workflow: dict[str, Any], node_classes: dict[str, type]) -> None:
    """Only nodes of the pack and of ComfyUI itself."""
    assert {node["type"] for node in server_nodes(workflow)} <= node_classes.keys()


def test_uses_the_pack(workflow: dict[str, Any]) -> None:
    """Our nodes carry the pack's name, which the front end shows where the pack is missing."""
    ours = [node for node in server_nodes(workflow) if node["type"].startswith("AD")]
    assert ours
    assert {node["properties"]["cnr_id"] for node in ours} == {"comfyui-attention-distillation"}


def test_widget_values_fit(workflow: dict[str, Any], node_classes: dict[str, type]) -> None:
    """As many values as widgets, each of its type, in its range or among its choices."""
    for node in server_nodes(workflow):
        specifications = inputs_of(node_classes[node["type"]])
        widgets = {name: specification for name, specification in specifications.items() if is_widget(specification)}
        values = iter(node["widgets_values"])
        for name, specification in widgets.items():
            kind, options = type_of(specification), dict(*specification[1:])
            value = next(values)
            where = f"{node['type']}.{name} = {value!r}"
            assert isinstance(value, VALUE_TYPES[kind]), where
            assert isinstance(value, bool) == (kind == "BOOLEAN"), where
            if kind in ("INT", "FLOAT"):
                assert options.get("min", value) <= value <= options.get("max", value), where
            if kind == "COMBO" and name not in FILE_WIDGETS:
                assert value in (options.get("options") or specification[0]), where
            for _ in range(extra_values(name, specification)):
                assert next(values) in EXTRA_VALUES, where
        assert list(values) == [], node["type"]


def test_links_fit(workflow: dict[str, Any], node_classes: dict[str, type]) -> None:
    """Every link joins an output and an input of its type, and both ends know it."""
    by_id = {node["id"]: node for node in workflow["nodes"]}
    for link_id, source_id, source_slot, target_id, target_slot, kind in workflow["links"]:
        source, target = by_id[source_id], by_id[target_id]
        where = f"link {link_id}: {source['type']} to {target['type']}"
        socket = target["inputs"][target_slot]
        assert node_classes[source["type"]].RETURN_TYPES[source_slot] == kind, where
        assert type_of(inputs_of(node_classes[target["type"]])[socket["name"]]) == kind, where
        assert socket["link"] == link_id and link_id in source["outputs"][source_slot]["links"], where


def test_required_sockets_are_linked(workflow: dict[str, Any], node_classes: dict[str, type]) -> None:
    """Nothing is left for the artist to wire before the first run."""
    for node in server_nodes(workflow):
        linked = {socket["name"] for socket in node["inputs"] if socket["link"] is not None}
        node_class = node_classes[node["type"]]
        required = node_class.INPUT_TYPES()["required"]
        assert {name for name, specification in required.items() if not is_widget(specification)} <= linked, node[
            "type"
        ]


def test_model_files_can_be_found(workflow: dict[str, Any], node_classes: dict[str, type]) -> None:
    """A loader says where each of its files comes from and belongs; the demo model's is written by the demo."""
    known = {name: {"input": node_class.INPUT_TYPES()} for name, node_class in node_classes.items()}
    prompt = to_api(workflow, known)
    for node in server_nodes(workflow):
        inputs = prompt[str(node["id"])]["inputs"]
        widgets = [(widget, folder) for widget, folder in MODEL_WIDGETS.items() if widget in inputs]
        files = [(inputs[widget], folder) for widget, folder in widgets if inputs[widget] != CHECKPOINT]
        models = node["properties"].get("models", [])
        assert [(model["name"], model["directory"]) for model in models] == files
        for model in models:
            assert model["url"].startswith("https://") and model["url"].endswith(f"/{model['name']}")


def test_layout_is_tidy(workflow: dict[str, Any]) -> None:
    """There is a note, no node covers another, and every node that runs lies in a group with a title."""
    boxes = {}
    for node in workflow["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes[f"{node['type']} {node['id']}"] = (x, y - TITLE_HEIGHT, x + width, y + height)
    for (name, a), (other, b) in combinations(boxes.items(), 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, f"{name} and {other} overlap"
    assert any(node["type"] in NOTES for node in workflow["nodes"])
    assert all(group["title"] for group in workflow["groups"])
    for node in server_nodes(workflow):
        left, top, right, bottom = boxes[f"{node['type']} {node['id']}"]
        assert any(
            x <= left and y <= top and right <= x + width and bottom <= y + height
            for x, y, width, height in (group["bounding"] for group in workflow["groups"])
        ), f"{node['type']} is in no group"


def test_has_a_thumbnail(workflow_file: Path) -> None:
    """A small picture of the same name, which the template browser shows."""
    path = workflow_file.with_suffix(".jpg")
    with Image.open(path) as image:
        assert image.format == "JPEG"
        assert max(image.size) <= THUMBNAIL_SIDE
    assert path.stat().st_size <= THUMBNAIL_BYTES
