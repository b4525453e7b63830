"""A plain reading of attention distillation inside a sampling loop, for one UNet of the SD1.5 kind.

It shares no code with the pack. Queries, keys and values come from hooks on the projections of a complete
forward pass, attention is written out as a softmax, gradients are plain autograd on a copy of the model with
ordinary parameters, and the sampler is Euler written out. All is in the floating point type of the inputs.

Spaces: a *latent* is what a VAE node gives. `LATENT_SCALE * latent` is x0 of *k-diffusion space*, where a
state is x = x0 + sigma * noise. *Model space* is what the UNet is fed, z = x / sqrt(sigma^2 + 1); the
optimisation and AdaIN work there.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_SCALE = 0.18215
ADAIN_NOISE, STYLE_NOISE, CONTENT_NOISE = range(3)
ADAIN_EPS = 1e-6


@dataclass(frozen=True)
class Reference:
    """One style reference: a latent tensor and how its tokens are offered.

    latent: [N, 4, h, w] in latent space, N pictures pooled.
    weight: adds log(weight) to the logits of its tokens; 0 removes them.
    mask: [H, W] or [N, H, W]; a token is offered where the mask, resized to the tokens' grid, is above 0.5.
    labels: [H, W] label map of a controlled texture; read only when target labels are given.
    target: [H, W] or [B, H, W], 0 to 1; where in the picture being made it counts, and how much.
    """

    latent: Tensor
    weight: float = 1.0
    mask: Tensor | None = None
    labels: Tensor | None = None
    target: Tensor | None = None


@dataclass(frozen=True)
class Settings:
    """The settings of the method. `layers` are the chosen self-attention layers in execution order.

    adam_epsilon: Adam's own. The mean over a batch of b pictures divides each picture's gradient by b, which is Adam
    with b times the epsilon on the gradient of the sum.
    """

    layers: tuple[int, ...]
    learning_rate: float = 0.05
    iterations: int = 2
    adain: bool = True
    content_weight: float = 0.0
    content_loss: str = "query"
    attention_scale: float = 1.0
    adam_epsilon: float = 1e-8


@dataclass(frozen=True)
class Noises:
    """The independent draws of one guided step, each of the shape of the latent that it is added to."""

    adain: list[Tensor]
    style: list[Tensor]
    content: Tensor | None


@dataclass
class Step:
    """One guided step. All tensors in model space, [B, 4, h, w]; sigma is the one the step is treated at."""

    sigma: float
    before: Tensor
    after_adain: Tensor
    after: Tensor
    gradient: Tensor | None
    losses: list[float]


@dataclass
class Run:
    """A whole run: x is the end state in k-diffusion space, latent the same in latent space."""

    x: Tensor
    steps: list[Step] = field(default_factory=list)

    @property
    def latent(self) -> Tensor:
        return self.x / LATENT_SCALE


def ordinary_copy(unet: nn.Module, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A deep copy of a diffusion model that autograd can go through: ordinary, frozen parameters of dtype."""
    with torch.inference_mode(False):
        twin = copy.deepcopy(unet).to(dtype).requires_grad_(False)
        twin.dtype = dtype
    return twin


def timestep_of(sigma: float, model_sigmas: Tensor) -> float:
    """The index of the model's noise level nearest to sigma in the logarithm. model_sigmas: [1000]."""
    return float((model_sigmas.double().log() - math.log(sigma)).abs().argmin())


