"""A ComfyUI that lacks what the pack uses: said once, in words, and ComfyUI goes on without the pack."""

import ast
import asyncio
import shutil

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.patcher_extension
import comfyui_version
import pytest
from host_names import CHECKOUT, FOLDERS, used_by_the_pack

import nodes


@pytest.fixture
def another_copy(pack, tmp_path, monkeypatch):
    """The pack once more, so that it is imported anew, and its nodes are no others than before."""
    for folder in FOLDERS:
        shutil.copytree(CHECKOUT / folder, tmp_path / "copy" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("__init__.py", "host_guard.py"):
        shutil.copy(CHECKOUT / file, tmp_path / "copy")
    for name in ("NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "EXTENSION_WEB_DIRS", "LOADED_MODULE_DIRS"):
        monkeypatch.setattr(nodes, name, dict(getattr(nodes, name)))
    return tmp_path / "copy"


LACKING = {
    "comfy.model_management.extra_reserved_memory": (
        comfy.model_management, "extra_reserved_memory", "comfy.model_management.extra_reserved_memory"),
    "comfy.patcher_extension.WrappersMP.CALC_COND_BATCH": (
        comfy.patcher_extension.WrappersMP, "CALC_COND_BATCH", "comfy.patcher_extension.WrappersMP.CALC_COND_BATCH"),
    "comfy.ldm.modules.attention.attention_pytorch": (
        comfy.ldm.modules.attention, "attention_pytorch",
        "cannot import name 'attention_pytorch' from 'comfy.ldm.modules.attention'"),
}  # fmt: skip


@pytest.mark.parametrize("name", LACKING)
def test_a_host_that_lacks_something(another_copy, monkeypatch, caplog, name):
    owner, attribute, says = LACKING[name]
    monkeypatch.delattr(owner, attribute)
    assert asyncio.run(nodes.load_custom_node(str(another_copy))) is False
    (line,) = [record.getMessage() for record in caplog.records if "Cannot import" in record.getMessage()]
    told = f"Attention Distillation cannot be used with this ComfyUI ({comfyui_version.__version__}), which lacks what"
    assert told in line and says in line and "0.18.2 or newer is needed" in line


def test_a_host_that_lacks_nothing(another_copy):
    assert asyncio.run(nodes.load_custom_node(str(another_copy)))


def test_all_that_is_looked_up_later_is_asked_for(pack_module):
    """The list is what the source uses, less what it imports by name; networks are told by their names alone."""
    guard, used = pack_module("host_guard"), set()
    for file, names in used_by_the_pack().items():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        imports = [node for node in tree.body if isinstance(node, ast.ImportFrom | ast.Import)]
        by_name = {name.name for node in imports if isinstance(node, ast.Import) for name in node.names} | {
            f"{node.module}.{name.name}" for node in imports if isinstance(node, ast.ImportFrom) for name in node.names
        }
        if file.name != "architectures.py":
            used |= names - by_name
    used -= {"comfy_extras.nodes_sag.SelfAttentionGuidance"}  # a node, by its name
    innermost = {name for name in used if not any(other.startswith(f"{name}.") for other in used)}
    assert list(guard.USED_LATER) == sorted(innermost)
    for name in guard.USED_LATER:
        guard.look_up(name)
