"""Every picture, mask, latent, condition and number that a node of the pack takes: each odd value of its type.

The right result, or a ValueError that names the input before anything is loaded. The table has a row for each input of
each node; the types say what is tried on it.
"""

import asyncio
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from small_vae import small_kl, smooth_image

import nodes as comfy_nodes

NAN, INF = math.nan, math.inf


def latents(latent: dict[str, Any], change: Callable[[torch.Tensor], Any]) -> dict[str, Any]:
    """The LATENT with other samples."""
    return {**latent, "samples": change(latent["samples"])}


def texts(conditioning: list, change: Callable[[torch.Tensor], torch.Tensor | None]) -> list:
    """The CONDITIONING with other text."""
    return [[change(text), dict(options)] for text, options in conditioning]


def of_samples(**changes: Callable[[torch.Tensor], Any]) -> dict[str, Callable]:
    """Changes of a tensor as changes of a LATENT; underscores of the names are spaces."""
    return {name.replace("_", " "): functools.partial(latents, change=change) for name, change in changes.items()}


def of_text(**changes: Callable[[torch.Tensor], Any]) -> dict[str, Callable]:
    """Changes of a tensor as changes of a CONDITIONING."""
    return {name.replace("_", " "): functools.partial(texts, change=change) for name, change in changes.items()}


BAD: dict[str, dict[str, Callable[[Any], Any]]] = {
    "IMAGE": {
        "no channels": lambda image: image[..., :0],
        "five channels": lambda image: image[..., [0, 1, 2, 0, 1]],
        "one row": lambda image: image[0, 0],
        "no batch axis": lambda image: image[0],
        "a video's shape": lambda image: image[None],
        "no pictures": lambda image: image[:0],
        "no pixels": lambda image: image[:, :0],
        "one pixel": lambda image: image[:, :1, :1],
        "NaN": lambda image: image * NAN,
        "infinite": lambda image: image + INF,
    },
    "MASK": {
        "one row": lambda mask: mask[0, 0],
        "three channels": lambda mask: mask.expand(3, -1, -1)[None],
        "a video's shape": lambda mask: mask[None, None],
        "no masks": lambda mask: mask[:0],
        "three masks for one": lambda mask: mask.expand(3, -1, -1),
        "no pixels": lambda mask: mask[:, :0],
        "NaN": lambda mask: mask * NAN,
        "infinite": lambda mask: mask + INF,
    },
    "LATENT": of_samples(
        one_channel=lambda x: x[:, :1],
        two_channels=lambda x: x[:, :2],
        three_channels=lambda x: x[:, :3],
        five_channels=lambda x: x[:, [0, 1, 2, 3, 0]],
        one_row=lambda x: x[0, 0],
        no_batch_axis=lambda x: x[0],
        a_frame_of_a_video=lambda x: x[:, :, None],
        two_frames=lambda x: x[:, :, None].expand(-1, -1, 2, -1, -1),
        six_axes=lambda x: x[None, None],
        no_pictures=lambda x: x[:0],
        no_pixels=lambda x: x[..., :0],
        NaN=lambda x: x * NAN,
        infinite=lambda x: x + INF,
        video_and_audio=lambda x: NestedTensor([x, x]),
    ),
    "CONDITIONING": {
        "nothing": lambda conditioning: [],
        **of_text(
            no_text=lambda text: None,
            no_token_axis=lambda text: text[0],
            four_axes=lambda text: text[None],
            no_batch=lambda text: text[:0],
            no_tokens=lambda text: text[:, :0],
            another_width=lambda text: text.repeat(1, 1, 2),
            NaN=lambda text: text * NAN,
            infinite=lambda text: text + INF,
        ),
    },
    "FLOAT": {"NaN": lambda _: NAN, "infinite": lambda _: INF, "minus infinite": lambda _: -INF},
    "AD_REFERENCE": {name: lambda _, name=name: ("reference", name) for name in (
        "16 channels", "a layer too far", "another model's text", "weight 0")},
    "AD_REGIONS": {"three reference labels": lambda _: ("regions", 3)},
}  # fmt: skip