def predict(unet: nn.Module, z: Tensor, timestep: float, context: Tensor) -> Tensor:
    """One complete forward pass: z [B, 4, h, w] in model space, context [1 or B, S, 768] -> noise, as z."""
    times = torch.full((z.shape[0],), timestep)
    context = context.to(z.dtype).expand(z.shape[0], -1, -1)
    return unet(z, times, context=context, transformer_options={})


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """[B, T, heads * d] -> [B, heads, T, d]."""
    batch, count, width = tokens.shape
    return tokens.reshape(batch, count, heads, width // heads).transpose(1, 2)


def attention_weights(q: Tensor, k: Tensor, bias: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias): q [B, heads, T, d], k [B, heads, S, d] -> [B, heads, T, S]."""
    logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    return torch.softmax(logits if bias is None else logits + bias, dim=-1)


def features(unet: nn.Module, z: Tensor, timestep: float, context: Tensor) -> list[dict[str, Tensor]]:
    """q, k, v and out = softmax(q k^T / sqrt(d)) v of every self-attention layer in execution order.

    All are [B, heads, T, d]; z [B, 4, h, w] is in model space. `host_out` is the same attention as the model
    itself computed it.
    """
    layers: list[dict[str, Tensor]] = []
    handles = []

    def watch(attention: nn.Module) -> None:
        def begin(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
            layers.append({"q": split_heads(output, attention.heads)})

        def keep(name: str, tokens: Tensor) -> None:
            layers[-1][name] = split_heads(tokens, attention.heads)

        handles.append(attention.to_q.register_forward_hook(begin))
        handles.append(attention.to_k.register_forward_hook(lambda module, inputs, output: keep("k", output)))
        handles.append(attention.to_v.register_forward_hook(lambda module, inputs, output: keep("v", output)))
        handles.append(attention.to_out.register_forward_pre_hook(lambda module, inputs: keep("host_out", inputs[0])))

    for name, module in unet.named_modules():
        if name.endswith(".attn1"):
            watch(module)
    try:
        predict(unet, z, timestep, context)
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        layer["out"] = attention_weights(layer["q"], layer["k"]) @ layer["v"]
    return layers


def adain(z: Tensor, references: Sequence[Tensor], mask: Tensor | None = None) -> Tensor:
    """Give each sample and channel of z [B, C, h, w] the mean and unbiased std of all references' pixels.

    references: latents [N, C, h, w] of any size in the same space as z. mask: [h, w] of zeros and ones; z's own mean
    and std are taken where it is 1.
    """
    pixels = torch.cat([r.transpose(0, 1).flatten(1) for r in references], dim=1)
    mean = pixels.mean(dim=1).reshape(1, -1, 1, 1)
    std = pixels.std(dim=1, unbiased=True).reshape(1, -1, 1, 1)
    own = z.flatten(2) if mask is None else z[:, :, mask > 0]
    own_mean = own.mean(dim=2)[:, :, None, None]
    own_std = own.std(dim=2, unbiased=True)[:, :, None, None]
    return (z - own_mean) / (own_std + ADAIN_EPS) * std + mean


def adain_by_place(z: Tensor, references: Sequence[Tensor], weights: Sequence[float], covered: Tensor) -> Tensor:
    """AdaIN where each reference has its own part of z, pixel by pixel.

    At a pixel, each reference counts by its weight, its number of pixels and how much it covers there (covered:
    [references, B or 1, h, w]). The pixel's own mean and variance are those of the areas that the references cover,
    mixed by these shares; what it is given are the references' own, mixed alike.
    """
    shares = [
        w * r.shape[0] * r.shape[2] * r.shape[3] * c[:, None]
        for w, r, c in zip(weights, references, covered, strict=True)
    ]
    whole = sum(shares)
    shares = [torch.where(whole > 0, share / whole, 0) for share in shares]

    def mixed(means: list[Tensor], variances: list[Tensor]) -> tuple[Tensor, Tensor]:
        mean = sum(s * m for s, m in zip(shares, means, strict=True))
        return mean, sum(s * (v + m**2) for s, m, v in zip(shares, means, variances, strict=True)) - mean**2

    own_means, own_variances = [], []
    for c in covered[:, :, None]:
        c = c / c.amax()
        mean = (c * z).sum(dim=(2, 3), keepdim=True) / c.sum(dim=(2, 3), keepdim=True)
        own_means.append(mean)
        own_variances.append(
            (c * (z - mean) ** 2).sum(dim=(2, 3), keepdim=True) / (c.sum(dim=(2, 3), keepdim=True) - 1)
        )
    pixels = [r.transpose(0, 1).flatten(1) for r in references]
    own_mean, own_variance = mixed(own_means, own_variances)
    mean, variance = mixed(
        [p.mean(dim=1).reshape(1, -1, 1, 1) for p in pixels], [p.var(dim=1).reshape(1, -1, 1, 1) for p in pixels]
    )
    moved = (z - own_mean) / (own_variance.clamp(min=0).sqrt() + ADAIN_EPS) * variance.clamp(min=0).sqrt() + mean
    return z + reach_of(covered) * (moved - z)


def reach_of(covered: Tensor) -> Tensor:
    """How far pixels may move: what references cover together, [references, B or 1, h, w] -> [B or 1, 1, h, w]."""
    return covered.sum(dim=0).clamp(max=1)[:, None]


def token_grid(height: int, width: int, tokens: int) -> tuple[int, int]:
    """The grid of a layer that has this many tokens for a latent of height x width (halved, rounding up)."""
    while height * width > tokens:
        height, width = (height + 1) // 2, (width + 1) // 2
    assert height * width == tokens
    return height, width


def on_tokens(image: Tensor, latent: Tensor, tokens: int) -> Tensor:
    """Nearest-neighbour resize of [H, W] or [N, H, W] to a layer's token grid: [N of the latent, tokens]."""
    image = image.reshape(-1, 1, *image.shape[-2:]).double()
    grid = F.interpolate(image, size=token_grid(latent.shape[2], latent.shape[3], tokens), mode="nearest")
    return grid.flatten(1).expand(latent.shape[0], -1)


def coverage(style: Sequence[Reference], z: Tensor, size: tuple[int, int]) -> Tensor:
    """How much of each cell of a grid each reference's target mask covers, [references, B or 1, rows, columns]."""
    everywhere = torch.ones(1, 1, dtype=z.dtype)
    targets = [everywhere if r.target is None else r.target.to(z.dtype) for r in style]
    grids = [F.interpolate(t.reshape(-1, 1, *t.shape[-2:]), size=size, mode="area")[:, 0] for t in targets]
    return torch.stack(torch.broadcast_tensors(*grids))


def edges_of(latent: Tensor) -> Tensor:
    """How firmly the edges of a latent [N, 4, h, w] hold each of its pixels, [N, 1, h, w], of mean 1.

    Half is the same everywhere; half goes by the length of the gradient, half the differences of the two neighbours.
    """
    beside = torch.cat([latent[..., :1], latent, latent[..., -1:]], dim=3)
    above = torch.cat([latent[:, :, :1], latent, latent[:, :, -1:]], dim=2)
    gradient = torch.cat([beside[..., 2:] - beside[..., :-2], above[:, :, 2:] - above[:, :, :-2]], dim=1) / 2
    length = gradient.norm(dim=1, keepdim=True)
    return 0.5 + 0.5 * length / length.mean(dim=(1, 2, 3), keepdim=True)


def logit_bias(
    style: Sequence[Reference], counts: Sequence[int], z: Tensor, z_tokens: int, target_labels: Tensor | None
) -> Tensor:
    """What is added to the logits of the pooled reference tokens at one layer, [T or 1, S].

    It is the logarithm of the weight, or -inf where a token is not offered. counts: the tokens of one picture
    of each reference at this layer; target_labels: [H, W].
    """
    columns = []
    for reference, count in zip(style, counts, strict=True):
        weight = math.log(reference.weight) if reference.weight > 0 else -math.inf
        column = torch.full((1, reference.latent.shape[0] * count), weight, dtype=z.dtype)
        if reference.mask is not None:
            offered = on_tokens(reference.mask, reference.latent, count).flatten() > 0.5
            column = column.masked_fill(~offered, -math.inf)
        if target_labels is not None:
            own = on_tokens(reference.labels, reference.latent, count).flatten()
            wanted = on_tokens(target_labels, z[:1], z_tokens).flatten()
            column = column.expand(z_tokens, -1).masked_fill(wanted[:, None] != own[None, :], -math.inf)
        columns.append(column)
    return torch.cat(columns, dim=1)


def pool(tokens: Sequence[Tensor]) -> Tensor:
    """Tokens of several references, each [N, heads, T, d], in a row: [1, heads, sum of N * T, d]."""
    return torch.cat([t.transpose(0, 1).flatten(1, 2) for t in tokens], dim=1)[None]


def masked_target(
    q: Tensor, k_s: Sequence[Tensor], v_s: Sequence[Tensor], bias: Tensor, covered: Tensor
) -> tuple[Tensor, Tensor]:
    """The target of each token and its weight in the loss, [B, heads, T, d] and [B or 1, 1, T, 1].

    A reference's weight is multiplied by how much of the token it covers, [references, B or 1, T]; a token is pulled
    by the sum of these, at most 1.
    """
    sizes = [k.shape[0] * k.shape[2] for k in k_s]
    columns = [c[..., None].expand(-1, -1, size) for c, size in zip(covered.log(), sizes, strict=True)]
    weight = covered.sum(dim=0).clamp(max=1)[:, None, :, None]
    target = attention_weights(q, pool(k_s), bias + torch.cat(columns, dim=-1)[:, None]) @ pool(v_s)
    return torch.where(weight > 0, target, 0), weight


def feature_loss(
    live: Sequence[dict[str, Tensor]],
    style: Sequence[Sequence[dict[str, Tensor]]],
    content: Sequence[dict[str, Tensor]] | None,
    references: Sequence[Reference],
    settings: Settings,
    z: Tensor,
    target_labels: Tensor | None = None,
    edges: Tensor | None = None,
) -> Tensor:
    """The total loss from the features of z (`live`), of each style reference and of the content.

    edges: of the content, [B or 1, 1, h, w], see `edges_of`.

    Means are over one picture; pictures of a batch are summed, so that each is optimised as if it were alone. (The
    authors' program takes the mean over the batch: see `Settings.adam_epsilon`.)
    """
    pictures = len(z)
    total = live[0]["q"].new_zeros(())
    for index in settings.layers:
        layer = live[index]
        k_s = [of_one[index]["k"] for of_one in style]
        v_s = [of_one[index]["v"] for of_one in style]
        bias = logit_bias(references, [k.shape[2] for k in k_s], z, layer["q"].shape[2], target_labels)
        covered = coverage(references, z, token_grid(*z.shape[-2:], layer["q"].shape[2])).flatten(2)
        with torch.no_grad():
            target, weight = masked_target(settings.attention_scale * layer["q"], k_s, v_s, bias, covered)
        total = total + pictures * (weight * (layer["out"] - target).abs()).mean()
        if content is None or settings.content_weight == 0:
            continue
        q_c, k_c, v_c = content[index]["q"], content[index]["k"], content[index]["v"]
        if settings.content_loss == "query":
            difference = layer["q"] - q_c
        elif settings.content_loss == "query_edges":
            grid = token_grid(*z.shape[-2:], layer["q"].shape[2])
            difference = F.interpolate(edges, size=grid, mode="area").flatten(2)[..., None] * (layer["q"] - q_c)
        elif settings.content_loss == "query_key":
            difference = attention_weights(layer["q"], layer["k"]) - attention_weights(q_c, k_c)
        elif settings.content_loss == "query_key_value":
            difference = (attention_weights(layer["q"], layer["k"]) - attention_weights(q_c, k_c)) @ v_c
        else:
            raise ValueError(f"unknown content_loss {settings.content_loss!r}")
        total = total + pictures * settings.content_weight * difference.abs().mean()
    return total


def loss(
    unet: nn.Module,
    z: Tensor,
    timestep: float,
    context: Tensor,
    references: Sequence[Reference],
    style_noised: Sequence[Tensor],
    content_noised: Tensor | None,
    settings: Settings,
    target_labels: Tensor | None = None,
    edges: Tensor | None = None,
) -> Tensor:
    """The total loss of z [B, 4, h, w] against noised references, all in model space: a scalar."""
    with torch.no_grad():
        style = [features(unet, latent, timestep, context) for latent in style_noised]
        content = None if content_noised is None else features(unet, content_noised, timestep, context)
    live = features(unet, z, timestep, context)
    return feature_loss(live, style, content, references, settings, z, target_labels, edges)


def seed_of(*numbers: int) -> int:
    """One seed made of several numbers: each is mixed in by exclusive or, a product modulo 2^64 and a shift."""
    seed = 0x5AD
    for number in numbers:
        seed = (seed ^ number) * 0x9E3779B97F4A7C15 % 2**64
        seed = seed ^ (seed >> 32)
    return seed % 2**63


def draw_noises(
    seed: int, step: int, style: Sequence[Reference], content: Tensor | None, settings: Settings, guidance: int = 0
) -> Noises:
    """The noises of one guided step, counted from 0: each draw has a seed of its own. Drawn in float32."""

    def like(latent: Tensor, part: int, purpose: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(seed_of(seed, guidance, step, part, purpose))
        return torch.randn(latent.shape, generator=generator, dtype=torch.float32).to(latent.dtype)

    numbered = list(enumerate(style))
    for_adain = [like(r.latent, i, ADAIN_NOISE) for i, r in numbered] if settings.adain else []
    for_style = [like(r.latent, i, STYLE_NOISE) for i, r in numbered]
    with_content = content is not None and settings.content_weight > 0
    return Noises(for_adain, for_style, like(content, 0, CONTENT_NOISE) if with_content else None)


def noised(latent: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """A latent brought to noise level sigma, in model space."""
    return (LATENT_SCALE * latent + sigma * noise) / math.sqrt(sigma**2 + 1)


def guided_step(
    unet: nn.Module,
    z: Tensor,
    sigma: float,
    model_sigmas: Tensor,
    context: Tensor,
    style: Sequence[Reference],
    noises: Noises,
    settings: Settings,
    content: Tensor | None = None,
    target_labels: Tensor | None = None,
    mask: Tensor | None = None,
    edges: Tensor | None = None,
) -> Step:
    """AdaIN, then `iterations` steps of a fresh Adam on z [B, 4, h, w], model space, at noise level sigma.

    A sigma of 0 is treated at the model's smallest one; context is the condition of the distilling passes;
    content: [1 or B, 4, h, w] in latent space; mask: [h, w] of zeros and ones, only where it is 1 does z move: after
    AdaIN and after each iteration the rest is put back. Without content, z moves by as much as the references' target
    masks cover of it. edges: of a content that z shows only a part of; else they are the content's own.
    """
    sigma = max(sigma, float(model_sigmas[0]))
    timestep = timestep_of(sigma, model_sigmas)
    start = z.detach().clone()
    covered = coverage(style, z, z.shape[-2:])
    reach = 1 if content is not None else reach_of(covered)
    if settings.adain:
        pairs = zip(style, noises.adain, strict=True)
        shown = [noised(reference.latent, noise, sigma) for reference, noise in pairs]
        if all(reference.target is None for reference in style):
            z = adain(start, shown, mask)
        else:
            z = adain_by_place(start, shown, [reference.weight for reference in style], covered)
        z = z if mask is None else torch.where(mask > 0, z, start)
    after_adain = z.detach().clone()
    pairs = zip(style, noises.style, strict=True)
    style_noised = [noised(reference.latent, noise, sigma) for reference, noise in pairs]
    content_noised = None if noises.content is None else noised(content, noises.content, sigma)
    if edges is None and content is not None:
        edges = edges_of(LATENT_SCALE * content)
    z = after_adain.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=settings.learning_rate, eps=settings.adam_epsilon)
    first_gradient, losses = None, []
    for _ in range(settings.iterations):
        optimizer.zero_grad()
        value = loss(unet, z, timestep, context, style, style_noised, content_noised, settings, target_labels, edges)
        value.backward()
        first_gradient = z.grad.clone() if first_gradient is None else first_gradient
        losses.append(value.item())
        before = z.detach().clone()
        optimizer.step()
        z.data = before + reach * (z.data - before)
        if mask is not None:
            z.data = torch.where(mask > 0, z.data, start)
    return Step(sigma, start, after_adain, z.detach(), first_gradient, losses)


@torch.no_grad()
def denoise(
    unet: nn.Module,
    x: Tensor,
    sigma: float,
    model_sigmas: Tensor,
    cfg: float,
    positive: Tensor,
    negative: Tensor,
) -> Tensor:
    """The guided estimate of x0 by two calls of a noise-predicting model, k-diffusion space, [B, 4, h, w]."""
    z, timestep = x / math.sqrt(sigma**2 + 1), timestep_of(sigma, model_sigmas)
    conditional = x - sigma * predict(unet, z, timestep, positive)
    unconditional = x - sigma * predict(unet, z, timestep, negative)
    return unconditional + cfg * (conditional - unconditional)


def run(
    unet: nn.Module,
    noise: Tensor,
    sigmas: Tensor,
    model_sigmas: Tensor,
    cfg: float,
    positive: Tensor,
    negative: Tensor,
    style: Sequence[Reference],
    settings: Settings,
    seed: int,
    content: Tensor | None = None,
    condition: Tensor | None = None,
    target_labels: Tensor | None = None,
) -> Run:
    """Euler from an empty latent with a guided step after every sampler step, the last one included.

    noise: [B, 4, h, w] of unit variance; positive, negative, condition: [1 or B, S, 768]. The condition of
    the distilling passes is the negative one if none is given.
    """
    levels = sigmas.tolist()
    sigma_max = float(model_sigmas[-1])
    full = levels[0] > sigma_max or math.isclose(levels[0], sigma_max, rel_tol=1e-5)
    x = noise * (math.sqrt(1 + levels[0] ** 2) if full else levels[0])
    result = Run(x)
    for number, (sigma, sigma_next) in enumerate(itertools.pairwise(levels)):
        denoised = denoise(unet, x, sigma, model_sigmas, cfg, positive, negative)
        x = x + (x - denoised) / sigma * (sigma_next - sigma)
        treated_at = max(sigma_next, float(model_sigmas[0]))
        scale = math.sqrt(treated_at**2 + 1)
        step = guided_step(
            unet,
            x / scale,
            sigma_next,
            model_sigmas,
            negative if condition is None else condition,
            style,
            draw_noises(seed, number, style, content, settings),
            settings,
            content,
            target_labels,
        )
        x = step.after * scale
        result.steps.append(step)
    result.x = x
    return result


def optimise(
    unet: nn.Module,
    start: Tensor,
    context: Tensor,
    style: Sequence[Reference],
    settings: Settings,
    steps: int,
    content: Tensor | None = None,
    target_labels: Tensor | None = None,
    cosine: bool = False,
) -> Tensor:
    """Mode 1: Adam on z, fed clean at falling timesteps against clean references; one Adam state for the run.

    start: [B, 4, h, w] in model space, where a clean latent is the latent times its scale; returns the same. Without
    content, z moves by as much as target masks cover of it.
    """
    reach = 1 if content is not None else reach_of(coverage(style, start, start.shape[-2:]))
    z = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=settings.learning_rate)
    edges = None if content is None else edges_of(LATENT_SCALE * content)
    clean = [LATENT_SCALE * reference.latent for reference in style]
    for step, k in enumerate(reversed(range(steps))):
        timestep = k * (1000 // steps) + 1
        if cosine:
            optimizer.param_groups[0]["lr"] = settings.learning_rate * (1 + math.cos(math.pi * step / steps)) / 2
        for _ in range(settings.iterations):
            optimizer.zero_grad()
            held = None if content is None else LATENT_SCALE * content
            loss(unet, z, timestep, context, style, clean, held, settings, target_labels, edges).backward()
            before = z.detach().clone()
            optimizer.step()
            z.data = before + reach * (z.data - before)
    return z.detach()
