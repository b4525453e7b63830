"""The shipped templates, blueprints and nodes in ComfyUI's real front end, in a browser without a window.

Screenshots land in output/front_end/.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo
import folder_paths
import pytest
from build_workflows import files
from front_end import SETTLE_MS, WAIT_MS, FrontEnd, browser_page
from host.comfy_env import CHECKOUT
from host.comfy_server import PACK_NAME, ComfyServer
from host.workflow_api import to_api
from PIL import Image
from workflow_builder.saved import CATEGORY

TEMPLATES = sorted((CHECKOUT / "workflows").glob("*.json"))
BLUEPRINTS = sorted((CHECKOUT / "subgraphs").glob("*.json"))
STYLE = CHECKOUT / "workflows" / "03 Style from a Picture (SD1.5).json"
COMFYUI = Path(folder_paths.__file__).parent
SHOTS = CHECKOUT / "output" / "front_end"
WIDTH, HEIGHT = 1440, 900
WIDGET_TEXT, NOTE_TEXT = 10.0, 8.5
"""The least size of letters in pixels. The front end draws those of widgets at 12, of notes at 10, times the scale."""
LETTERS_OF_WIDGETS = 12
NOT_KEPT = {"ds", "frontendVersion", "localized_name", "category"}
"""What saving changes: the view, and what goes with the language; a box's folder is for the node library alone."""
STEPS, SIDE = 2, 128
MOST_WIRES = 4

VIEW = """() => {
    const {ds, canvas} = window.app.canvas, corner = canvas.getBoundingClientRect()
    const note = document.querySelector(".comfy-markdown"), text = note?.querySelector("p")
    const grown = note ? note.getBoundingClientRect().width / note.offsetWidth : 1
    return {
        scale: ds.scale,
        note: text ? parseFloat(getComputedStyle(text).fontSize) * grown : null,
        cut: note ? note.scrollHeight > note.clientHeight + 1 : false,
        nodes: window.app.graph.nodes.map(({type, pos, size}) => ({
            type,
            left: corner.x + (pos[0] + ds.offset[0]) * ds.scale,
            top: corner.y + (pos[1] - 30 + ds.offset[1]) * ds.scale,
            right: corner.x + (pos[0] + size[0] + ds.offset[0]) * ds.scale,
            bottom: corner.y + (pos[1] + size[1] + ds.offset[1]) * ds.scale,
        })),
    }
}"""
ADD_LOADER = """(file) => {
    const load = window.LiteGraph.createNode("CheckpointLoaderSimple")
    window.app.graph.add(load)
    load.widgets[0].value = file
}"""
WIRE_UP = """() => {
    const find = (test) => window.app.graph.nodes.find(test)
    const load = find((node) => node.type === "CheckpointLoaderSimple"), box = find((node) => node.isSubgraphNode?.())
    const wires = [0, 1, 2].map((slot) => load.connect(slot, box, slot))
    wires.push(box.connect(0, find((node) => node.type === "SaveImage"), 0))
    const bottom = Math.max(...window.app.graph.nodes.map((node) => node === box ? 0 : node.pos[1] + node.size[1]))
    load.pos = [0, bottom + 100]
    box.pos = [500, bottom + 100]
    window.app.canvas.deselectAll()
    window.app.extensionManager.command.execute("Comfy.Canvas.FitView") // pictures are shown of nodes in view
    return wires.filter((wire) => wire).length
}"""
SET = """(values) => {
    const box = window.app.graph.nodes.find((node) => node.isSubgraphNode?.())
    for (const [name, value] of Object.entries(values)) box.widgets.find((widget) => widget.name === name).value = value
}"""
SAVED_PICTURE = """() => {
    const node = window.app.graph.nodes.find((node) => node.type === "SaveImage")
    return node?.imgs?.[0]?.naturalWidth ? node.imgs[0].src : null
}"""
SEED = """() => window.app.graph.nodes.find((node) => node.isSubgraphNode?.())
    .widgets.find((widget) => widget.name === "seed").value"""
