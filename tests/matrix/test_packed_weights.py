"""Weights packed in another pack's tensor class, as from a GGUF file, on a model of each architecture."""

import pytest
import small_gguf
import small_models
import torch
from guided import Graph


@pytest.mark.parametrize("name", small_models.MODELS)
def test_guidance_is_that_of_the_unpacked_weights(pack, custom_samplers, random_latent, name):
    """Bit for bit, and the weights are packed again afterwards: the same objects."""
    small = small_models.MODELS[name]
    packed, plain = small_models.load_packed(small)
    weights = packed.model.diffusion_model.state_dict(keep_vars=True)
    assert sum(getattr(weight, "kind", None) == "Q8" for weight in weights.values()) > 10
    made = []
    for model in (packed, plain):
        latent = {"samples": small.as_host(torch.zeros(1, small.channels, 8, 8))}
        graph = Graph(pack, model, small.cond(1), small.cond(1), latent, steps=1, settings={"iterations": 1})
        made.append(graph.styled(small.as_host(random_latent(1, (1, small.channels, 8, 6)))).ksampler())
        assert not torch.equal(made[-1], graph.core())
    assert torch.isfinite(made[0]).all()
    assert torch.equal(*made)
    after = packed.model.diffusion_model.state_dict(keep_vars=True)
    assert all(after[key] is weight for key, weight in weights.items())
    assert any(type(weight) is small_gguf.PackedTensor for weight in after.values())
