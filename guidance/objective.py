"""What is optimised at one noise level: the distance between the picture's attention and the references'.

L = L_AD + content_weight * L_content, each summed over its layers (paper equations 2 to 4). `Objective` says what the
picture is held against (`offer`, `targets`), what it has itself (`features`), and how far the two are apart (`losses`).
"""

from collections.abc import Hashable, Mapping, Sequence

import torch
from comfy.model_base import BaseModel

from ..attention import conditioning
from ..attention.bank import TokenBank, TokenPool
from ..attention.capture import LayerFeatures, capture_features
from ..attention.frames import without_frame
from ..attention.gradient import MemoryPlan
from ..attention.hypernetworks import Patches, modules_of
from ..attention.layers import AttentionLayer
from ..attention.noise import NoiseLevel, Purpose, StepNoise
from ..attention.reader import ReferenceReader
from ..attention.reference import Reference, part_labels
from ..attention.regions import Regions
from ..losses.adain import ChannelStats, adain, adain_by_place
from ..losses.content import CONTENT_LOSSES, WEIGHED_BY_EDGES
from ..losses.distillation import QueryGroup, distillation_loss, offered_target, region_target
from ..tiling.rolling import Pass, Rolling
from .maps import PictureMaps, content_coverage, edge_weights
from .motion import Motion
from .sequence import with_frame_before
from .settings import GuidanceSettings
from .target_masks import TargetMasks
from .targets import ContentTarget, Losses, Offer, Targets, WindowTargets
from .windows import ALL, Layout, Window, cut, of_items, whole


