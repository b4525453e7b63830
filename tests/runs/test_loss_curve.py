"""What a node shows after a run: how style and content loss fell. And it costs the run nothing."""

from __future__ import annotations

import io
import logging
import re
from pathlib import Path
from typing import Any

import folder_paths
import numpy as np
import pytest
import torch
from guided import DEFAULTS
from PIL import Image

import nodes as comfy_nodes


@torch.inference_mode()
def sampled(graph: Any, **changes: Any) -> Any:
    """The whole output of AD-Guided KSampler."""
    return comfy_nodes.NODE_CLASS_MAPPINGS["ADGuidedKSampler"].execute(
        graph.model, graph.seed, graph.steps, graph.cfg, graph.sampler, graph.scheduler, graph.positive,
        graph.negative, graph.latent, graph.denoise, graph.style, content=graph.content, **{**DEFAULTS, **changes},
    )  # fmt: skip


@torch.inference_mode()
def optimised(graph: Any, latent: torch.Tensor, **changes: Any) -> Any:
    """The whole output of AD Optimize Latent."""
    inputs = {
        "seed": 3, "start_from": "noise", "steps": 8, "lr_schedule": "constant", "learning_rate": 0.05, "iterations": 1,
        "content_weight": 0.25, "attention_scale": 1.0, "content_loss": "query", "content": graph.content,
    }  # fmt: skip
    node = comfy_nodes.NODE_CLASS_MAPPINGS["ADOptimizeLatent"]
    return node.execute(graph.model, graph.style, {"samples": latent}, **{**inputs, **changes})


def shown(made: Any) -> np.ndarray:
    """The plot of a node's output as the front end gets it, [H W 3]."""
    (entry,) = made.ui.as_dict()["images"]
    assert entry["type"] == "temp"
    file = Path(folder_paths.get_temp_directory()) / entry["subfolder"] / entry["filename"]
    return np.asarray(Image.open(io.BytesIO(file.read_bytes())).convert("RGB")).astype(int)


def lines(plot: np.ndarray, colour: tuple[int, int, int], texts: int = 1) -> np.ndarray:
    """Where a plot has a colour below its lines of text, [pixels, 2], rows and columns."""
    return np.argwhere((np.abs(plot - colour).sum(axis=-1) < 30) & (np.arange(len(plot))[:, None] > 16 + 34 * texts))


STYLE, CONTENT = (255, 166, 64), (96, 176, 255)


def test_both_nodes_show_style_and_content_apart(styled, random_latent):
    graph = styled.but(content=styled.capture(random_latent(2)))
    for made in (sampled(graph), optimised(graph, random_latent(3))):
        plot = shown(made)
        assert plot.shape == (320, 512, 3)
        for colour in (STYLE, CONTENT):
            _, columns = lines(plot, colour, texts=2).T
            assert columns.min() < 30 and columns.max() > 480, "from the first step to the last"
    assert not len(lines(shown(sampled(styled)), CONTENT)), "where there is no content"


def test_the_line_goes_where_the_loss_goes(styled, random_latent):
    """Of an optimisation that works, it falls from the top to the bottom."""
    rows, columns = lines(shown(optimised(styled, random_latent(3), steps=30)), STYLE).T
    assert rows[columns < 30].mean() < 110
    assert rows[columns > 480].mean() > 230


@pytest.mark.parametrize("off", [{"iterations": 0}, {"start_percent": 1.0}])
def test_without_guidance_there_is_nothing_to_show(styled, off):
    assert sampled(styled, **off).ui is None


def test_an_optimisation_without_iterations_has_nothing_to_show(styled, random_latent):
    assert optimised(styled, random_latent(3), iterations=0).ui is None


def test_the_picture_is_that_of_the_node_without_a_plot(styled):
    assert torch.equal(sampled(styled)[0]["samples"], styled.core(styled.patched()))


def test_a_run_is_kept_where_previews_cannot_be_saved(styled, tmp_path, monkeypatch, caplog):
    expected = sampled(styled)[0]["samples"]
    (tmp_path / "full").touch()
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "full"))
    made = sampled(styled)
    assert torch.equal(made[0]["samples"], expected)
    assert made.ui is None
    assert "the plot of the losses could not be saved" in caplog.text


def test_changes_are_those_within_steps(pack_module):
    """A loss that is larger at each step's noise level, and falls by a quarter within each."""
    iteration, curve = pack_module("guidance.descent").Iteration, pack_module("guidance.curve")
    run = [
        iteration(step, i, 1.0, style=level * left, content=2 * level / left, total=level * left + 0.5 * level / left)
        for step, level in enumerate((1.0, 2.0, 4.0))
        for i, left in enumerate((1.0, 0.9, 0.75))
    ]
    found = curve.falls(run)
    assert found["style"].first == [1.0, 2.0, 4.0] and found["style"].last == [0.75, 1.5, 3.0]
    assert str(found["style"]) == "-25 % in each step"
    assert found["content"].first == pytest.approx([0.5, 1.0, 2.0]), "as it counts in the total"
    assert str(found["content"]) == "+33 % in each step"
    assert str(curve.falls([one for one in run if one.iteration == 0])["style"]) == "1 to 4"


@pytest.mark.parametrize("values", [[0.0], [1.0], [0.0, 1.0], [1e-30, 1e20]])
def test_any_losses_can_be_drawn(pack_module, values):
    iteration = pack_module("guidance.descent").Iteration
    plot = pack_module("guidance.curve").draw_losses(
        [iteration(step, 0, 1.0, value, 0.0, value) for step, value in enumerate(values)]
    )
    assert plot.shape == (320, 512, 3) and 0.05 < plot.mean() < 0.5


def test_the_log_says_the_same(styled, caplog):
    caplog.set_level(logging.INFO)
    sampled(styled, iterations=3, adain=False)
    (change,) = re.findall(r"s each; style (-\d+) % in each step; ", caplog.text)
    assert int(change) < 0
