"""Write a Stable Diffusion 1.5 checkpoint by formula, so that a first run needs no download.

Its self-attention is multi-scale patch matching: every token holds the 5x5 neighbourhood of its place in an
image pyramid, and attends to the places that look most alike. Distilling it is classical texture
optimisation (Kwatra et al., 2005). It is a model for teaching and testing, and knows nothing of the world.

    python demo_checkpoint.py FILE [--vae taesd|pixel]

Terms: a *signal* is a channel that carries a colour, as 2 c - 1 of a colour c in 0..1; a *slot* is the place of a
signal among the network's 320 channels; a *carrier* is a large constant that makes a normalisation layer linear; a
*shift* is a signal moved by up to a pixel, a *tap* one of the 5x5 neighbours.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CHANNELS, HEADS, HEAD_DIM, CONTEXT = 320, 8, 40, 768
GROUP, SIGNALS = 10, 8
"""Channels in a GroupNorm group, and how many of them are signals; the other two are carriers."""

COLOURS, SIDE = 3, 5
"""Colours of a pixel, and how many pixels a patch is wide."""
TAPS, SHIFTS = COLOURS * SIDE**2, COLOURS * 9
LOW, NEGATIVE_LOW, SHIFTED, PULLED = 80, 83, 88, 120
"""The first signal of the low-passed picture, of its negative (both in one group), of the shifts of what the next level
takes its taps from, and of what the attention of the first level adds. The taps come before them."""

MATCHED = HEAD_DIM - 1
"""How many of a patch's cosine waves are matched, the slow ones first; the last value of a head is a constant."""
FAINT = 0.1
"""Weight of the other waves in a token: they are only there to be values."""

CARRIER = 50.0
"""Carriers of a GroupNorm group: +CARRIER and -CARRIER."""
BASE = 0.3
"""Constants +-BASE of a token, which put it on a sphere after LayerNorm."""
TIME_SCALE = 1000.0
"""Size of the constants that make the second GroupNorm of a ResBlock linear."""

BANDWIDTHS = (0.04, 0.03, 0.03)
"""h of each level at t = 0: how unlike two patches may be and still match."""
ANNEAL = 6.0
"""How many times larger h is at t = 1000."""

PULL = 1.0
"""How strongly a picture that is sampled moves towards what its attention finds."""
SD15_SCALE = 0.18215
PREVIEW = torch.tensor(
    [
        [0.3512, 0.3250, -0.2829, -0.2120],
        [0.2297, 0.4974, 0.1762, -0.2616],
        [0.3227, 0.2350, 0.2721, -0.7177],
    ]
)
"""What ComfyUI's previews (latent2rgb) make of an SD1.5 latent: 2 c - 1, as this model's VAE does."""
LOW_PASS = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])) / 16
"""A smooth halving."""
SHARPER = torch.outer(torch.tensor([-0.25, 1.5, -0.25]), torch.tensor([-0.25, 1.5, -0.25]))
"""Undoes most of what smooth doublings take from the picture's detail."""

POSITIVE = torch.arange(SIGNALS, CHANNELS, GROUP)
NEGATIVE = POSITIVE + 1


def slot(signal: int) -> int:
    """The channel of a signal: the carriers' channels are left out."""
    return signal // SIGNALS * GROUP + signal % SIGNALS


def waves() -> Tensor:
    """The discrete cosine transform of a patch, [TAPS, TAPS], orthonormal; slow waves first, each in three colours."""
    places, frequencies = torch.arange(SIDE), torch.arange(SIDE)[:, None]
    line = torch.cos(math.pi * (2 * places + 1) * frequencies / (2 * SIDE)) * math.sqrt(2 / SIDE)
    line[0] /= math.sqrt(2)
    order = sorted((u + v, max(u, v), u, v) for u in range(SIDE) for v in range(SIDE))
    patterns = torch.stack([torch.outer(line[u], line[v]).flatten() for _, _, u, v in order])
    return torch.kron(patterns, torch.eye(COLOURS))


