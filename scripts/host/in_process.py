"""A real ComfyUI in this very process, with the pack loaded as ComfyUI loads it."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from .comfy_env import CHECKOUT


def start_comfyui(comfyui: Path, base: Path, arguments: Sequence[str] = ()) -> None:
    """Put ComfyUI first on the import path and let it parse a command line of our own. To be called once, first.

    Args:
        comfyui: its folder.
        base: where it keeps models, input, output and user folders.
        arguments: of its command line.
    """
    sys.path.insert(0, str(comfyui))
    import comfy.options

    comfy.options.enable_args_parsing()
    argv = sys.argv
    sys.argv = ["main.py", *arguments, "--disable-all-custom-nodes"]
    sys.argv += ["--base-directory", str(base), "--database-url", "sqlite:///:memory:"]
    try:
        importlib.import_module("comfy.cli_args")
        importlib.import_module("utils")  # early, as main.py does: nodes.py of 0.24 puts comfy/utils.py in front of it
    finally:
        sys.argv = argv
        comfy.options.enable_args_parsing(False)


def load_pack() -> ModuleType:
    """The checkout's package module, loaded by ComfyUI's own loader."""
    import nodes

    if not asyncio.run(nodes.load_custom_node(str(CHECKOUT))):
        raise RuntimeError("ComfyUI could not load the pack: see its log")
    return sys.modules[str(CHECKOUT).replace(".", "_x_")]
