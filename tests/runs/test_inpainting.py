"""Masks: only what may move does, after AdaIN and after each iteration, against the plain reading."""

import plain_method as plain
import pytest
import torch
from passes import watched
from steps import RMS_TOLERANCE, recording_euler

import nodes

SHAPE = (1, 4, 8, 10)
PAINTED = torch.zeros(SHAPE[2:])
PAINTED[3:, :6] = 1


@pytest.fixture(scope="module")
def painting(styled, random_latent):
    """A guided graph that paints a part of a picture, three iterations a step."""
    latent = {"samples": random_latent(7, SHAPE), "noise_mask": PAINTED[None, None]}
    return styled.but(latent=latent, iterations=3, steps=2).styled(random_latent(1, SHAPE))


@pytest.mark.parametrize("adain", [True, False])
def test_each_step_matches_the_plain_reading(painting, random_latent, adain):
    graph, states = painting.but(adain=adain), []
    with watched(graph.model) as passes:
        result = graph.guider(recording_euler(states))
    model = graph.model.model
    unet, model_sigmas = plain.ordinary_copy(model.diffusion_model), model.model_sampling.sigmas.clone()
    states[-1] = (*states[-1][:2], model.process_latent_in(result))
    settings = plain.Settings(tuple(range(1, 7)), iterations=3, adain=adain)
    start = plain.LATENT_SCALE * graph.latent["samples"]
    with torch.inference_mode():
        noise = nodes.NODE_CLASS_MAPPINGS["RandomNoise"].execute(graph.seed)[0].generate_noise(graph.latent).clone()
    shown = [one.x for one in passes.reading if one.with_gradient]
    assert len(shown) == 2 * 3
    references = [plain.Reference(random_latent(1, SHAPE))]
    with torch.inference_mode(False):
        for number, (sigma, before, after) in enumerate(states[1:]):
            scale = (max(sigma, float(model_sigmas[0])) ** 2 + 1) ** -0.5
            kept = scale * (start + sigma * noise)
            seen = torch.where(PAINTED > 0, scale * before.clone(), kept)
            step = plain.guided_step(
                unet, seen, sigma, model_sigmas, torch.zeros(1, 77, 768), references,
                plain.draw_noises(graph.seed, number, references, None, settings), settings, mask=PAINTED,
            )  # fmt: skip
            moved = (scale * after.clone() - step.after) * PAINTED
            assert (moved.square().sum() / (4 * PAINTED.sum())).sqrt() < RMS_TOLERANCE, f"sigma {sigma}"
            torch.testing.assert_close(after * (1 - PAINTED), before * (1 - PAINTED), rtol=0, atol=1e-6)
            for z in shown[3 * number : 3 * number + 3]:
                torch.testing.assert_close(z * (1 - PAINTED), kept * (1 - PAINTED), rtol=0, atol=1e-5)


def test_soft_masks_are_soft(styled, random_latent):
    """An element moves by its mask's share of what it moves without one; the first iteration shows it."""
    shares = torch.linspace(0, 1, SHAPE[-1]).expand(SHAPE[2:])
    graph = styled.but(latent={"samples": random_latent(7, SHAPE)}, style=styled.style)
    node = nodes.NODE_CLASS_MAPPINGS["ADOptimizeLatent"]

    @torch.inference_mode()
    def moved(**mask):
        start = graph.latent["samples"]
        made = node.execute(
            graph.model, graph.style, {"samples": start, **mask}, 3, "latent", 1, "constant", learning_rate=0.05,
            iterations=1, content_weight=0.0, attention_scale=1.0, content_loss="query",
        )[0]["samples"]  # fmt: skip
        return plain.LATENT_SCALE * (made - start)

    whole = moved()
    torch.testing.assert_close(moved(noise_mask=shares[None, None]), shares * whole, rtol=0, atol=1e-6)
    assert whole.abs().mean() > 0.04


@torch.inference_mode()
def painted(way, graph, random_latent):
    """A latent from one of the nodes that heed a mask."""
    if way == "sampling":
        return graph.ksampler()
    if way == "optimisation":
        return nodes.NODE_CLASS_MAPPINGS["ADOptimizeLatent"].execute(
            graph.model, graph.style, graph.latent, 3, "latent", 1, "constant", learning_rate=0.05, iterations=1,
            content_weight=0.0, attention_scale=1.0, content_loss="query",
        )[0]["samples"]  # fmt: skip
    picture, reference = {"samples": graph.latent["samples"]}, {"samples": random_latent(2, SHAPE)}
    node = nodes.NODE_CLASS_MAPPINGS["ADAdaINLatent"]
    return node.execute(picture, reference, 1.0, graph.latent["noise_mask"][0])[0]["samples"]


@pytest.mark.parametrize("way", ["sampling", "optimisation", "AdaIN Latent"])
def test_an_empty_mask_is_told_of(way, painting, random_latent, caplog):
    """Load Image gives one of a picture that nobody painted on: nothing would change, and nobody would know why."""
    start = painting.latent["samples"]
    empty = painting.but(steps=1, latent={"samples": start, "noise_mask": torch.zeros(1, 1, 64, 64)})
    torch.testing.assert_close(painted(way, empty, random_latent), start, rtol=0, atol=1e-4)
    told = [message for message in caplog.messages if "is empty, so the picture stays as it is" in message]
    assert len(told) == 1
    caplog.clear()
    assert not torch.equal(painted(way, painting.but(steps=1), random_latent), start)
    assert "is empty" not in caplog.text
