"""Which self-attention layers a model has, and the words a user picks them with.

Layers are counted from 0 in execution order; cross-attention is not counted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, UNetModel, Upsample

AUTO_LAYER_COUNT = 6  # the paper: the last six layers of the network, whatever its depth


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention layer.

    Attributes:
        index: position in execution order, from 0.
        block: ComfyUI's name for it, the key of patches_replace["attn1"]: (stage, block number, transformer index).
        halvings: how often the latent has been halved in size before it gets here.
    """

    index: int
    block: tuple[str, int, int]
    halvings: int

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the layer's token grid for a latent of height x width (latent pixels)."""
        for _ in range(self.halvings):
            height, width = (height + 1) // 2, (width + 1) // 2  # a stride-2 convolution with padding 1
        return height, width


def list_layers(diffusion_model: torch.nn.Module) -> tuple[AttentionLayer, ...]:
    """The self-attention layers of a model in execution order.

    Raises:
        ValueError: the model is of a kind this pack cannot read, or has no self-attention.
    """
    kind = type(diffusion_model).__name__
    if not isinstance(diffusion_model, UNetModel):
        raise ValueError(f"model: {kind} is not supported; allowed are UNet models such as SD1.5, SD2 and SDXL")
    found: list[tuple[tuple[str, int, int], int]] = []
    halvings = 0
    for stage, number, block in _unet_blocks(diffusion_model):
        for module in block:
            if isinstance(module, SpatialVideoTransformer):
                raise ValueError("model: video models are not supported; use an image model such as SD1.5 or SDXL")
            if isinstance(module, SpatialTransformer):
                for i, transformer in enumerate(module.transformer_blocks):
                    if not transformer.disable_self_attn:
                        found.append(((stage, number, i), halvings))
            elif isinstance(module, Downsample):
                halvings += 1
            elif isinstance(module, Upsample):
                halvings -= 1
    if not found:
        raise ValueError(
            f"model: this {kind} has no self-attention layer; choose a checkpoint that has some, such as SD1.5"
        )
    return tuple(AttentionLayer(index, block, level) for index, (block, level) in enumerate(found))


def _unet_blocks(unet: UNetModel):
    """Yield (stage, number, block) in execution order, named as ComfyUI names them in transformer_options."""
    for number, block in enumerate(unet.input_blocks):
        yield "input", number, block
    if unet.middle_block is not None:
        yield "middle", 0, unet.middle_block
    for number, block in enumerate(unet.output_blocks):
        yield "output", number, block


def select_layers(text: str, count: int) -> tuple[int, ...]:
    """Read the `layers` setting: `auto`, `all`, or indices and ranges such as `10-15` or `3,5,8-10`.

    Args:
        text: what the user wrote; `auto` is the last six layers (all of them where there are fewer).
        count: how many self-attention layers the model has.

    Returns:
        Layer indices, ascending, each once.

    Raises:
        ValueError: the text cannot be read, or names a layer that does not exist.
    """
    word = text.strip().lower()
    if word == "auto":
        return tuple(range(max(0, count - AUTO_LAYER_COUNT), count))
    if word == "all":
        return tuple(range(count))
    chosen: set[int] = set()
    for part in word.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(
                f"layers: cannot read {part.strip()!r} in {text!r}; "
                "write auto, all, or indices such as 10-15 or 3,5,8-10"
            )
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if first > last:
            raise ValueError(f"layers: the range {part.strip()!r} runs backwards; write {last}-{first}")
        if last >= count:
            raise ValueError(
                f"layers: layer {last} does not exist; this model has {count} self-attention layers, 0 to {count - 1}"
            )
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def describe_layers(indices: Sequence[int]) -> str:
    """Write layer indices the short way, `3,5,8-10`, as `select_layers` reads them."""
    runs: list[list[int]] = []
    for index in indices:
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
