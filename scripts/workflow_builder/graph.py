"""The words in which templates and blueprints are described: nodes by class, inputs by name, boxes with settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

GAP = 40
"""Between columns."""
Size = tuple[int, int]
Kinds = list[tuple[str, str]]
"""Name and type of each output, in order."""


@dataclass(eq=False)
class Output:
    """One output of a node, to be put into another node's input."""

    node: Node
    index: int
    kind: str


@dataclass(eq=False)
class Socket:
    """Something that a box is given from outside by a wire; with a value it is a setting on the box instead."""

    name: str
    kind: str
    label: str
    value: Any = None
    is_setting: bool = False


@dataclass(eq=False)
class Node:
    """A node: its class, what is put into its inputs, and how it is shown."""

    kind: str
    inputs: dict[str, Any]
    outputs: Kinds
    title: str | None = None
    size: Size | None = None
    models: list[dict[str, str]] = field(default_factory=list)
    box: Box | None = None
    place: tuple[int, int] = (0, 0)

    def __getitem__(self, name: str) -> Output:
        """The output of this name; of several the first."""
        for index, (own, kind) in enumerate(self.outputs):
            if own == name:
                return Output(self, index, kind)
        raise KeyError(f"{self.kind} has no output {name!r}, only {[own for own, _ in self.outputs]}")


class Graph:
    """Nodes in columns from left to right.

    Args:
        info: the server's answer to /object_info.
    """

    def __init__(self, info: dict[str, Any]) -> None:
        self.info = info
        self.nodes: list[Node] = []
        self.columns: list[list[Node]] = []
        self.gaps: list[int] = []

    def add(self, kind: str, /, *, title: str | None = None, at_least: Size | None = None, **inputs: Any) -> Node:
        """A node; each input is a value, an Output of another node or a Socket of the box."""
        info = self.info[kind]
        node = Node(kind, inputs, list(zip(info["output_name"], info["output"], strict=True)), title, at_least)
        self.nodes.append(node)
        return node

    def use(self, make: Callable[[dict[str, Any]], Box], /, *, at_least: Size | None = None, **inputs: Any) -> Node:
        """A box as a node; of its settings those that are not given stand as the box has them."""
        box = make(self.info)
        node = Node(box.name, inputs, [(name, output.kind) for name, output in box.outputs], size=at_least, box=box)
        self.nodes.append(node)
        return node

    def arrange(self, *columns: list[Node], gaps: list[int] | None = None) -> None:
        """Say which nodes stand in which column, from the top, and how far apart the columns are."""
        self.columns, self.gaps = list(columns), gaps or [GAP] * len(columns)


class Box(Graph):
    """A subgraph: a graph that is a node in another one."""

    def __init__(self, info: dict[str, Any], name: str, description: str, aliases: list[str] | None = None) -> None:
        super().__init__(info)
        self.name, self.description, self.aliases = name, description, aliases or []
        self.sockets: list[Socket] = []
        self.outputs: list[tuple[str, Output]] = []

    def wire(self, name: str, kind: str, label: str = "") -> Socket:
        """What comes in by a wire."""
        socket = Socket(name, kind, label)
        self.sockets.append(socket)
        return socket

    def setting(self, label: str, value: Any, name: str = "") -> Socket:
        """What is set on the box. Its type is that of the first input that it is put into."""
        socket = Socket(name or label.replace(" ", "_"), "", label, value, is_setting=True)
        self.sockets.append(socket)
        return socket

    def gives(self, **outputs: Output) -> None:
        """What comes out of the box."""
        self.outputs += outputs.items()
