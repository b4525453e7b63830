"""Values made of tensors, brought to a device as a whole."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def on_device(value: T, device: torch.device) -> T:
    """A value with all tensors in it on a device: dataclasses, dicts, lists and tuples of such are made anew.

    What lies there already is shared; all else, numbers for one, too.
    """
    moved: Any = value
    if isinstance(value, torch.Tensor):
        moved = value.to(device)
    elif dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        moved = dataclasses.replace(value, **on_device(fields, device))
    elif isinstance(value, Mapping):
        moved = {name: on_device(of_it, device) for name, of_it in value.items()}
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        moved = type(value)(*(on_device(of_it, device) for of_it in value))
    elif isinstance(value, list | tuple):
        moved = type(value)(on_device(of_it, device) for of_it in value)
    return moved
