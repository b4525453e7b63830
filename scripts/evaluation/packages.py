"""The bench's own packages: two that carry networks, and what runs one of them.

They lie in a folder of their own in .comfyui/: neither a user of the pack nor a ComfyUI named by COMFYUI_PATH gets
them.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
from pathlib import Path

from host.comfy_env import HERE, HOME, pip

WANTED = HERE / "requirements-bench.txt"


def provide() -> Path:
    """The folder that holds them, filled at the first call (85 MB fetched); it is put on the import path.

    Raises:
        SetupError: they cannot be fetched.
    """
    recipe = hashlib.sha256(WANTED.read_bytes()).hexdigest()
    folder = HOME / f"bench-{sys.version_info.major}.{sys.version_info.minor}"
    stamp = folder / "ready"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != recipe:
        shutil.rmtree(folder, ignore_errors=True)
        options = ["--no-deps", "--only-binary", ":all:", "--target", str(folder), "-r", str(WANTED)]
        HOME.mkdir(parents=True, exist_ok=True)
        pip(Path(sys.executable), "Installing the bench's networks", "install", *options)
        stamp.write_text(recipe, encoding="utf-8")
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
    return folder
