"""Sharper decoding: fit a VAE's decoder to the reference picture (the paper's release: L1, Adam, latents fixed).

The training copy of the decoder's weights is in fp32 and stands in for the VAE's own only during the training. The
result is a patch on a clone of the VAE, as a LoRA is on a model: the encoder and everything else is shared.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from comfy import model_management
from comfy.sd import VAE
from torch.utils.checkpoint import checkpoint

DECODERS = ("decoder", "taesd_decoder")
ENCODERS = ("encoder", "taesd_encoder")
ACTIVATION_SHARE = 1.25  # of what ComfyUI reckons a plain decode takes in fp32; measured: 1.0 at 512x512

# Called after each step with its number from 1, its loss, and the last picture's reconstruction, [h w 3] in 0..1.
OnStep = Callable[[int, float, torch.Tensor], None]


@dataclass(frozen=True, kw_only=True)
class FinetuneSettings:
    """What the artist can set.

    Attributes:
        steps: optimisation steps; 0 leaves the decoder as it is.
        learning_rate: Adam's step.

    Raises:
        ValueError: names the setting, what was given and what is allowed.
    """

    steps: int = 75
    learning_rate: float = 1e-4

    def __post_init__(self) -> None:
        if self.steps < 0:
            raise ValueError(f"steps: {self.steps} is not allowed; use 0 or more")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"learning_rate: {self.learning_rate} is not allowed; use a number above 0")


class FineTunedVAE(VAE):
    """A VAE with another one's weights, except for some that are its own.

    They are shared through ComfyUI's weight patches. Those stay in the shared network until it is loaded for another
    VAE; what reads the network directly, such as saving, would find them there. So they go after each use.
    """

    def __init__(self, vae: VAE, weights: Mapping[str, torch.Tensor]) -> None:
        """
        Args:
            vae: where everything else is taken from; it is not changed.
            weights: by name in the state dict of the VAE's network, in its dtypes.
        """
        self.__dict__.update(vae.__dict__)  # nothing is loaded anew
        self.patcher = vae.patcher.clone()
        self.patcher.add_patches({name: ("set", (weight,)) for name, weight in weights.items()})
        self._own_weights = {**getattr(vae, "_own_weights", {}), **weights}

    @contextmanager
    def _loaded_for_one_call(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.patcher.detach()

    def encode(self, *args, **kwargs) -> torch.Tensor:
        """As the VAE does."""
        with self._loaded_for_one_call():
            return super().encode(*args, **kwargs)

    def encode_tiled(self, *args, **kwargs) -> torch.Tensor:
        """As the VAE does."""
        with self._loaded_for_one_call():
            return super().encode_tiled(*args, **kwargs)

    def decode(self, *args, **kwargs) -> torch.Tensor:
        """As the VAE does, with this one's weights."""
        with self._loaded_for_one_call():
            return super().decode(*args, **kwargs)

    def decode_tiled(self, *args, **kwargs) -> torch.Tensor:
        """As the VAE does, with this one's weights."""
        with self._loaded_for_one_call():
            return super().decode_tiled(*args, **kwargs)

    def get_sd(self) -> dict[str, torch.Tensor]:
        """The state dict to save, with this one's weights."""
        return {**super().get_sd(), **self._own_weights}


def finetune_decoder(vae: VAE, image: torch.Tensor, settings: FinetuneSettings, on_step: OnStep | None = None) -> VAE:
    """A VAE whose decoder has been fitted to pictures; it shares everything else with the VAE, which is not changed.

    Nothing is random: the latents are the encoder's means.

    Args:
        image: [n h w 3] in 0..1; cropped to multiples of the VAE's downscale as VAE Encode does.
        on_step: called after each step.

    Raises:
        ValueError: a VAE of another kind, or an image smaller than one latent pixel.
    """
    decoder = _decoder_name(vae)
    pixels = vae.vae_encode_crop_pixels(image)
    if 0 in pixels.shape:
        smallest = vae.spacial_compression_encode()
        raise ValueError(
            f"image: {image.shape[2]}x{image.shape[1]} (width x height) is too small; use {smallest}x{smallest} or more"
        )
    if settings.steps == 0:
        return vae
    latents = vae.encode(pixels)
    weights = vae.get_sd()
    _make_room(vae, latents, sum(weights[name].numel() for name in weights if name.startswith(f"{decoder}.")))
    with torch.inference_mode(False), torch.enable_grad():
        targets = vae.process_input(pixels.movedim(-1, 1).to(vae.device, torch.float32, copy=True))
        latents = latents.to(vae.device, torch.float32, copy=True)
        with _training_copy(vae.first_stage_model, weights, decoder, vae.device) as parameters:
            losses = _descend(vae, list(parameters.values()), latents, targets, settings, on_step)
        tuned = {
            name: parameter.detach().to(vae.patcher.offload_device, weights[name].dtype)
            for name, parameter in parameters.items()
        }
    logging.info(
        "Attention distillation: VAE decoder fitted to %d pictures in %d steps, L1 loss %.4f -> %.4f",
        len(pixels), settings.steps, losses[0], losses[-1],
    )  # fmt: skip
    return FineTunedVAE(vae, tuned)


