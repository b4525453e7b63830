"""The rows of the table: how each picture is made, as a prompt for the server.

Each comes from a shipped workflow, with the reference, the seed, the size and the number of steps put in.
"""

from __future__ import annotations

import copy
import json
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import demo
from host.comfy_env import CHECKOUT

if TYPE_CHECKING:
    from host.comfy_server import ComfyServer

Prompt = dict[str, Any]

WORKFLOWS = CHECKOUT / "workflows"
OPTIMISATION, LARGE_TEXTURE, SEAMLESS, IN_STYLE, PHOTO = (
    WORKFLOWS / f"{name}.json"
    for name in (
        "08 Texture by Optimisation",
        "05 Large Texture",
        "06 Seamless Tile",
        "03 Style from a Picture (SD1.5)",
        "04 Photo in a Style",
    )
)
VAE_ALONE, NOTHING, FLAT, INJECTION = "reference through the VAE", "nothing", "a flat picture", "Inject Reference KV"
MOVED = "the reference, moved"
FEED_FORWARD, KV_GUIDED, GUIDED, OPTIMISED = "feed-forward", "KV guidance", "guided sampling", "optimisation"
WINDOWS, TILE, COARSE, LARGE = "windows, 3:2", "seamless tile", "coarse to fine", "coarse to fine, double size"
PROMPT_ALONE, PROMPTED, PROMPT_FORWARD = "prompt, no guidance", "prompt in the style", "prompt, feed-forward"
PHOTO_ALONE, PAINTED, PHOTO_FORWARD = "the photo itself", "photo in the style", "photo, feed-forward"
STRENGTHS = {"photo, edges held, 1/4": 0.25, "photo, edges held, 1/2": 0.5, "photo, edges held": 1.0}
"""The photo in the style with its edges held, and how much of the template's style strength each is given."""
TEXTURES = (
    *(LARGE, VAE_ALONE, MOVED, NOTHING, FLAT, FEED_FORWARD, INJECTION, KV_GUIDED, COARSE, GUIDED, OPTIMISED, TILE),
    WINDOWS,
)
"""In the order in which they are made: what tells most comes first."""
PROMPTS, PHOTOS = (PROMPT_ALONE, PROMPT_FORWARD, PROMPTED), (PHOTO_ALONE, PHOTO_FORWARD, PAINTED, *STRENGTHS)
SHOWN = (
    *(VAE_ALONE, MOVED, NOTHING, FLAT, FEED_FORWARD, INJECTION, KV_GUIDED, GUIDED, OPTIMISED, WINDOWS, TILE, COARSE),
    LARGE,
    *PROMPTS,
    *PHOTOS,
)
"""In the order of the table."""


class Settings(NamedTuple):
    """What one table is made with, beside reference and seed."""

    size: int
    """Pixels of a side; the row of double size has twice as many."""
    sampling: int = 50
    """Steps of each guided sampling that is not coarse to fine, which has its own."""
    optimisation: int = 300
    stride: int = 8
    """How often a window moves on until it has moved by its own size."""
    coarse: int = 1
    """What the steps of coarse to fine are divided by."""
    checkpoint: str = demo.CHECKPOINT
    prompt: str = ""
    content: str = ""
    """Name of a photo in the server's input folder."""
    content_weight: float = 0.25
    """How firmly the photo's structure is held."""

    @property
    def window_stride(self) -> int:
        """Pixels by which a window moves on."""
        return self.size // self.stride


def make_prompt(server: ComfyServer, row: str, reference: str, seed: int, settings: Settings) -> Prompt:
    """The prompt of a row whose picture comes from the server."""
    prompt = MAKERS[row](server, reference, seed, settings)
    prompt[demo.find(prompt, "CheckpointLoaderSimple")]["inputs"]["ckpt_name"] = settings.checkpoint
    return prompt


def target_prompt(server: ComfyServer, reference: str, size: int, settings: Settings) -> Prompt:
    """The reference after the VAE's encode and decode."""
    prompt = demo.reference_prompt(guided(server, reference, 0, settings._replace(size=size)))
    prompt[demo.find(prompt, "CheckpointLoaderSimple")]["inputs"]["ckpt_name"] = settings.checkpoint
    return prompt


