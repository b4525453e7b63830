"""What is optimised at one noise level: the distance between the picture's attention and the references'.

L = L_AD + content_weight * L_content, each summed over its layers (paper equations 2 to 4).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from comfy.model_base import BaseModel

from ..attention import conditioning
from ..attention.capture import LayerFeatures, capture_features
from ..attention.frames import as_model_takes, without_frame
from ..attention.layers import AttentionLayer
from ..attention.reference import Reference, ReferencePart, TokenBank, build_bank, part_labels, token_mask
from ..attention.regions import Regions, label_tokens
from ..losses.adain import ChannelStats, channel_stats
from ..losses.content import query_key_loss, query_key_value_loss, query_loss
from ..losses.distillation import distillation_loss, distillation_target, region_target
from .settings import GuidanceSettings
from .windows import Layout, Window, cut, whole


@dataclass(frozen=True)
class Losses:
    """Loss of one iteration, scalars in fp32 or better; `style` and `content` are before weighting."""

    total: torch.Tensor
    style: torch.Tensor
    content: torch.Tensor


@dataclass
class PreparedPart:
    """A reference part on the model's device, ready for passes.

    Attributes:
        part: with its latent in the model's scale (process_latent_in applied).
        conds: its text conditions as the model encodes them.
        copies: how often each picture goes through the model, so that batches are alike.
    """

    part: ReferencePart
    conds: Sequence[conditioning.Cond] = field(repr=False)
    copies: int = 1

    def at(self, model: BaseModel, sigma: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """The latent as the model is shown it at noise level sigma, [n * copies, c, h, w] in k-diffusion space.

        With a generator it gets a fresh draw of noise, made on the CPU in fp32, so that a seed means the same on every
        machine. Without one it is shown clean, as the optimisation mode does.
        """
        latent, sampling = self.part.latent, model.model_sampling
        if generator is None:
            x = latent / sampling.calculate_input(sigma, latent.new_ones(1, 1, 1, 1))
        else:
            noise = torch.randn(latent.shape, generator=generator, dtype=torch.float32).to(latent)
            x = sampling.noise_scaling(sigma, noise, latent)
        return x.repeat(self.copies, 1, 1, 1)


@dataclass(frozen=True)
class Offer:
    """What the references offer at one noise level, to the whole picture and all its windows.

    Attributes:
        sigma: the noise level, a scalar tensor.
        style: by layer, what the picture's queries may look at.
        content: each content part with its latent as the model is shown it, [b c h w] in k-diffusion space.
    """

    sigma: torch.Tensor
    style: Mapping[int, TokenBank]
    content: Sequence[tuple[PreparedPart, torch.Tensor]]


@dataclass(frozen=True)
class ContentTarget:
    """What one content part asks of one window.

    Attributes:
        weight: of the part.
        mask: where it counts, [b or 1, 1, H, W] at any resolution; None is everywhere.
        features: by layer.
    """

    weight: float
    mask: torch.Tensor | None
    features: Mapping[int, LayerFeatures]


@dataclass(frozen=True)
class WindowTargets:
    """What one window of the picture is held against.

    Attributes:
        style: by layer, what the window's queries may look at.
        labels: with regions, the label map of the window, [1 or b, H, W].
        content: what is held of the content, by part.
    """

    style: Mapping[int, TokenBank]
    labels: torch.Tensor | None
    content: Sequence[ContentTarget]


@dataclass(frozen=True)
class Targets:
    """What some windows of the picture are held against in one pass.

    Attributes:
        sigma: the noise level, a scalar tensor.
        conds: text condition as apply_model takes it, for the windows one after the other along the batch.
        windows: targets of each.
    """

    sigma: torch.Tensor
    conds: dict[str, Any] = field(repr=False)
    windows: Sequence[WindowTargets]


class Objective:
    """The objective of one run: which model, which references, which layers.

    Must be made and used inside `attention.gradient.differentiable`.
    """

    def __init__(
        self,
        model: BaseModel,
        layers: Sequence[AttentionLayer],
        *,
        style: Reference,
        content: Reference | None,
        settings: GuidanceSettings,
        conds: Sequence[conditioning.Cond],
        latent: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
        regions: Regions | None = None,
    ) -> None:
        """
        Args:
            model: ComfyUI's model, loaded.
            layers: all self-attention layers of the model.
            style, content: the references; content is not used where its weight is 0.
            settings: loss weights and attention scale.
            conds: the sampler's text conditions, for references that brought none and for the picture.
            latent: the clean latent that sampling starts from, [b c h w], model scale; its shape, device and dtype are
                those of the picture.
            denoise_mask: where the picture may change; inpainting models read it.
            regions: which part of the picture takes its look from which part of the style reference.
        """
        latent = without_frame(latent)
        denoise_mask = None if denoise_mask is None else without_frame(denoise_mask)
        self.model = model
        self.settings = settings
        self.all_layers = layers
        self.style = [self._prepare(part, conds, latent) for part in style.active_parts]
        uses_content = content is not None and settings.content_weight > 0
        # The same batch for content and picture: rounding differs between batch sizes, and where the picture starts
        # from the content, that would turn into full-size gradients.
        self.content = [self._prepare(part, conds, latent, latent.shape[0]) for part in content.active_parts
                        ] if uses_content else []  # fmt: skip
        self.labels = None if regions is None else regions.target.to(latent.device)
        self._part_labels = None if regions is None else part_labels(style, regions, latent.device)
        self._label_count = 0 if regions is None else regions.count
        self.layers = sorted(set(style.layers) | (set(content.layers) if uses_content else set()))
        own = conds if style.conditioning is None else conditioning.from_socket(style.conditioning)
        self.conds = conditioning.encode(model, own, latent, denoise_mask, conditioning.shown_beside(conds))
        self.shape = latent.shape

    def _prepare(
        self, part: ReferencePart, conds: Sequence[conditioning.Cond], like: torch.Tensor, batch: int | None = None
    ) -> PreparedPart:
        latent = self.model.process_latent_in(as_model_takes(self.model, part.latent.to(like).clone()))
        latent = without_frame(latent)
        mask = None if part.mask is None else part.mask.to(like).clone()
        part = replace(part, latent=latent, mask=mask)
        own = conds if part.conditioning is None else conditioning.from_socket(part.conditioning)
        copies = 1 if batch is None else batch // latent.shape[0]
        return PreparedPart(part, conditioning.encode(self.model, own, latent.repeat(copies, 1, 1, 1)), copies)

    @torch.no_grad()
    def style_stats(self, sigma: torch.Tensor, generator: torch.Generator) -> ChannelStats:
        """AdaIN statistics of the style references noised to sigma, over all their pixels together, model space."""
        pixels, weights = [], []
        for prepared in self.style:
            part = prepared.part
            z = self.model.model_sampling.calculate_input(sigma, prepared.at(self.model, sigma, generator))
            weight = torch.full_like(z[:, :1], part.weight)
            if part.mask is not None:
                weight = weight * token_mask(part.mask, z.shape[-2:]).reshape(-1, 1, *z.shape[-2:])
            pixels.append(z.transpose(0, 1).flatten(1))
            weights.append(weight.flatten())
        return channel_stats(torch.cat(pixels, dim=1)[None, :, None], torch.cat(weights)[None, None, None])

    @torch.no_grad()
    def offer(self, sigma: torch.Tensor, generator: torch.Generator | None) -> Offer:
        """The references at noise level sigma, each with a noise of its own, style first.

        Without a generator the references are shown clean.
        """
        style = []
        for prepared in self.style:
            x = prepared.at(self.model, sigma, generator)
            conds = conditioning.for_pass(prepared.conds, float(sigma), x.shape[0])
            style.append((prepared.part, self._features(prepared.part, x, sigma, conds)))
        content = [(prepared, prepared.at(self.model, sigma, generator)) for prepared in self.content]
        return Offer(sigma, build_bank(style, self._part_labels, self._label_count), content)

    @torch.no_grad()
    def targets(self, offer: Offer, layout: Layout | None = None, windows: Sequence[Window] = ()) -> Targets:
        """What some windows of the picture are held against; without a layout the whole picture."""
        if layout is None:
            layout = whole(*self.shape[-2:])
            windows = layout.windows
        areas = [None if layout.is_whole else window.area for window in windows]
        content: list[list[ContentTarget]] = [[] for _ in windows]
        for prepared, x in offer.content:
            part = prepared.part
            conds = conditioning.for_pass(prepared.conds, float(offer.sigma), x.shape[0], areas)
            features = self._features(part, cut(x, windows), offer.sigma, conds)
            split = {index: of_layer.split(len(windows)) for index, of_layer in features.items()}
            for i, window in enumerate(windows):
                mask = None if part.mask is None else layout.of_map(window, part.mask)
                content[i].append(ContentTarget(part.weight, mask, {index: s[i] for index, s in split.items()}))
        labels = [None if self.labels is None else layout.of_map(window, self.labels) for window in windows]
        return Targets(
            offer.sigma,
            conditioning.for_pass(self.conds, float(offer.sigma), self.shape[0], areas),
            [WindowTargets(offer.style, *own) for own in zip(labels, content, strict=True)],
        )

    def _features(
        self, part: ReferencePart, x: torch.Tensor, sigma: torch.Tensor, conds: dict[str, Any]
    ) -> dict[int, LayerFeatures]:
        return capture_features(self.model, x, sigma, conds, [self.all_layers[index] for index in part.layers])

    def losses(self, x: torch.Tensor, targets: Targets) -> Losses:
        """The losses of windows of the picture, summed: each window is optimised as if it were alone.

        Args:
            x: the windows one after the other along the batch, [(windows b) c h w] in k-diffusion space at noise level
                targets.sigma.
            targets: of these windows, from `targets`.
        """
        layers = [self.all_layers[index] for index in self.layers]
        features = capture_features(self.model, x, targets.sigma, targets.conds, layers)
        split = {index: of_layer.split(len(targets.windows)) for index, of_layer in features.items()}
        style = content = x.new_zeros(())
        for i, window in enumerate(targets.windows):
            for index, bank in window.style.items():
                style = style + self._style_loss(split[index][i], bank, window.labels)
            for part in window.content:
                for index, held in part.features.items():
                    content = content + part.weight * self._content_loss(split[index][i], held, part.mask)
        return Losses(style + self.settings.content_weight * content, style.detach(), content.detach())

    def _style_loss(self, features: LayerFeatures, bank: TokenBank, labels: torch.Tensor | None) -> torch.Tensor:
        options = {"attention_scale": self.settings.attention_scale, "log_weight": bank.log_weight}
        if labels is None:
            target = distillation_target(features.q, bank.k, bank.v, **options)
        else:
            others = bank.allowed.shape[0] - 1  # the row for tokens that are no part of the picture
            tokens = features.on_all_tokens(label_tokens(labels, features.grid), others)
            target = region_target(features.q, bank.k, bank.v, labels=tokens, allowed=bank.allowed, **options)
        return distillation_loss(features.out, target)

    def _content_loss(
        self, features: LayerFeatures, held: LayerFeatures, mask: torch.Tensor | None
    ) -> torch.Tensor | float:
        if features.q.shape[-2] != held.q.shape[-2]:
            raise ValueError(
                "content: its text condition has another length than the picture's, and this model's attention sees "
                "both; connect one conditioning to the Capture nodes of style and content"
            )
        weight = None if mask is None else token_mask(mask, held.grid).to(mask.dtype)
        if weight is not None and not weight.any():
            return 0.0  # a window beside the mask
        if weight is not None:
            weight = held.on_all_tokens(weight, 1.0)
        if self.settings.content_loss == "query":
            return query_loss(features.q, held.q, weight)
        if self.settings.content_loss == "query_key":
            return query_key_loss(features.q, features.k, held.q, held.k, weight)
        return query_key_value_loss(features.q, features.k, held.q, held.k, held.v, weight)
