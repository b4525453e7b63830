"""ComfyUI's real front end in a browser without a window: open workflows, add nodes, read what is shown."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from host.comfy_server import ComfyServer

sync_api = pytest.importorskip("playwright.sync_api", reason="the Python package playwright is missing")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
if CHROMIUM is None:
    pytest.skip(f"none of these is on the PATH: {', '.join(BROWSERS)}", allow_module_level=True)

BROWSER_ARGUMENTS = ["--disable-gpu", "--disable-quic", "--disable-sync"]
WAIT_MS = 60_000
SETTLE_MS = 300
"""Complaints about a workflow may come a little after it has opened."""
MODEL_SIZES = "Content Security Policy"
"""The front end asks the web for the size of missing models, those of its own first workflow too; that is blocked."""

OPEN = """async ([name, text]) => {
    await window.app.handleFile(new File([text], name, {type: "application/json"}), "file_button")
}"""
OPEN_TEMPLATE = """async ([name, text]) => {
    await window.app.loadGraphData(JSON.parse(text), true, true, name, {openSource: "template"})
}"""
# Both give text, as the front end writes it: Playwright would turn values that are left out into nulls.
SAVED = "async () => JSON.stringify((await window.app.graphToPrompt()).workflow, null, 2)"
PROMPT = "async () => JSON.stringify((await window.app.graphToPrompt()).output)"
NODES = """() => [...window.app.graph.nodes, ...[...window.app.graph.subgraphs.values()].flatMap((box) => box.nodes)]
  .map((node) => ({
    type: node.type,
    registered: node.type in window.LiteGraph.registered_node_types,
    module: node.constructor.nodeData?.python_module,
    outlines: Object.keys(node.strokeStyles).filter((key) => node.strokeStyles[key].call(node)),
}))"""
ADD_NODES = """async (types) => {
    await window.app.extensionManager.command.execute("Comfy.NewBlankWorkflow")
    for (const type of types) window.app.graph.add(window.LiteGraph.createNode(type))
}"""


class FrontEnd:
    """A page with the front end in it, and what it complained about."""

    def __init__(self, page: Any, server: ComfyServer) -> None:
        self.page, self.server = page, server
        self.complaints: list[str] = []
        page.on("console", self._console)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))
        page.request.post(f"{server.url}/settings/Comfy.TutorialCompleted", data="true")
        page.goto(server.url)
        page.wait_for_function("window.app?.vueAppReady", timeout=WAIT_MS)
        page.wait_for_load_state("networkidle")
        page.wait_for_function("window.app.graph.nodes.length > 0", timeout=WAIT_MS)  # its own first workflow

    def _console(self, message: Any) -> None:
        if message.type == "error" and MODEL_SIZES not in message.text:
            self.complaints.append(f"{message.text} {message.location.get('url', '')}")

    def open(self, text: str, name: str = "opened.json") -> None:
        """Open a workflow as if it had been chosen from a folder; earlier complaints are forgotten."""
        self.complaints.clear()
        self.page.evaluate(OPEN, [name, text])
        self.page.wait_for_timeout(SETTLE_MS)

    def open_template(self, text: str, name: str) -> None:
        """Open a workflow as the template browser does: all of it is brought into view."""
        self.complaints.clear()
        self.page.evaluate(OPEN_TEMPLATE, [name, text])
        self.page.wait_for_timeout(SETTLE_MS)

    def add(self, *types: str) -> None:
        """A new workflow of these nodes."""
        self.complaints.clear()
        self.page.evaluate(ADD_NODES, types)

    def nodes(self) -> list[dict[str, Any]]:
        """Every node of the open workflow and of its boxes: type, whether it is registered, Python module, outlines."""
        return self.page.evaluate(NODES)

    def saved(self) -> dict[str, Any]:
        """The open workflow as the front end saves it."""
        return json.loads(self.page.evaluate(SAVED))

    def prompt(self) -> dict[str, Any]:
        """The open workflow as the front end sends it to be run, without the titles."""
        prompt = json.loads(self.page.evaluate(PROMPT))
        return {node: {k: v for k, v in entry.items() if k != "_meta"} for node, entry in prompt.items()}

    def element(self, test_id: str) -> Any:
        """A part of the page by the name that the front end's own tests use."""
        return self.page.get_by_test_id(test_id)


@contextmanager
def browser_page(width: int = 1900, height: int = 1100) -> Iterator[Any]:
    """A fresh page of a browser of its own."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=BROWSER_ARGUMENTS)
        yield browser.new_page(viewport={"width": width, "height": height})
        browser.close()
