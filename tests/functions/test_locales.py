"""Translations say all that the English texts say, in the glossary's words, and nothing of it in English.

The languages are the folders of locales/; a help page in a language is web/docs/<id>/<language>.md.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import help_templates
import pytest
from conftest import CHECKOUT

LOCALES = CHECKOUT / "locales"
DOCS = CHECKOUT / "web" / "docs"
LANGUAGES = sorted(path.name for path in LOCALES.glob("*/"))
LETTERS = {"zh": r"[一-鿿]", "zh-TW": r"[一-鿿]", "ja": r"[一-鿿ぁ-ヿ]"}
CHARACTERS = {"zh": ("gb2312", 0xF7), "zh-TW": ("big5", 0xC6), "ja": ("shift_jis", 0xEA)}
"""Character sets of old that hold one way of writing, and the last first byte that is looked at.

GB 2312 has no traditional characters. Big5 has simplified ones only among its rare characters, which begin at 0xC9.
"""
SAME_EVERYWHERE = {"AdaIN", "cfg", "latent", "Latent", "VAE"}
"""Names of inputs that are written so in other languages too."""
ENGLISH = re.compile(r"[A-Za-z]{2,}(?: [A-Za-z]{2,}){3,}")
"""Four words in a row: longer than any name."""
SPECIAL = re.compile(r"[{}@|]")
"""What the front end reads as placeholders, links and plurals in all texts but tooltips."""
NUMBER = re.compile(r"\d+(?:\.\d+)?")
CODE = re.compile(r"`([^`]+)`")
PICTURE = re.compile(r"!\[.*?\]\((.+?)\)")
ENGLISH_SETTING = re.compile(r"- `(\w+)`:")
"""An item of the list of settings. In the other languages brackets and colon are of full width."""


class Term(NamedTuple):
    """A row of the glossary that holds always."""

    english: re.Pattern[str]
    translations: tuple[str, ...]


def load(language: str, name: str) -> dict[str, Any]:
    """One of a language's files."""
    return json.loads((LOCALES / language / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(params=LANGUAGES)
def language(request: pytest.FixtureRequest) -> str:
    """Each language in turn."""
    return request.param


@pytest.fixture(scope="module")
def english(pack) -> dict[str, dict[str, Any]]:
    """The texts of the schemas, in the form of nodeDefs.json. An output has a name where the schema gives it one."""
    extension = asyncio.run(pack.comfy_entrypoint())
    texts = {}
    for node in asyncio.run(extension.get_node_list()):
        schema = node.define_schema()
        outputs = [
            ({"name": each.display_name} if each.display_name else {}) | {"tooltip": each.tooltip}
            for each in schema.outputs
        ]
        texts[schema.node_id] = {
            "display_name": schema.display_name,
            "description": schema.description,
            "inputs": {each.id: {"name": each.id, "tooltip": each.tooltip} for each in schema.inputs},
            "outputs": {str(i): output for i, output in enumerate(outputs)},
        }
    return texts


@pytest.fixture(scope="module")
def folders_and_types(pack) -> tuple[set[str], set[str]]:
    """Folders of the node library, and the types of socket that are ours."""
    extension = asyncio.run(pack.comfy_entrypoint())
    schemas = [node.define_schema() for node in asyncio.run(extension.get_node_list())]
    sockets = {each.get_io_type() for schema in schemas for each in (*schema.inputs, *schema.outputs)}
    folders = {folder for schema in schemas for folder in schema.category.split("/")}
    return folders, {socket for socket in sockets if socket.startswith("AD_")}


def strings(texts: dict[str, Any], place: str = "") -> Iterator[tuple[str, str]]:
    """Every string, with the keys that lead to it."""
    for key, value in texts.items():
        if isinstance(value, dict):
            yield from strings(value, f"{place}{key}.")
        else:
            yield f"{place}{key}", value


def table_cells(line: str) -> list[str]:
    """What stands between the bars."""
    return [cell.strip() for cell in line.strip("|").split("|")]


def glossary(language: str) -> list[Term]:
    """The rows of all tables that are kept always."""
    terms, column = [], None
    for line in (LOCALES / "GLOSSARY.md").read_text(encoding="utf-8").splitlines():
        cells = table_cells(line) if line.startswith("|") else []
        if cells and cells[0] == "English":
            column = cells.index(language)
        elif cells and cells[-1] == "always":
            words = tuple(word.strip() for word in cells[column].split("/"))
            terms.append(Term(as_word(cells[0]), words))
    return terms


def as_word(text: str) -> re.Pattern[str]:
    """Finds a term, or its plural, where it is no part of another word."""
    return re.compile(rf"(?<!\w){re.escape(text)}(?:e?s)?(?!\w)", re.IGNORECASE)


def short(name: str) -> str:
    """A display name without what its end has in brackets: as texts write it."""
    return re.sub(r"\s*[(\uff08][^()\uff08\uff09]+[)\uff09]$", "", name)


def node_names(english: dict[str, Any], translated: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """Our nodes' names by id, as texts write them, in English and in a language."""
    names = {}
    for node, texts in english.items():
        name, translation = texts["display_name"], translated[node]["display_name"]
        names[node] = (short(name), short(translation) if short(name) != name else translation)
    return names


def missing_terms(english: str, translation: str, terms: list[Term]) -> list[str]:
    """What the English text says by a term, and the translation in other words."""
    return [
        f"{term.english.search(english)[0]} -> {' / '.join(term.translations)}: {translation}"
        for term in terms
        if term.english.search(english) and not any(word in translation for word in term.translations)
    ]


def changed_numbers(english: str, translation: str) -> list[str]:
    """Numbers that one of the two lacks; but a translation may count with figures where English has a word."""
    said, translated = Counter(NUMBER.findall(english)), Counter(NUMBER.findall(translation))
    added = (number for number in (translated - said) if "." in number or not 1 <= int(number) <= 10)
    return [*(said - translated), *added]


def wrong_characters(text: str, language: str) -> set[str]:
    """Characters that are not written in the language."""
    codec, last = CHARACTERS[language]
    return {one for one in text if not (code := one.encode(codec, errors="ignore")) or code[0] > last}


def test_the_languages():
    assert set(LANGUAGES) == set(LETTERS) == set(CHARACTERS) == set(help_templates.NONE)


def test_the_glossary_has_every_term_in_every_language(language):
    terms = glossary(language)
    assert len(terms) > 40
    assert not [term.english.pattern for term in terms if not all(term.translations)]
    for term in terms:
        assert not wrong_characters("".join(term.translations), language), term


def test_texts_are_those_of_the_schema(english, language):
    """Every node, input and output, and nothing else."""
    assert dict(strings(load(language, "nodeDefs"))).keys() == dict(strings(english)).keys()


def test_folders_and_types_are_named(folders_and_types, language):
    folders, types = folders_and_types
    main = load(language, "main")
    assert main.keys() == {"nodeCategories", "dataTypes"}
    assert (set(main["nodeCategories"]), set(main["dataTypes"])) == (folders, types)


def test_nothing_is_left_in_english(language):
    for file in ("nodeDefs", "main"):
        for key, text in strings(load(language, file)):
            assert text in SAME_EVERYWHERE or re.search(LETTERS[language], text), (key, text)
            assert not ENGLISH.search(text), (key, text)
            assert not wrong_characters(text, language), (key, wrong_characters(text, language))
            assert key.endswith("tooltip") or not SPECIAL.search(text), (key, text)


def test_numbers_are_those_of_the_english_texts(english, language):
    translated = dict(strings(load(language, "nodeDefs")))
    for key, text in strings(english):
        assert not changed_numbers(text, translated[key]), (key, translated[key])


def test_texts_keep_to_the_glossary(english, language):
    translations = load(language, "nodeDefs")
    terms = glossary(language)
    terms += [Term(as_word(name), (to,)) for name, to in node_names(english, translations).values()]
    translated = dict(strings(translations))
    found = [
        f"{key}: {missing}"
        for key, text in strings(english)
        if not key.endswith(".name")  # these are ids in English
        for missing in missing_terms(text, translated[key], terms)
    ]
    assert not found, "\n".join(found)


def test_the_same_setting_has_the_same_name_on_all_nodes(language):
    """But for a node whose input of that id is another thing."""
    names: dict[str, set[str]] = {}
    for texts in load(language, "nodeDefs").values():
        for key, texts_of_input in texts["inputs"].items():
            names.setdefault(key, set()).add(texts_of_input["name"])
    assert not {key: found for key, found in names.items() if len(found) > 1}


def blocks(page: Path) -> list[str]:
    """Paragraphs, headings and list items of a help page, each on one line; templates are left out."""
    text = page.read_text(encoding="utf-8")
    assert text.count(help_templates.BEGIN) == text.count(help_templates.END) == 1, page
    text = re.sub(f"{help_templates.BEGIN}.*{help_templates.END}", "", text, flags=re.DOTALL)
    return [" ".join(block.split()) for block in re.split(r"\n(?=- )|\n\n+", text) if block.strip()]


def kind(block: str) -> str:
    """What a block is: the level of a heading, an item of a list, a picture, a caption or a paragraph."""
    return re.match(r"#+ |- |!\[|\*(?!\*)|", block)[0]


def page_ids() -> list[str]:
    """Nodes that have an English page."""
    return sorted(path.stem for path in DOCS.glob("*.md"))


@pytest.fixture(params=page_ids())
def page(request: pytest.FixtureRequest) -> str:
    """The id of each node that has a page."""
    return request.param


@pytest.fixture
def pairs(page: str, language: str) -> list[tuple[str, str]]:
    """Each block of an English page with its translation."""
    originals, translations = blocks(DOCS / f"{page}.md"), blocks(DOCS / page / f"{language}.md")
    assert [kind(each) for each in translations] == [kind(each) for each in originals]
    return list(zip(originals, translations, strict=True))


def test_every_node_has_its_pages(english, language):
    translated = {path.parent.name for path in DOCS.glob(f"*/{language}.md")}
    assert translated == set(page_ids()) == set(english)


def test_pages_have_the_same_numbers_and_pictures(pairs):
    for original, translation in pairs:
        assert PICTURE.findall(original) == PICTURE.findall(translation)
        assert not changed_numbers(original, translation), translation


def test_pages_speak_of_the_same_settings(pairs, language):
    """By their ids, or by the names that are shown, which are the same on all nodes."""
    nodes = load(language, "nodeDefs").values()
    shown = {key: texts["name"] for node in nodes for key, texts in node["inputs"].items()}
    for original, translation in pairs:
        ids = set(CODE.findall(translation))
        assert all(key in original for key in ids), translation
        for key in set(CODE.findall(original)) - ids:
            assert key in shown and shown[key] in translation, (key, translation)


def test_pages_name_nodes_and_settings_as_they_are_shown(pairs, page, english, language):
    """The heading is the node's name; behind the id of a setting stands its name, unless it is the same."""
    translated = load(language, "nodeDefs")
    assert pairs[0][1] == f"# {node_names(english, translated)[page][1]}"
    found = []
    for original, translation in pairs:
        if setting := ENGLISH_SETTING.match(original):
            shown = translated[page]["inputs"][setting[1]]["name"]
            head = f"- `{setting[1]}`" + ("" if shown == setting[1] else f"\uff08{shown}\uff09") + "\uff1a"
            assert translation.startswith(head), (head, translation)
            found.append(setting[1])
    assert sorted(found) == sorted(english[page]["inputs"])


def test_pages_keep_to_the_glossary(pairs, english, language):
    terms = glossary(language)
    terms += [Term(as_word(name), (to,)) for name, to in node_names(english, load(language, "nodeDefs")).values()]
    found = [
        missing
        for original, translation in pairs
        for missing in missing_terms(PICTURE.sub("", CODE.sub("", original)), CODE.sub("", translation), terms)
    ]
    assert not found, "\n".join(found)


def test_pages_are_in_their_language(pairs, language):
    for _, translation in pairs:
        plain = PICTURE.sub("", CODE.sub("", translation))
        assert re.search(LETTERS[language], plain) or PICTURE.search(translation) or "FLUX" in plain, translation
        assert not ENGLISH.search(plain), translation
        assert not wrong_characters(translation, language), (wrong_characters(translation, language), translation)
