"""Write a described graph as ComfyUI's front end saves it: numbers, sockets, sizes and places."""

from __future__ import annotations

import uuid
from itertools import count, zip_longest
from typing import Any

from host.comfy_env import DEFAULT_VERSION
from host.workflow_api import CHOICES_WITH_INPUTS, extra_values, input_specifications, is_widget

from .graph import GAP, Box, Graph, Node, Output, Socket

PACK_NAME = "comfyui-attention-distillation"
NAMESPACE = uuid.uuid5(uuid.NAMESPACE_URL, PACK_NAME)
CATEGORY = "Attention Distillation"
INPUT_SIDE, OUTPUT_SIDE = -10, -20
"""Numbers of the two ends of a box's inside, which are no nodes."""

ROW, WIDGET, TITLE, EDGE = 20, 24, 30, 6
TEXT_HEIGHT, WIDTH = 90, 300
GAP_DOWN = 24
NOTE_COLOURS = {"color": "#432", "bgcolor": "#653"}
NOTES = {"Note", "MarkdownNote"}
OPTIONAL_SHAPE = 7


class Numbers:
    """Numbers of nodes and links, each once in a file, and identities that are the same at each writing."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.nodes, self.links = count(1), count(1)
        self.last_node = self.last_link = 0

    def node(self) -> int:
        self.last_node = next(self.nodes)
        return self.last_node

    def link(self) -> int:
        self.last_link = next(self.links)
        return self.last_link

    def identity(self, *path: str) -> str:
        """A UUID of the file and a path in it."""
        return str(uuid.uuid5(NAMESPACE, "/".join((self.file, *path))))


def specifications(node: Node, info: dict[str, Any]) -> dict[str, list[Any]]:
    """Every input of a node of the server, the ones that grow by use among them."""
    found: dict[str, list[Any]] = {}
    for name, specification in input_specifications(info[node.kind]).items():
        if specification[0] == "COMFY_AUTOGROW_V3":
            template = specification[1]["template"]
            (kind,) = template["input"]["required"].values()
            used = sum(f"{name}.{letter}" in node.inputs for letter in template["names"])
            found |= {f"{name}.{letter}": kind for letter in template["names"][: used + 1]}
        else:
            found[name] = specification
    return found


def is_multiline(specification: list[Any]) -> bool:
    return bool(len(specification) > 1 and specification[1].get("multiline"))


def default_of(specification: list[Any]) -> Any:
    """A widget's value where the description says nothing."""
    kind, options = specification[0], specification[1] if len(specification) > 1 else {}
    if "default" in options:
        return options["default"]
    if isinstance(kind, list):
        return kind[0]
    if kind == CHOICES_WITH_INPUTS:
        return options["options"][0]["key"]
    return options["options"][0] if kind == "COMBO" else {"INT": 0, "FLOAT": 0.0, "STRING": "", "BOOLEAN": False}[kind]


