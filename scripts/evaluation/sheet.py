"""The contact sheet, and what goes into docs/: the sheet, which README shows too, and the table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from demo import CHECKOUT
from PIL import Image, ImageDraw, ImageFont, ImageOps

from . import rows
from .cells import Cell, Reference

DOCS = CHECKOUT / "docs"
TILE, GAP, BAND, FONT = 180, 6, 44, 15
UNSEEN = (rows.FLAT, rows.MOVED)
"""Rows with nothing to look at."""
START, END = "<!-- results, written by scripts/evaluate.py --docs -->", "<!-- end of results -->"


def contact_sheet(cells: Sequence[Cell], references: Sequence[Reference], folder: Path) -> Image.Image:
    """References downwards; across the reference itself, then what each row makes of it with its first seed."""
    pictures = {(cell.reference, cell.row): cell.file(folder) for cell in reversed(cells)}
    columns = [row for row in rows.SHOWN if row not in UNSEEN and any(row == known for _, known in pictures)]
    shown = [reference for reference in references if any(reference.name == name for name, _ in pictures)]
    sheet = Image.new("RGB", (place(len(columns) + 1), BAND + place(len(shown))), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=FONT)
    for column, title in enumerate(("reference", *columns)):
        words = title.replace(", ", ",\n").replace("reference through", "reference\nthrough")
        middle = (place(column) + GAP + TILE // 2, BAND // 2)
        draw.multiline_text(middle, words, fill="black", font=font, anchor="mm", align="center", spacing=2)
    for line, reference in enumerate(shown):
        files = [reference.file, *(pictures.get((reference.name, row)) for row in columns)]
        for column, file in enumerate(files):
            if file is not None:
                sheet.paste(tile(file, TILE), (place(column), BAND + place(line)))
    return sheet


def place(number: int) -> int:
    """Where a tile of a sheet begins."""
    return GAP + number * (TILE + GAP)


def tile(file: Path, side: int) -> Image.Image:
    """The middle square of a picture file, scaled."""
    with Image.open(file) as picture:
        return ImageOps.fit(picture.convert("RGB"), (side, side), Image.Resampling.LANCZOS)


def write_docs(cells: Sequence[Cell], references: Sequence[Reference], folder: Path, text: str) -> None:
    """Into docs/: the sheet, of the pack's own pictures only, and the text of all."""
    own = [reference for reference in references if reference.formula]
    shown = ""
    if own:
        shown = "![Each reference, and what each way of working makes of it](evaluation.jpg)\n\n"
        kept = [cell for cell in cells if any(cell.reference == reference.name for reference in own)]
        contact_sheet(kept, own, folder).save(DOCS / "evaluation.jpg", quality=86)
    page = DOCS / "EVALUATION.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    _, _, after = rest.partition(END)
    page.write_text(f"{before}{START}\n{shown}```text\n{text}```\n{END}{after}", encoding="utf-8")