class Objective:
    """The objective of one run: which model, which references, which layers.

    Must be made and used inside `differentiable`.

    Attributes:
        has_places: styles count in different places of the picture.
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
        patches: Patches | None = None,
        rolling: Rolling | None = None,
        motion: Motion | None = None,
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
            patches: hypernetworks on the model.
            rolling: how far the model is shown picture and content rolled, where the picture is a tile.
            motion: how the content moves, where the batch is one picture moving.
        """
        latent = without_frame(latent)
        self.model = model
        self.modules = [model, *modules_of(patches or {})]  # all that has weights
        self.settings = settings
        self._patches = patches
        self._rolling = rolling
        self._memory = MemoryPlan(model, settings.memory)
        self.all_layers = layers
        self.shape, self.device = latent.shape, latent.device
        content = content if settings.content_weight > 0 else None
        self.style = ReferenceReader(model, layers, style, conds, latent, patches=patches)
        # The same batch for content and picture: rounding differs between batch sizes, and where the picture starts
        # from the content, that would turn into full-size gradients.
        self.content = ReferenceReader(
            model,
            layers,
            content,
            conds,
            latent,
            copies_of=latent.shape[0],
            patches=patches,
            noise_along=None if motion is None else motion.along,
        )
        labels, count = (None, 0) if regions is None else (part_labels(style, regions), regions.count)
        self._targets = TargetMasks.of(style, latent.device)
        self.has_places = regions is not None or self._targets is not None
        self._is_sequence = settings.frames > 0 and latent.shape[0] > 1
        self._reach: dict[tuple[int, int], torch.Tensor] = {}
        self._pool = TokenPool(style.active_parts, labels, count, in_shares=style.in_shares)
        self._maps = PictureMaps(None if regions is None else regions.target, count, latent.device)
        self._edges = self._edges_of_content() if settings.content_loss in WEIGHED_BY_EDGES else None
        self.layers = sorted(set(style.layers) | (set() if content is None else set(content.layers)))
        self._conds = conditioning.encode(
            model,
            conditioning.of_passes(model, conds, style.conditioning),
            latent,
            size=latent.shape[-2:],
            denoise_mask=None if denoise_mask is None else without_frame(denoise_mask),
            beside=conditioning.shown_beside(conds),
        )

    def _edges_of_content(self) -> list[torch.Tensor]:
        """Of each content part, how firmly its edges hold each latent pixel of the picture, [b 1 h w] on the CPU."""
        found = []
        for prepared in self.content.parts:
            part = prepared.part
            covered = content_coverage(part.mask, part.target_mask, tuple(prepared.latent.shape[-2:]))
            latent = prepared.latent.cpu().repeat(prepared.copies, 1, 1, 1)
            found.append(edge_weights(latent, covered))
        return found

    def statistics(self, level: NoiseLevel, noise: StepNoise) -> Sequence[ChannelStats]:
        """AdaIN statistics of the style references noised to a level, model space.

        One for all their pixels together; where they count in different places, one for each part.
        """
        if self._targets is None:
            return [self.style.statistics(level, noise)]
        return self.style.statistics_of_parts(level, noise)

    def recoloured(
        self,
        z: torch.Tensor,
        stats: Sequence[ChannelStats],
        layout: Layout,
        windows: Sequence[Window],
        weight: torch.Tensor | None,
    ) -> torch.Tensor:
        """Windows of the picture after AdaIN, each on its own.

        Args:
            z: the windows one after the other along the batch, [(windows b) c h w] in model space.
            stats: from `statistics`.
            weight: which pixels the picture's own statistics are taken over, as in `adain`.
        """
        if self._targets is None:
            return adain(z, stats[0], weight)
        batch = z.shape[0] // len(windows)
        coverage = self._targets.on_pixels(layout.height, layout.width).to(z)
        of_windows = torch.stack([cut(part.expand(batch, -1, -1, -1), windows) for part in coverage])
        counts = [prepared.pixel_count for prepared in self.style.parts if prepared.pixel_count > 0]
        return adain_by_place(z, stats, counts, of_windows, weight)

    def reach(self, height: int, width: int) -> torch.Tensor | None:
        """How far each latent pixel may move, 0 to 1, [b or 1, 1, h, w]; None where references reach everywhere.

        What neither a style nor the content reaches must not follow the faint gradient that comes there through
        attention: Adam makes full steps of the faintest.
        """
        if self._targets is None:
            return None
        size = (height, width)
        if size not in self._reach:
            reach = self._targets.on_pixels(*size).sum(dim=0)
            for prepared in self.content.parts:
                held = content_coverage(prepared.part.mask, prepared.part.target_mask, size)
                reach = reach + (1.0 if held is None else held.reshape(-1, 1, *size).to(reach))
            self._reach[size] = reach.clamp(max=1)
        return self._reach[size]

    def offer(
        self,
        level: NoiseLevel,
        noise: StepNoise | None,
        read: Sequence[Mapping[int, LayerFeatures]] | None = None,
    ) -> Offer:
        """The references at a noise level, each with a noise of its own; without noise they are shown clean.

        Args:
            read: features of every part of the style, where they have been read; see `ReferenceReader.read`.
        """
        style = self._pool.banks(self.style.read(level, noise, Purpose.STYLE) if read is None else read)
        content = [
            self.content.shown(number, level, noise, Purpose.CONTENT) for number in range(len(self.content.parts))
        ]
        return Offer(level, style, content)

    def targets(
        self, offer: Offer, layout: Layout | None = None, windows: Sequence[Window] = (), items: slice = ALL
    ) -> Targets:
        """What some windows of the picture are held against; without a layout the whole picture.

        Args:
            items: of some pictures of the batch alone, all or with a start and a stop. Not of frames, which hold on to
                each other.
        """
        if layout is None:
            layout = whole(*self.shape[-2:])
            windows = layout.windows
        areas = [None if layout.is_whole else window.area for window in windows]
        content: list[list[ContentTarget]] = [[] for _ in windows]
        for number, x in enumerate(offer.content):
            shown, offset = cut(x[items], windows), self._offset(offer.level, x)
            features = self.content.features(number, shown, offer.level, areas, offset, items)
            split = {index: of_layer.split(len(windows)) for index, of_layer in features.items()}
            for i, window in enumerate(windows):
                of_window = {index: of_layer[i] for index, of_layer in split.items()}
                content[i].append(self._content_target(number, layout, window, of_window, items))
        return Targets(
            offer.level,
            layout,
            conditioning.for_pass(self._conds, offer.level.sigma, self.shape[0], areas, items),
            [WindowTargets(window, offer.style, parts) for window, parts in zip(windows, content, strict=True)],
            items,
        )

    def _offset(self, level: NoiseLevel, x: torch.Tensor) -> tuple[int, int]:
        """How far the model is shown x rolled at a noise level; what it gives is rolled back."""
        return (0, 0) if self._rolling is None else self._rolling.offset(level.sigma, x.shape[-2:], Pass.READING)

    def _content_target(
        self, number: int, layout: Layout, window: Window, features: Mapping[int, LayerFeatures], items: slice
    ) -> ContentTarget:
        """What a content part asks of a window: nothing in layers where its mask lies beside the window."""
        part = self.content.parts[number].part
        coverage = {
            index: self._maps.coverage(number, part.mask, part.target_mask, layout, window, of_layer.layout)
            for index, of_layer in features.items()
        }
        held = {
            index: None if cover is None else of_items(cover, items)
            for index, cover in coverage.items()
            if cover is not self._maps.NOTHING
        }
        edges = {}
        if self._edges is not None:
            edges = {
                index: of_items(
                    self._maps.edges(number, self._edges[number], layout, window, features[index].layout), items
                )
                for index in held
            }
        return ContentTarget(part.weight, {index: features[index] for index in held}, held, edges)

    def features(self, x: torch.Tensor, targets: Targets) -> list[dict[int, LayerFeatures]]:
        """Features of windows of the picture, of each by layer; they carry its gradient.

        Args:
            x: the windows one after the other along the batch, [(windows b) c h w] in k-diffusion space at the noise
                level of `targets`.
            targets: of these windows.
        """
        return self._features(x, targets, self._memory.again(x, lambda z: self._counted(z, targets)))

    def _counted(self, x: torch.Tensor, targets: Targets) -> tuple[list[dict[int, LayerFeatures]], Losses]:
        """A pass and its losses, for counting what they keep."""
        features = self._features(x, targets)
        return features, self.losses(features, targets)

    def _features(
        self, x: torch.Tensor, targets: Targets, again: Sequence[torch.nn.Module] = ()
    ) -> list[dict[int, LayerFeatures]]:
        layers = [self.all_layers[index] for index in self.layers]
        features = capture_features(
            self.model, x, targets.level.sigmas, targets.conds, layers, self._patches, again,
            self._offset(targets.level, x),
        )  # fmt: skip
        split = {index: of_layer.split(len(targets.windows)) for index, of_layer in features.items()}
        return [{index: windows[i] for index, windows in split.items()} for i in range(len(targets.windows))]

    def losses(self, features: Sequence[Mapping[int, LayerFeatures]], targets: Targets) -> Losses:
        """The losses of windows of the picture, summed: each window is optimised as if it were alone.

        Args:
            features: of each window, from `features`.
            targets: of these windows.
        """
        some = next(iter(features[0].values())).out
        style = content = some.new_zeros((), dtype=torch.promote_types(some.dtype, torch.float32))
        for own, window in zip(features, targets.windows, strict=True):
            for index, bank in window.style.items():
                style = style + self._style_loss(own[index], bank, targets.layout, window.window, targets.items)
            for part in window.content:
                for index, held in part.features.items():
                    loss = self._content_loss(own[index], held, part.coverage[index], part.edges.get(index))
                    content = content + part.weight * loss
        return Losses(style + self.settings.content_weight * content, style.detach(), content.detach())

    def _style_loss(
        self, features: LayerFeatures, bank: TokenBank, layout: Layout, window: Window, items: slice
    ) -> torch.Tensor:
        weight, scale = None, self.settings.attention_scale
        if bank.by_label:
            groups, offers = self._maps.groups(layout, window, features.layout), bank.by_label
            kinds: Sequence[Hashable] = range(len(offers))
        elif self._targets is not None:
            places = self._targets.places(layout, window, features.layout, tuple(bank.counts))
            groups, offers, weight = places.query_groups, places.offers(bank), of_items(places.weight, items)
            kinds = [group.parts for group in places.groups]
        elif not self._is_sequence:
            target = offered_target(features.q, bank, attention_scale=scale)
            return distillation_loss(features.out, target)
        else:
            groups, offers, kinds = [QueryGroup(slice(None), slice(None), 0)], [bank], [0]
        if self._is_sequence:
            groups, offers = with_frame_before(features, groups, offers, kinds, self.settings.frames)
        groups = [of_them for group in groups if (of_them := group.of_items(items)) is not None]
        target = region_target(features.q, groups, offers, attention_scale=scale)
        return distillation_loss(features.out, target, weight)

    def _content_loss(
        self,
        features: LayerFeatures,
        held: LayerFeatures,
        coverage: torch.Tensor | None,
        edges: torch.Tensor | None,
    ) -> torch.Tensor:
        if features.q.shape[-2] != held.q.shape[-2]:
            raise ValueError(
                "content: its text condition has another length than the picture's, and this model's attention sees "
                "both; connect one conditioning to the Capture nodes of style and content"
            )
        return CONTENT_LOSSES[self.settings.content_loss](features, held, coverage, edges)
