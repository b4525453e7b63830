"""Turn a workflow as the front end saves it into the form that the server's API takes.

It covers what this pack's workflows hold: nodes, links, widgets. Notes are left out; muted and bypassed
nodes, subgraphs and unknown nodes are errors.
"""

from __future__ import annotations

from typing import Any

NOTES = {"Note", "MarkdownNote"}
WIDGET_TYPES = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}


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


def node_inputs(node: dict[str, Any], info: dict[str, Any], sources: dict[int, list[Any]]) -> dict[str, Any]:
    """One node's inputs: widget values by name, then links, which come before a widget of the same name."""
    values = iter(node.get("widgets_values", []))
    inputs: dict[str, Any] = {}
    for name, specification in input_specifications(info).items():
        if is_widget(specification):
            try:
                inputs[name] = next(values)
            except StopIteration:
                raise ValueError(f"Node {node['id']} ({node['type']}) saves no value for {name!r}.") from None
            for _ in range(extra_values(name, specification)):
                next(values, None)
    left_over = list(values)
    if left_over:
        raise ValueError(f"Node {node['id']} ({node['type']}) saves values of no widget: {left_over}.")
    for entry in node.get("inputs", []):
        if entry.get("link") is not None:
            inputs[entry["name"]] = sources[entry["link"]]
    return inputs


def to_api(workflow: dict[str, Any], object_info: dict[str, Any]) -> dict[str, Any]:
    """The API prompt of a saved workflow; `object_info` is the server's answer to /object_info."""
    sources = {link: [str(node), output] for link, node, output, *_ in workflow["links"]}
    prompt: dict[str, Any] = {}
    for node in workflow["nodes"]:
        name = node["type"]
        if name in NOTES:
            continue
        if node.get("mode", 0) != 0:
            raise ValueError(f"Node {node['id']} ({name}) is muted or bypassed; the API takes active nodes.")
        if name not in object_info:
            raise ValueError(f"Node {node['id']} has the type {name!r}, which the server does not know.")
        inputs = node_inputs(node, object_info[name], sources)
        prompt[str(node["id"])] = {"class_type": name, "inputs": inputs}
    return prompt
