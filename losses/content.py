"""The content losses: the picture keeps the structure of a content reference (paper section 3.3, equation 4).

Each is a mean absolute error of one layer, summed over the pictures of a batch. Features of the picture carry the
gradient, those of the content do not. `token_weight`, [b or 1, t], weighs a picture's tokens; None counts every token
once.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from .precision import at_least_fp32

MAP_ELEMENTS = 2**24  # of an attention map held at a time: 64 MB in fp32


def query_loss(q: torch.Tensor, q_c: torch.Tensor, token_weight: torch.Tensor | None = None) -> torch.Tensor:
    """mean | q - Q_c |.

    Args:
        q: queries of the picture, [b heads t d].
        q_c: queries of the content reference, same shape.

    Returns:
        A scalar in fp32 or better.
    """
    return _mean((at_least_fp32(q) - at_least_fp32(q_c.detach())).abs(), token_weight)


def query_edges_loss(
    q: torch.Tensor, q_c: torch.Tensor, edges: torch.Tensor, token_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """mean of w | q - Q_c |: where the content has edges its structure is held more firmly, elsewhere it may give way.

    Args:
        q, q_c: see `query_loss`.
        edges: w of each token, [b or 1, t]; of mean 1 over a picture, so that the loss keeps its size.

    Returns:
        A scalar in fp32 or better.
    """
    error = (at_least_fp32(q) - at_least_fp32(q_c.detach())).abs()
    return _mean(error * edges[:, None, :, None], token_weight)


def query_key_value_loss(
    q: torch.Tensor,
    k: torch.Tensor,
    q_c: torch.Tensor,
    k_c: torch.Tensor,
    v_c: torch.Tensor,
    token_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """mean | Attn(q, k, V_c) - Attn(Q_c, K_c, V_c) |. All [b heads t d]; a scalar in fp32 or better."""
    with torch.no_grad():
        target = F.scaled_dot_product_attention(q_c, k_c, v_c)
    out = F.scaled_dot_product_attention(q, k, v_c.detach())
    return _mean((at_least_fp32(out) - at_least_fp32(target)).abs(), token_weight)


def query_key_loss(
    q: torch.Tensor,
    k: torch.Tensor,
    q_c: torch.Tensor,
    k_c: torch.Tensor,
    token_weight: torch.Tensor | None = None,
    map_elements: int = MAP_ELEMENTS,
) -> torch.Tensor:
    """mean | softmax(q k^T / sqrt d) - softmax(Q_c K_c^T / sqrt d) |.

    The maps are [b heads t t]. They are made a few rows at a time and made again for the gradient, so that memory
    grows with t, not with t squared.

    Args:
        q, k, q_c, k_c: [b heads t d].
        map_elements: how many elements of a map are held at a time.

    Returns:
        A scalar in fp32 or better.
    """
    b, heads, t, _ = q.shape
    rows = max(1, map_elements // (b * heads * t))
    k, q_c, k_c = at_least_fp32(k), at_least_fp32(q_c.detach()), at_least_fp32(k_c.detach())
    shares = _shares(k.new_ones(1, t) if token_weight is None else token_weight).expand(b, -1)
    total = k.new_zeros(())
    for start in range(0, t, rows):
        part = slice(start, start + rows)
        total = total + checkpoint(
            _map_error, at_least_fp32(q[:, :, part]), k, q_c[:, :, part], k_c, shares[:, part],
            use_reentrant=False, preserve_rng_state=False,
        )  # fmt: skip
    return total / (heads * k.shape[-2])


def _map_error(
    q: torch.Tensor, k: torch.Tensor, q_c: torch.Tensor, k_c: torch.Tensor, share: torch.Tensor
) -> torch.Tensor:
    """Absolute error of some rows of the attention map, summed with each row's share, [b rows]."""
    scale = q.shape[-1] ** -0.5
    error = (_softmax_map(q * scale, k) - _softmax_map(q_c * scale, k_c)).abs()
    return (error.sum(dim=(1, 3)) * share).sum()


def _softmax_map(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    return (q @ k.transpose(-1, -2)).softmax(dim=-1)


def _mean(error: torch.Tensor, token_weight: torch.Tensor | None) -> torch.Tensor:
    """Mean of [b heads t d] over everything but the batch, tokens weighted; summed over the batch."""
    b, heads, _, d = error.shape
    if token_weight is None:
        return error.mean() * b
    return (error.sum(dim=(1, 3)) * _shares(token_weight)).sum() / (heads * d)


def _shares(token_weight: torch.Tensor) -> torch.Tensor:
    """Weights of tokens as shares of their picture's sum, [b or 1, t]; a picture without weight has none."""
    total = token_weight.sum(dim=1, keepdim=True)
    return torch.where(total > 0, token_weight / total, token_weight)


class Features(Protocol):
    """Queries, keys and values of one layer, [b heads t d]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor


ContentLoss = Callable[[Features, Features, torch.Tensor | None, torch.Tensor | None], torch.Tensor]

CONTENT_LOSSES: dict[str, ContentLoss] = {
    "query": lambda own, held, weight, edges: query_loss(own.q, held.q, weight),
    "query_key": lambda own, held, weight, edges: query_key_loss(own.q, own.k, held.q, held.k, weight),
    "query_key_value": lambda own, held, weight, edges: query_key_value_loss(
        own.q, own.k, held.q, held.k, held.v, weight
    ),
    "query_edges": lambda own, held, weight, edges: query_edges_loss(own.q, held.q, edges, weight),
}
"""By the name that the artist chooses: the loss of the picture's features against those held of the content."""

WEIGHED_BY_EDGES = frozenset({"query_edges"})
"""Those that are given the content's edges; the others are given None."""