class Weights(dict[str, Tensor]):
    """A state dict of layers that start as zeros."""

    def conv(self, name: str, outputs: int, inputs: int, size: int = 3, bias: bool = True) -> Tensor:
        """Add a convolution and return its weight."""
        if bias:
            self[f"{name}.bias"] = torch.zeros(outputs)
        self[f"{name}.weight"] = torch.zeros(outputs, inputs, size, size)
        return self[f"{name}.weight"]

    def linear(self, name: str, outputs: int, inputs: int, bias: bool = True) -> Tensor:
        """Add a linear layer and return its weight."""
        if bias:
            self[f"{name}.bias"] = torch.zeros(outputs)
        self[f"{name}.weight"] = torch.zeros(outputs, inputs)
        return self[f"{name}.weight"]

    def norm(self, name: str, channels: int, on: bool = False) -> None:
        """Add a normalisation layer, which is used (`on`) or puts out zeros."""
        self[f"{name}.weight"] = torch.full((channels,), float(on))
        self[f"{name}.bias"] = torch.zeros(channels)

    def carriers(self, name: str) -> None:
        """Let the bias of a convolution put the carriers beside its signals."""
        self[f"{name}.bias"][POSITIVE] = CARRIER
        self[f"{name}.bias"][NEGATIVE] = -CARRIER


