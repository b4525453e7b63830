"""The process that measures: a real ComfyUI with the pack in it. Started by bench.py, once for each command line.

Every case is written out as soon as it is known: what comes after it may end the process.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from host.comfy_env import CHECKOUT

from benchmark.cases import COUNT, Case
from benchmark.processes import MARK


def start_comfyui(folder: Path, arguments: Sequence[str]) -> None:
    """Let ComfyUI start itself as far as its server, dynamic VRAM included, with a command line of our own.

    Args:
        folder: where it keeps its files.
        arguments: of its command line.
    """
    sys.path.insert(0, os.environ["COMFYUI_PATH"])
    sys.argv = ["main.py", *arguments, "--disable-all-custom-nodes", "--base-directory", str(folder)]
    sys.argv += ["--database-url", "sqlite:///:memory:"]
    importlib.import_module("comfy.options").enable_args_parsing()
    importlib.import_module("main")


def load_pack() -> ModuleType:
    """The pack's package, loaded by ComfyUI."""
    import nodes

    if not asyncio.run(nodes.load_custom_node(str(CHECKOUT))):
        raise RuntimeError("ComfyUI could not load the pack: see its log")
    return sys.modules[str(CHECKOUT).replace(".", "_x_")]


class Files:
    """Files of weights, each made when it is first asked for; only those of one network and format are kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, network: str, dtype: str) -> Path:
        """The file of a network in a number format."""
        from comfy.model_management import get_torch_device

        from benchmark import networks, programs

        file = self._folder / f"{network.replace(' ', '-').replace(',', '')}-{dtype}.safetensors"
        if not file.is_file():
            self.clear()
            networks.write(network, programs.DTYPES[dtype], file, get_torch_device())
        return file

    def clear(self) -> None:
        """Remove all."""
        for file in self._folder.glob("*.safetensors"):
            file.unlink()


def machine(arguments: Sequence[str]) -> dict[str, Any]:
    """What a report needs of it: nothing that tells whose it is."""
    import comfy.memory_management
    import comfyui_version
    import torch
    from comfy import model_management

    device = model_management.get_torch_device()
    card = getattr(torch, device.type).get_device_name() if device.type in ("cuda", "xpu") else str(device)
    return {
        "device": card,
        "memory, GB": round(model_management.get_total_memory(device) / 1024**3, 1),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "ComfyUI": comfyui_version.__version__,
        "pack": re.search(r'^version = "(.+)"', (CHECKOUT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1],
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "command line": " ".join(arguments),
        "dynamic VRAM": bool(getattr(comfy.memory_management, "aimdo_enabled", False)),
    }


def say(content: dict[str, Any]) -> None:
    """A line for bench.py."""
    print(f"{MARK}{json.dumps(content)}", flush=True)


def measure(pack: ModuleType, case: Case, files: Files) -> dict[str, Any]:
    """What is known of a case afterwards."""
    from benchmark import counting, measuring, programs

    if case.kind != COUNT:
        return asdict(programs.measure(pack, case, files))
    measured = measuring.Measured()
    of_dtype = programs.DTYPES[case.dtype]
    counted = measured.attempt("count", lambda: counting.count(pack, case.network, case.side, of_dtype))
    return {**asdict(measured), "gigabytes": counted}


def main() -> None:
    """Measure the cases that are given, one line of JSON each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("cases", help="a JSON list")
    parser.add_argument("arguments", nargs="*", help="of ComfyUI, after --")
    options = parser.parse_args()
    start_comfyui(options.folder, options.arguments)
    pack, files = load_pack(), Files(options.folder)
    say({"machine": machine(options.arguments)})
    for case in (Case(**fields) for fields in json.loads(options.cases)):
        say({"case": asdict(case), **measure(pack, case, files)})
    files.clear()


if __name__ == "__main__":
    main()
