"""Make docs/banner.jpg and docs/icon.png out of the templates' thumbnails, which the pack has made itself.

    python scripts/make_banner.py

Make the thumbnails first: python scripts/thumbnails.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from demo import CHECKOUT
from host.comfy_env import provision, rerun_in

if TYPE_CHECKING:
    from PIL import Image

DOCS, WORKFLOWS = CHECKOUT / "docs", CHECKOUT / "workflows"
SHOWN, ICON = ("02", "01", "04", "03"), "02"
"""By the number that a template's name begins with."""
SIDE, GAP, ICON_SIDE = 320, 4, 400
"""Pixels of a picture on the banner, between two, and of the icon."""


def thumbnail(number: str, side: int) -> Image.Image:
    """A template's thumbnail in another size."""
    from PIL import Image

    (file,) = WORKFLOWS.glob(f"{number} *.jpg")
    with Image.open(file) as picture:
        return picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)


def banner() -> Image.Image:
    """The thumbnails beside one another."""
    from PIL import Image

    sheet = Image.new("RGB", (len(SHOWN) * (SIDE + GAP) - GAP, SIDE), "white")
    for place, number in enumerate(SHOWN):
        sheet.paste(thumbnail(number, SIDE), (place * (SIDE + GAP), 0))
    return sheet


def main() -> None:
    """Run in the provisioned Python."""
    rerun_in(provision(), __file__, [])
    banner().save(DOCS / "banner.jpg", quality=85, optimize=True)
    thumbnail(ICON, ICON_SIDE).quantize(256).save(DOCS / "icon.png", optimize=True)


if __name__ == "__main__":
    main()