class Saved:
    """One graph on its way to JSON; `owner` is the box whose inside it is."""

    def __init__(self, graph: Graph, numbers: Numbers, owner: Box | None = None) -> None:
        self.graph, self.numbers, self.owner = graph, numbers, owner
        self.ids = {id(node): numbers.node() for node in graph.nodes}
        self.links: list[tuple[int, int, int, int, int, str]] = []
        self.definitions: list[dict[str, Any]] = []
        self.identities: dict[str, str] = {}

    def definition_of(self, box: Box) -> str:
        """The identity of a box's definition, which is written at its first use."""
        if box.name not in self.identities:
            inside = Saved(box, self.numbers, box)
            self.identities[box.name] = self.numbers.identity(box.name)
            written = inside.definition(self.identities[box.name])
            self.definitions += [*inside.definitions, written]
        return self.identities[box.name]

    def connect(self, value: Output | Socket, target: Node, slot: int, kind: str) -> int:
        """A link into an input of a node; its number."""
        if isinstance(value, Output):
            source, output, kind = self.ids[id(value.node)], value.index, value.kind
        else:
            source, output = INPUT_SIDE, self.owner.sockets.index(value)
            value.kind = value.kind or kind
            kind = value.kind
        link = self.numbers.link()
        self.links.append((link, source, output, self.ids[id(target)], slot, kind))
        return link

    def node(self, node: Node) -> dict[str, Any]:
        """One node; its links are made on the way."""
        written = self.box_node(node) if node.box else self.server_node(node)
        size = node.size or (WIDTH, 0)
        least = self.least_height(node, written)
        written["size"] = [size[0], max(size[1], least)]
        node.size = (size[0], max(size[1], least))
        written.update(flags={}, order=0, mode=0)
        if node.title:
            written["title"] = node.title
        if node.kind in NOTES:
            written |= NOTE_COLOURS
        return written

    def least_height(self, node: Node, written: dict[str, Any]) -> int:
        """The height below which the front end draws no node of this class."""
        if node.kind in NOTES:
            return 0
        wires = sum("widget" not in entry for entry in written["inputs"])
        if node.box:
            texts = [is_multiline(self.target_of(node.box, one)) for one in node.box.sockets if one.is_setting]
        else:
            texts = []
            for name, specification in specifications(node, self.graph.info).items():
                if is_widget(specification):
                    texts += [is_multiline(specification)] + [False] * extra_values(name, specification)
        height = ROW * max(wires, len(written["outputs"]), 1) + EDGE
        widgets = sum(TEXT_HEIGHT if text else WIDGET for text in texts)
        return height + (widgets + 8 if texts else 0)

    def is_optional(self, box: Box, socket: Socket) -> bool:
        """Whether everything that an input of a box goes into may be left open."""
        targets = [(node, name) for node in box.nodes for name, value in node.inputs.items() if value is socket]
        return all(name in box.info[node.kind]["input"].get("optional", {}) for node, name in targets)

    def target_of(self, box: Box, setting: Socket) -> list[Any]:
        """The specification of the first widget that a box's setting goes into."""
        for node in box.nodes:
            for name, value in node.inputs.items():
                if value is setting:
                    return specifications(node, box.info)[name]
        raise ValueError(f"{box.name}: the setting {setting.label!r} goes nowhere")

    def server_node(self, node: Node) -> dict[str, Any]:
        """A node that runs on the server, or a note."""
        if node.kind in NOTES:
            return {"type": node.kind, "inputs": [], "outputs": [], "properties": {},
                    "widgets_values": [node.inputs["text"]]}  # fmt: skip
        info = self.graph.info[node.kind]
        known = specifications(node, self.graph.info)
        unknown = node.inputs.keys() - known.keys()
        if unknown:
            raise ValueError(f"{node.kind} has no input {sorted(unknown)}, only {sorted(known)}")
        wires = [name for name in known if not is_widget(known[name])]
        linked = [
            name for name in known if is_widget(known[name]) and isinstance(node.inputs.get(name), Output | Socket)
        ]
        inputs = []
        for slot, name in enumerate([*wires, *linked]):
            entry: dict[str, Any] = {"name": name, "type": known[name][0]}
            if name in linked:
                entry = {"name": name, "type": kind_of(known[name]), "widget": {"name": name}}
            elif "." in name:
                entry["label"] = name.split(".")[1]
            if name in info["input"].get("optional", {}) or ("." in name and name not in node.inputs):
                entry["shape"] = OPTIONAL_SHAPE
            value = node.inputs.get(name)
            entry["link"] = None if value is None else self.connect(value, node, slot, entry["type"])
            inputs.append(entry)
        ours = info["python_module"].startswith("custom_nodes")
        return {
            "type": node.kind,
            "inputs": inputs,
            "outputs": [{"name": name, "type": kind, "links": []} for name, kind in node.outputs],
            "properties": {
                "Node name for S&R": node.kind,
                **({"cnr_id": PACK_NAME} if ours else {"cnr_id": "comfy-core", "ver": DEFAULT_VERSION}),
                **({"models": node.models} if node.models else {}),
            },
            "widgets_values": self.widget_values(node, known),
        }

    def widget_values(self, node: Node, known: dict[str, list[Any]]) -> list[Any]:
        """The values of the widgets in order; where a setting of the box is linked, the box's own."""
        values = []
        for name, specification in known.items():
            if is_widget(specification):
                value = node.inputs[name] if name in node.inputs else default_of(specification)
                if isinstance(value, Socket):
                    value = value.value
                values.append(default_of(specification) if isinstance(value, Output) else value)
                extra = extra_values(name, specification)
                values += ["randomize" if name in ("seed", "noise_seed") else "image"] * extra
        return values

    def box_node(self, node: Node) -> dict[str, Any]:
        """A box seen from outside."""
        identity = self.definition_of(node.box)
        unknown = node.inputs.keys() - {socket.name for socket in node.box.sockets}
        if unknown:
            raise ValueError(f"{node.box.name} has no input {sorted(unknown)}")
        inputs, values = [], []
        for slot, socket in enumerate(node.box.sockets):
            entry: dict[str, Any] = {"name": socket.name, "type": socket.kind}
            if socket.label:
                entry["label"] = socket.label
            value = node.inputs.get(socket.name, socket.value)
            if socket.is_setting:
                entry["widget"] = {"name": socket.name}
                values.append(socket.value if isinstance(value, Output) else value)
            if self.is_optional(node.box, socket):
                entry["shape"] = OPTIONAL_SHAPE
            entry["link"] = self.connect(value, node, slot, socket.kind) if isinstance(value, Output | Socket) else None
            inputs.append(entry)
        return {
            "type": identity,
            "inputs": inputs,
            "outputs": [{"name": name, "type": output.kind, "links": []} for name, output in node.box.outputs],
            "properties": {"cnr_id": PACK_NAME, "previewExposures": []},
            "widgets_values": values,
        }

    def nodes(self) -> list[dict[str, Any]]:
        """Every node with its number, its place, and the links that leave it."""
        written = []
        for node in self.graph.nodes:
            written.append({"id": self.ids[id(node)], **self.node(node)})
        place(self.graph)
        orders = self.orders()
        for entry, node in zip(written, self.graph.nodes, strict=True):
            entry["pos"], entry["order"] = list(node.place), orders[entry["id"]]
            for index, output in enumerate(entry["outputs"]):
                output["links"] = [
                    link for link, source, slot, *_ in self.links if (source, slot) == (entry["id"], index)
                ]
        return [{key: entry[key] for key in KEYS if key in entry} for entry in written]

    def orders(self) -> dict[int, int]:
        """The order of execution as the front end counts it: a node once all that leads to it has been counted.

        In a box that is so for none that hangs on the box's own inputs; those follow as they stand.
        """
        waiting = {number: sum(link[3] == number for link in self.links) for number in self.ids.values()}
        ready = [number for number, links in waiting.items() if not links]
        for number in ready:
            for _, _, _, target, _, _ in sorted(link for link in self.links if link[1] == number):
                waiting[target] -= 1
                if not waiting[target]:
                    ready.append(target)
        ready += [number for number in waiting if number not in ready]
        return {number: order for order, number in enumerate(ready)}

    def definition(self, identity: str) -> dict[str, Any]:
        """A box from inside."""
        box, numbers = self.owner, self.numbers
        nodes = self.nodes()
        right = max(node.place[0] + node.size[0] for node in box.nodes) + GAP
        outputs = []
        for index, (name, output) in enumerate(box.outputs):
            link = numbers.link()
            source = self.ids[id(output.node)]
            self.links.append((link, source, output.index, OUTPUT_SIDE, index, output.kind))
            (entry,) = (node for node in nodes if node["id"] == source)
            entry["outputs"][output.index]["links"].append(link)
            place_of = [right + ROW, ROW * (index + 1)]
            outputs.append({"id": numbers.identity(box.name, "out", name), "name": name, "type": output.kind,
                            "linkIds": [link], "pos": place_of})  # fmt: skip
        inputs = []
        for index, socket in enumerate(box.sockets):
            links = [link for link, source, slot, *_ in self.links if (source, slot) == (INPUT_SIDE, index)]
            label = {"label": socket.label} if socket.label else {}
            inputs.append({"id": numbers.identity(box.name, "in", socket.name), "name": socket.name,
                           "type": socket.kind, "linkIds": links, **label,
                           "pos": [-100 - GAP, ROW * (index + 1)]})  # fmt: skip
        names = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        return {
            "id": identity,
            "version": 1,
            "state": {"lastGroupId": 0, "lastNodeId": 0, "lastLinkId": 0, "lastRerouteId": 0},
            "revision": 0,
            "config": {},
            "name": box.name,
            "description": box.description,
            "category": CATEGORY,
            "inputNode": {"id": INPUT_SIDE, "bounding": [-200 - GAP, 0, 120, ROW * (len(inputs) + 2)]},
            "outputNode": {"id": OUTPUT_SIDE, "bounding": [right, 0, 120, ROW * (len(outputs) + 2)]},
            "inputs": inputs,
            "outputs": outputs,
            "widgets": [],
            "nodes": nodes,
            "groups": [],
            "links": [dict(zip(names, link, strict=True)) for link in self.links],
            "extra": {},
        }  # fmt: skip


