"""Pictures larger than the model's native size: overlapping windows, each handled on its own, overlaps averaged.

This is MultiDiffusion (paper section 4.5): after every sampler step each window is distilled, from the same state, and
where windows overlap the results are averaged. `windowed_model` does the same for the denoising.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from comfy import model_management
from comfy.model_base import BaseModel

from ..attention.gradient import activation_bytes

ALL = slice(None)  # of the pictures of a batch
MOST_AT_ONCE = 8  # pictures in one pass of the model: this, and not the picture's size, sets the peak of memory


@dataclass(frozen=True)
class Windows:
    """An AD_WINDOWS: how windows lie on the picture.

    Attributes:
        size: width and height of a window in pixels, the model's native size.
        stride: how far windows lie apart in pixels, at most their size.
        at_once: how many windows a pass takes at most; a batch of b pictures counts b times.
    """

    size: int = 512
    stride: int = 64
    at_once: int = MOST_AT_ONCE

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size: {self.size} is not allowed; use 1 pixel or more, best the model's native size")
        if not 1 <= self.stride <= self.size:
            raise ValueError(
                f"stride: {self.stride} is not allowed with windows of {self.size} pixels, it would leave gaps between "
                f"them; use 1 to {self.size} (size)"
            )

    def place(self, height: int, width: int, pixels: int) -> "Layout":
        """Lay windows on a picture.

        Args:
            height, width: of the picture in latent pixels.
            pixels: picture pixels to a latent pixel, the latent format's `spacial_downscale_ratio`.
        """
        size, stride = max(1, self.size // pixels), max(1, self.stride // pixels)
        windows = tuple(
            Window(y, x, min(size, height), min(size, width))
            for y in window_starts(height, size, stride)
            for x in window_starts(width, size, stride)
        )
        return Layout(height, width, windows)

    def largest_pass(self, shape: Sequence[int], pixels: int) -> tuple[int, ...]:
        """The shape of the largest pass on windows of a latent, where memory allows it.

        Args:
            shape: of the latent, [b c h w] or [b c 1 h w].
            pixels: see `place`.
        """
        layout = self.place(*shape[-2:], pixels)
        if layout.is_whole:
            return tuple(shape)
        count = max(1, min(len(layout.windows), self.at_once // shape[0]))
        return (shape[0] * count, *shape[1:-2], layout.windows[0].height, layout.windows[0].width)


def window_starts(length: int, size: int, stride: int) -> tuple[int, ...]:
    """Where windows begin along one axis: at each multiple of the stride, the last one flush with the border.

    An axis no longer than a window has one, which covers it.
    """
    if length <= size:
        return (0,)
    return (*range(0, length - size, stride), length - size)


@dataclass(frozen=True)
class Window:
    """A rectangle of the picture in latent pixels."""

    y: int
    x: int
    height: int
    width: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """What the window shows of a tensor of the picture's size, [... h w]; a view."""
        return tensor[..., self.y : self.y + self.height, self.x : self.x + self.width]

    @property
    def area(self) -> tuple[int, int, int, int]:
        """As ComfyUI writes an area: height, width, y, x."""
        return (self.height, self.width, self.y, self.x)


@dataclass(frozen=True)
class Layout:
    """How the windows of one picture lie.

    Attributes:
        height, width: of the picture in latent pixels.
        windows: row by row; together they cover the picture, and all have one size.
    """

    height: int
    width: int
    windows: tuple[Window, ...]

    @property
    def is_whole(self) -> bool:
        """True where a single window covers the picture."""
        return self.windows[0] == Window(0, 0, self.height, self.width)

    def of_map(self, window: Window, image: torch.Tensor) -> torch.Tensor:
        """What a window shows of a mask or label map that covers the picture at any resolution, [... H W].

        Nearest-neighbour; a map whose resolution is a multiple of the latent's is cut exactly.
        """
        if self.is_whole:
            return image
        rows = _nearest_samples(image.shape[-2], window.y, window.height, self.height)
        columns = _nearest_samples(image.shape[-1], window.x, window.width, self.width)
        return image[..., rows[:, None], columns]


def whole(height: int, width: int) -> Layout:
    """A picture without windows: one window covers it. Latent pixels."""
    return Layout(height, width, (Window(0, 0, height, width),))


def _nearest_samples(samples: int, start: int, length: int, whole_length: int) -> torch.Tensor:
    """Samples of a map's axis that lie on latent pixels start to start + length, at the map's resolution or finer."""
    fine = math.ceil(samples / whole_length)  # samples taken per latent pixel
    return torch.arange(start * fine, (start + length) * fine) * samples // (whole_length * fine)


def cut(tensor: torch.Tensor, windows: Sequence[Window]) -> torch.Tensor:
    """Windows of one size of a picture [b c h w], along the batch: [(windows b) c h w]."""
    return torch.cat([window.of(tensor) for window in windows])


def of_items(tensor: torch.Tensor, items: slice) -> torch.Tensor:
    """What some pictures of a batch have of a tensor, [b or 1, ...]; one for all of them stays."""
    return tensor if len(tensor) == 1 else tensor[items]


def chunks(windows: Sequence[Window], count: int) -> Iterator[Sequence[Window]]:
    """The windows in order, at most `count` at a time."""
    for start in range(0, len(windows), count):
        yield windows[start : start + count]


class WindowAverage:
    """The plain average of what overlapping windows say of a picture."""

    def __init__(self, like: torch.Tensor) -> None:
        """like: the picture, [b c h w]; gives shape, device and dtype."""
        self._sum = torch.zeros_like(like)
        self._count = torch.zeros_like(like[:, :1])

    def add(self, windows: Sequence[Window], values: torch.Tensor, items: slice = ALL) -> None:
        """
        Args:
            values: as `cut` puts windows together, [(windows b) c h w].
            items: which pictures of the batch they are of.
        """
        for window, value in zip(windows, values.chunk(len(windows)), strict=True):
            window.of(self._sum[items]).add_(value)
            window.of(self._count[items]).add_(1)

    def over(self, picture: torch.Tensor) -> torch.Tensor:
        """The average; where no window was added, the picture itself."""
        return torch.where(self._count > 0, self._sum / self._count.clamp(min=1), picture)


def distilled_at_once(
    model: BaseModel, picture: torch.Tensor, window: Window, most: int, device: torch.device | None = None
) -> int:
    """How many windows can be distilled in one pass: as memory allows, at most `most` pictures, at least one window.

    Args:
        model: ComfyUI's model, loaded.
        picture: [b c h w]; a window holds b pictures.
        window: one of its windows; all have one size.
        most: see `Windows.at_once`.
        device: of the model, if it is not the picture's.
    """
    free = model_management.get_free_memory(picture.device if device is None else device)
    needed = activation_bytes(model, window.of(picture).shape)
    return max(1, min(most // picture.shape[0], int(free / needed)))
