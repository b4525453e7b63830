"""Nothing is missing anywhere: what the schemas, templates and blueprints hold, all that tells of them tells too.

Whether translations say the same as the English texts is for test_locales.py; here each has to be there.
"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import help_templates
import pytest
from conftest import CHECKOUT

DOCS = CHECKOUT / "web" / "docs"
IMAGES = DOCS / "images"
LOCALES = sorted((CHECKOUT / "locales").glob("*/"))
TEMPLATES = sorted((CHECKOUT / "workflows").glob("*.json"))
BLUEPRINTS = sorted((CHECKOUT / "subgraphs").glob("*.json"))
PAGES = [path for _node, path in help_templates.pages()]
TEXTS = [CHECKOUT / "README.md", *sorted((CHECKOUT / "docs").glob("*.md")), *sorted(DOCS.glob("*.md"))]
SETTING = re.compile(r"^- `(\w+)`", re.MULTILINE)
LINK = re.compile(r"\]\(<?([^)>]+)>?\)")
PICTURE = re.compile(r"!\[[^]]*\]\(([^)]+)\)")
CALLED = re.compile(r"\b(?:Apply )?AD(?:-[A-Z]\w+)?(?: [A-Z]\w+)+")
"""What a text calls a node whose name has AD in it."""
OF_COMFYUI = {"denoised_output"}
"""Names in code in our pages that are an input or output of ComfyUI's own nodes alone."""
COMPARED = ("learning_rate", "iterations", "steps", "cfg", "adain")


@pytest.fixture(scope="module")
def schemas(pack) -> dict[str, Any]:
    """The schema of each node by its id."""
    extension = asyncio.run(pack.comfy_entrypoint())
    return {each.node_id: each for each in (node.define_schema() for node in asyncio.run(extension.get_node_list()))}


def read(path: Path) -> str:
    """A text file."""
    return path.read_text(encoding="utf-8")


def plain_name(schema: Any) -> str:
    """A display name as texts write it: without what stands in brackets for the search."""
    return re.sub(r" \(.*\)$", "", schema.display_name)


def section(text: str, number: int) -> str:
    """A part of a help page: 1 settings, 2 values per task, 3 mistakes, 4 templates."""
    return re.split(r"^## ", text, flags=re.MULTILINE)[number]


def tables(text: str) -> dict[str, list[list[str]]]:
    """The rows of a page's tables by the head of the first column, without Markdown's signs."""
    found: dict[str, list[list[str]]] = {}
    head = ""
    for line in text.splitlines():
        if not line.startswith("|"):
            head = ""
            continue
        cells = [re.sub(r"[*`]", "", LINK.sub("]", cell)).strip(" []") for cell in line.strip("|").split("|")]
        if not head:
            head = cells[0]
            found.setdefault(head, [])
        elif set(line) - set("|-: "):
            found[head].append(cells)
    return found


def first_cells(*heads: str) -> list[str]:
    """What README's tables with such a head have a row for."""
    rows = tables(read(CHECKOUT / "README.md"))
    return [row[0] for head in heads for row in rows.get(head, [])]


def notes(workflow: dict[str, Any]) -> list[str]:
    """The texts of a workflow's notes, those inside its subgraphs too."""
    graphs = [workflow, *workflow.get("definitions", {}).get("subgraphs", [])]
    nodes = [node for graph in graphs for node in graph["nodes"]]
    return [node["widgets_values"][0] for node in nodes if node["type"] in ("MarkdownNote", "Note")]


def test_every_node_says_what_it_is(schemas):
    for node, schema in schemas.items():
        assert schema.description and schema.search_aliases, node
        assert re.fullmatch(r"attention distillation/[a-z ]+", schema.category), node
        for each in (*schema.inputs, *schema.outputs):
            assert each.tooltip, (node, each)


def test_every_node_has_a_row_in_readme(schemas):
    assert sorted(first_cells("Node")) == sorted(map(plain_name, schemas.values()))


def test_every_node_has_a_page_and_every_page_a_node(schemas):
    assert {path.stem for path in DOCS.glob("*.md")} == schemas.keys()
    assert {path.parent.name for path in PAGES if path.parent != DOCS} <= schemas.keys()


def test_every_language_has_every_node(schemas):
    for folder in LOCALES:
        texts = json.loads(read(folder / "nodeDefs.json"))
        assert texts.keys() == schemas.keys(), folder.name
        for node, schema in schemas.items():
            assert list(texts[node]["inputs"]) == [each.id for each in schema.inputs], (folder.name, node)
            assert len(texts[node]["outputs"]) == len(schema.outputs), (folder.name, node)
            assert (DOCS / node / f"{folder.name}.md").is_file(), (folder.name, node)
    languages = {folder.name for folder in LOCALES}
    assert {path.stem for path in PAGES if path.parent != DOCS} == languages == help_templates.NONE.keys()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_page_has_every_input_and_nothing_else(schemas, path):
    node = path.stem if path.parent == DOCS else path.parent.name
    text = read(path)
    assert len(re.findall(r"^## ", text, re.MULTILINE)) == 4
    assert sorted(SETTING.findall(section(text, 1))) == sorted(each.id for each in schemas[node].inputs)
    assert "|" not in text, "a table is cut off in the narrow panel"
    if path.parent == DOCS:
        assert text.startswith(f"# {plain_name(schemas[node])}\n")


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(DOCS).as_posix())
def test_page_lists_its_templates(path):
    """python scripts/help_templates.py brings it up to date."""
    node = path.stem if path.parent == DOCS else path.parent.name
    assert read(path) == help_templates.with_templates(path, help_templates.templates_by_node().get(node, []))


