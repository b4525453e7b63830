"""What an artist meets in ComfyUI's real front end: help, search, languages, errors on their node, Cancel, the map.

One server and one page for all; screenshots land in output/front_end/.
"""

from __future__ import annotations

import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import demo
import folder_paths
import help_templates
import numpy as np
import pytest
from front_end import WAIT_MS, FrontEnd, browser_page
from host.comfy_env import CHECKOUT
from host.comfy_server import PACK_NAME, ComfyServer
from PIL import Image

COMFYUI = Path(folder_paths.__file__).parent
DOCS = CHECKOUT / "web" / "docs"
SHOTS = CHECKOUT / "output" / "front_end"
NODES = sorted(path.stem for path in DOCS.glob("*.md"))
LANGUAGES = sorted(path.name for path in (CHECKOUT / "locales").glob("*/") if path.name != "en")
PLAIN = ("ADCaptureReferenceAttention", "ADGuidedKSampler", "ADOptimizeLatent")
TECHNICAL = ("ADLossGuider", "ADApplyGuidance", "ADInjectReferenceKV")
WORDS = {
    "zh": ("风格", "纹理", "注意力蒸馏"),
    "zh-TW": ("風格", "紋理", "注意力蒸餾"),
    "ja": ("スタイル", "テクスチャ", "アテンション蒸留"),
}
"""Style, texture, attention distillation: the words that artists look for."""
FIRST = 5
"""What can be seen of a search without scrolling, and without reading on."""
SIDE, ITERATIONS = 256, 100
"""Of the run that is cancelled: pixels, and iterations of one step."""

SHOW_HELP = """async (type) => {
    await window.app.extensionManager.command.execute("Comfy.NewBlankWorkflow")
    const node = window.LiteGraph.createNode(type), canvas = window.app.canvas
    window.app.graph.add(node)
    canvas.ds.reset()
    node.pos = [350, 150]  // its buttons are above it
    canvas.selectNode(node)
}"""
CUT_OFF = """(panel) => [...panel.querySelectorAll("*")]
    .filter((part) => part.getBoundingClientRect().right > panel.getBoundingClientRect().right + 1)
    .map((part) => part.outerHTML)"""
PICTURES_SHOWN = "(panel) => [...panel.querySelectorAll('img')].map((each) => each.complete && each.naturalWidth)"
SHOWN_IMAGES = """(type) => window.app.graph.nodes.filter((node) => node.type === type)
    .map((node) => node.imgs?.[0]?.naturalWidth ?? 0)"""
OPEN = """async (prompt) => {
    await window.app.loadApiJson(prompt, "made by a test")
    const heard = window.heard = {}
    for (const kind of ["progress", "execution_success", "execution_interrupted"])
        window.app.api.addEventListener(kind, (event) => { heard[kind] = event.detail })
}"""
BRING_INTO_VIEW = """(type) => {
    const canvas = window.app.canvas, node = window.app.graph.nodes.find((node) => node.type === type)
    canvas.ds.scale = 1
    canvas.centerOnNode(node)
    const corner = canvas.canvas.getBoundingClientRect(), {offset} = canvas.ds
    return {x: corner.x + node.pos[0] + offset[0], y: corner.y + node.pos[1] + offset[1],
            width: node.size[0], height: node.size[1]}
}"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with this pack and the demo model."""
    base = tmp_path_factory.mktemp("help")
    demo.prepare_base(base)
    with ComfyServer(COMFYUI, base, arguments=["--cpu"]) as running:
        yield running


@pytest.fixture(scope="module")
def front_end(server: ComfyServer) -> Iterator[FrontEnd]:
    """The front end in English, open in a browser of the size of a laptop's."""
    SHOTS.mkdir(parents=True, exist_ok=True)
    with browser_page(1440, 900) as page:
        yield FrontEnd(page, server)


def command(front_end: FrontEnd, name: str) -> None:
    """What a key or a menu of the front end does."""
    front_end.page.evaluate("(name) => window.app.extensionManager.command.execute(name)", name)


def display_names(server: ComfyServer) -> dict[str, str]:
    """The English names of the pack's nodes by id."""
    info = server.object_info()
    of_pack = f"custom_nodes.{PACK_NAME}"
    return {name: node["display_name"] for name, node in info.items() if node["python_module"] == of_pack}


