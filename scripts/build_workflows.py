"""Write workflows/*.json (templates) and subgraphs/*.json (blueprints): python scripts/build_workflows.py

What they hold is described in workflow_builder/; the sockets, widgets and sizes of nodes come from a real server.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from host.comfy_env import CHECKOUT, SetupError, leave, provision, rerun_in


def files(info: dict[str, Any]) -> dict[str, str]:
    """The text of every file, by its path in the checkout; `info` is the server's answer to /object_info."""
    from workflow_builder.boxes import BLUEPRINTS
    from workflow_builder.graph import Graph
    from workflow_builder.saved import workflow
    from workflow_builder.templates import TEMPLATES

    written: dict[str, dict[str, Any]] = {}
    for build in TEMPLATES:
        template = build(info)
        path = f"workflows/{template.title}.json"
        written[path] = workflow(template.graph, path, template.extra)
    for make in BLUEPRINTS:
        graph = Graph(info)
        node = graph.use(make, at_least=(340, 0))
        graph.arrange([node])
        path = f"subgraphs/{node.box.name}.json"
        extra = {"BlueprintDescription": node.box.description, "BlueprintSearchAliases": node.box.aliases}
        written[path] = workflow(graph, path, extra)
    return {path: json.dumps(content, indent=2) + "\n" for path, content in written.items()}


def write(written: dict[str, str]) -> None:
    """Into the checkout; templates and blueprints that are no longer described are taken away."""
    for path in (*CHECKOUT.glob("workflows/*.json"), *CHECKOUT.glob("subgraphs/*.json")):
        if path.relative_to(CHECKOUT).as_posix() not in written:
            path.unlink()
    for path, text in written.items():
        target = CHECKOUT / path
        target.parent.mkdir(exist_ok=True)
        target.write_text(text, encoding="utf-8")
        print(path)


def main() -> None:
    """Provision, then run in the provisioned Python."""
    env = provision()
    rerun_in(env, __file__, sys.argv[1:])

    from host.comfy_server import ComfyServer

    with tempfile.TemporaryDirectory() as base, ComfyServer(env.comfyui, Path(base), arguments=["--cpu"]) as server:
        write(files(server.object_info()))


if __name__ == "__main__":
    try:
        main()
    except (SetupError, OSError) as error:
        leave(error)
