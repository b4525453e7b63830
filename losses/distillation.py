"""The attention distillation loss L_AD (paper section 3.2, equations 2 and 3)."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F

from .precision import at_least_fp32


@torch.no_grad()
def distillation_target(
    q: torch.Tensor,
    k_s: torch.Tensor,
    v_s: torch.Tensor,
    *,
    attention_scale: float = 1.0,
    log_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """What the layer would put out if its queries looked at the reference: Attn(a * q, K_s, V_s).

    Args:
        q: queries of the picture, [b heads t d].
        k_s, v_s: keys and values of the reference's tokens, [1 or b, heads, t_s, d].
        attention_scale: a; above 1 each query settles on fewer, closer tokens.
        log_weight: added to the attention logits of each reference token, [t_s], or for each query, [t t_s].

    Returns:
        [b heads t d], detached: the gradient of the loss never flows through the target.
    """
    k_s, v_s = k_s.expand(q.shape[0], -1, -1, -1), v_s.expand(q.shape[0], -1, -1, -1)
    bias = None
    if log_weight is not None:
        bias = log_weight.to(q.dtype).expand(q.shape[0], q.shape[1], q.shape[2], -1)
    return F.scaled_dot_product_attention(attention_scale * q, k_s, v_s, attn_mask=bias)


class QueryGroup(NamedTuple):
    """Tokens of the picture that look at the same tokens of the reference.

    Attributes:
        items: which pictures of the batch.
        tokens: numbers of the tokens.
        label: which of the offers is theirs.
    """

    items: slice
    tokens: torch.Tensor
    label: int

    def of_items(self, items: slice) -> "QueryGroup | None":
        """The group among some pictures of the batch, counted from the first of these; None where it has none there.

        Args:
            items: all, or with a start and a stop.
        """
        if slice(None) in (self.items, items):
            return self
        first, end = max(self.items.start, items.start), min(self.items.stop, items.stop)
        return self._replace(items=slice(first - items.start, end - items.start)) if first < end else None


class Offer(Protocol):
    """Tokens of the references to look at: see `distillation_target`.

    Attributes:
        log_weight: of each token, see `distillation_target`; within each reference, where there are weights.
        weights: of each reference, [references], or for each query, [t references]; None pools their tokens.
        sizes: how many tokens each has, one reference after the other.
    """

    k: torch.Tensor
    v: torch.Tensor
    log_weight: torch.Tensor | None
    weights: torch.Tensor | None

    @property
    def sizes(self) -> Sequence[int]: ...


def shares(weights: torch.Tensor) -> torch.Tensor:
    """How much each reference's own attention counts in a target, [... references]; they sum to 1.

    Those of positive weight receive their weight's share. Those of negative weight are gone away from, as far as their
    weight is of the positive ones' sum, together at most as far as there is to them.
    """
    positive = weights.clamp(min=0)
    total = positive.sum(dim=-1, keepdim=True)
    away = (-weights).clamp(min=0) / total
    away = away / away.sum(dim=-1, keepdim=True).clamp(min=1)
    return positive / total * (1 + away.sum(dim=-1, keepdim=True)) - away


@torch.no_grad()
def offered_target(q: torch.Tensor, offer: Offer, *, attention_scale: float = 1.0) -> torch.Tensor:
    """`distillation_target` on an offer: its tokens pooled, or each reference with its share.

    With shares, queries look at each reference alone, and what they find is mixed. That is one attention on all, whose
    logits are raised by what brings each reference's mass to its share.
    """
    if offer.weights is None:
        return distillation_target(q, offer.k, offer.v, attention_scale=attention_scale, log_weight=offer.log_weight)
    alone = zip(offer.k.split(offer.sizes, dim=-2), offer.v.split(offer.sizes, dim=-2), strict=True)
    within = [None] * len(offer.sizes) if offer.log_weight is None else offer.log_weight.split(offer.sizes, dim=-1)
    found = [
        distillation_target(q, k, v, attention_scale=attention_scale, log_weight=log_weight)
        for (k, v), log_weight in zip(alone, within, strict=True)
    ]
    of_each = shares(offer.weights).to(q).unbind(dim=-1)
    return sum(share[..., None] * of_one for share, of_one in zip(of_each, found, strict=True))


@torch.no_grad()
def region_target(
    q: torch.Tensor, groups: Sequence[QueryGroup], offers: Sequence[Offer], *, attention_scale: float = 1.0
) -> torch.Tensor:
    """`distillation_target` where each token attends only to reference tokens of its own label (paper section 4.3).

    Args:
        q: queries of the picture, [b heads t d].
        groups: tokens that belong to none have a target of 0.
        offers: by label.

    Returns:
        [b heads t d], detached.
    """
    target = torch.zeros_like(q)
    for items, tokens, label in groups:
        found = offered_target(q[items][:, :, tokens], offers[label], attention_scale=attention_scale)
        target[items, :, tokens] = found
    return target


def distillation_loss(
    out: torch.Tensor, target: torch.Tensor, token_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """mean | out - target | of one layer, summed over pictures: a picture's gradient does not depend on its batch.

    A token of weight 0 has no error, and the mean is still over all tokens: the others are pulled as without weights.

    Args:
        out: attention output of the picture before the output projection, [b heads t d]; carries the gradient.
        target: from `distillation_target`, same shape.
        token_weight: how much each token counts, 0 to 1, [b or 1, t]; None counts all fully.

    Returns:
        A scalar in fp32 or better.
    """
    error = (at_least_fp32(out) - at_least_fp32(target)).abs()
    if token_weight is None:
        return error.mean() * len(out)
    return (error.mean(dim=(1, 3)) * token_weight).mean(dim=1).sum()
