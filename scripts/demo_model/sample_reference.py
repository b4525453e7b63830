"""The demo's reference picture, glazed scales, written by the formula of the pack's node Example Reference Picture.

python sample_reference.py FILE
"""

from __future__ import annotations

import argparse
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

FORMULAS = Path(__file__).resolve().parents[2] / "pictures"


def formulas() -> ModuleType:
    """The pack's folder of pictures as a package of its own: the pack itself can be imported in ComfyUI only."""
    if "pictures" not in sys.modules:
        spec = spec_from_file_location("pictures", FORMULAS / "__init__.py")
        sys.modules["pictures"] = module_from_spec(spec)
        spec.loader.exec_module(sys.modules["pictures"])
    return sys.modules["pictures"]


def sample_reference() -> np.ndarray:
    """The picture, [512, 512, 3] in 0..1: always the same one."""
    return formulas().PICTURES["texture: scales"]()


def write_sample_reference(path: Path) -> None:
    """Write the picture as a PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((sample_reference() * 255).round().astype(np.uint8)).save(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the sample reference picture.")
    parser.add_argument("file", type=Path, help="where to write it, a .png")
    write_sample_reference(parser.parse_args().file)


if __name__ == "__main__":
    main()