def test_pictures_of_the_pages_are_there_and_no_others():
    named = {path: PICTURE.findall(read(path)) for path in PAGES}
    assert all(named.values()), [path for path in named if not named[path]]
    in_pages = {picture for pictures in named.values() for picture in pictures}
    assert in_pages == {f"images/{path.name}" for path in IMAGES.glob("*")}


def test_templates_and_thumbnails_go_together():
    assert [path.stem for path in TEMPLATES] == sorted(path.stem for path in TEMPLATES[0].parent.glob("*.jpg"))


def test_every_template_and_blueprint_has_a_row_in_readme():
    assert sorted(first_cells("Template", "Workflow")) == [path.stem for path in TEMPLATES]
    assert sorted(first_cells("Box", "Blueprint")) == [path.stem for path in BLUEPRINTS]


@pytest.mark.parametrize("path", [*TEMPLATES, *BLUEPRINTS], ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_workflow_holds_nodes_that_there_are(schemas, path):
    types = help_templates.node_types(json.loads(read(path)))
    ours = {kind for kind in types if re.match("AD[A-Z]", kind)}
    assert ours and ours <= schemas.keys(), ours - schemas.keys()


def test_every_template_says_what_to_do():
    assert [path.stem for path in TEMPLATES if not notes(json.loads(read(path)))] == []


def test_every_blueprint_can_be_found():
    for path in BLUEPRINTS:
        extra = json.loads(read(path))["extra"]
        assert extra["BlueprintDescription"] and extra["BlueprintSearchAliases"], path.stem


def test_every_node_is_shown_in_a_template_or_blueprint_or_its_page_says_so(schemas):
    """A page without templates is right only where there are none; the nodes to begin with have some."""
    shown = help_templates.templates_by_node()
    for node, schema in schemas.items():
        if schema.category.endswith("/start here"):
            assert shown.get(node), node


def test_texts_call_nodes_by_their_names(schemas):
    names = {plain_name(schema) for schema in schemas.values()}
    texts = {path.name: read(path) for path in TEXTS}
    texts |= {path.stem: "\n".join(notes(json.loads(read(path)))) for path in (*TEMPLATES, *BLUEPRINTS)}
    assert any(CALLED.findall(text) for text in texts.values())
    for place, text in texts.items():
        for called in CALLED.findall(text):
            assert any(called == name or called.startswith(f"{name} ") for name in names), (place, called)
        for called in re.findall(r"\bAD[A-Z][a-z]\w+|\bADVAE\w+", text):
            assert called in schemas, (place, called)


def test_pages_name_inputs_that_there_are(schemas):
    sockets = [each for schema in schemas.values() for each in (*schema.inputs, *schema.outputs)]
    known = {each.id for each in sockets} | {each.display_name for each in sockets} | OF_COMFYUI
    known |= {option for each in sockets for option in getattr(each, "options", None) or []}
    for path in PAGES:
        for named in re.findall(r"`(\w*_\w*)`", read(path)):
            assert named in known, (path, named)


def test_values_per_task_are_those_of_readme():
    """The pages' numbers against README's table of settings."""
    head, *_ = (line for line in read(CHECKOUT / "README.md").splitlines() if line.startswith("| For |"))
    columns = [cell.strip() for cell in head.strip("|").split("|")]
    rows = {row[0]: dict(zip(columns, row, strict=True)) for row in tables(read(CHECKOUT / "README.md"))["For"]}
    compared = 0
    for path in sorted(DOCS.glob("*.md")):
        for task, values in re.findall(r"^- \*\*(.+?)\*\*.*?: (.+)$", section(read(path), 2), re.MULTILINE):
            optimised = f"{task}, optimised" if path.stem == "ADOptimizeLatent" else task
            row = rows.get(optimised, rows.get(task))
            for name, value in re.findall(r"(\w+) ([\w.]+)", values) if row else []:
                if name in COMPARED and path.stem not in ("ADFinetuneVAEDecoder", "ADInjectReferenceKV"):
                    compared += 1
                    assert value == row[name], (path.stem, task, name, value)
    assert compared > 60, compared


@pytest.mark.parametrize("path", [*sorted(CHECKOUT.glob("*.md")), *sorted((CHECKOUT / "docs").glob("*.md"))],
                         ids=lambda path: path.relative_to(CHECKOUT).as_posix())  # fmt: skip
def test_links_lead_somewhere(path):
    targets = [target for target in LINK.findall(read(path)) if not re.match(r"https?:|mailto:|#", target)]
    missing = [target for target in targets if not (path.parent / unquote(target.partition("#")[0])).exists()]
    assert missing == []