def show_help(front_end: FrontEnd, node: str) -> Any:
    """Put a node on the canvas and press its Info button; the panel that opens."""
    front_end.complaints.clear()
    front_end.page.evaluate(SHOW_HELP, node)
    front_end.element("info-button").click()
    panel = front_end.page.locator(".node-help-content")
    panel.locator("h1").wait_for()
    front_end.page.wait_for_load_state("networkidle")
    return panel


def heading(page: Path) -> str:
    """The title of a help page."""
    return page.read_text(encoding="utf-8").partition("\n")[0].removeprefix("# ")


@pytest.mark.parametrize("node", NODES)
def test_help_is_shown(front_end: FrontEnd, node: str) -> None:
    """All of the page and its picture, and nothing of it cut off by the narrow panel."""
    panel, source = show_help(front_end, node), (DOCS / f"{node}.md").read_text(encoding="utf-8")
    front_end.page.screenshot(path=SHOTS / f"help_{node}.png")
    assert panel.locator("h1").inner_text() == heading(DOCS / f"{node}.md")
    assert panel.locator("h2").all_inner_texts() == re.findall(r"^## (.+)$", source, re.MULTILINE)
    assert panel.locator("li").count() == len(re.findall(r"^- ", source, re.MULTILINE))
    pictures = panel.evaluate(PICTURES_SHOWN)
    assert len(pictures) == source.count("![") and all(pictures), pictures
    assert panel.evaluate(CUT_OFF) == []
    assert help_templates.END not in panel.inner_text()
    # The front end asks for a page of its own language first: English ones are the pages without one.
    assert [line for line in front_end.complaints if not line.endswith(f"/{node}/en.md")] == []


def found_by_search(front_end: FrontEnd, words: str, shot: str = "") -> list[str]:
    """Names of the nodes that the search box lists, best first."""
    page = front_end.page
    command(front_end, "Workspace.SearchBox.Toggle")
    box = page.get_by_role("dialog").locator("input").first
    box.wait_for()
    box.fill(words)
    page.wait_for_timeout(1000)  # it waits for the typing to end
    if shot:
        page.screenshot(path=SHOTS / shot)
    # The first line of an entry is its name; the others are where it comes from and what it does.
    names = [text.partition("\n")[0] for text in front_end.element("result-item").all_inner_texts()]
    page.keyboard.press("Escape")
    box.wait_for(state="hidden")
    return names


@pytest.mark.parametrize("words", ["texture", "style", "style transfer", "style reference"])
def test_search_finds_what_artists_want(front_end: FrontEnd, server: ComfyServer, words: str) -> None:
    """Ours are among the first five, nodes to begin with or blueprints, and technical nodes come behind them."""
    names, found = display_names(server), found_by_search(front_end, words, f"search_{words.replace(' ', '_')}.png")
    blueprints = {path.stem for path in (CHECKOUT / "subgraphs").glob("*.json")}
    plain, technical = {names[node] for node in PLAIN}, {names[node] for node in TECHNICAL}
    assert len((plain | blueprints) & set(found[:FIRST])) >= 2, found
    places = [found.index(name) for name in plain if name in found]
    assert len(places) == len(plain), found
    assert max(places) < min([found.index(name) for name in technical if name in found], default=len(found)), found


def test_search_for_the_method_finds_every_node(front_end: FrontEnd, server: ComfyServer) -> None:
    """By its name, nodes that say nothing of it in theirs."""
    assert set(display_names(server).values()) <= set(found_by_search(front_end, "attention distillation"))


