"""Make the pictures of the help pages that show where a node belongs: the real front end's canvas, nodes folded.

    python scripts/help_wiring.py

Needs Chromium and the test tools' Python. They are written to web/docs/images/.
"""

from __future__ import annotations

import io
import json
import shutil
from typing import TYPE_CHECKING, Any

from demo import BASE, CHECKOUT, prepare_base
from host.comfy_env import SetupError, leave, provision, rerun_in

if TYPE_CHECKING:
    from PIL import Image

IMAGES = CHECKOUT / "web" / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
VIEW, WAIT_MS, SETTLE_MS = {"width": 1440, "height": 900}, 60_000, 1500
MARGIN, SCALE = 14, 2
"""Pixels around the nodes, and of the screen to one of the page."""

WIRINGS: dict[str, tuple[list[tuple[str, int, int]], list[tuple[int, int, str]]]] = {
    "ADApplyGuidance": (
        [
            ("CheckpointLoaderSimple", 0, 0),
            ("LoraLoaderModelOnly", 60, 60),
            ("ADCaptureReferenceAttention", 250, 60),
            ("ADApplyGuidance", 150, 130),
            ("KSampler", 270, 200),
        ],
        [(0, 1, "model"), (1, 3, "model"), (2, 3, "style"), (3, 4, "model")],
    ),
    "ADLossGuider": (
        [
            ("CheckpointLoaderSimple", 0, 0),
            ("ADCaptureReferenceAttention", 200, 0),
            ("ADLossGuider", 110, 75),
            ("RandomNoise", 20, 150),
            ("SamplerCustomAdvanced", 250, 150),
        ],
        [(0, 2, "model"), (1, 2, "style"), (2, 4, "guider"), (3, 4, "noise")],
    ),
}
"""Nodes with their places, and links: from which node's first output to which input of which node."""

BUILD = """async ([nodes, links]) => {
    await window.app.extensionManager.command.execute("Comfy.NewBlankWorkflow")
    const made = nodes.map(([type, x, y]) => {
        const node = window.LiteGraph.createNode(type)
        window.app.graph.add(node)
        node.pos = [x, y]
        return node
    })
    for (const [from, to, input] of links) {
        const target = made[to].inputs.findIndex((slot) => slot.name === input)
        if (target < 0) throw new Error(`no input ${input}`)
        made[from].connect(0, made[to], target)
    }
    made.forEach((node) => node.collapse())
    const view = window.app.canvas.ds
    view.scale = 1
    view.offset = [300, 300]
    window.app.canvas.setDirty(true, true)
}"""
FRAME = """() => {
    const canvas = window.app.canvas, edges = [[], [], [], []]
    for (const node of window.app.graph.nodes) {
        const [x, y, width, height] = node.boundingRect
        edges[0].push(x); edges[1].push(y); edges[2].push(x + width); edges[3].push(y + height)
    }
    const rectangle = canvas.canvas.getBoundingClientRect()
    const [left, top] = [Math.min(...edges[0]), Math.min(...edges[1])]
    const [right, bottom] = [Math.max(...edges[2]), Math.max(...edges[3])]
    const [x, y] = [rectangle.x + canvas.ds.offset[0], rectangle.y + canvas.ds.offset[1]]
    return [x + left, y + top, right - left, bottom - top]
}"""


def draw(page: Any, name: str) -> Image.Image:
    """The canvas around the nodes of one wiring."""
    from PIL import Image

    nodes, links = WIRINGS[name]
    page.evaluate(BUILD, [nodes, links])
    page.wait_for_timeout(SETTLE_MS)
    left, top, width, height = page.evaluate(FRAME)
    clip = {"x": left - MARGIN, "y": top - MARGIN, "width": width + 2 * MARGIN, "height": height + 2 * MARGIN}
    return Image.open(io.BytesIO(page.screenshot(clip=clip))).convert("RGB")


def main() -> None:
    """Provision, then run in the provisioned Python."""
    env = provision()
    rerun_in(env, __file__, [])

    from host.comfy_server import ComfyServer, device_arguments, stop_signals_raise
    from playwright.sync_api import sync_playwright

    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        leave(SetupError(f"None of these is on the PATH: {', '.join(BROWSERS)}"))
    IMAGES.mkdir(parents=True, exist_ok=True)
    prepare_base(BASE)
    with (
        stop_signals_raise(),
        ComfyServer(env.comfyui, BASE, arguments=device_arguments()) as server,
        sync_playwright() as playwright,
    ):
        chromium = playwright.chromium.launch(executable_path=browser, args=["--disable-gpu", "--disable-quic"])
        page = chromium.new_page(viewport=VIEW, device_scale_factor=SCALE)
        page.request.post(f"{server.url}/settings/Comfy.TutorialCompleted", data="true")
        page.goto(server.url)
        page.wait_for_function("window.app?.vueAppReady", timeout=WAIT_MS)
        page.wait_for_load_state("networkidle")
        for name in WIRINGS:
            file = IMAGES / f"{name}.png"
            draw(page, name).quantize(64).save(file, optimize=True)
            print(json.dumps({"picture": name, "bytes": file.stat().st_size}), flush=True)
        chromium.close()


if __name__ == "__main__":
    main()