# Odd values with what they must be equal to.
SAME: dict[str, dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]]] = {
    "IMAGE": {
        "grey": (lambda image: image[..., :1], lambda image: image[..., [0, 0, 0]]),
        "grey and alpha": (lambda image: image[..., [0, 2]], lambda image: image[..., [0, 0, 0]]),
        "alpha": (lambda image: image[..., [0, 1, 2, 1]], lambda image: image),
    },
    "MASK": {
        "no batch axis": (lambda mask: mask[0], lambda mask: mask),
        "a channel axis": (lambda mask: mask[:, None], lambda mask: mask),
        "one pixel": (lambda mask: torch.ones(1, 1, 1), lambda mask: torch.ones(1, 8, 8)),
    },
    "LATENT": {},
    "CONDITIONING": {
        "a second text for a batch": (
            lambda conditioning: texts(conditioning, lambda text: torch.cat([text, text + 1])),
            lambda conditioning: conditioning,
        ),
    },
}

# Odd values with which the node runs and gives finite numbers.
FINITE: dict[str, dict[str, Callable[[Any], Any]]] = {
    "LATENT": of_samples(one_pixel=lambda x: x[..., :1, :1], one_row_of_pixels=lambda x: x[..., :1, :]),
    "CONDITIONING": of_text(one_token=lambda text: text[:, :1], an_odd_length=lambda text: text[:, :13]),
}


@dataclass(frozen=True)
class Row:
    """What is special about an input.

    Attributes:
        fine: bad values of its type that are right here.
        blamed: another input that the error names, by bad value.
        same: further odd values with what they are equal to.
        known_later: what becomes known only when a sampler runs.
        instead_of: an input that is left out where this one is given.
    """

    fine: tuple[str, ...] = ()
    blamed: dict[str, str] = field(default_factory=dict)
    same: dict[str, tuple[Callable, Callable]] = field(default_factory=dict)
    known_later: tuple[str, ...] = ()
    instead_of: str | None = None


OTHER_CHANNELS = ("one channel", "two channels", "three channels", "five channels")
NO_NEGATIVE = {
    "none at all, cfg 1": (lambda conditioning: [], lambda conditioning: "positive"),
    "without text, cfg 1": (lambda conditioning: [[None, {}]], lambda conditioning: "positive"),
}
EMPTY_OF_ANOTHER_MODEL = {
    "empty, 16 channels": (
        lambda latent: latents(latent, lambda x: torch.zeros(1, 16, 8, 8)),
        lambda latent: latents(latent, torch.zeros_like),
    ),
}
SETTINGS = ("learning_rate", "content_weight", "attention_scale", "start_percent", "end_percent", "frames")
REFERENCES = ("style", "content", "regions")