def guided(**settings: Any) -> dict[str, Any]:
    """An API prompt: a small guided run of the demo model on an example texture, shown by a preview."""
    sampler = {
        "model": ["1", 0], "positive": ["2", 0], "negative": ["2", 0], "latent_image": ["5", 0], "style": ["4", 0],
        "seed": 0, "steps": 4, "cfg": 1, "sampler_name": "euler", "scheduler": "karras", "denoise": 1,
        "learning_rate": 0.1, "iterations": 2, "adain": False, "content_weight": 0.25, "attention_scale": 1,
        "content_loss": "query", "start_percent": 0, "end_percent": 1, "lr_schedule": "linear",
    }  # fmt: skip
    capture = {"model": ["1", 0], "image": ["3", 0], "vae": ["1", 2], "conditioning": ["2", 0], "weight": 1}
    capture |= {"layers": settings.pop("layers", "auto")}
    nodes = [
        ("CheckpointLoaderSimple", {"ckpt_name": demo.CHECKPOINT}),
        ("CLIPTextEncode", {"clip": ["1", 1], "text": ""}),
        ("ADExampleReference", {"picture": "texture: scales"}),
        ("ADCaptureReferenceAttention", capture),
        ("EmptyLatentImage", {"width": SIDE, "height": SIDE, "batch_size": 1}),
        ("ADGuidedKSampler", sampler | settings),
        ("VAEDecode", {"samples": ["6", 0], "vae": ["1", 2]}),
        ("PreviewImage", {"images": ["7", 0]}),
    ]
    return {str(i): {"class_type": kind, "inputs": inputs} for i, (kind, inputs) in enumerate(nodes, 1)}


LINE = (255, 166, 64)


def run(front_end: FrontEnd, prompt: dict[str, Any]) -> None:
    """Open a prompt as a workflow and press Run; what the server tells meanwhile is kept in the page."""
    front_end.page.evaluate(OPEN, prompt)
    front_end.element("queue-button").click()


def test_a_wrong_layer_is_shown_on_its_node(front_end: FrontEnd) -> None:
    """Layer 99 in Capture: its node is outlined, and the text says which layers there are."""
    run(front_end, guided(layers="99"))
    error = front_end.page.wait_for_function(
        "() => window.app.extensionManager.lastExecutionError", timeout=WAIT_MS
    ).json_value()
    assert (error["node_type"], error["exception_type"]) == ("ADCaptureReferenceAttention", "ValueError")
    assert "99" in error["exception_message"]
    outlined = [node["type"] for node in front_end.nodes() if "executionError" in node["outlines"]]
    assert outlined == ["ADCaptureReferenceAttention"]
    front_end.element("error-overlay-see-errors").click()
    front_end.page.get_by_text(error["exception_message"].strip()).first.wait_for()
    front_end.page.evaluate(BRING_INTO_VIEW, "ADCaptureReferenceAttention")
    front_end.page.wait_for_timeout(500)
    front_end.page.screenshot(path=SHOTS / "layer_99.png")


def shown(front_end: FrontEnd, kind: str) -> Image.Image:
    """What can be seen of the only node of a type, once it has a picture to show."""
    page = front_end.page
    page.wait_for_function("() => window.heard.execution_success", timeout=3 * WAIT_MS)
    page.evaluate(BRING_INTO_VIEW, kind)
    page.wait_for_function(f"() => ({SHOWN_IMAGES})('{kind}').every(Boolean)", timeout=WAIT_MS)
    place = page.evaluate(BRING_INTO_VIEW, kind)  # it has grown
    page.wait_for_timeout(500)  # until the canvas is drawn once more
    return Image.open(io.BytesIO(page.screenshot(clip=place))).convert("RGB")


