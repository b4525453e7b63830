"""Write a Stable Diffusion 1.5 checkpoint by formula, so that a first run needs no download.

Its self-attention is multi-scale patch matching: every token holds the 3x3 neighbourhood of its place in an
image pyramid, and attends to the places that look most alike. Distilling it is classical texture
optimisation (Kwatra et al., 2005). It is a model for teaching and testing, and knows nothing of the world.

    python demo_checkpoint.py FILE [--vae taesd|pixel]

Terms: a *signal* is a channel that carries a colour; a *slot* is the place of a signal among the network's
320 channels; a *carrier* is a large constant that makes a normalisation layer linear.
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

CARRIER = 50.0
"""Carriers of a GroupNorm group: +CARRIER and -CARRIER."""
BASE = 0.3
"""Constants +-BASE of a token, which put it on a sphere after LayerNorm."""
TIME_SCALE = 1000.0
"""Size of the constants that make the GroupNorm of a timestep's signal linear."""

BANDWIDTHS = (0.04, 0.03, 0.03, 0.03)
"""h of each level at t = 0: how unlike two patches may be and still match."""
ANNEAL = 6.0
"""How many times larger h is at t = 1000."""

PULL = 1.0
"""How strongly a picture that is sampled moves towards what its attention finds."""
LATENT_STD = 0.25
"""The standard deviation of colours that becomes 1 in the model's space (taesd variant)."""
SD15_SCALE = 0.18215
LOW_PASS = torch.outer(torch.tensor([1.0, 2.0, 1.0]), torch.tensor([1.0, 2.0, 1.0])) / 16

POSITIVE = torch.arange(SIGNALS, CHANNELS, GROUP)
NEGATIVE = POSITIVE + 1


