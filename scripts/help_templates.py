"""Write into the nodes' help pages, of all languages, which templates hold the node.

    python scripts/help_templates.py

Each page has two marks, which the front end does not show; what stands between them is made of workflows/*.json. Run it
when a template is added, renamed or gets another node.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).resolve().parents[1]
BEGIN, END = "<!-- templates, written by scripts/help_templates.py -->", "<!-- end of templates -->"
NONE = {"zh": "暂无", "zh-TW": "尚無", "ja": "まだありません"}
"""What stands there when no template holds the node; in other languages "none yet"."""


def pages() -> Iterator[tuple[str, Path]]:
    """Each help page with the id of its node: docs/<id>.md is the English one, docs/<id>/<language>.md are others."""
    docs = CHECKOUT / "web" / "docs"
    for path in sorted(docs.rglob("*.md")):
        yield (path.stem if path.parent == docs else path.parent.name), path


def node_types(workflow: dict[str, Any]) -> set[str]:
    """The types of all nodes of a workflow, those inside its subgraphs too."""
    subgraphs = workflow.get("definitions", {}).get("subgraphs", [])
    return {node["type"] for graph in (workflow, *subgraphs) for node in graph["nodes"]}


def templates_by_node() -> dict[str, list[str]]:
    """The titles of the templates that hold a node, by its type; a title is the file's name."""
    found: dict[str, list[str]] = {}
    for path in sorted((CHECKOUT / "workflows").glob("*.json")):
        for kind in node_types(json.loads(path.read_text(encoding="utf-8"))):
            found.setdefault(kind, []).append(path.stem)
    return found


def with_templates(path: Path, titles: list[str]) -> str:
    """A page's text with these titles between its marks.

    Raises:
        ValueError: it does not have both marks once.
    """
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} needs these two lines once: {BEGIN} and {END}")
    items = "\n".join(f"- {title}" for title in titles or [NONE.get(path.stem, "none yet")])
    # The empty lines make a list of it, whatever stands around the marks.
    return re.sub(f"{BEGIN}.*{END}", lambda _: f"{BEGIN}\n\n{items}\n\n{END}", text, flags=re.DOTALL)


def main() -> None:
    """Rewrite every page."""
    by_node = templates_by_node()
    for node, path in pages():
        path.write_text(with_templates(path, by_node.get(node, [])), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
