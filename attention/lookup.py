"""What the picture's queries find on the reference's tokens: their attention, written out."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from comfy import model_management

from ..losses.distillation import shares
from ..losses.precision import at_least_fp32
from .bank import TokenBank

AT_ONCE = 2**25  # attention weights that are held at a time


class Found(NamedTuple):
    """What queries find, in fp32 or better.

    Attributes:
        values: the mean of the tokens' values by their attention, [b t d]. Tokens without a place count as 0 in it.
        share: how much of the attention is on tokens that have a place, 0 to 1, [b t].
        certainty: 1 where all attention is on one place, 0 where it is spread evenly or on tokens without one, [b t]:
            share * (1 - entropy / log n) of the attention on the n places.
    """

    values: torch.Tensor
    share: torch.Tensor
    certainty: torch.Tensor


@torch.no_grad()
def look_up(q: torch.Tensor, bank: TokenBank, values: torch.Tensor, placed: torch.Tensor) -> Found:
    """The mean over heads of softmax(q k^T / sqrt(d) + log weight), and what it finds.

    In shares, the softmax is over each part alone, times its share.

    Args:
        q: queries, [b heads t d].
        bank: the keys, and how much each counts; its values are not read.
        values: of the bank's tokens, [s d'].
        placed: which of them have a place on a picture, [s], bool; the values of all others are 0.
    """
    k = at_least_fp32(bank.k[0]).transpose(-1, -2)  # [heads d s]
    rows = max(1, AT_ONCE // (k.shape[0] * k.shape[-1]))
    bias = None if bank.log_weight is None else bank.log_weight.expand(q.shape[2], -1)
    share = None if bank.weights is None else shares(bank.weights).expand(q.shape[2], -1)
    parts = []
    for queries in q:
        for number, some in enumerate(queries.split(rows, dim=1)):
            model_management.throw_exception_if_processing_interrupted()
            logits = at_least_fp32(some) @ k / math.sqrt(q.shape[-1])
            these = slice(number * rows, (number + 1) * rows)
            if bias is not None:
                logits = logits + bias[these]
            attention = logits.softmax(dim=-1) if share is None else _by_share(logits, bank.sizes, share[these])
            parts.append(_found(attention.mean(dim=0), values, placed))
    return Found(*(torch.cat(of_all).unflatten(0, (q.shape[0], q.shape[2])) for of_all in zip(*parts, strict=True)))


def _by_share(logits: torch.Tensor, sizes: Sequence[int], share: torch.Tensor) -> torch.Tensor:
    """Attention within each part, as much as its share is: [heads t s] with parts of these sizes, share [t parts]."""
    alone = zip(logits.split(sizes, dim=-1), share.split(1, dim=-1), strict=True)
    return torch.cat([of_one.softmax(dim=-1) * of_part for of_one, of_part in alone], dim=-1)


def _found(attention: torch.Tensor, values: torch.Tensor, placed: torch.Tensor) -> Found:
    """What some queries find, [t s] -> Found of [t ...]."""
    on_places = attention[:, placed]
    share = on_places.sum(dim=-1)
    spread = torch.special.entr(on_places / share.clamp_min(1e-12)[:, None]).sum(dim=-1)
    evenly = math.log(max(2, on_places.shape[-1]))  # of one place alone, the entropy is 0
    return Found(attention @ values.to(attention), share, share * (1 - spread / evenly).clamp(0, 1))