TABLE: dict[str, dict[str, Row]] = {
    "ADCaptureReferenceAttention": {
        "latent": Row(), "weight": Row(), "mask": Row(), "conditioning": Row(),
        "reference": Row(known_later=tuple(BAD["AD_REFERENCE"])),
        "image": Row(fine=("one pixel",), instead_of="latent"),
        "target_mask": Row(known_later=("three masks for one",)),
    },
    "ADLossGuider": {
        "positive": Row(), "negative": Row(fine=("nothing", "no text")), "cfg": Row(),
        **{name: Row() for name in (*SETTINGS, *REFERENCES)},
    },
    "ADGuidedKSampler": {
        "cfg": Row(), "positive": Row(), "negative": Row(fine=("nothing", "no text")),
        "latent_image": Row(same=EMPTY_OF_ANOTHER_MODEL), "denoise": Row(),
        **{name: Row() for name in (*SETTINGS, *REFERENCES)},
    },
    "ADApplyGuidance": {name: Row() for name in (*SETTINGS, *REFERENCES)},
    "ADOptimizeLatent": {
        "latent_image": Row(same=EMPTY_OF_ANOTHER_MODEL),
        "conditioning": Row(),
        **{name: Row() for name in ("learning_rate", "content_weight", "attention_scale", "frames", *REFERENCES)},
    },
    "ADAdaINLatent": {
        "latent": Row(
            fine=("a frame of a video",), blamed=dict.fromkeys(OTHER_CHANNELS, "reference"),
            same={"a frame": (lambda x: latents(x, lambda x: x[:, :, None]), lambda x: x)},
        ),
        "reference": Row(
            fine=("a frame of a video",), same={"a frame": (lambda x: latents(x, lambda x: x[:, :, None]), lambda x: x)}
        ),
        "strength": Row(), "mask": Row(),
    },
    "ADRegions": {"reference_labels": Row(), "target_labels": Row()},
    "ADInjectReferenceKV": {
        name: Row() for name in ("style", "strength", "start_percent", "end_percent", "negative_strength")
    },
    "ADFinetuneVAEDecoder": {"image": Row(), "learning_rate": Row()},
    "ADAttentionMap": {
        "style": Row(), "latent": Row(), "conditioning": Row(), "image": Row(fine=("one pixel",)),
    },
    "ADWindows": {},
    "ADSeamlessTiling": {},
    "ADExampleReference": {"image": Row(fine=("one pixel",))},
}  # fmt: skip
TYPES: dict[tuple[str, str], str] = {
    ("ADCaptureReferenceAttention", "latent"): "LATENT", ("ADCaptureReferenceAttention", "mask"): "MASK",
    ("ADCaptureReferenceAttention", "reference"): "AD_REFERENCE", ("ADCaptureReferenceAttention", "image"): "IMAGE",
    ("ADCaptureReferenceAttention", "target_mask"): "MASK", ("ADGuidedKSampler", "latent_image"): "LATENT",
    ("ADOptimizeLatent", "latent_image"): "LATENT", ("ADAdaINLatent", "latent"): "LATENT",
    ("ADAdaINLatent", "reference"): "LATENT", ("ADAdaINLatent", "mask"): "MASK",
    ("ADRegions", "reference_labels"): "IMAGE", ("ADRegions", "target_labels"): "IMAGE",
    ("ADFinetuneVAEDecoder", "image"): "IMAGE", ("ADAttentionMap", "latent"): "LATENT",
    ("ADAttentionMap", "image"): "IMAGE",
    ("ADExampleReference", "image"): "IMAGE",
}  # fmt: skip
BY_NAME = {"positive": "CONDITIONING", "negative": "CONDITIONING", "conditioning": "CONDITIONING",
           "style": "AD_REFERENCE", "content": "AD_REFERENCE", "regions": "AD_REGIONS"}  # fmt: skip
ROWS = [(node_id, name, row) for node_id, rows in TABLE.items() for name, row in rows.items()]


def type_of(node_id: str, name: str) -> str:
    """As the schema has it; `test_the_table_has_every_input` compares."""
    return TYPES.get((node_id, name), BY_NAME.get(name, "FLOAT"))


def test_the_table_has_every_input(pack):
    """A new input of these types, or a new node, needs a row."""
    extension = asyncio.run(pack.comfy_entrypoint())
    found = {}
    for node in asyncio.run(extension.get_node_list()):
        schema = node.define_schema()
        found[schema.node_id] = {each.id: each.get_io_type() for each in schema.inputs if each.get_io_type() in BAD}
    assert found == {node_id: {name: type_of(node_id, name) for name in rows} for node_id, rows in TABLE.items()}


@pytest.fixture(scope="module")
def small(graph, random_latent):
    """A guided graph at 8x8, one step, with a content reference."""
    made = graph.but(latent={"samples": random_latent(3, (1, 4, 8, 8))}, steps=1, iterations=1, denoise=0.5)
    return made.styled(random_latent(1, (1, 4, 8, 8))).but(content=made.capture(random_latent(2, (1, 4, 8, 8))))


