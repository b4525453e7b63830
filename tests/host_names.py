"""The names of ComfyUI's modules, classes and functions that the pack's source uses."""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parent.parent
FOLDERS = ("attention", "decoder", "guidance", "losses", "nodes", "pictures", "tiling")
HOST = ("comfy", "comfy_api", "comfy_extras", "latent_preview", "nodes")  # what the pack imports of ComfyUI


def names_of_the_host(tree: ast.Module) -> set[str]:
    """The full names of all that a module uses of ComfyUI: what it imports, looks up in that, or writes as a string."""
    bound, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                found.add(name.name)
                bound[name.asname or name.name.split(".")[0]] = name.name if name.asname else name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            for name in node.names:
                found.add(f"{node.module}.{name.name}")
                bound[name.asname or name.name] = f"{node.module}.{name.name}"
        elif isinstance(node, ast.Constant) and re.fullmatch(r"comfy\w*(\.\w+)+", str(node.value)):
            found.add(node.value)
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name) and node.id in bound:
            found.add(".".join([bound[node.id], *reversed(parts)]))
    return {name for name in found if name.split(".")[0] in HOST}


def used_by_the_pack() -> Mapping[Path, set[str]]:
    """By file, see `names_of_the_host`."""
    files = [path for folder in FOLDERS for path in sorted((CHECKOUT / folder).rglob("*.py"))]
    return {file: names_of_the_host(ast.parse(file.read_text(encoding="utf-8"))) for file in files}
