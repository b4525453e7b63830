"""On every ComfyUI that the pack supports: it loads, its nodes and workflows are what they are to be, and it guides.

scripts/test.py runs this file alone on the older versions, and the whole suite on the newest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import comfyui_version
import demo
import folder_paths
import pytest
import small_models
import torch
from guided import Graph
from help_templates import node_types
from host.comfy_env import DEFAULT_VERSION
from host.comfy_server import PACK_NAME, ComfyServer, PromptError
from host.workflow_api import input_specifications, to_api
from host_names import used_by_the_pack

CHECKOUT = Path(__file__).resolve().parents[2]
COMFYUI = Path(folder_paths.__file__).resolve().parent
SIZE, STEPS = 128, 10

SETTINGS = [
    "learning_rate", "iterations", "adain", "content_weight", "attention_scale", "content_loss", "start_percent",
    "end_percent",
]  # fmt: skip
OF_OPTIMISE = [name for name in SETTINGS if name not in ("adain", "start_percent", "end_percent")]
OPTIONAL = ["content", "regions", "windows", "lr_schedule", "memory", "frames"]

NODES: dict[str, tuple[list[str], list[str]]] = {
    "ADCaptureReferenceAttention": (
        ["model", "layers", "weight", "latent", "mask", "conditioning", "reference", "image", "vae", "target_mask",
         "balance"],
        ["AD_REFERENCE"],
    ),
    "ADLossGuider": (["model", "positive", "negative", "style", "cfg", *SETTINGS, *OPTIONAL], ["GUIDER"]),
    "ADGuidedKSampler": (
        ["model", "seed", "steps", "cfg", "sampler_name", "scheduler", "positive", "negative", "latent_image",
         "denoise", "style", *SETTINGS, *OPTIONAL],
        ["LATENT"],
    ),
    "ADApplyGuidance": (["model", "style", *SETTINGS, *OPTIONAL], ["MODEL"]),
    "ADOptimizeLatent": (
        ["model", "style", "latent_image", "seed", "start_from", "steps", *OF_OPTIMISE, "lr_schedule", "content",
         "conditioning", "regions", "memory", "frames"],
        ["LATENT"],
    ),
    "ADAdaINLatent": (["latent", "reference", "strength", "mask"], ["LATENT"]),
    "ADRegions": (["reference_labels", "target_labels"], ["AD_REGIONS"]),
    "ADWindows": (["size", "stride"], ["AD_WINDOWS"]),
    "ADInjectReferenceKV": (
        ["model", "style", "strength", "start_percent", "end_percent", "negative_strength"], ["MODEL"]
    ),
    "ADSeamlessTiling": (["model", "vae", "axes"], ["MODEL", "VAE"]),
    "ADFinetuneVAEDecoder": (["vae", "image", "steps", "learning_rate"], ["VAE"]),
    "ADExampleReference": (["picture", "image"], ["IMAGE"]),
    "ADAttentionMap": (["model", "style", "latent", "conditioning", "layer", "image"], ["IMAGE", "IMAGE"]),
}  # fmt: skip
"""Saved workflows depend on these: inputs in order, the optional ones last, and the types of the outputs."""

NEWER = {"ColorTransfer"}
"""Nodes of ComfyUI in shipped workflows that it has only since a later version than the oldest supported: 0.20.1."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyServer]:
    """A server with the demo's checkpoint and sample reference."""
    base = tmp_path_factory.mktemp("base")
    demo.prepare_base(base)
    with ComfyServer(COMFYUI, base, arguments=["--cpu"]) as running:
        yield running


def test_nodes_are_those_of_the_contract(server: ComfyServer) -> None:
    info = server.object_info()
    of_pack = {name: node["category"] for name, node in info.items() if node["python_module"].endswith(PACK_NAME)}
    assert of_pack.keys() == NODES.keys()
    assert all(category.startswith("attention distillation/") for category in of_pack.values()), of_pack
    served = {name: (list(input_specifications(info[name])), info[name]["output"]) for name in NODES}
    assert served == NODES


def test_workflows_fit_the_server(server: ComfyServer) -> None:
    """Each template and blueprint holds only nodes that the server knows, with a value for every widget.

    Those with a node that ComfyUI has had only later say so in README; they are left out on older versions.
    """
    info = server.object_info()
    missing = NEWER - info.keys()
    assert not missing or comfyui_version.__version__ != DEFAULT_VERSION
    shipped = [*CHECKOUT.glob("workflows/*.json"), *CHECKOUT.glob("subgraphs/*.json")]
    saved = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in shipped}
    fitting = {name: content for name, content in saved.items() if not node_types(content) & missing}
    assert len(fitting) >= 20
    for name, content in fitting.items():
        assert to_api(content, info), name