@pytest.fixture(scope="module")
def inputs(small, pack_module, encode_random):
    """Good inputs of each node."""
    settings = {"learning_rate": 0.05, "iterations": 1, "adain": True, "content_weight": 0.25, "attention_scale": 1.0,
                "content_loss": "query", "start_percent": 0.0, "end_percent": 1.0, "frames": 0.0}  # fmt: skip
    of_optimise = {k: v for k, v in settings.items() if k not in ("adain", "start_percent", "end_percent")}
    labels = torch.zeros(1, 8, 16, 3)
    labels[:, :, 8:] = 0.6
    regions = pack_module("attention.regions").read_regions(labels, labels)
    shared = {"model": small.model, "style": small.style, "content": small.content, "regions": regions}
    prompts = {"positive": small.positive, "negative": encode_random(2), "cfg": 1.0}
    latent = {"samples": small.latent["samples"].clone()}
    mask = torch.ones(1, 8, 8)
    mask[:, :4] = 0
    return {
        "ADCaptureReferenceAttention": {
            "model": small.model, "latent": latent, "layers": "auto", "weight": 1.0, "mask": mask,
            "conditioning": small.positive, "reference": small.style, "image": smooth_image(1, 16, 16),
            "vae": small_kl(), "target_mask": mask, "balance": "amount",
        },
        "ADLossGuider": {**shared, **prompts, **settings},
        "ADGuidedKSampler": {
            **shared, **prompts, **settings, "seed": 3, "steps": 1, "sampler_name": "euler", "scheduler": "normal",
            "latent_image": latent, "denoise": 0.5,
        },
        "ADApplyGuidance": {**shared, **settings},
        "ADOptimizeLatent": {
            **shared, **of_optimise, "latent_image": latent, "seed": 3, "start_from": "latent", "steps": 1,
            "lr_schedule": "constant", "conditioning": small.positive,
        },
        "ADAdaINLatent": {
            "latent": latent, "reference": latents(latent, lambda x: 2 * x + 1), "strength": 0.7, "mask": mask
        },
        "ADRegions": {"reference_labels": labels, "target_labels": labels},
        "ADInjectReferenceKV": {
            "model": small.model, "style": small.style, "strength": 1.0, "start_percent": 0.0, "end_percent": 1.0,
            "negative_strength": 0.0,
        },
        "ADAttentionMap": {
            "model": small.model, "style": small.style, "latent": latent, "conditioning": small.positive,
            "layer": "mean", "image": smooth_image(1, 16, 16),
        },
        "ADFinetuneVAEDecoder": {
            "vae": small_kl(), "image": smooth_image(1, 16, 16), "steps": 1, "learning_rate": 1e-3
        },
        "ADExampleReference": {"picture": "texture: scales", "image": smooth_image(1, 16, 16)},
    }  # fmt: skip