def slot(signal: int) -> int:
    """The channel of a signal: the carriers' channels are left out."""
    return signal // SIGNALS * GROUP + signal % SIGNALS


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
    """Builds the UNet: `channels` colours in the latent, multiplied by `gain` to become signals in -1..1."""

    def __init__(self, channels: int, gain: float, levels: int = len(BANDWIDTHS)) -> None:
        self.channels, self.gain, self.levels = channels, gain, levels
        self.taps = 9 * channels
        self.low = self.taps
        """The first signal of the low-passed picture, behind the taps."""
        self.pull = self.low + channels
        """The first signal of what the attention of the first level adds, behind the low-passed picture."""
        self.weights = Weights()

    def build(self) -> Weights:
        """One ResBlock a level, attention on the way down only, no middle block."""
        self.time_embedding()
        self.first_convolution()
        self.resblock("input_blocks.1.0", CHANNELS)
        for level in range(1, self.levels + 1):
            self.next_level(f"input_blocks.{2 * level}.0.op", first=level == 1)
            self.resblock(f"input_blocks.{2 * level + 1}.0", CHANNELS)
            self.timed_carriers(f"input_blocks.{2 * level + 1}.0")
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
        waves = time[:, None] * frequencies
        slow = (frequencies < 6e-3).repeat(2)
        design = torch.cat([waves.cos(), waves.sin()], 1)[:, slow]
        ridge = 1e-4 * torch.eye(design.shape[1], dtype=torch.float64)
        fit = torch.linalg.solve(design.T @ design + ridge, design.T @ (ANNEAL ** (time / 1000) - 1))
        first = self.weights.linear("time_embed.0", 4 * CHANNELS, CHANNELS)
        first[0, slow], first[1, slow] = fit.float(), -fit.float()
        second = self.weights.linear("time_embed.2", 4 * CHANNELS, 4 * CHANNELS)
        second[:2, :2] = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])

    def first_convolution(self) -> None:
        """Signals 0 ... = the picture; signals `low` ... = the low-passed picture."""
        weight = self.weights.conv("input_blocks.0.0", CHANNELS, self.channels)
        self.weights.carriers("input_blocks.0.0")
        for colour in range(self.channels):
            weight[slot(colour), colour, 1, 1] = self.gain
            weight[slot(self.low + colour), colour] = self.gain * LOW_PASS

    def next_level(self, name: str, first: bool) -> None:
        """At half the size: signals 0 ... = the 3x3 taps of the level above; `low` ... = its low pass.

        Taps are ordered by row, column, colour. The first level takes the taps of the picture itself.
        """
        weight = self.weights.conv(name, CHANNELS, CHANNELS)
        self.weights.carriers(name)
        for colour in range(self.channels):
            low = slot(self.low + colour)
            weight[low, low] = LOW_PASS
            source = slot(colour) if first else low
            for tap in range(9):
                weight[slot(tap * self.channels + colour), source, tap // 3, tap % 3] = 1

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

    def attention(self, name: str, bandwidth: float) -> None:
        """Attention weights = softmax(-|u_q - u_k|^2 / 2h^2) with h(t) = bandwidth * ANNEAL^(t/1000).

        u = the 3x3 taps / sqrt(27), values = u. The block's output is zero, so the signals pass unchanged.
        """
        self.token(name)
        block = f"{name}.transformer_blocks.0"
        self.weights.norm(f"{block}.norm1", CHANNELS, on=True)
        constants = CHANNELS - 2 * self.taps
        sharpness = constants * BASE**2 / (2 * bandwidth**2)
        matching = self.sphere() * math.sqrt(sharpness * math.sqrt(HEAD_DIM) / CHANNELS)
        values = self.sphere()[: self.taps] * BASE * math.sqrt(constants / (2 * CHANNELS))
        for layer, rows in (("to_q", matching), ("to_k", matching), ("to_v", values)):
            weight = self.weights.linear(f"{block}.attn1.{layer}", CHANNELS, CHANNELS, bias=False)
            weight.view(HEADS, HEAD_DIM, CHANNELS)[:, : len(rows)] = rows
        self.rest_of_transformer(name, block)

    def token(self, name: str) -> None:
        """norm and proj_in: the token is (u, -u, +-BASE ...), where u falls as the carriers grow.

        A group's GroupNorm is (s - mean) / (C sqrt(0.2)), as its carriers +-C outweigh its signals; the
        carriers' mean is -mean / (C sqrt(0.2)), which is subtracted again.
        """
        self.weights.norm(f"{name}.norm", CHANNELS, on=True)
        weight = self.weights.conv(f"{name}.proj_in", CHANNELS, CHANNELS, size=1)[:, :, 0, 0]
        scale = CARRIER * math.sqrt(0.2 / 27)
        for signal in range(self.taps):
            group = signal // SIGNALS
            for row, sign in ((signal, 1), (self.taps + signal, -1)):
                weight[row, slot(signal)] = sign * scale
                weight[row, [POSITIVE[group], NEGATIVE[group]]] = -sign * scale / 2
        self.weights[f"{name}.proj_in.bias"][2 * self.taps :] = BASE * self.signs()

    def signs(self) -> Tensor:
        """+1, -1, +1 ... for the constants of a token: their mean is zero."""
        return torch.tensor([1.0, -1.0]).repeat(CHANNELS // 2 - self.taps)

    def sphere(self) -> Tensor:
        """Rows that turn a token after LayerNorm into (u, constant), a point on a sphere of radius sqrt(320).

        On a sphere the scalar product is a distance, so no |k|^2 has to be known to the query.
        """
        rows = torch.zeros(self.taps + 1, CHANNELS)
        eye = torch.eye(self.taps) / math.sqrt(2)
        rows[: self.taps, : self.taps], rows[: self.taps, self.taps : 2 * self.taps] = eye, -eye
        rows[self.taps, 2 * self.taps :] = self.signs() / math.sqrt(CHANNELS - 2 * self.taps)
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
        """The signals `pull` ... = how the mean of the 3x3 taps attended to differs from the token's own.

        After attn1 the token still is u in its first places, and holds what was attended to on top of its
        constants. The way up carries the difference to full size; a kernel of two pixels makes it smooth.
        """
        rows, own = 2 * self.taps + torch.arange(self.taps), torch.arange(self.taps)
        self.weights[f"{name}.transformer_blocks.0.attn1.to_out.0.weight"][rows, own] = 1
        output, bias = self.weights[f"{name}.proj_out.weight"][:, :, 0, 0], self.weights[f"{name}.proj_out.bias"]
        scale = PULL * math.sqrt(27) / 9
        for tap in range(9):
            for colour in range(self.channels):
                signal, taken = slot(self.pull + colour), tap * self.channels + colour
                output[signal, rows[taken]], output[signal, taken] = scale, -scale
                bias[signal] -= scale * BASE * self.signs()[taken]
        signals = [slot(self.pull + colour) for colour in range(self.channels)]
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
        scale = CARRIER * math.sqrt(0.2) / self.gain
        for colour in range(self.channels):
            for row, sign in ((colour, 1), (self.channels + colour, -1)):
                skip[row, CHANNELS + slot(colour)], skip[row, slot(self.pull + colour)] = sign, -sign
                output[colour, row, 1, 1] = sign * scale


def taesd_vae() -> Weights:
    """A VAE in the layout of TAESD: encode = the mean of 8x8 pixels, decode = three smooth doublings.

    Latent channels 0-2 are (colour - 0.5) / LATENT_STD in the model's space, channel 3 is zero. Values kept
    small pass the decoder's tanh, values kept positive (or as +- pairs) its ReLUs.
    """
    small = 0.02
    weights = Weights(vae_scale=torch.tensor(small * LATENT_STD * SD15_SCALE), vae_shift=torch.tensor(0.0))

    def blocks(prefix: str, numbers: tuple[int, ...]) -> None:
        for number in numbers:
            for layer in (0, 2, 4):
                weights.conv(f"{prefix}.{number}.conv.{layer}", 64, 64)

    colours, negative = torch.arange(3), torch.arange(3, 6)
    blocks("taesd_encoder", (1, 3, 4, 5, 7, 8, 9, 11, 12, 13))
    weights.conv("taesd_encoder.0", 64, 3)[colours, colours, 1, 1] = 1
    for halving in (2, 6, 10):
        weights.conv(f"taesd_encoder.{halving}", 64, 64, bias=False)[colours, colours, 1:, 1:] = 0.25
    weights.conv("taesd_encoder.14", 4, 64)[colours, colours, 1, 1] = small
    weights["taesd_encoder.14.bias"][colours] = -0.5 * small

    blocks("taesd_decoder", (3, 4, 5, 8, 9, 10, 13, 14, 15, 18))
    first = weights.conv("taesd_decoder.1", 64, 4)
    first[colours, colours, 1, 1], first[negative, colours, 1, 1] = 1 / small, -1 / small
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
        unet, first_stage = DemoUNet(4, gain=2 * LATENT_STD), taesd_vae()
    elif vae == "pixel":
        unet, first_stage = DemoUNet(3, gain=1 / SD15_SCALE), Weights(pixel_space_vae=torch.tensor(1.0))
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
