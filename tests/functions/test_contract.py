"""Saved workflows: they keep widget values in order, and API prompts know nothing of inputs that came later.

What has landed stays, in its order. What is new comes behind all of it, optional and with a default.
"""

import asyncio
import inspect

import pytest

SETTINGS = "learning_rate FLOAT, iterations INT, adain BOOLEAN, content_weight FLOAT, attention_scale FLOAT, " \
           "content_loss COMBO, start_percent FLOAT, end_percent FLOAT"  # fmt: skip
OPTIONAL = "content AD_REFERENCE, regions AD_REGIONS, windows AD_WINDOWS"
LANDED = {
    "ADCaptureReferenceAttention": (
        "model MODEL, latent LATENT, layers STRING, weight FLOAT, mask MASK, conditioning CONDITIONING, "
        "reference AD_REFERENCE",
        "AD_REFERENCE",
    ),
    "ADLossGuider": (
        "model MODEL, positive CONDITIONING, negative CONDITIONING, style AD_REFERENCE, cfg FLOAT, "
        f"{SETTINGS}, {OPTIONAL}",
        "GUIDER",
    ),
    "ADGuidedKSampler": (
        "model MODEL, seed INT, steps INT, cfg FLOAT, sampler_name COMBO, scheduler COMBO, positive CONDITIONING, "
        f"negative CONDITIONING, latent_image LATENT, denoise FLOAT, style AD_REFERENCE, {SETTINGS}, {OPTIONAL}",
        "LATENT",
    ),
    "ADApplyGuidance": (f"model MODEL, style AD_REFERENCE, {SETTINGS}, {OPTIONAL}", "MODEL"),
    "ADOptimizeLatent": (
        "model MODEL, style AD_REFERENCE, latent_image LATENT, seed INT, start_from COMBO, steps INT, "
        "learning_rate FLOAT, iterations INT, content_weight FLOAT, attention_scale FLOAT, content_loss COMBO, "
        "lr_schedule COMBO, content AD_REFERENCE, conditioning CONDITIONING, regions AD_REGIONS",
        "LATENT",
    ),
    "ADAdaINLatent": ("latent LATENT, reference LATENT, strength FLOAT, mask MASK", "LATENT"),
    "ADRegions": ("reference_labels IMAGE, target_labels IMAGE", "AD_REGIONS"),
    "ADWindows": ("size INT, stride INT", "AD_WINDOWS"),
    "ADInjectReferenceKV": (
        "model MODEL, style AD_REFERENCE, strength FLOAT, start_percent FLOAT, end_percent FLOAT",
        "MODEL",
    ),
    "ADSeamlessTiling": ("model MODEL, vae VAE, axes COMBO", "MODEL, VAE"),
    "ADFinetuneVAEDecoder": ("vae VAE, image IMAGE, steps INT, learning_rate FLOAT", "VAE"),
    "ADExampleReference": ("picture COMBO", "IMAGE"),
    "ADAttentionMap": (
        "model MODEL, style AD_REFERENCE, latent LATENT, conditioning CONDITIONING, layer STRING, image IMAGE",
        "IMAGE, IMAGE",
    ),
}
"""Inputs and outputs of each node as of version 0.1.0. Nothing here is ever edited; a new node may be added."""

ADDED = {
    "ADCaptureReferenceAttention": "image IMAGE, vae VAE, target_mask MASK, balance COMBO",
    "ADLossGuider": "lr_schedule COMBO, memory COMBO, frames FLOAT",
    "ADGuidedKSampler": "lr_schedule COMBO, memory COMBO, frames FLOAT",
    "ADApplyGuidance": "lr_schedule COMBO, memory COMBO, frames FLOAT",
    "ADOptimizeLatent": "memory COMBO, frames FLOAT",
    "ADExampleReference": "image IMAGE",
    "ADInjectReferenceKV": "negative_strength FLOAT",
}
"""Inputs that came behind them since then, in their order. What is here stays; what is new is put at its end."""


@pytest.fixture(scope="module")
def nodes(pack):
    """The pack's nodes by id."""
    extension = asyncio.run(pack.comfy_entrypoint())
    return {node.define_schema().node_id: node for node in asyncio.run(extension.get_node_list())}


def test_no_node_is_gone(nodes):
    assert LANDED.keys() <= nodes.keys()


@pytest.mark.parametrize("node_id", LANDED)
def test_what_has_landed_stays_and_what_is_new_comes_behind_it(nodes, node_id):
    inputs, outputs = (text.split(", ") for text in LANDED[node_id])
    added = ADDED[node_id].split(", ") if node_id in ADDED else []
    schema = nodes[node_id].define_schema()
    assert [f"{each.id} {each.get_io_type()}" for each in schema.inputs] == inputs + added
    assert [each.get_io_type() for each in schema.outputs][: len(outputs)] == outputs
    for new in schema.inputs[len(inputs) :]:
        assert new.optional, f"{new.id}: an API prompt saved before it came would be refused"
        assert getattr(new, "default", "a socket") is not None, f"{new.id}: a widget without a default"
    known = [text.split(" ")[0] for text in inputs]
    inspect.signature(nodes[node_id].execute).bind(**dict.fromkeys(known))  # as ComfyUI runs a prompt without the new
