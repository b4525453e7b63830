"""Which self-attention layers a model has, and the words a user picks them with.

Layers are counted from 0 in execution order; cross-attention is not counted.
"""

import re
from collections.abc import Sequence

from .architectures import AUTO_LAYER_COUNT, AttentionLayer, auto_layer_count, list_layers

__all__ = ["AttentionLayer", "auto_layer_count", "describe_layers", "list_layers", "select_layers"]


def select_layers(text: str, count: int, auto: int = AUTO_LAYER_COUNT) -> tuple[int, ...]:
    """Read the `layers` setting: `auto`, `all`, or indices and ranges such as `10-15` or `3,5,8-10`.

    Args:
        text: what the user wrote; `auto` is the last layers of the network.
        count: how many self-attention layers the model has.
        auto: how many layers `auto` is (all of them where there are fewer), see `auto_layer_count`.

    Returns:
        Layer indices, ascending, each once.

    Raises:
        ValueError: the text cannot be read, or names a layer that does not exist.
    """
    word = text.strip().lower()
    if word == "auto":
        return tuple(range(max(0, count - auto), count))
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