def guided(server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    prompt = demo.guided_prompt(server, reference, seed, settings.size)
    return with_inputs(prompt, "ADGuidedKSampler", steps=settings.sampling)


def nothing(server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    return demo.unguided_prompt(guided(server, reference, seed, settings))


def injected(server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    """Sampling without guidance, with the reference's keys and values injected."""
    prompt = nothing(server, reference, seed, settings)
    inputs = prompt[demo.find(prompt, "ADGuidedKSampler")]["inputs"]
    values = {"strength": 1.0, "start_percent": 0.0, "end_percent": 1.0}
    prompt["injection"] = {
        "class_type": "ADInjectReferenceKV",
        "inputs": {"model": inputs["model"], "style": inputs["style"], **values},
    }
    inputs["model"] = ["injection", 0]
    return prompt


def kv_guided(server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    """The same, pushed away from the picture without."""
    return with_inputs(injected(server, reference, seed, settings), "ADInjectReferenceKV", negative_strength=3.0)


def optimised(server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    prompt = demo.guided_prompt(server, reference, seed, settings.size, OPTIMISATION)
    return with_inputs(prompt, "ADOptimizeLatent", steps=settings.optimisation)


def in_windows(server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    prompt = demo.guided_prompt(server, reference, seed, settings.size, LARGE_TEXTURE)
    with_inputs(prompt, "ADGuidedKSampler", steps=settings.sampling)
    with_inputs(prompt, "ADWindows", size=settings.size, stride=settings.window_stride)
    return with_inputs(prompt, "EmptyLatentImage", width=settings.size * 3 // 2)


def tile(server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    prompt = demo.guided_prompt(server, reference, seed, settings.size, SEAMLESS)
    return with_inputs(prompt, "ADGuidedKSampler", steps=settings.sampling)


def coarse_to_fine(server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    prompt = demo.coarse_to_fine_prompt(server, reference, seed, settings.size)
    for node in prompt.values():
        if node["class_type"] == "ADGuidedKSampler":
            node["inputs"]["steps"] //= settings.coarse
    return prompt


def double_size(server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    return coarse_to_fine(server, reference, seed, settings._replace(size=2 * settings.size))


def prompted(server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    """What the words say, in the style of the reference."""
    prompt = demo.guided_prompt(server, reference, seed, settings.size, IN_STYLE)
    sampler = with_inputs(prompt, "ADGuidedKSampler", steps=settings.sampling)[demo.find(prompt, "ADGuidedKSampler")]
    words = prompt[sampler["inputs"]["positive"][0]]
    while words["class_type"] != "CLIPTextEncode":
        words = prompt[words["inputs"]["conditioning"][0]]
    words["inputs"]["text"] = settings.prompt
    return prompt


def prompt_alone(server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    return demo.unguided_prompt(prompted(server, reference, seed, settings))


def painted(server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    """The photo, its middle square, in the style of the reference."""
    from host.workflow_api import to_api

    prompt = to_api(json.loads(PHOTO.read_text(encoding="utf-8")), server.object_info())
    prompt = {number: node for number, node in prompt.items() if node["class_type"] != "PreviewImage"}
    for number, node in list(prompt.items()):
        if node["class_type"] == "ADExampleReference":
            photo = node["inputs"]["picture"].startswith("scene")
            prompt[number] = {
                "class_type": "LoadImage",
                "inputs": {"image": settings.content if photo else reference},
            }
    with_inputs(prompt, "ADOptimizeLatent", seed=seed, content_weight=settings.content_weight)
    scale = demo.find(prompt, "ImageScaleToTotalPixels")
    square = {"upscale_method": "lanczos", "width": settings.size, "height": settings.size, "crop": "center"}
    prompt[scale] = {
        "class_type": "ImageScale",
        "inputs": {"image": prompt[scale]["inputs"]["image"], **square},
    }
    return prompt


def edges_held(share: float, server: ComfyServer, reference: str, seed: int, settings: Settings) -> Prompt:
    """The same with the photo's edges held most, and a share of the style strength."""
    prompt = painted(server, reference, seed, settings)
    strength = prompt[demo.find(prompt, "ADOptimizeLatent")]["inputs"]["learning_rate"]
    return with_inputs(prompt, "ADOptimizeLatent", content_loss="query_edges", learning_rate=share * strength)


MAKERS = {
    NOTHING: nothing,
    INJECTION: injected,
    KV_GUIDED: kv_guided,
    GUIDED: guided,
    OPTIMISED: optimised,
    WINDOWS: in_windows,
    TILE: tile,
    COARSE: coarse_to_fine,
    LARGE: double_size,
    PROMPT_ALONE: prompt_alone,
    PROMPTED: prompted,
    PAINTED: painted,
    **{row: partial(edges_held, share) for row, share in STRENGTHS.items()},
}


def with_inputs(prompt: Prompt, class_type: str, **inputs: Any) -> Prompt:
    """The same prompt, with inputs of the only node of a type set."""
    prompt[demo.find(prompt, class_type)]["inputs"].update(inputs)
    return prompt


def unfolded(prompt: Prompt) -> list[Any]:
    """A prompt without the numbers of its nodes: two that make the same picture are alike."""

    def read(value: Any) -> Any:
        if isinstance(value, list) and len(value) == 2 and value[0] in prompt:
            node = prompt[value[0]]
            return [node["class_type"], {name: read(each) for name, each in sorted(node["inputs"].items())}, value[1]]
        return copy.deepcopy(value)

    return [read([number, 0]) for number, node in prompt.items() if node["class_type"] == "SaveImage"]
