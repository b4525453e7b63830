"""Let the picture look at a reference: keys and values of its self-attention exchanged in one forward pass.

Both ways live in the transformer_options of that one pass, and nothing is put into the model: in a UNet, whose
self-attention is called by name, it is replaced; in a transformer each attention call is overridden.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from comfy.ldm.modules.attention import optimized_attention
from einops import rearrange

from ..losses.distillation import offered_target
from .bank import TokenBank
from .calls import check_place, heads_apart, mask_by_heads, picture_place, split_heads
from .layers import AttentionLayer

Override = Callable[..., torch.Tensor]
Replacement = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]
# Of a layer's queries, [b heads t d], bank and options of the call: what it would put out, and how much
# that counts, [b t]; None is in full.
Given = Callable[[torch.Tensor, TokenBank, AttentionLayer, Mapping[str, Any]], tuple[torch.Tensor, torch.Tensor | None]]


def replaced_attention(
    transformer_options: dict[str, Any],
    layers: Sequence[AttentionLayer],
    banks: Mapping[int, TokenBank],
    strength: float,
    given: Given | None = None,
) -> dict[str, Any]:
    """The options of one call of a UNet with the exchange in them; those given are not changed.

    Args:
        layers: all of the model.
        banks: what the reference offers by layer.
        strength: 0 keeps a layer's own output, 1 takes what the reference gives, above 1 it goes on from there. What
            another pack has put in a layer's place gives the layer's own output.
        given: what the reference gives; None lets all queries look at all of the bank.
    """
    replace = transformer_options.get("patches_replace", {})
    before = replace.get("attn1", {})
    ours = {
        layers[index].block: _replacement(
            _replacement_of(before, layers[index]),
            functools.partial(given or _everywhere, bank=bank, layer=layers[index]),
            strength,
        )
        for index, bank in banks.items()
    }
    return {**transformer_options, "patches_replace": {**replace, "attn1": {**before, **ours}}}


def _replacement(before: Replacement | None, given: Callable[..., tuple], strength: float) -> Replacement:
    def inject(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
        queries = split_heads(q, extra_options["n_heads"])
        found, counts = given(queries, transformer_options=extra_options)  # first: a kernel may use up its input
        own = (before or _host_attention)(q, k, v, extra_options)
        share = strength if counts is None else strength * counts[..., None].to(own)
        return torch.lerp(own, rearrange(found, "b heads t d -> b t (heads d)").to(own), share)

    return inject


def _everywhere(
    q: torch.Tensor, bank: TokenBank, layer: AttentionLayer, transformer_options: Mapping[str, Any]
) -> tuple[torch.Tensor, None]:
    """What all queries find on all of a bank."""
    return offered_target(q, bank), None


def _replacement_of(replacements: Mapping[tuple, Replacement], layer: AttentionLayer) -> Replacement | None:
    """What another pack has put in a layer's place: for this very transformer, or for all of its block."""
    return replacements.get(layer.block, replacements.get(layer.block[:2]))


def _host_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, extra_options: dict[str, Any]) -> torch.Tensor:
    """The attention that ComfyUI computes where nothing replaces it, [b t (heads d)]; overrides stay in force."""
    return optimized_attention(
        q, k, v, extra_options["n_heads"],
        attn_precision=extra_options.get("attn_precision"), transformer_options=extra_options,
    )  # fmt: skip