KEYS = (
    "id", "type", "pos", "size", "flags", "order", "mode", "inputs", "outputs", "title", "properties",
    "widgets_values", "color", "bgcolor",
)  # fmt: skip


def kind_of(specification: list[Any]) -> str:
    """The type of a widget's input; the older form of a combo is a list of its choices."""
    return "COMBO" if isinstance(specification[0], list) else specification[0]


def place(graph: Graph) -> None:
    """Put the columns side by side, the nodes of each one below the other."""
    left = {id(node) for node in graph.nodes} - {id(node) for column in graph.columns for node in column}
    if left:
        raise ValueError(f"in no column: {[node.kind for node in graph.nodes if id(node) in left]}")
    across = 0
    for column, gap in zip_longest(graph.columns, graph.gaps, fillvalue=0):
        down = 0
        for node in column:
            node.place = (across, down)
            down += node.size[1] + TITLE + GAP_DOWN
        across += max(node.size[0] for node in column) + gap


def workflow(graph: Graph, file: str, extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """A whole file."""
    numbers = Numbers(file)
    saved = Saved(graph, numbers)
    nodes = saved.nodes()
    for definition in saved.definitions:
        definition["state"] |= {"lastNodeId": numbers.last_node, "lastLinkId": numbers.last_link}
    return {
        "id": numbers.identity(),
        "revision": 0,
        "last_node_id": numbers.last_node,
        "last_link_id": numbers.last_link,
        "nodes": nodes,
        "links": [list(link) for link in saved.links],
        "groups": [],
        **({"definitions": {"subgraphs": saved.definitions}} if saved.definitions else {}),
        "config": {},
        "extra": extra or {},
        "version": 0.4,
    }