def _decoder_name(vae: VAE) -> str:
    """What the VAE's network calls its decoder."""
    vae.throw_exception_if_invalid()
    network = vae.first_stage_model
    for name in DECODERS:
        if vae.latent_dim == 2 and isinstance(getattr(network, name, None), torch.nn.Module):
            return name
    raise ValueError(
        f"vae: {type(network).__name__} is not supported; allowed are image VAEs with a decoder, such as those of "
        "SD1.5 and SDXL, and TAESD"
    )


def _make_room(vae: VAE, latents: torch.Tensor, parameters: int) -> None:
    """Have models unloaded as far as needed.

    Training holds the decoder's weights, gradients and two moments in fp32, and the activations of one picture.
    """
    activations = ACTIVATION_SHARE * vae.memory_used_decode(latents[:1].shape, torch.float32)
    model_management.free_memory(16 * parameters + activations, vae.device)


def _descend(
    vae: VAE,
    parameters: list[torch.nn.Parameter],
    latents: torch.Tensor,
    targets: torch.Tensor,
    settings: FinetuneSettings,
    on_step: OnStep | None,
) -> list[float]:
    """Adam on the parameters; the pictures go through one by one. Returns the loss of each step, before its update.

    Args:
        latents: [n c h w], targets: [n 3 H W], both fp32, in the scale of the VAE's network.
    """
    optimiser = torch.optim.Adam(parameters, lr=settings.learning_rate)
    losses = []
    for step in range(settings.steps):
        optimiser.zero_grad()
        total = 0.0
        for latent, target in zip(latents.split(1), targets.split(1), strict=True):
            model_management.throw_exception_if_processing_interrupted()
            picture = vae.first_stage_model.decode(latent)
            loss = F.l1_loss(picture, target) / len(latents)
            loss.backward()
            total += loss.item()
        optimiser.step()
        losses.append(total)
        if on_step is not None:
            on_step(step + 1, total, vae.process_output(picture.detach())[0].movedim(0, -1))
    return losses


@contextmanager
def _training_copy(
    network: torch.nn.Module, weights: Mapping[str, torch.Tensor], decoder: str, device: torch.device
) -> Iterator[dict[str, torch.nn.Parameter]]:
    """For the time of the training, give a VAE's network fp32 copies of its weights, those of the decoder trainable.

    The encoder's stay, it is not run. Each block of the decoder is made to compute its activations again for the
    gradient, instead of keeping them. Everything is put back on every exit.

    Yields:
        The decoder's trainable parameters by name in the state dict.
    """
    replaced: list[tuple[dict, str, object]] = []
    trainable: dict[str, torch.nn.Parameter] = {}
    try:
        for prefix, module in network.named_modules():
            for key, original in module._parameters.items():
                name = f"{prefix}.{key}" if prefix else key
                if original is None or name.split(".")[0] in ENCODERS:
                    continue
                training = name.split(".")[0] == decoder
                copied = torch.nn.Parameter(weights[name].to(device, torch.float32, copy=True), requires_grad=training)
                if training:
                    trainable[name] = copied
                replaced.append((module._parameters, key, original))
                module._parameters[key] = copied
        for parent, key, block in list(_blocks(getattr(network, decoder))):
            replaced.append((parent._modules, key, block))
            parent._modules[key] = _Checkpointed(block)
        yield trainable
    finally:
        for owner, key, original in replaced:
            owner[key] = original


def _blocks(container: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, str, torch.nn.Module]]:
    """The blocks of layers inside lists and plain holders of modules: (where it is held, its name there, itself)."""
    for key, module in container.named_children():
        if type(module) in (torch.nn.Module, torch.nn.ModuleList, torch.nn.Sequential):
            yield from _blocks(module)
        elif next(module.children(), None) is not None:
            yield container, key, module


class _Checkpointed(torch.nn.Module):
    """Stands in for a block and computes its activations again for the gradient."""

    def __init__(self, block: torch.nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """As the block does."""
        return checkpoint(self.block, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)