class KeyValueExchange:
    """An attention override for one forward pass of a transformer.

    The picture's queries look at the reference's tokens in place of the picture's own. They still see all other tokens,
    those of the text above all, and the queries of these keep their own output.
    """

    def __init__(
        self,
        layers: Sequence[AttentionLayer],
        banks: Mapping[int, TokenBank],
        size: tuple[int, int],
        strength: float,
        before: Override | None,
    ) -> None:
        """
        Args:
            layers: all of the model.
            banks: what the reference offers by layer, tokens of its pictures alone.
            size: height and width of the latent.
            strength: 0 keeps a layer's own output, 1 takes what the reference gives, above 1 it goes on from there.
            before: an override that another node has set; what it gives counts as the layer's own output.
        """
        self._layers = {layer.call: layer for layer in layers if layer.index in banks}
        self._banks = banks
        self._size = size
        self._strength = strength
        self._before = before
        self._calls = 0

    def __call__(self, func: Callable[..., torch.Tensor], *args, **kwargs) -> torch.Tensor:
        """Called by ComfyUI in place of its attention; func is what it would have called."""
        layer = self._layers.get(self._calls)
        self._calls += 1
        given = None if layer is None else self._given(layer, *args, **kwargs)  # first: a kernel may use up its input
        own = func(*args, **kwargs) if self._before is None else self._before(func, *args, **kwargs)
        if given is None:
            return own
        picture, of_picture = given
        mixed = own.clone()
        mixed[..., picture, :] = torch.lerp(own[..., picture, :], of_picture.to(own), self._strength)
        return mixed

    def check_calls(self, expected: int) -> None:
        """Hold the number of calls that came by against the model's; none is fine: what skips a pass injects nothing.

        Raises:
            ValueError: another node adds attention to the model or takes it away.
        """
        if self._calls not in (0, expected):
            raise ValueError(
                f"model: {self._calls} attention calls came by, {expected} are expected; another node adds attention "
                "to the model or takes it away, take that node away"
            )

    def _given(
        self, layer: AttentionLayer, q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
        skip_output_reshape=False, **kwargs,
    ) -> tuple[slice, torch.Tensor]:  # fmt: skip
        """Which tokens of a layer are the picture's, and what these find on the reference and beside the picture.

        Args:
            q, k, v, mask, kwargs: of the call, see `heads_apart`.

        Returns:
            The latter as the layer's own output is: [b heads t d] with skip_output_reshape, else [b t (heads d)].
        """
        options = kwargs.get("transformer_options") or {}
        check_place(layer, options)
        apart = heads_apart(q, k, v, heads, skip_reshape, kwargs)
        shown = sum(options.get("reference_image_num_tokens", ()))  # pictures of edit models stand behind the one made
        (rows, columns), start = picture_place(layer, self._size, apart.q.shape[-2] - shown, apart.k.shape[-2])
        picture = slice(start, start + rows * columns)
        given = _look(*apart, mask, picture, self._banks[layer.index])
        return picture, given if skip_output_reshape else rearrange(given, "b heads t d -> b t (heads d)")


def _look(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, picture: slice, bank: TokenBank
) -> torch.Tensor:
    """What the picture's queries find on the reference's tokens and on all tokens beside the picture's own.

    Args:
        q, k, v: [b heads t d].
        mask: of the call, see `mask_by_heads`.
        picture: its tokens.

    Returns:
        [b heads t d] of the picture's tokens.
    """

    def exchanged(own: torch.Tensor, offered: torch.Tensor) -> torch.Tensor:
        return torch.cat([_beside(own, picture, -2), offered.expand(own.shape[0], -1, -1, -1)], dim=-2)

    q, keys, values = q[:, :, picture], exchanged(k, bank.k), exchanged(v, bank.v)
    bias = _bias(q, mask, picture, bank, keys.shape[-2])
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=bias)


def _bias(
    q: torch.Tensor, mask: torch.Tensor | None, picture: slice, bank: TokenBank, keys: int
) -> torch.Tensor | None:
    """What is added to the logits, [b or 1, heads or 1, t or 1, keys]: the call's mask, and the reference's weights."""
    if mask is None and bank.log_weight is None:
        return None
    offered = bank.k.shape[-2]
    bias = q.new_zeros(1, 1, 1, keys)
    if mask is not None:
        mask = mask_by_heads(mask)
        mask = mask[:, :, picture] if mask.shape[-2] > 1 else mask
        if mask.dtype == torch.bool:
            mask = q.new_zeros(mask.shape).masked_fill(~mask, -torch.inf)
        bias = F.pad(_beside(mask, picture, -1).to(q.dtype), (0, offered))
    if bank.log_weight is not None:
        bias[..., keys - offered :] = bank.log_weight
    return bias.expand(q.shape[0], q.shape[1], q.shape[2], -1)


def _beside(tensor: torch.Tensor, picture: slice, dim: int) -> torch.Tensor:
    """All tokens but the picture's."""
    behind = tensor.shape[dim] - picture.stop
    return torch.cat([tensor.narrow(dim, 0, picture.start), tensor.narrow(dim, picture.stop, behind)], dim=dim)
