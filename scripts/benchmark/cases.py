"""What is measured: which network, how large, in which number format, where."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

COUNT, CPU, CARD = "count", "cpu", "card"
STEPS = 20
"""Of a whole run."""
SHORT = "FLUX, 8 blocks"
"""As wide as FLUX: small enough to be held against itself in fp32, and quick to count."""


@dataclass(frozen=True)
class Case:
    """One row of the bench.

    Attributes:
        kind: COUNT on tensors without values, or measured on CPU or CARD.
        network: by its name in `networks`.
        side: of the picture, in pixels.
        dtype: number format of the weights, by its name in `DTYPES`.
        dynamic: whether ComfyUI's dynamic VRAM is on.
        rounds: how often each program is run, a whole run once; the fastest counts.
        steps: of the whole run, 0 for none.
    """

    kind: str
    network: str
    side: int
    dtype: str
    dynamic: bool = False
    rounds: int = 1
    steps: int = 0

    @property
    def name(self) -> str:
        """For people."""
        where = {COUNT: "", CPU: ", CPU", CARD: f", card, dynamic VRAM {'on' if self.dynamic else 'off'}"}
        return f"{self.network} {self.side} {self.dtype}{where[self.kind]}"


COUNTED = (
    Case(COUNT, "toy", 128, "fp32"),
    Case(COUNT, "SD1.5", 256, "fp16"),
    Case(COUNT, "SD1.5", 512, "fp16"),
    Case(COUNT, "SDXL", 1024, "fp16"),
    Case(COUNT, "FLUX", 512, "bf16"),
    Case(COUNT, "FLUX", 512, "fp8"),
)
TOY = Case(CPU, "toy", 128, "fp32", rounds=2, steps=STEPS)
QUICK = (
    Case(COUNT, "SD1.5", 512, "fp16"),
    Case(COUNT, SHORT, 512, "bf16"),
    Case(COUNT, SHORT, 512, "fp8"),
    Case(CPU, "toy", 64, "fp32", steps=2),
)
FULL_SIZE = (Case(CPU, "SD1.5", 256, "fp32"), Case(CPU, "SD1.5", 512, "fp32"))
"""On the processor: minutes each."""
FORMATS = {"toy": ("fp32",), "SD1.5": ("fp16", "bf16", "fp8"), "SDXL": ("fp16", "bf16", "fp8"), "FLUX": ("fp8",)}
SIDES = {"toy": (128,), "SD1.5": (512, 1024), "SDXL": (1024, 512), "FLUX": (512, 1024)}
"""On a card; the first is what the network is made for, and there a whole run is measured."""


def card_cases() -> Iterator[Case]:
    """All that is measured on a card, what needs least first."""
    for dynamic in (False, True):
        for network, formats in FORMATS.items():
            for dtype in formats:
                for side in SIDES[network]:
                    steps = STEPS if side == SIDES[network][0] else 0
                    yield Case(CARD, network, side, dtype, dynamic, rounds=2, steps=steps)


def chosen(quick: bool, card: bool, full_size: bool, networks: Collection[str] = ()) -> list[Case]:
    """The cases of a run, by what is wished for.

    Args:
        quick: only what takes seconds.
        card: there is one, and it is wished for.
        full_size: measured on the processor as well, which takes many minutes.
        networks: only these; all if empty.
    """
    everything = [*COUNTED, TOY, *(FULL_SIZE if full_size else ()), *(card_cases() if card else ())]
    return [case for case in (QUICK if quick else everything) if not networks or case.network in networks]
