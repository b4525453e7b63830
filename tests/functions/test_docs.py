"""The pages in docs/ name all that the code's tables and refusals name."""

import ast
import re
from pathlib import Path

import comfy.samplers
import pytest
import yaml
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from conftest import CHECKOUT, COMFYUI
from host.comfy_env import VERSIONS

CORE = ("attention", "decoder", "guidance", "losses", "nodes", "pictures", "tiling")


def page(name):
    return (CHECKOUT / "docs" / name).read_text(encoding="utf-8")


def cells(text):
    """What stands in tables, between commas and bars."""
    rows = [line for line in text.splitlines() if line.startswith("|")]
    return {cell.strip() for row in rows for cell in re.split(r"[|,]", row)}


@pytest.fixture(scope="module")
def samplers(pack_module):
    return pack_module("guidance.samplers")


def test_the_page_on_samplers_names_every_sampler_of_the_table(samplers):
    text = page("samplers.md")
    named = {word for cell in cells(text) for word in re.findall(r"\w+", cell)}
    missing = {one.name for one in samplers.SAMPLERS} - named
    assert not missing
    works, refused = text.split("Refused, with a message:")
    for one in samplers.SAMPLERS:
        part = refused if isinstance(one.watch({}), str) else works
        assert any(re.search(rf"(?<![\w]){one.name}(?![\w])", cell) for cell in cells(part)), one.name


def test_the_table_has_every_sampler_of_comfyui(samplers):
    """Each once, by the function that ComfyUI itself takes for the name."""
    by_name = {one.name: one for one in samplers.SAMPLERS}
    assert len(by_name) == len(samplers.SAMPLERS)
    assert set(comfy.samplers.SAMPLER_NAMES) <= set(by_name)
    for name in comfy.samplers.SAMPLER_NAMES:
        function = comfy.samplers.sampler_object(name).sampler_function
        assert samplers.known(function).function == function.__name__ == by_name[name].function


def test_the_page_on_architectures_names_every_class(pack_module):
    architectures, named = pack_module("attention.architectures"), cells(page("architectures.md"))
    classes = [*architectures.TRANSFORMERS, *architectures.REFUSED]
    assert {name.rsplit(".")[-1] for name in classes} <= named
    assert f"{UNetModel.__name__} and what derives from it" in named
    for model, _reason in architectures.REFUSED.values():
        assert model in page("architectures.md").split("## Refused")[1]


def plain(text):
    return re.sub(r"[^a-z0-9]", "", text.lower())


def nodes_of_comfyui():
    """Ids and titles of ComfyUI's own nodes, those that are no everyday word."""
    text = "".join(path.read_text(encoding="utf-8") for path in [COMFYUI / "nodes.py", *extra_nodes()])
    found = set(re.findall(r'(?:node_id|display_name)="([^"]+)"', text))
    found |= {name for pair in re.findall(r'^    "([^"]+)": "?([^",]+)"?,$', text, re.MULTILINE) for name in pair}
    return {name for name in found if re.search(r"[a-z][A-Z]|[A-Z]{2}| ", name)}


def extra_nodes() -> list[Path]:
    return sorted((COMFYUI / "comfy_extras").glob("*.py"))


def refusals():
    """The words of each error that the pack raises."""
    for path in (path for folder in CORE for path in sorted((CHECKOUT / folder).rglob("*.py"))):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise):
                parts = [one.value for one in ast.walk(node) if isinstance(one, ast.Constant)]
                yield "".join(part for part in parts if isinstance(part, str))


def test_nodes_that_errors_name_are_named_in_the_docs():
    """An error that speaks of a node of ComfyUI's: the page on graphs, or on samplers, says why."""
    docs, nodes = plain(page("graphs.md") + page("samplers.md")), nodes_of_comfyui()
    spoken = {name for text in refusals() for name in nodes if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)} - {
        "KSamplerSelect"
    }  # what to use instead
    assert {"TorchCompileModel", "FlipSigmas"} <= spoken
    assert not {name for name in spoken if plain(name) not in docs}


def test_the_registrys_archive_leaves_out_what_only_the_project_needs():
    """And nothing that the pack itself loads."""
    left_out = set((CHECKOUT / ".comfyignore").read_text(encoding="utf-8").split("\n", 1)[1].split())
    assert left_out == {".ci/", ".github/", "scripts/", "tests/", "CONTRIBUTING.md"}
    assert not left_out & {f"{folder}/" for folder in (*CORE, "workflows", "docs")}


def test_one_version_everywhere():
    """The registry's, the citation's, and the first that the list of changes has."""
    said = {
        "pyproject.toml": r'^version = "(.+)"$', "CITATION.cff": r"^version: (.+)$", "CHANGELOG.md": r"^## (.+)$"
    }  # fmt: skip
    found = {
        name: re.search(pattern, (CHECKOUT / name).read_text(encoding="utf-8"), re.MULTILINE)[1]
        for name, pattern in said.items()
    }
    assert len(set(found.values())) == 1, found


def test_the_publisher_waits_for_the_tests():
    """The job that publishes needs the one that runs them, on each version of ComfyUI that can be set up."""
    workflows = CHECKOUT / ".github" / "workflows"
    publish, tests = (yaml.safe_load((workflows / name).read_text(encoding="utf-8")) for name in (
        "publish.yml", "tests.yml"))  # fmt: skip
    assert publish["jobs"]["tests"]["uses"] == "./.github/workflows/tests.yml"
    assert publish["jobs"]["publish"]["needs"] == "tests"
    assert tests["jobs"]["tests"]["strategy"]["matrix"]["comfyui"] == list(VERSIONS)
    for form in (CHECKOUT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        assert yaml.safe_load(form.read_text(encoding="utf-8")), form.name