def given_for(name: str, node_id: str, inputs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The node's good inputs, where `name` is tried: of two that stand for one another, that one."""
    pairs = {new: row.instead_of for new, row in TABLE[node_id].items() if row.instead_of}
    left_out = {old if new == name else new for new, old in pairs.items()}
    return {key: value for key, value in inputs[node_id].items() if key not in left_out}


@torch.inference_mode()
def execute(node_id: str, given: dict[str, Any]) -> Any:
    """A node's last output, by the way that ComfyUI's execution goes."""
    node = comfy_nodes.NODE_CLASS_MAPPINGS[node_id]
    return node.PREPARE_CLASS_CLONE(None).EXECUTE_NORMALIZED(**given).args[-1]


def outcome(node_id: str, given: dict[str, Any], small: Any) -> torch.Tensor:
    """What comes of a node's output in the end, as numbers."""
    made = execute(node_id, given)
    if node_id == "ADCaptureReferenceAttention":
        return small.but(style=made, content=None).ksampler()
    if node_id == "ADLossGuider":
        return small.advanced(made)
    if node_id == "ADRegions":
        return torch.cat([made.reference.flatten(), made.target.flatten()])
    if node_id == "ADExampleReference":
        return made
    if node_id == "ADFinetuneVAEDecoder":
        return torch.cat([weight.flatten() for name, weight in sorted(made.get_sd().items())])
    return made if torch.is_tensor(made) else made["samples"]


def bad_value(kind: str, bad: str, good: Any, small: Any, pack_module: Callable) -> Any:
    """A bad value of a type; references and regions of another model are made on the spot."""
    value = BAD[kind][bad](good)
    if kind not in ("AD_REFERENCE", "AD_REGIONS"):
        return value
    if kind == "AD_REGIONS":
        maps = torch.zeros(3, 4, 4, dtype=torch.long)
        return pack_module("attention.regions").Regions(maps, maps[:1], 1)
    reference, other = pack_module("attention.reference"), torch.zeros(1, 20, 48)
    latent = torch.ones(1, 16 if bad == "16 channels" else 4, 8, 8)
    text = [[other, {}]] if bad == "another model's text" else None
    layers = (1, 99) if bad == "a layer too far" else (1, 2)
    return reference.Reference(
        (reference.ReferencePart(latent, layers, 0.0 if bad == "weight 0" else 1.0, None, text),)
    )


def bad_values() -> list:
    """Each bad value of each row."""
    return [
        pytest.param(node_id, name, bad, row, id=f"{node_id}-{name}-{bad}")
        for node_id, name, row in ROWS
        for bad in BAD[type_of(node_id, name)]
        if bad not in row.fine + row.known_later
    ]


@pytest.mark.parametrize(("node_id", "name", "bad", "row"), bad_values())
def test_bad_values_are_refused_by_name(node_id, name, bad, row, inputs, small, pack_module, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("work was started before the error")

    given = given_for(name, node_id, inputs)
    value = bad_value(type_of(node_id, name), bad, given[name], small, pack_module)
    monkeypatch.setattr(comfy.model_management, "load_models_gpu", refuse)
    with pytest.raises(ValueError, match=rf"^{row.blamed.get(bad, name)}: "):
        execute(node_id, {**given, name: value})


def same_values() -> list:
    """Each odd value of each row that is right, with what it is equal to."""
    found = []
    for node_id, name, row in ROWS:
        values = {**SAME.get(type_of(node_id, name), {}), **row.same}
        if name == "negative":
            values |= NO_NEGATIVE
        found += [pytest.param(node_id, name, *pair, id=f"{node_id}-{name}-{odd}") for odd, pair in values.items()]
    return found


@pytest.mark.parametrize(("node_id", "name", "odd", "even"), same_values())
def test_odd_values_are_taken_for_what_they_mean(node_id, name, odd, even, inputs, small):
    given = given_for(name, node_id, inputs)
    value = even(given[name])
    expected = outcome(node_id, {**given, name: given[value] if isinstance(value, str) else value}, small)
    found = outcome(node_id, {**given, name: odd(given[name])}, small)
    assert torch.equal(found.reshape(expected.shape), expected)


def finite_values() -> list:
    """Each odd value of each row that the node runs with."""
    return [
        pytest.param(node_id, name, odd, id=f"{node_id}-{name}-{what}")
        for node_id, name, _ in ROWS
        for what, odd in FINITE.get(type_of(node_id, name), {}).items()
    ]


@pytest.mark.parametrize(("node_id", "name", "odd"), finite_values())
def test_odd_values_run(node_id, name, odd, inputs, small):
    given = given_for(name, node_id, inputs)
    given = {**given, name: odd(given[name])}
    if name in ("latent_image", "latent"):  # content must have the picture's size, a mask only the model's smallest
        given = {key: value for key, value in given.items() if key not in ("content", "mask")}
    made = outcome(node_id, given, small)
    assert torch.isfinite(made).all() and made.std() > 0
