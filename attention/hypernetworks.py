"""Hypernetworks: small networks that change what attention makes its keys and values of.

ComfyUI keeps them as patches of attention, where other nodes put what is for the denoising alone. They belong to the
weights, as a LoRA does: the pack's passes take them too.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Patches = Mapping[str, Sequence[Callable]]

_KINDS = ("attn1_patch", "attn2_patch")  # of self-attention and of attention to the text
_CLASS = "load_hypernetwork_patch.<locals>.hypernetwork_patch"  # in ComfyUI's Load Hypernetwork


def hypernetworks(model_options: Mapping[str, Any]) -> dict[str, list[Callable]]:
    """The hypernetworks among the patches of a model, as `patches` of transformer_options holds them."""
    patches = model_options.get("transformer_options", {}).get("patches", {})
    found = {kind: [one for one in patches.get(kind, ()) if type(one).__qualname__ == _CLASS] for kind in _KINDS}
    return {kind: of_kind for kind, of_kind in found.items() if of_kind}


def modules_of(patches: Patches) -> list[torch.nn.Module]:
    """The networks in hypernetwork patches, each once."""
    networks = {id(net): net for of_kind in patches.values() for one in of_kind for net in one.hypernet.values()}
    return list(networks.values())