ADAIN_OF_UNLIKE_LATENTS = """() => {
    const [small, large, adain, save] = window.app.graph.nodes
    small.connect(0, adain, 0)
    large.connect(0, adain, 1)
    adain.connect(0, save, 0)
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with this pack and the demo's model. The other models that the templates name exist, and are empty."""
    base = tmp_path_factory.mktemp("frontend")
    demo.prepare_base(base)
    for path in TEMPLATES:
        for node in json.loads(path.read_text(encoding="utf-8"))["nodes"]:
            for model in node["properties"].get("models", []):
                file = base / "models" / model["directory"] / model["name"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.touch()
    with ComfyServer(COMFYUI, base, arguments=["--cpu"]) as running:
        yield running


@pytest.fixture(scope="module")
def front_end(server: ComfyServer) -> Iterator[FrontEnd]:
    """The front end, open in a browser."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    with browser_page(WIDTH, HEIGHT) as page:
        yield FrontEnd(page, server)


@pytest.fixture(params=[*TEMPLATES, *BLUEPRINTS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def shipped_file(request: pytest.FixtureRequest) -> Path:
    """Each template and each blueprint in turn."""
    return request.param


def test_the_pack_loads_in_the_page(front_end: FrontEnd) -> None:
    """Nothing that the page complained about while it loaded comes from the pack. Runs first."""
    assert not [line for line in front_end.complaints if PACK_NAME in line]


def test_files_are_what_the_builder_makes(server: ComfyServer) -> None:
    """Templates and blueprints are changed in scripts/workflow_builder/, and written by scripts/build_workflows.py."""
    shipped = {path.relative_to(CHECKOUT).as_posix(): path for path in (*TEMPLATES, *BLUEPRINTS)}
    made = files(server.object_info())
    assert made.keys() == shipped.keys()
    for name, text in made.items():
        assert shipped[name].read_text(encoding="utf-8") == text, f"{name}: run python scripts/build_workflows.py"


def test_templates_are_listed(front_end: FrontEnd, server: ComfyServer) -> None:
    """The template browser gets every template and its thumbnail."""
    address = f"{server.url}/api/workflow_templates"
    names = front_end.page.request.get(address).json()[PACK_NAME]
    assert sorted(names) == [path.stem for path in TEMPLATES]
    for name in names:
        assert front_end.page.request.get(f"{address}/{PACK_NAME}/{name}.json").ok
        thumbnail = front_end.page.request.get(f"{address}/{PACK_NAME}/{name}.jpg")
        assert thumbnail.headers["content-type"] == "image/jpeg"


def without(content: Any, names: set[str]) -> Any:
    """The same without entries of these names, at any depth."""
    if isinstance(content, dict):
        return {name: without(value, names) for name, value in content.items() if name not in names}
    return [without(value, names) for value in content] if isinstance(content, list) else content


def check_legible(view: dict[str, Any]) -> None:
    """All nodes are in view, beside the bars of the front end; letters are large enough, and no note is cut."""
    assert view["scale"] * LETTERS_OF_WIDGETS >= WIDGET_TEXT
    left_bar, top_bar = 60, 92
    for node in view["nodes"]:
        assert node["left"] >= left_bar and node["top"] >= top_bar, node
        assert node["right"] <= WIDTH and node["bottom"] <= HEIGHT, node
    if view["note"] is not None:
        assert view["note"] >= NOTE_TEXT
        assert not view["cut"]


def test_opens_as_it_was_shipped(front_end: FrontEnd, server: ComfyServer, shipped_file: Path) -> None:
    """No error in the console or on the page; every node, in boxes too, has the class that is registered for it.

    All of it can be read. Saving gives what was opened. The converter of the scripts makes the front end's own prompt.
    """
    text = shipped_file.read_text(encoding="utf-8")
    front_end.open_template(text, shipped_file.stem)
    front_end.page.screenshot(path=SHOTS / f"{shipped_file.stem}.png")
    assert front_end.complaints == []
    assert front_end.element("error-overlay").count() == 0
    nodes = front_end.nodes()
    assert len(nodes) > 5
    for node in nodes:
        assert node["registered"], node["type"]
        assert node["outlines"] == [], node["type"]
        if node["type"].startswith("AD"):
            assert node["module"] == f"custom_nodes.{PACK_NAME}"
    check_legible(front_end.page.evaluate(VIEW))
    workflow = json.loads(text)
    kept = {"BlueprintDescription", "BlueprintSearchAliases", "linearData"}
    saved = front_end.saved()
    assert saved["extra"].keys() - NOT_KEPT <= kept
    assert without(saved, NOT_KEPT) == without(workflow, NOT_KEPT)
    assert to_api(workflow, server.object_info()) == front_end.prompt()


def test_app_mode_shows_the_settings(front_end: FrontEnd) -> None:
    """Every setting of the box, by its label."""
    front_end.open_template(STYLE.read_text(encoding="utf-8"), STYLE.stem)
    box = next(node for node in json.loads(STYLE.read_text(encoding="utf-8"))["nodes"] if "-" in node["type"])
    toggle = "() => window.app.extensionManager.command.execute('Comfy.ToggleLinear')"
    front_end.page.evaluate(toggle)
    try:
        for socket in box["inputs"]:
            if "widget" in socket:
                label = front_end.page.get_by_text(socket["label"], exact=True).locator("visible=true")
                label.first.wait_for()
        front_end.page.screenshot(path=SHOTS / "app mode.png")
    finally:
        front_end.page.evaluate(toggle)


def test_a_blueprint_makes_a_picture_in_the_default_graph(front_end: FrontEnd) -> None:
    """Out of the node library, in the pack's folder, into ComfyUI's default graph: four wires, Run, and a picture.

    The next picture will have another seed.
    """
    page = front_end.page
    page.evaluate("() => window.app.extensionManager.command.execute('Comfy.LoadDefaultWorkflow')")
    page.wait_for_function("window.app.graph.nodes.some((node) => node.type === 'SaveImage')")
    page.evaluate(ADD_LOADER, demo.CHECKPOINT)
    page.keyboard.press("n")
    for folder in ("Comfy Blueprints", CATEGORY):
        page.wait_for_timeout(SETTLE_MS)  # the tree moves while it opens
        item = page.get_by_role("treeitem", name=folder, exact=True)
        item.click()
        item.evaluate("(item) => item.scrollIntoView({block: 'start'})")  # what lies far below is not drawn
    leaves = {path.stem: page.get_by_role("treeitem").filter(has_text=path.stem) for path in BLUEPRINTS}
    for leaf in leaves.values():
        leaf.wait_for()
    page.screenshot(path=SHOTS / "node library.png")
    leaves["Texture from a Picture"].click()
    page.mouse.click(WIDTH // 2, HEIGHT - 150)
    page.wait_for_function("window.app.graph.nodes.some((node) => node.isSubgraphNode?.())")
    page.keyboard.press("n")
    assert page.evaluate(WIRE_UP) == MOST_WIRES
    page.evaluate(SET, {"steps": STEPS, "width": SIDE, "height": SIDE})
    seed = page.evaluate(SEED)
    front_end.element("queue-button").click()
    source = page.wait_for_function(SAVED_PICTURE, timeout=5 * WAIT_MS).json_value()
    page.screenshot(path=SHOTS / "blueprint in the default graph.png")
    with Image.open(io.BytesIO(page.request.get(source).body())) as picture:
        assert picture.size == (SIDE, SIDE)
        assert max(high - low for low, high in picture.convert("RGB").getextrema()) > 100, "a flat picture"
    assert page.evaluate(SEED) != seed


def test_a_missing_node_would_be_noticed(front_end: FrontEnd) -> None:
    """What test_opens_as_it_was_shipped looks for is there when a node in a box is missing."""
    front_end.open(STYLE.read_text(encoding="utf-8").replace("ADGuidedKSampler", "ADNoSuchNode"))
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
