"""The token bank: keys and values of all style references, pooled, which the picture's queries may look at."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate

import torch

from .capture import HIDDEN, LayerFeatures
from .reference import ReferencePart
from .tokens import NO_LABEL, inner_tokens, label_tokens, token_mask, touched_tokens

FRAME_BEFORE = -1  # the part that `TokenBank.with_frame_before` adds; those of references are counted from 0


@dataclass(frozen=True)
class TokenBank:
    """Keys and values that the picture's queries may look at in one layer.

    Attributes:
        k, v: [1 or b, heads, tokens, d], tokens of all parts one after the other.
        log_weight: [tokens] or, for each query, [queries tokens]; None where all tokens count alike.
        by_label: with regions, what a target token of each label may look at; the last is for tokens that are no part
            of the picture, such as text.
        counts: how many tokens each part has, by its number, in their order.
        weights: in shares, the weight of each part, [parts] or, for each query, [queries parts]; else None.
        log_one: what a weight of 1 is in `log_weight`, of which only ratios count, or the log of it in `weights`: a
            number or, for each query, [queries 1]: there that of the part to come near to that counts most.
    """

    k: torch.Tensor
    v: torch.Tensor
    log_weight: torch.Tensor | None = None
    by_label: "Sequence[TokenBank]" = ()
    counts: Mapping[int, int] = field(default_factory=dict)
    weights: torch.Tensor | None = None
    log_one: float | torch.Tensor = 0.0

    @property
    def sizes(self) -> list[int]:
        """How many tokens each part has."""
        return list(self.counts.values())

    def only(self, tokens: torch.Tensor, counts: Mapping[int, int]) -> "TokenBank":
        """Some of the tokens, given by number; counts: how many of each part these are, of parts that have any."""
        log_weight = None if self.log_weight is None else self.log_weight[tokens]
        weights = self.weights
        if weights is not None:
            weights = torch.stack([weights[number] for number, part in enumerate(self.counts) if part in counts])
        return TokenBank(self.k[:, :, tokens], self.v[:, :, tokens], log_weight, (), counts, weights, self.log_one)

    def of_parts(self, parts: Sequence[int], log_share: torch.Tensor | None = None) -> "TokenBank":
        """The tokens of some parts, given by number in ascending order.

        Args:
            log_share: log of how much each part counts for each query, [queries parts].
        """
        bank = self
        if len(parts) < len(self.counts):
            ends = dict(zip(self.counts, accumulate(self.sizes), strict=True))
            spans = [torch.arange(ends[part] - self.counts[part], ends[part], device=self.k.device) for part in parts]
            bank = self.only(torch.cat(spans), {part: self.counts[part] for part in parts})
        if log_share is None:
            return bank
        to_come_near = log_share if bank.weights is None else log_share.masked_fill(bank.weights < 0, -torch.inf)
        bank = replace(bank, log_one=bank.log_one + to_come_near.amax(dim=1, keepdim=True))
        if bank.weights is not None:
            return replace(bank, weights=bank.weights * log_share.exp())
        columns = zip(log_share.to(bank.k).split(1, dim=1), bank.sizes, strict=True)
        of_tokens = torch.cat([column.expand(-1, size) for column, size in columns], dim=1)
        return replace(bank, log_weight=of_tokens if bank.log_weight is None else of_tokens + bank.log_weight)

    def with_frame_before(
        self, k: torch.Tensor, v: torch.Tensor, weight: float, seen: torch.Tensor | None = None
    ) -> "TokenBank":
        """What some frames may look at if each also looks at the one before it, as at one more reference.

        Args:
            k, v: of the frames before, [b heads t d].
            weight: of a frame before, above 0; means what the weights of references do.
            seen: which of its tokens the model lets be looked at, [t], bool; None is all.
        """
        (b, _, count, _), own = k.shape, self.k.shape[-2]
        log_before = self.log_one + math.log(weight)
        before = log_before if torch.is_tensor(log_before) else self.k.new_full((1,), log_before)
        weights, of_tokens = self.weights, before.expand(*before.shape[:-1], count)
        if weights is not None:
            weights, of_tokens = torch.cat([weights, before.exp().to(weights)], dim=-1), of_tokens.new_zeros(count)
        if seen is not None:
            of_tokens = of_tokens.masked_fill(~seen, HIDDEN)
        log_weight = of_tokens.new_zeros(*of_tokens.shape[:-1], own) if self.log_weight is None else self.log_weight
        alike = weights is not None or (isinstance(log_before, float) and log_before == 0)
        alike = alike and self.log_weight is None and seen is None  # kernels without a bias are faster
        return TokenBank(
            k=torch.cat([self.k.expand(b, -1, -1, -1), k], dim=-2),
            v=torch.cat([self.v.expand(b, -1, -1, -1), v], dim=-2),
            log_weight=None if alike else torch.cat([log_weight, of_tokens], dim=-1),
            counts={**self.counts, FRAME_BEFORE: count},
            weights=weights,
            log_one=self.log_one,
        )


@dataclass(frozen=True)
class _Offered:
    """Which tokens of a layer are offered; the same at every step of a run.

    Attributes:
        kept: of each part, the numbers of its offered tokens, pictures of a batch one after the other; None is all.
        log_weight: of the pooled tokens, None where all count alike.
        weights: of the parts, in shares; else None.
        log_one: see `TokenBank`.
        by_label: with regions, the numbers of the pooled tokens that each label may look at, and how many of them each
            part has.
    """

    kept: Sequence[torch.Tensor | None]
    log_weight: torch.Tensor | None
    weights: torch.Tensor | None
    log_one: float
    by_label: Sequence[tuple[torch.Tensor, Mapping[int, int]]]


class TokenPool:
    """Pools the tokens of a reference's parts. Made for one run; what is constant in it is worked out once."""

    def __init__(
        self,
        parts: Sequence[ReferencePart],
        labels: Sequence[torch.Tensor] | None = None,
        label_count: int = 0,
        *,
        pictures_alone: bool = False,
        in_shares: bool = False,
    ) -> None:
        """
        Args:
            parts: those that count, weight not 0.
            labels: with regions, the label map of each part, [n H W].
            label_count: how many labels there are.
            pictures_alone: of the references' text, and whatever is no part of their pictures, nothing is offered.
            in_shares: what their weights mean, see `Reference.in_shares`.
        """
        self._parts = parts
        self._in_shares = in_shares
        self._labels = labels
        self._label_count = label_count
        self._pictures_alone = pictures_alone
        self._offered: dict[tuple, _Offered] = {}

    def banks(self, features: Sequence[Mapping[int, LayerFeatures]]) -> dict[int, TokenBank]:
        """One bank for each layer that a part to come near to takes part in, from each part's features at one level."""
        layers = sorted({index for part in self._parts if part.weight > 0 for index in part.layers})
        seen = _read_seen(features)
        return {index: self._bank(index, features, [of_part.get(index) for of_part in seen]) for index in layers}

    def _bank(
        self, index: int, features: Sequence[Mapping[int, LayerFeatures]], seen: Sequence[torch.Tensor | None]
    ) -> TokenBank:
        numbers = [number for number, part in enumerate(self._parts) if index in part.layers]
        of_layer = [features[number][index] for number in numbers]
        offered = self._offered_tokens(numbers, of_layer, [seen[number] for number in numbers])
        keys = [_pick(f.k, kept) for f, kept in zip(of_layer, offered.kept, strict=True)]
        bank = TokenBank(
            k=torch.cat(keys, dim=-2),
            v=torch.cat([_pick(f.v, kept) for f, kept in zip(of_layer, offered.kept, strict=True)], dim=-2),
            log_weight=offered.log_weight,
            counts={number: of_part.shape[-2] for number, of_part in zip(numbers, keys, strict=True)},
            weights=offered.weights,
            log_one=offered.log_one,
        )
        return replace(bank, by_label=tuple(bank.only(*of_label) for of_label in offered.by_label))

    def _offered_tokens(
        self, numbers: Sequence[int], features: Sequence[LayerFeatures], seen: Sequence[torch.Tensor | None]
    ) -> _Offered:
        """What is offered of some parts in a layer, from memory where it is known."""
        key = (
            tuple(numbers), features[0].k.device, features[0].k.dtype, tuple((f.layout, f.edges) for f in features),
            tuple(None if s is None else s.numpy().tobytes() for s in seen),
        )  # fmt: skip
        if key not in self._offered:
            masks = [
                _without_edges(
                    _offered_mask(self._parts[number], f, of_part, self._pictures_alone),
                    f,
                    None if self._labels is None else self._labels[number],
                )
                for number, f, of_part in zip(numbers, features, seen, strict=True)
            ]
            by_label = () if self._labels is None else self._by_label(numbers, features, masks)
            device, sizes = features[0].k.device, [int(mask.sum()) for mask in masks]
            counts = [
                {number: int(n.sum()) for number, n in zip(numbers, of_label.split(sizes), strict=True) if n.any()}
                for of_label in by_label
            ]
            weights = [self._parts[number].weight for number in numbers]
            self._offered[key] = _Offered(
                kept=[None if mask.all() else mask.nonzero()[:, 0].to(device) for mask in masks],
                log_weight=None if self._in_shares else self._log_weight(numbers, masks, features[0].k),
                weights=torch.tensor(weights, device=device) if self._in_shares else None,
                log_one=0.0 if self._in_shares else -math.log(max(weights)),
                by_label=[(allowed.nonzero()[:, 0].to(device), n) for allowed, n in zip(by_label, counts, strict=True)],
            )
        return self._offered[key]

    def _log_weight(
        self, numbers: Sequence[int], masks: Sequence[torch.Tensor], like: torch.Tensor
    ) -> torch.Tensor | None:
        """log w of each pooled token. Only ratios count: the largest weight is taken for 1, so one alone is nothing."""
        weights = [self._parts[number].weight for number in numbers]
        if len(set(weights)) == 1:
            return None
        logs = [math.log(weight / max(weights)) for weight in weights]
        return torch.cat([like.new_full([int(m.sum())], log) for m, log in zip(masks, logs, strict=True)])

    def _by_label(
        self, numbers: Sequence[int], features: Sequence[LayerFeatures], masks: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """Which pooled tokens of a layer belong to each label, [labels + 1, tokens], bool; never an empty row.

        By nearest neighbour. A label that this leaves without tokens at a coarse layer has those that it touches; where
        a mask has taken these away too, all tokens. Tokens that are no part of a picture, such as text, belong to every
        label, and have a last row of their own, with all tokens.
        """
        nearest, touched, others = [], [], []
        for number, of_layer, mask in zip(numbers, features, masks, strict=True):
            label_map, layout, n = self._labels[number], of_layer.layout, of_layer.k.shape[0]

            def pooled(tokens: torch.Tensor, n: int = n, mask: torch.Tensor = mask) -> torch.Tensor:
                return tokens.expand(n, -1).flatten()[mask]

            of_part = pooled(layout.on_all_tokens(label_tokens(label_map, layout.grid), NO_LABEL))
            nearest.append(torch.stack([of_part == label for label in range(self._label_count)]))
            touching = (touched_tokens(label_map, label, layout.grid) for label in range(self._label_count))
            touched.append(torch.stack([pooled(layout.on_all_tokens(tokens, False)) for tokens in touching]))
            others.append(of_part == NO_LABEL)
        allowed, fallback = torch.cat(nearest, dim=1), torch.cat(touched, dim=1)
        allowed = torch.where(allowed.any(dim=1, keepdim=True), allowed, fallback)
        allowed = torch.where(allowed.any(dim=1, keepdim=True), allowed, torch.ones_like(allowed))
        return torch.cat([allowed | torch.cat(others), torch.ones_like(allowed[:1])])


def _read_seen(features: Sequence[Mapping[int, LayerFeatures]]) -> list[dict[int, torch.Tensor]]:
    """Of each part, `LayerFeatures.seen` by layer where there is one, on the CPU; read from the device in one go."""
    on_device = [
        {index: of_layer.seen for index, of_layer in of_part.items() if of_layer.seen is not None}
        for of_part in features
    ]
    every = [seen for of_part in on_device for seen in of_part.values()]
    read = iter(
        torch.cat([seen.flatten() for seen in every]).cpu().split([seen.numel() for seen in every]) if every else ()
    )
    return [{index: next(read).view(seen.shape) for index, seen in of_part.items()} for of_part in on_device]


def _offered_mask(
    part: ReferencePart, features: LayerFeatures, seen: torch.Tensor | None, pictures_alone: bool
) -> torch.Tensor:
    """Which of a part's tokens are offered, [n * tokens], bool, on the CPU.

    A mask is about tokens of the picture: those of the text are offered, unless pictures alone are, where the model
    lets them be seen.
    """
    layout, n = features.layout, features.k.shape[0]
    offered = torch.ones(n, layout.tokens, dtype=torch.bool) if seen is None else seen
    if part.mask is not None:
        offered = offered & layout.on_all_tokens(token_mask(part.mask, layout.grid), True)
    if pictures_alone:
        rows, columns = layout.grid
        offered = offered & layout.on_all_tokens(torch.ones(1, rows * columns, dtype=torch.bool), False)
    return offered.flatten()


def _without_edges(offered: torch.Tensor, features: LayerFeatures, labels: torch.Tensor | None) -> torch.Tensor:
    """A part's offered tokens, [n * tokens], without those at edges that show what is no picture.

    A part that has no other keeps them: it is small, or masked to its edges. With regions, [n H W], so does each label,
    also one that a coarse layer's tokens are merely touched by, see `TokenPool._by_label`.
    """
    if not any(features.edges):
        return offered
    layout, n = features.layout, features.k.shape[0]

    def on_all(of_picture: torch.Tensor, beside: bool) -> torch.Tensor:
        return layout.on_all_tokens(of_picture, beside).expand(n, -1).flatten()

    kept = offered & on_all(inner_tokens(layout.grid, features.edges), True)
    labels = torch.zeros(1, 1, 1, dtype=torch.long) if labels is None else labels
    for label in labels.unique().tolist():
        nearest = offered & on_all(label_tokens(labels, layout.grid) == label, False)
        of_label = nearest if nearest.any() else offered & on_all(touched_tokens(labels, label, layout.grid), False)
        if not (kept & of_label).any():
            kept = kept | of_label
    return kept


def _pick(tensor: torch.Tensor, kept: torch.Tensor | None) -> torch.Tensor:
    """Offered tokens of [n heads t d] as [1, heads, tokens, d]; pictures of a batch one after the other."""
    tokens = tensor.transpose(1, 2).flatten(0, 1)  # [(n t) heads d]
    return (tokens if kept is None else tokens[kept]).transpose(0, 1)[None]