class DemoUNet:
    """Builds the UNet. `colours`: the signals of a latent, [3, channels]; `latents`: the latent of signals."""

    def __init__(self, colours: Tensor, latents: Tensor, levels: int = len(BANDWIDTHS)) -> None:
        self.colours, self.latents, self.levels = colours, latents, levels
        self.channels = len(latents)
        self.weights = Weights()

    def build(self) -> Weights:
        """One ResBlock a level, attention on the way down only, no middle block."""
        self.time_embedding()
        self.first_convolution()
        self.resblock("input_blocks.1.0", CHANNELS)
        for level in range(1, self.levels + 1):
            self.next_level(f"input_blocks.{2 * level}.0.op")
            self.resblock(f"input_blocks.{2 * level + 1}.0", CHANNELS)
            self.timed_carriers(f"input_blocks.{2 * level + 1}.0")
            if level < self.levels:
                self.shifts(f"input_blocks.{2 * level + 1}.0")
            self.attention(f"input_blocks.{2 * level + 1}.1", BANDWIDTHS[level - 1])
        for block in range(2 * self.levels + 2):
            self.resblock(f"output_blocks.{block}.0", 2 * CHANNELS)
            if block % 2 and block < 2 * self.levels:
                self.weights.conv(f"output_blocks.{block}.1.conv", CHANNELS, CHANNELS)
        self.attended("input_blocks.3.1")
        self.noise_prediction(f"output_blocks.{2 * self.levels + 1}.0")
        return self.weights

    def time_embedding(self) -> None:
        """The embedding is (y, -y, 0 ...) with y(t) = ANNEAL^(t/1000) - 1.

        A ridge fit reads y off the slow waves of the timestep's sinusoids; SiLU(y) - SiLU(-y) = y makes the
        activation between the two layers linear.
        """
        half = CHANNELS // 2
        time = torch.arange(1000, dtype=torch.float64)
        frequencies = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float64) / half)
        sinusoids = time[:, None] * frequencies
        slow = (frequencies < 6e-3).repeat(2)
        design = torch.cat([sinusoids.cos(), sinusoids.sin()], 1)[:, slow]
        ridge = 1e-4 * torch.eye(design.shape[1], dtype=torch.float64)
        fit = torch.linalg.solve(design.T @ design + ridge, design.T @ (ANNEAL ** (time / 1000) - 1))
        first = self.weights.linear("time_embed.0", 4 * CHANNELS, CHANNELS)
        first[0, slow], first[1, slow] = fit.float(), -fit.float()
        second = self.weights.linear("time_embed.2", 4 * CHANNELS, 4 * CHANNELS)
        second[:2, :2] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])

    def first_convolution(self) -> None:
        """Signals 0 ... = the latent itself; then the low-passed picture, and the shifts of the picture."""
        weight = self.weights.conv("input_blocks.0.0", CHANNELS, self.channels)
        self.weights.carriers("input_blocks.0.0")
        for channel in range(self.channels):
            weight[slot(channel), channel, 1, 1] = 1
        for colour in range(COLOURS):
            weight[slot(LOW + colour)] = self.colours[colour, :, None, None] * LOW_PASS
            for place in range(9):
                weight[slot(SHIFTED + COLOURS * place + colour), :, place // 3, place % 3] = self.colours[colour]

    def next_level(self, name: str) -> None:
        """At half the size: signals 0 ... = the 5x5 taps of the level above; then its low pass, and the negative of it.

        Taps are ordered by row, column, colour. A tap is a shift, and those at the rim a shift taken a pixel further.
        """
        weight = self.weights.conv(name, CHANNELS, CHANNELS)
        self.weights.carriers(name)
        for colour in range(COLOURS):
            weight[slot(LOW + colour), slot(LOW + colour)] = LOW_PASS
            weight[slot(NEGATIVE_LOW + colour), slot(LOW + colour)] = -LOW_PASS
        for tap in range(SIDE**2):
            row, column = tap // SIDE - 2, tap % SIDE - 2
            down, right = max(-1, min(1, row)), max(-1, min(1, column))
            shift = 3 * (down + 1) + right + 1
            for colour in range(COLOURS):
                source = slot(SHIFTED + COLOURS * shift + colour)
                weight[slot(COLOURS * tap + colour), source, row - down + 1, column - right + 1] = 1

    def resblock(self, name: str, inputs: int) -> None:
        """The identity; on the way up, of the skip connection alone."""
        weights = self.weights
        weights.norm(f"{name}.in_layers.0", inputs)
        weights.conv(f"{name}.in_layers.2", CHANNELS, inputs)
        weights.linear(f"{name}.emb_layers.1", CHANNELS, 4 * CHANNELS)
        weights.norm(f"{name}.out_layers.0", CHANNELS)
        weights.conv(f"{name}.out_layers.3", CHANNELS, CHANNELS)
        if inputs != CHANNELS:
            skip = weights.conv(f"{name}.skip_connection", CHANNELS, inputs, size=1)
            skip[:, CHANNELS:, 0, 0] = torch.eye(CHANNELS)

    def timed_carriers(self, name: str) -> None:
        """The ResBlock multiplies the carriers by ANNEAL^(t/1000) and leaves the signals alone.

        It adds CARRIER * y to the one and -CARRIER * y to the other. Two constants of +-TIME_SCALE in the
        group make its GroupNorm the factor 1 / (TIME_SCALE sqrt(0.2)); the pair makes the SiLU linear.
        """
        self.weights.norm(f"{name}.out_layers.0", CHANNELS, on=True)
        embedding, bias = (
            self.weights[f"{name}.emb_layers.1.weight"],
            self.weights[f"{name}.emb_layers.1.bias"],
        )
        output = self.weights[f"{name}.out_layers.3.weight"][:, :, 1, 1]
        step = CARRIER * TIME_SCALE * math.sqrt(0.2)
        bias[POSITIVE - 8], bias[POSITIVE - 7] = TIME_SCALE, -TIME_SCALE
        for row, sign in ((POSITIVE, 1), (NEGATIVE, -1)):
            embedding[row, 0], embedding[row, 1] = sign, -sign
            output[row, POSITIVE], output[row, NEGATIVE] = sign * step, -sign * step

    def shifts(self, name: str) -> None:
        """The ResBlock puts shifts of the low-passed picture beside the signals, for the taps of the next level.

        Carriers make its first GroupNorm linear, the constants of `timed_carriers` the second; the mean of a group is
        zero, since each colour is there with its negative, and the pairs make both SiLUs linear.
        """
        self.weights.norm(f"{name}.in_layers.0", CHANNELS, on=True)
        inner, outer = self.weights[f"{name}.in_layers.2.weight"], self.weights[f"{name}.out_layers.3.weight"]
        for colour in range(COLOURS):
            pair = slot(LOW + colour), slot(NEGATIVE_LOW + colour)
            # channels 0 and 1 of a group hold the constants, so what is in its channels 0 to 5 moves on by two
            for own, other in (pair, pair[::-1]):
                inner[own + 2, own, 1, 1] = CARRIER * math.sqrt(0.2)
                inner[own + 2, other, 1, 1] = -CARRIER * math.sqrt(0.2)
            for place in range(9):
                signal = slot(SHIFTED + COLOURS * place + colour)
                for channel, sign in zip(pair, (1, -1), strict=True):
                    outer[signal, channel + 2, place // 3, place % 3] = sign * TIME_SCALE * math.sqrt(0.2)

    def attention(self, name: str, bandwidth: float) -> None:
        """Attention weights = softmax(-|w_q - w_k|^2 / 2h^2) with h(t) = bandwidth * ANNEAL^(t/1000).

        u = the 5x5 taps / sqrt(75), w = its slow waves, values = u, spread over the heads. The block's output is zero,
        so the signals pass unchanged.
        """
        self.token(name)
        block = f"{name}.transformer_blocks.0"
        self.weights.norm(f"{block}.norm1", CHANNELS, on=True)
        constants = CHANNELS - 2 * TAPS
        sharpness = constants * BASE**2 / (2 * bandwidth**2)
        sphere = self.sphere()
        matching = sphere[[*range(MATCHED), TAPS]] * math.sqrt(sharpness * math.sqrt(HEAD_DIM) / CHANNELS)
        values = self.taps_of_token() @ sphere[:TAPS] * BASE * math.sqrt(constants / (2 * CHANNELS))
        for layer in ("to_q", "to_k"):
            weight = self.weights.linear(f"{block}.attn1.{layer}", CHANNELS, CHANNELS, bias=False)
            weight.view(HEADS, HEAD_DIM, CHANNELS)[:] = matching
        self.weights.linear(f"{block}.attn1.to_v", CHANNELS, CHANNELS, bias=False)[self.places()] = values
        self.rest_of_transformer(name, block)

    def token(self, name: str) -> None:
        """norm and proj_in: the token is (w, -w, +-BASE ...) with w = the waves of u, falling as the carriers grow.

        A group's GroupNorm is (s - mean) / (C sqrt(0.2)), as its carriers +-C outweigh its signals; the
        carriers' mean is -mean / (C sqrt(0.2)), which is subtracted again. Waves that are not matched are faint.
        """
        self.weights.norm(f"{name}.norm", CHANNELS, on=True)
        taps = torch.zeros(TAPS, CHANNELS)
        for signal in range(TAPS):
            group = signal // SIGNALS
            taps[signal, slot(signal)] = 1
            taps[signal, [POSITIVE[group], NEGATIVE[group]]] = -0.5
        rows = self.strengths()[:, None] * waves() @ taps * CARRIER * math.sqrt(0.2 / TAPS)
        weight = self.weights.conv(f"{name}.proj_in", CHANNELS, CHANNELS, size=1)[:, :, 0, 0]
        weight[:TAPS], weight[TAPS : 2 * TAPS] = rows, -rows
        self.weights[f"{name}.proj_in.bias"][2 * TAPS :] = BASE * self.signs()

    def strengths(self) -> Tensor:
        """How large each wave is in a token."""
        return torch.where(torch.arange(TAPS) < MATCHED, 1.0, FAINT)

    def taps_of_token(self) -> Tensor:
        """The taps u of the waves in a token, [TAPS, TAPS]."""
        return waves().T / self.strengths()

    def places(self) -> Tensor:
        """Where in the output of the attention each tap is: its heads share them."""
        share, taps = math.ceil(TAPS / HEADS), torch.arange(TAPS)
        return taps // share * HEAD_DIM + taps % share

    def signs(self) -> Tensor:
        """+1, -1, +1 ... for the constants of a token: their mean is zero."""
        return torch.tensor([1.0, -1.0]).repeat(CHANNELS // 2 - TAPS)

    def sphere(self) -> Tensor:
        """Rows that turn a token after LayerNorm into (waves, constant), a point on a sphere of radius sqrt(320).

        On a sphere the scalar product is a distance, so no |k|^2 has to be known to the query.
        """
        rows = torch.zeros(TAPS + 1, CHANNELS)
        eye = torch.eye(TAPS) / math.sqrt(2)
        rows[:TAPS, :TAPS], rows[:TAPS, TAPS : 2 * TAPS] = eye, -eye
        rows[TAPS, 2 * TAPS :] = self.signs() / math.sqrt(CHANNELS - 2 * TAPS)
        return rows

    def rest_of_transformer(self, name: str, block: str) -> None:
        """Cross-attention, feed-forward layer and all outputs: zeros."""
        weights = self.weights
        weights.linear(f"{block}.attn1.to_out.0", CHANNELS, CHANNELS)
        weights.norm(f"{block}.norm2", CHANNELS)
        weights.linear(f"{block}.attn2.to_q", CHANNELS, CHANNELS, bias=False)
        weights.linear(f"{block}.attn2.to_k", CHANNELS, CONTEXT, bias=False)
        weights.linear(f"{block}.attn2.to_v", CHANNELS, CONTEXT, bias=False)
        weights.linear(f"{block}.attn2.to_out.0", CHANNELS, CHANNELS)
        weights.norm(f"{block}.norm3", CHANNELS)
        weights.linear(f"{block}.ff.net.0.proj", 8 * CHANNELS, CHANNELS)
        weights.linear(f"{block}.ff.net.2", CHANNELS, 4 * CHANNELS)
        weights.conv(f"{name}.proj_out", CHANNELS, CHANNELS, size=1)

    def attended(self, name: str) -> None:
        """The signals `PULLED` ... = how the mean of the middle 3x3 taps attended to differs from the token's own.

        After attn1 the token still is the waves in its first places, and holds the taps attended to on top of its
        constants. The way up carries the difference to full size; a kernel of two pixels makes it smooth.
        """
        rows = 2 * TAPS + torch.arange(TAPS)
        self.weights[f"{name}.transformer_blocks.0.attn1.to_out.0.weight"][rows, self.places()] = 1
        output, bias = self.weights[f"{name}.proj_out.weight"][:, :, 0, 0], self.weights[f"{name}.proj_out.bias"]
        middle = torch.tensor([row * SIDE + column for row in (1, 2, 3) for column in (1, 2, 3)]) * COLOURS
        scale, own = PULL * math.sqrt(TAPS) / 9, self.taps_of_token()
        for colour in range(COLOURS):
            signal, taken = slot(PULLED + colour), middle + colour
            output[signal, rows[taken]] = scale
            output[signal, :TAPS] = -scale * own[taken].sum(0)
            bias[signal] = -scale * BASE * self.signs()[taken].sum()
        signals = [slot(PULLED + colour) for colour in range(COLOURS)]
        for block in (2 * self.levels - 1, 2 * self.levels):
            self.weights[f"output_blocks.{block}.0.skip_connection.weight"][signals, signals] = 1
        self.weights[f"output_blocks.{2 * self.levels - 1}.1.conv.weight"][signals, signals, 1:, 1:] = 0.25

    def noise_prediction(self, last_block: str) -> None:
        """eps = x_t - what the attention adds: the last block keeps them as +- pairs in one group: SiLU is linear."""
        skip = self.weights[f"{last_block}.skip_connection.weight"].zero_()
        bias = self.weights[f"{last_block}.skip_connection.bias"]
        bias[POSITIVE[0]], bias[NEGATIVE[0]] = CARRIER, -CARRIER
        self.weights.norm("out.0", CHANNELS, on=True)
        output = self.weights.conv("out.2", self.channels, CHANNELS)
        pulled = [slot(PULLED + colour) for colour in range(COLOURS)]
        for channel in range(self.channels):
            for row, sign in ((channel, 1), (self.channels + channel, -1)):
                skip[row, CHANNELS + slot(channel)] = sign
                skip[row, pulled] = -sign * self.latents[channel, :, None, None]
                output[channel, row, 1, 1] = sign * CARRIER * math.sqrt(0.2)


def taesd_vae() -> Weights:
    """A VAE in the layout of TAESD: encode = the mean of 8x8 pixels, decode = three smooth doublings.

    The latent's colours are those that ComfyUI's previews show. Values kept small pass the decoder's tanh, values kept
    positive (or as +- pairs) its ReLUs.
    """
    small = 0.02
    weights = Weights(vae_scale=torch.tensor(small * SD15_SCALE), vae_shift=torch.tensor(0.0))

    def blocks(prefix: str, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            for layer in (0, 2, 4):
                weights.conv(f"{prefix}.{number}.conv.{layer}", 64, 64)

    colours, negative = torch.arange(3), torch.arange(3, 6)
    blocks("taesd_encoder", (1, 3, 4, 5, 7, 8, 9, 11, 12, 13))
    weights.conv("taesd_encoder.0", 64, 3)[colours, colours, 1, 1] = 1
    for halving in (2, 6, 10):
        weights.conv(f"taesd_encoder.{halving}", 64, 64, bias=False)[colours, colours, 1:, 1:] = 0.25
    latents = torch.linalg.pinv(PREVIEW)
    weights.conv("taesd_encoder.14", 4, 64)[:, colours, 1, 1] = 2 * small * latents
    weights["taesd_encoder.14.bias"][:] = -small * latents.sum(1)

    blocks("taesd_decoder", (3, 4, 5, 8, 9, 10, 13, 14, 15, 18))
    first = weights.conv("taesd_decoder.1", 64, 4)
    shown = PREVIEW[:, :, None, None] * SHARPER / (2 * small)
    first[colours], first[negative] = shown, -shown
    for doubling in (7, 12, 17):
        weight = weights.conv(f"taesd_decoder.{doubling}", 64, 64, bias=False)
        weight[range(6), range(6)] = LOW_PASS
    last = weights.conv("taesd_decoder.19", 3, 64)
    last[colours, colours, 1, 1], last[colours, negative, 1, 1] = 1, -1
    weights["taesd_decoder.19.bias"][:] = 0.5
    return weights


def empty_text_encoder() -> Weights:
    """A CLIP-L of zeros in half precision: every prompt is encoded as zeros."""
    weights = Weights()
    weights["embeddings.token_embedding.weight"] = torch.zeros(49408, CONTEXT)
    weights["embeddings.position_embedding.weight"] = torch.zeros(77, CONTEXT)
    for layer in range(12):
        name = f"encoder.layers.{layer}"
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weights.linear(f"{name}.self_attn.{part}", CONTEXT, CONTEXT)
        weights.norm(f"{name}.layer_norm1", CONTEXT)
        weights.norm(f"{name}.layer_norm2", CONTEXT)
        weights.linear(f"{name}.mlp.fc1", 4 * CONTEXT, CONTEXT)
        weights.linear(f"{name}.mlp.fc2", CONTEXT, 4 * CONTEXT)
    weights.norm("final_layer_norm", CONTEXT)
    return Weights({name: value.half() for name, value in weights.items()})


def demo_checkpoint(vae: str = "taesd") -> dict[str, Tensor]:
    """The whole state dict. `vae`: taesd (8x smaller, 4 channels) or pixel (1:1, 3 channels)."""
    if vae == "taesd":
        unet, first_stage = DemoUNet(PREVIEW, torch.linalg.pinv(PREVIEW)), taesd_vae()
    elif vae == "pixel":
        eye = torch.eye(COLOURS)
        unet, first_stage = DemoUNet(eye / SD15_SCALE, eye * SD15_SCALE), Weights(pixel_space_vae=torch.tensor(1.0))
    else:
        raise ValueError(f"vae is {vae!r}; it must be taesd or pixel.")
    parts = {
        "model.diffusion_model.": unet.build(),
        "first_stage_model.": first_stage,
        "cond_stage_model.transformer.text_model.": empty_text_encoder(),
    }
    return {prefix + name: value for prefix, part in parts.items() for name, value in part.items()}


def write_demo_checkpoint(path: Path, vae: str = "taesd") -> None:
    """Write the checkpoint; a file of that name is replaced once the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    save_file(demo_checkpoint(vae), str(partial), metadata={"format": "pt"})
    partial.replace(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Write the demo checkpoint.")
    parser.add_argument("file", type=Path, help="where to write it; the name ends in .safetensors")
    parser.add_argument("--vae", choices=("taesd", "pixel"), default="taesd", help="default: taesd")
    options = parser.parse_args()
    write_demo_checkpoint(options.file, options.vae)
    print(f"{options.file}: {options.file.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
