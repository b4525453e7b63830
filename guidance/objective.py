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
from ..attention.layers import AttentionLayer
from ..attention.reference import Reference, ReferencePart, TokenBank, build_bank, token_mask
from ..losses.adain import ChannelStats, channel_stats
from ..losses.content import query_loss
from ..losses.distillation import distillation_loss, distillation_target
from .settings import GuidanceSettings


@dataclass(frozen=True)
class Losses:
    """Loss of one iteration, scalars in fp32 or better; `style` and `content` are before weighting."""

    total: torch.Tensor
    style: torch.Tensor
    content: torch.Tensor


@dataclass(frozen=True)
class Targets:
    """What the references offer at one noise level.

    Attributes:
        sigma: the noise level, a scalar tensor.
        style: by layer, what the picture's queries may look at.
        content: each content part with its features, by layer.
    """

    sigma: torch.Tensor
    style: Mapping[int, TokenBank]
    content: Sequence[tuple[ReferencePart, Mapping[int, LayerFeatures]]]


@dataclass
class PreparedPart:
    """A reference part on the model's device, ready for passes.

    Attributes:
        part: with its latent in the model's scale (process_latent_in applied).
        conds: its text condition as apply_model takes it.
    """

    part: ReferencePart
    conds: dict[str, Any] = field(repr=False)

    def noised(self, model: BaseModel, sigma: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """The latent at noise level sigma in k-diffusion space, [n c h w], with a fresh draw of noise.

        The noise is drawn on the CPU in fp32, so that a seed means the same on every machine.
        """
        latent = self.part.latent
        noise = torch.randn(latent.shape, generator=generator, dtype=torch.float32).to(latent)
        return model.model_sampling.noise_scaling(sigma, noise, latent)


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
        cond: dict[str, Any],
        latent: torch.Tensor,
        denoise_mask: torch.Tensor | None = None,
    ) -> None:
        """
        Args:
            model: ComfyUI's model, loaded.
            layers: all self-attention layers of the model.
            style, content: the references; content is not used where its weight is 0.
            settings: loss weights and attention scale.
            cond: the sampler's text condition, for references that brought none and for the picture.
            latent: the clean latent that sampling starts from, [b c h w], model scale; its shape, device and dtype are
                those of the picture.
            denoise_mask: where the picture may change; inpainting models read it.
        """
        self.model = model
        self.settings = settings
        self.all_layers = layers
        self.style = [self._prepare(part, cond, latent) for part in style.active_parts]
        uses_content = content is not None and settings.content_weight > 0
        self.content = [self._prepare(part, cond, latent) for part in content.active_parts] if uses_content else []
        self.layers = sorted(set(style.layers) | (set(content.layers) if uses_content else set()))
        own = cond if style.conditioning is None else conditioning.from_socket(style.conditioning)
        self.conds = conditioning.encode(model, own, latent, denoise_mask)

    def _prepare(self, part: ReferencePart, cond: dict[str, Any], like: torch.Tensor) -> PreparedPart:
        latent = self.model.process_latent_in(part.latent.to(like).clone())
        mask = None if part.mask is None else part.mask.to(like).clone()
        part = replace(part, latent=latent, mask=mask)
        own = cond if part.conditioning is None else conditioning.from_socket(part.conditioning)
        return PreparedPart(part, conditioning.encode(self.model, own, part.latent))

    @torch.no_grad()
    def style_stats(self, sigma: torch.Tensor, generator: torch.Generator) -> ChannelStats:
        """AdaIN statistics of the style references noised to sigma, over all their pixels together, model space."""
        pixels, weights = [], []
        for prepared in self.style:
            part = prepared.part
            z = self.model.model_sampling.calculate_input(sigma, prepared.noised(self.model, sigma, generator))
            weight = torch.full_like(z[:, :1], part.weight)
            if part.mask is not None:
                weight = weight * token_mask(part.mask, z.shape[-2:]).reshape(-1, 1, *z.shape[-2:])
            pixels.append(z.transpose(0, 1).flatten(1))
            weights.append(weight.flatten())
        return channel_stats(torch.cat(pixels, dim=1)[None, :, None], torch.cat(weights)[None, None, None])

    @torch.no_grad()
    def targets(self, sigma: torch.Tensor, generator: torch.Generator) -> Targets:
        """Features of the references noised to sigma, each with a noise of its own, style first."""
        style = [(p.part, self._features(p, p.noised(self.model, sigma, generator), sigma)) for p in self.style]
        content = [(p.part, self._features(p, p.noised(self.model, sigma, generator), sigma)) for p in self.content]
        return Targets(sigma, build_bank(style), content)

    def _features(self, prepared: PreparedPart, x: torch.Tensor, sigma: torch.Tensor) -> dict[int, LayerFeatures]:
        layers = [self.all_layers[index] for index in prepared.part.layers]
        return capture_features(self.model, x, sigma, prepared.conds, layers)

    def losses(self, x: torch.Tensor, targets: Targets) -> Losses:
        """The loss of the picture x, [b c h w] in k-diffusion space at noise level targets.sigma."""
        layers = [self.all_layers[index] for index in self.layers]
        features = capture_features(self.model, x, targets.sigma, self.conds, layers)
        style = sum(self._style_loss(features[index], bank) for index, bank in targets.style.items())
        content = sum(
            (part.weight * self._content_loss(features[index], held, part)
             for part, of_part in targets.content for index, held in of_part.items()),
            start=torch.zeros_like(style),
        )  # fmt: skip
        return Losses(style + self.settings.content_weight * content, style.detach(), content.detach())

    def _style_loss(self, features: LayerFeatures, bank: TokenBank) -> torch.Tensor:
        target = distillation_target(
            features.q,
            bank.k,
            bank.v,
            attention_scale=self.settings.attention_scale,
            log_weight=bank.log_weight,
        )
        return distillation_loss(features.out, target)

    def _content_loss(self, features: LayerFeatures, held: LayerFeatures, part: ReferencePart) -> torch.Tensor:
        q, q_c = torch.broadcast_tensors(features.q, held.q)
        if part.mask is not None:
            keep = token_mask(part.mask, held.grid).expand(q.shape[0], -1)
            q, q_c = q.transpose(1, 2)[keep], q_c.transpose(1, 2)[keep]
        return query_loss(q, q_c)