def test_the_attention_map_is_shown_on_the_canvas(front_end: FrontEnd) -> None:
    """The map of the reference itself, which looks at its own places: all the chart's colours."""
    prompt = guided()
    del prompt["5"], prompt["7"]
    prompt["6"] = {"class_type": "VAEEncode", "inputs": {"pixels": ["3", 0], "vae": ["1", 2]}}
    of_reference = {"model": ["1", 0], "style": ["4", 0], "latent": ["6", 0], "conditioning": ["2", 0], "layer": "mean"}
    prompt["9"] = {"class_type": "ADAttentionMap", "inputs": of_reference}
    prompt["8"]["inputs"]["images"] = ["9", 0]
    run(front_end, prompt)
    picture = shown(front_end, "PreviewImage")
    front_end.page.screenshot(path=SHOTS / "attention_map.png")
    hue, saturation, value = np.asarray(picture.convert("HSV")).reshape(-1, 3).T
    hues = {int(each) for each in hue[(saturation > 64) & (value > 64)] // 16}
    assert len(hues) > 6, hues


def test_the_losses_are_drawn_on_the_sampler(front_end: FrontEnd) -> None:
    """After a run, in the line's own colour (guidance/curve.py)."""
    run(front_end, guided(seed=1))
    picture = np.asarray(shown(front_end, "ADGuidedKSampler")).astype(int)
    front_end.page.screenshot(path=SHOTS / "losses.png")
    of_line = np.abs(picture - LINE).sum(-1) < 60
    assert of_line.sum() > 200
    assert np.ptp(of_line.nonzero()[1]) > picture.shape[1] / 3, "from the first step to the last"


def test_cancel_stops_within_an_iteration(front_end: FrontEnd, server: ComfyServer) -> None:
    """The button in the front end, pressed while a step's many iterations run: their rest is not waited for.

    How long an iteration takes here is read from the log of a short run before; when the run ended, in the server's
    own record. A quarter of the step leaves room for a busy machine.
    """
    run(front_end, guided(seed=1))
    shown(front_end, "PreviewImage")
    iterations, update_s = re.findall(r"updates of (\d+) iterations, ([\d.]+) s each", server.log())[-1]
    iteration_s = float(update_s) / int(iterations)

    run(front_end, guided(seed=2, iterations=ITERATIONS))
    # The model has made the first step, and what follows is guidance.
    front_end.page.wait_for_function("() => window.heard.progress?.value >= 1", timeout=3 * WAIT_MS)
    front_end.page.wait_for_timeout(1000)
    pressed = time.time()
    front_end.page.get_by_label("Cancel current run").click()
    front_end.page.wait_for_function("() => window.heard.execution_interrupted", timeout=3 * WAIT_MS)
    records = front_end.page.request.get(f"{server.url}/history").json().values()
    messages = [message for record in records for message in record["status"]["messages"]]
    (ended,) = (data["timestamp"] / 1000 for kind, data in messages if kind == "execution_interrupted")
    assert ended - pressed < ITERATIONS * iteration_s / 4, (ended - pressed, iteration_s)


@pytest.fixture(scope="module", params=LANGUAGES)
def language(request: pytest.FixtureRequest, front_end: FrontEnd, server: ComfyServer) -> str:
    """Each language that the pack has, chosen in the settings; these tests are the last, for it stays chosen."""
    front_end.page.request.post(f"{server.url}/settings/Comfy.Locale", data=json.dumps(request.param))
    front_end.page.reload()
    front_end.page.wait_for_function("window.app?.vueAppReady", timeout=WAIT_MS)
    front_end.page.wait_for_load_state("networkidle")
    return request.param


def translated(language: str) -> dict[str, Any]:
    """The pack's nodes in a language."""
    return json.loads((CHECKOUT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


def test_names_are_shown_in_the_language(front_end: FrontEnd, language: str) -> None:
    """In the node library, folder by folder."""
    page, nodes = front_end.page, translated(language)
    categories = json.loads((CHECKOUT / "locales" / language / "main.json").read_text(encoding="utf-8"))
    folders = categories["nodeCategories"]
    command(front_end, "Workspace.ToggleSidebarTab.node-library")
    for name in ("attention distillation", *(name for name in folders if name != "attention distillation")):
        page.get_by_text(folders[name], exact=True).first.click()
    for node in nodes.values():
        page.get_by_text(node["display_name"], exact=True).first.wait_for()
    page.get_by_text(nodes[PLAIN[0]]["display_name"], exact=True).first.scroll_into_view_if_needed()
    page.screenshot(path=SHOTS / f"library_{language}.png")
    command(front_end, "Workspace.ToggleSidebarTab.node-library")


def test_search_finds_the_nodes_by_the_words_of_the_language(front_end: FrontEnd, language: str) -> None:
    """The nodes to begin with are among the first results."""
    names = {translated(language)[node]["display_name"] for node in PLAIN}
    for number, words in enumerate(WORDS[language]):
        found = found_by_search(front_end, words, f"search_{language}_{number}.png")
        assert names <= set(found), (words, found)
        assert names & set(found[:FIRST]), (words, found)


@pytest.mark.parametrize("node", PLAIN)
def test_help_is_shown_in_the_language(front_end: FrontEnd, language: str, node: str) -> None:
    """The page of that language, with the same picture."""
    panel = show_help(front_end, node)
    front_end.page.screenshot(path=SHOTS / f"help_{language}_{node}.png")
    assert panel.locator("h1").inner_text() == heading(DOCS / node / f"{language}.md")
    assert all(panel.evaluate(PICTURES_SHOWN)) and panel.evaluate(CUT_OFF) == []
    assert front_end.complaints == []