def test_guided_run_through_the_server(server: ComfyServer) -> None:
    """The shipped texture workflow makes another picture than without guidance, and logs its memory and what it did."""
    prompt = demo.guided_prompt(server, demo.SAMPLE, seed=0, size=SIZE)
    prompt[demo.find(prompt, "ADGuidedKSampler")]["inputs"].update(steps=STEPS)
    plain = demo.as_array(demo.make_picture(server, demo.unguided_prompt(prompt), "unguided"))
    assert lines_of_the_pack(server) == []
    guided = demo.as_array(demo.make_picture(server, prompt, "guided"))
    room, line = lines_of_the_pack(server)
    assert "room for gradients on " in room
    assert f" {STEPS} updates of 3 iterations, " in line
    demo.run_summary(line)  # its losses are finite numbers
    assert guided.shape == plain.shape == (SIZE, SIZE, 3)
    assert guided.std() > 0.02, "a latent that is not finite decodes to a flat picture"
    assert abs(guided - plain).mean() > 0.05


def test_samplers_that_cannot_be_guided_are_not_offered(server: ComfyServer) -> None:
    """A workflow that holds one all the same is told why before it runs, and one with no sampler what there is."""
    info = server.object_info()
    listed = info["ADGuidedKSampler"]["input"]["required"]["sampler_name"][1]["options"]
    everything = info["KSampler"]["input"]["required"]["sampler_name"][0]
    refused = {"uni_pc", "uni_pc_bh2", "sa_solver", "ar_video"}
    assert listed == [name for name in everything if name not in refused]
    prompt = demo.guided_prompt(server, demo.SAMPLE, seed=0, size=SIZE)
    inputs = prompt[demo.find(prompt, "ADGuidedKSampler")]["inputs"]
    for name in refused & set(everything):
        inputs["sampler_name"] = name
        with pytest.raises(PromptError, match=rf"sampler_name - {name} is not supported with .*: it .*; use"):
            server.queue(prompt)
    inputs["sampler_name"] = "eular"
    with pytest.raises(PromptError, match="sampler_name - 'eular' is no sampler; use one of euler, "):
        server.queue(prompt)


def lines_of_the_pack(server: ComfyServer) -> list[str]:
    """What the pack has logged so far."""
    return [line for line in server.log().splitlines() if "Attention distillation: " in line]


def test_a_node_in_the_middle_of_a_graph_shows_its_losses(server: ComfyServer) -> None:
    """As a preview beside the saved picture; it is not run again for that, and shows nothing without guidance."""
    prompt = demo.guided_prompt(server, demo.SAMPLE, seed=1, size=SIZE)
    prompt[demo.find(prompt, "ADGuidedKSampler")]["inputs"].update(steps=2)
    first = server.run(prompt)
    (plot,) = server.images(first, "temp")
    assert plot.startswith(b"\x89PNG")
    logged = lines_of_the_pack(server)
    prompt[demo.find(prompt, "SaveImage")]["inputs"]["filename_prefix"] = "again"
    assert server.images(server.run(prompt)) and lines_of_the_pack(server) == logged, "from the cache"
    assert len(server.images(first)) == 1
    prompt[demo.find(prompt, "ADGuidedKSampler")]["inputs"].update(iterations=0)
    assert server.images(server.run(prompt), "temp") == []


def test_three_ways_give_one_picture(styled: Any) -> None:
    """And the model is what it was: ComfyUI's own KSampler makes the same of it before and after."""
    before = styled.core()
    guided = styled.ksampler()
    assert torch.equal(styled.guider(), guided)
    assert torch.equal(styled.core(styled.patched()), guided)
    assert torch.equal(styled.core(), before)
    assert torch.isfinite(guided).all() and not torch.equal(guided, before)


FAMILIES = ("SDXL", "SD3", "FLUX.1-dev", "Lumina 2", "Qwen-Image", "Wan 2.1", "Anima")
"""Beside SD1.5 above; a ComfyUI that has no such network says so by a skipped test."""


@pytest.mark.parametrize("family", FAMILIES)
def test_one_guided_run_of_each_family(
    pack: Any, custom_samplers: None, tmp_path: Path, random_latent: Callable, family: str
) -> None:
    small = small_models.MODELS[family]
    model, text = small_models.load(small, tmp_path), small.cond(1)
    shape = (1, small.channels, 8, 8)
    graph = Graph(pack, model, text, text, {"samples": small.as_host(torch.zeros(shape))}, steps=1)
    graph = graph.styled(small.as_host(random_latent(1, shape))).but(iterations=1)
    before = graph.core()
    guided = graph.ksampler()
    assert torch.isfinite(guided).all() and not torch.equal(guided, before)
    assert torch.equal(graph.core(), before)


def test_all_that_the_pack_uses_of_comfyui_is_there(pack_module: Callable) -> None:
    used, is_there = used_by_the_pack(), pack_module("host_guard").is_there
    assert CHECKOUT / "attention" / "gradient" / "memory.py" in used
    assert {"comfy.samplers.CFGGuider", "comfy.patcher_extension.WrappersMP.OUTER_SAMPLE", "nodes.common_ksampler",
            "comfy.ldm.flux.model.Flux", "comfy_api.latest.io.Schema",
            "comfy_extras.nodes_sag.SelfAttentionGuidance"} <= set().union(*used.values())  # fmt: skip
    missing = []
    for file, names in used.items():
        for name in sorted(names):
            if not is_there(name):
                if file.name == "architectures.py" and comfyui_version.__version__ != DEFAULT_VERSION:
                    continue  # a network that this host does not have yet: it is told by its name alone
                missing.append(f"{file.relative_to(CHECKOUT)}: {name}")
    assert not missing
