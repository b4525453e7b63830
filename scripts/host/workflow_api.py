"""Turn a workflow as the front end saves it into the form that the server's API takes.

It covers what this pack's workflows hold: nodes, links, widgets, and boxes (subgraphs) with settings, also in one
another. Notes are left out; muted and bypassed nodes and unknown nodes are errors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

NOTES = {"Note", "MarkdownNote"}
CHOICES_WITH_INPUTS = "COMFY_DYNAMICCOMBO_V3"
"""A list of choices, of which some have inputs of their own; these are not covered."""
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO", CHOICES_WITH_INPUTS}
INPUT_SIDE = -10
"""The number that a box's own inputs have for links inside it."""
NOTHING = object()


def is_widget(specification: list[Any]) -> bool:
    """Whether an input of /object_info is shown as a widget."""
    kind = specification[0]
    options = specification[1] if len(specification) > 1 else {}
    return (isinstance(kind, list) or kind in WIDGET_TYPES) and not options.get("forceInput")


def extra_values(name: str, specification: list[Any]) -> int:
    """How many values the front end saves behind a widget's own: "randomize", or an upload button's."""
    options = specification[1] if len(specification) > 1 else {}
    control = options.get("control_after_generate", name in ("seed", "noise_seed"))
    return bool(control) + bool(options.get("image_upload"))


def input_specifications(info: dict[str, Any]) -> dict[str, list[Any]]:
    """A node's inputs in the order in which the front end lays out their widgets."""
    return {
        name: specification
        for kind in ("required", "optional")
        for name, specification in info["input"].get(kind, {}).items()
    }


@dataclass
class Scope:
    """One graph of a workflow: the workflow itself, or the inside of one box (subgraph)."""

    nodes: list[dict[str, Any]]
    sources: dict[int, tuple[int, int]]
    """Of each link the node and the output from which it comes."""
    definitions: dict[str, dict[str, Any]]
    """Every box's inside, by the type of the nodes that show it."""
    path: str = ""
    """Numbers of the boxes around it, as the front end puts them before those of the nodes in them."""
    given: list[Any] = field(default_factory=list)
    """What the box around it is given, in the order of its inputs; NOTHING where a socket is left open."""

    def inside(self, node: dict[str, Any]) -> Scope:
        """What a node that is a box holds."""
        definition = self.definitions[node["type"]]
        if "proxyWidgets" in node.get("properties", {}):
            raise ValueError(f"Node {node['id']} ({definition['name']}) was saved by an older ComfyUI; save it anew.")
        values = iter(node.get("widgets_values", []))
        by_name: dict[str, Any] = {}
        for entry in node["inputs"]:
            by_name[entry["name"]] = next(values, NOTHING) if "widget" in entry else NOTHING
            if entry.get("link") is not None:
                by_name[entry["name"]] = self.source(entry["link"])
        links = {link["id"]: (link["origin_id"], link["origin_slot"]) for link in definition["links"]}
        given = [by_name.get(entry["name"], NOTHING) for entry in definition["inputs"]]
        return Scope(definition["nodes"], links, self.definitions, f"{self.path}{node['id']}:", given)

    def source(self, link: int) -> Any:
        """What a link brings: a node of the server and its output, a box's setting, or NOTHING."""
        number, output = self.sources[link]
        if number == INPUT_SIDE:
            return self.given[output]
        (node,) = (node for node in self.nodes if node["id"] == number)
        if node["type"] not in self.definitions:
            return [f"{self.path}{number}", output]
        check_active(node)
        (inner,) = self.definitions[node["type"]]["outputs"][output]["linkIds"]
        return self.inside(node).source(inner)


def check_active(node: dict[str, Any]) -> None:
    """Refuse what the front end would leave out or go round."""
    if node.get("mode", 0) != 0:
        raise ValueError(f"Node {node['id']} ({node['type']}) is muted or bypassed; the API takes active nodes.")


def check_choice(node: dict[str, Any], choice: str, specification: list[Any]) -> None:
    """Refuse a choice that has inputs of its own."""
    of_choice = next((one["inputs"] for one in specification[1]["options"] if one["key"] == choice), None)
    if of_choice is None or any(of_choice.values()):
        raise ValueError(f"Node {node['id']} ({node['type']}) is set to {choice!r}, which is not covered here.")


def node_inputs(node: dict[str, Any], info: dict[str, Any], scope: Scope) -> dict[str, Any]:
    """One node's inputs: widget values by name, then links, which come before a widget of the same name."""
    values = iter(node.get("widgets_values", []))
    inputs: dict[str, Any] = {}
    for name, specification in input_specifications(info).items():
        if is_widget(specification):
            try:
                inputs[name] = next(values)
            except StopIteration:
                raise ValueError(f"Node {node['id']} ({node['type']}) saves no value for {name!r}.") from None
            if specification[0] == CHOICES_WITH_INPUTS:
                check_choice(node, inputs[name], specification)
            for _ in range(extra_values(name, specification)):
                next(values, None)
    left_over = list(values)
    if left_over:
        raise ValueError(f"Node {node['id']} ({node['type']}) saves values of no widget: {left_over}.")
    for entry in node.get("inputs", []):
        source = NOTHING if entry.get("link") is None else scope.source(entry["link"])
        if source is not NOTHING:
            inputs[entry["name"]] = source
    return inputs


def nodes_to_api(scope: Scope, object_info: dict[str, Any]) -> dict[str, Any]:
    """The part of an API prompt that one graph makes, with the boxes in it."""
    prompt: dict[str, Any] = {}
    for node in scope.nodes:
        name = node["type"]
        if name in NOTES:
            continue
        check_active(node)
        if name in scope.definitions:
            prompt |= nodes_to_api(scope.inside(node), object_info)
        elif name not in object_info:
            raise ValueError(f"Node {node['id']} has the type {name!r}, which the server does not know.")
        else:
            inputs = node_inputs(node, object_info[name], scope)
            prompt[f"{scope.path}{node['id']}"] = {"class_type": name, "inputs": inputs}
    return prompt


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The API prompt of a saved workflow; `object_info` is the server's answer to /object_info."""
    definitions = {one["id"]: one for one in workflow.get("definitions", {}).get("subgraphs", [])}
    sources = {link: (node, output) for link, node, output, *_ in workflow["links"]}
    return nodes_to_api(Scope(workflow["nodes"], sources, definitions), object_info)
