"""The shipped workflows and the nodes in ComfyUI's real front end, in a browser without a window."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import folder_paths
import pytest
from demo import CHECKPOINT
from front_end import WAIT_MS, FrontEnd, browser_page
from host.comfy_env import CHECKOUT
from host.comfy_server import PACK_NAME, ComfyServer
from host.workflow_api import to_api

WORKFLOWS = sorted((CHECKOUT / "workflows").glob("*.json"))
STYLE = CHECKOUT / "workflows" / "style_text_to_image_sd15.json"
COMFYUI = Path(folder_paths.__file__).parent
ADAIN_OF_UNLIKE_LATENTS = """() => {
    const [small, large, adain, save] = window.app.graph.nodes
    small.connect(0, adain, 0)
    large.connect(0, adain, 1)
    adain.connect(0, save, 0)
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with this pack. The files that the workflows name exist; models among them are empty."""
    base = tmp_path_factory.mktemp("frontend")
    models, pictures = {f"checkpoints/{CHECKPOINT}"}, set()
    for path in WORKFLOWS:
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            models |= {f"{model['directory']}/{model['name']}" for model in node["properties"].get("models", [])}
            if node["type"] == "LoadImage":
                pictures.add(node["widgets_values"][0])
    for name in models:
        file = base / "models" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (base / "input").mkdir()
    for name in pictures:
        shutil.copy(COMFYUI / "input" / "example.png", base / "input" / name)
    with ComfyServer(COMFYUI, base, arguments=["--cpu"]) as running:
        yield running


@pytest.fixture(scope="module")
def front_end(server: ComfyServer) -> Iterator[FrontEnd]:
    """The front end, open in a browser."""
    with browser_page() as page:
        yield FrontEnd(page, server)


@pytest.fixture(params=WORKFLOWS, ids=lambda path: path.stem)
def workflow_file(request: pytest.FixtureRequest) -> Path:
    """Each workflow in turn."""
    return request.param


def test_the_pack_loads_in_the_page(front_end: FrontEnd) -> None:
    """Nothing that the page complained about while it loaded comes from the pack. Runs first."""
    assert not [line for line in front_end.complaints if PACK_NAME in line]


def test_templates_are_listed(front_end: FrontEnd, server: ComfyServer) -> None:
    """The template browser gets every workflow and its thumbnail."""
    address = f"{server.url}/api/workflow_templates"
    names = front_end.page.request.get(address).json()[PACK_NAME]
    assert sorted(names) == [path.stem for path in WORKFLOWS]
    for name in names:
        assert front_end.page.request.get(f"{address}/{PACK_NAME}/{name}.json").ok
        thumbnail = front_end.page.request.get(f"{address}/{PACK_NAME}/{name}.jpg")
        assert thumbnail.headers["content-type"] == "image/jpeg"


def test_workflow_opens(front_end: FrontEnd, workflow_file: Path) -> None:
    """No error in the console or on the page; every node has the class that is registered for it."""
    front_end.open(workflow_file.read_text(encoding="utf-8"))
    assert front_end.complaints == []
    assert front_end.element("error-overlay").count() == 0
    nodes = front_end.nodes()
    assert len(nodes) > 5
    for node in nodes:
        assert node["registered"], node["type"]
        assert node["outlines"] == [], node["type"]
        if node["type"].startswith("AD"):
            assert node["module"] == f"custom_nodes.{PACK_NAME}"


def test_workflow_is_saved_as_it_was(front_end: FrontEnd, workflow_file: Path) -> None:
    """Opening and saving changes nothing but the view: widget values, links and layout survive.

    Sockets without a link do not count: nodes may get more optional ones.
    """
    text = workflow_file.read_text(encoding="utf-8")
    front_end.open(text)
    expected, saved = json.loads(text), front_end.saved()
    for workflow in (expected, saved):
        del workflow["extra"]
        for node in workflow["nodes"]:
            node["inputs"] = [socket for socket in node["inputs"] if socket["link"] is not None]
    assert saved == expected


def test_converter_agrees_with_the_front_end(front_end: FrontEnd, server: ComfyServer, workflow_file: Path) -> None:
    """scripts/host/workflow_api.py makes the prompt that the front end makes."""
    text = workflow_file.read_text(encoding="utf-8")
    front_end.open(text)
    assert to_api(json.loads(text), server.object_info()) == front_end.prompt()


def test_a_missing_node_would_be_noticed(front_end: FrontEnd) -> None:
    """What test_workflow_opens looks for is there when a node is missing."""
    front_end.open(STYLE.read_text(encoding="utf-8").replace("ADLossGuider", "ADNoSuchNode"))
    front_end.element("error-overlay").wait_for()
    assert not all(node["registered"] for node in front_end.nodes())


def test_a_missing_checkpoint_can_be_downloaded(front_end: FrontEnd) -> None:
    """The front end offers the file where the loader says where it comes from."""
    front_end.open(STYLE.read_text(encoding="utf-8").replace("v1-5-pruned-emaonly-fp16", "absent"))
    assert "absent.safetensors" in front_end.element("error-overlay").inner_text()
    front_end.element("error-overlay-see-errors").click()
    front_end.element("missing-model-download").wait_for()


def test_every_node_can_be_added(front_end: FrontEnd, server: ComfyServer) -> None:
    """Each node of the pack can be put on the canvas and saved with a value for every widget."""
    types = [
        name for name, info in server.object_info().items() if info["python_module"] == f"custom_nodes.{PACK_NAME}"
    ]
    assert types
    front_end.add(*types)
    assert front_end.complaints == []
    assert [node["type"] for node in front_end.nodes()] == types
    assert to_api(front_end.saved(), server.object_info()) == front_end.prompt()


def test_an_error_is_shown_on_its_node(front_end: FrontEnd) -> None:
    """Running a graph with a wrong input outlines the node at fault and shows our text."""
    front_end.add("EmptyLatentImage", "EmptySD3LatentImage", "ADAdaINLatent", "SaveLatent")
    front_end.page.evaluate(ADAIN_OF_UNLIKE_LATENTS)
    front_end.element("queue-button").click()
    error = front_end.page.wait_for_function(
        "() => window.app.extensionManager.lastExecutionError", timeout=WAIT_MS
    ).json_value()
    assert (error["node_type"], error["exception_type"]) == ("ADAdaINLatent", "ValueError")
    outlined = [node["type"] for node in front_end.nodes() if "executionError" in node["outlines"]]
    assert outlined == ["ADAdaINLatent"]
    front_end.element("error-overlay-see-errors").click()
    front_end.page.get_by_text(error["exception_message"].strip()).first.wait_for()
