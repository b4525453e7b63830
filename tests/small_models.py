"""Tiny random models of ComfyUI's own classes, one of each architecture, and where their attention can be seen."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import small_gguf
import torch
from comfy.model_base import ModelType
from comfy.model_patcher import ModelPatcher
from torch import nn

TWO_LEVELS = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "num_res_blocks": [1, 1], "channel_mult": [1, 1],
    "transformer_depth": [1, 1], "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1],
    "num_heads": -1, "num_head_channels": 64, "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip
SDXL_CLASSES = {"num_classes": "sequential", "use_linear_in_transformer": True, "use_temporal_attention": False}
FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 24, "context_in_dim": 48, "hidden_size": 256, "mlp_ratio": 4.0,
    "num_heads": 2, "depth": 2, "depth_single_blocks": 8, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "txt_ids_dims": [],
}  # fmt: skip
SD3 = {
    "in_channels": 16, "patch_size": 2, "out_channels": 16, "depth": 4, "input_size": None, "adm_in_channels": 32,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 256}},
    "num_patches": 256, "pos_embed_max_size": 16, "pos_embed_scaling_factor": None,
}  # fmt: skip
LUMINA = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 96, "cap_feat_dim": 48, "n_layers": 5,
    "qk_norm": True, "n_heads": 4, "axes_dims": [8, 8, 8], "axes_lens": [300, 512, 512], "multiple_of": 16,
}  # fmt: skip
COSMOS = {  # ten blocks and sixteen heads: what a network of a width that the loader does not know has
    "model_channels": 192, "in_channels": 16, "out_channels": 16, "max_img_h": 240, "max_img_w": 240, "max_frames": 128,
    "patch_spatial": 2, "patch_temporal": 1, "pos_emb_cls": "rope3d", "use_adaln_lora": True,
    "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_enable_fps_modulation": False,
}  # fmt: skip

# A layer as a hook can see it: the modules that are given its output, text first, and how much of their input is it.
Outputs = list[list[nn.Module]]


@dataclass(frozen=True)
class Small:
    """A tiny model.

    Attributes:
        config: class of comfy.supported_models, by name.
        unet_config: of the network; the keys that ComfyUI's detection finds by itself are left out where it loads it.
        outputs: where the attention output of each layer goes, in execution order.
        auto: the layers that `auto` stands for.
        context: tokens and width of a text condition.
        pooled: width of a pooled prompt.
        through_loader: saved to a file and loaded through ComfyUI's loader, which detects the model from its weights.
        model_type: where it is not that of the class.
        channels: of a latent.
        frame: its latents are videos of one frame.
        gates: by layer, what the attention output is multiplied by the sigmoid of before it goes to `outputs`.
        without: a part too large for a test, which is taken out: the weight that the loader knows it by, and its shape.
    """

    config: str
    unet_config: dict[str, Any]
    outputs: Callable[[nn.Module], Outputs]
    auto: tuple[int, ...]
    context: tuple[int, int]
    pooled: int | None = None
    through_loader: bool = True
    model_type: ModelType | None = None
    channels: int = 4
    frame: bool = False
    gates: Callable[[nn.Module], list[nn.Module]] | None = None
    without: tuple[str, tuple[int, ...]] | None = None

    def as_host(self, latent: torch.Tensor) -> torch.Tensor:
        """[b c h w] as ComfyUI hands it on for this model."""
        return latent.unsqueeze(2) if self.frame else latent

    def cond(self, seed: int) -> list:
        """A random conditioning in ComfyUI's list format."""
        generator = torch.Generator().manual_seed(seed)
        pooled = None if self.pooled is None else torch.randn(1, self.pooled, generator=generator)
        return [[torch.randn(1, *self.context, generator=generator), {"pooled_output": pooled}]]


def unet_outputs(unet: nn.Module) -> Outputs:
    """In a UNet, by the order of its modules."""
    return [[module.to_out] for name, module in unet.named_modules() if name.endswith(".attn1")]


def flux_outputs(flux: nn.Module) -> Outputs:
    """In FLUX and Chroma."""
    double = [[block.txt_attn.proj, block.img_attn.proj] for block in flux.double_blocks]
    return double + [[block.linear2] for block in flux.single_blocks]


def sd3_outputs(sd3: nn.Module) -> Outputs:
    """In SD3: the text goes no further after the last block."""
    found = []
    for block in sd3.joint_blocks:
        text = [] if block.context_block.pre_only else [block.context_block.attn.proj]
        found.append([*text, block.x_block.attn.proj])
        if block.x_block.x_block_self_attn:
            found.append([block.x_block.attn2.proj])
    return found


def lumina_outputs(lumina: nn.Module) -> Outputs:
    """In Lumina 2 and Z-Image, without the blocks that see text alone."""
    return [[block.attention.out] for block in (*lumina.noise_refiner, *lumina.layers)]


def aura_outputs(aura: nn.Module) -> Outputs:
    """In AuraFlow."""
    double = [[block.attn.w1o, block.attn.w2o] for block in aura.double_layers]
    return double + [[block.attn.w1o] for block in aura.single_layers]


def qwen_outputs(qwen: nn.Module) -> Outputs:
    """In Qwen-Image."""
    return [[block.attn.to_add_out, block.attn.to_out[0]] for block in qwen.transformer_blocks]


def wan_outputs(wan: nn.Module) -> Outputs:
    """In Wan, without the attention to the text."""
    return [[block.self_attn.o] for block in wan.blocks]


def krea_outputs(krea: nn.Module) -> Outputs:
    """In Krea 2, without the blocks that see text alone; a gate is between."""
    return [[block.attn.wo] for block in krea.blocks]


def krea_gates(krea: nn.Module) -> list[nn.Module]:
    """Of Krea 2."""
    return [block.attn.gate for block in krea.blocks]


def cosmos_outputs(cosmos: nn.Module) -> Outputs:
    """In Anima, without the attention to the text."""
    return [[block.self_attn.output_proj] for block in cosmos.blocks]


LAST_SIX_OF_SEVEN = tuple(range(1, 7))
MODELS = {
    "SD1.5": Small(
        "SD15",
        {**TWO_LEVELS, "model_channels": 320, "context_dim": 768, "num_heads": 8, "num_head_channels": -1,
         "use_linear_in_transformer": False, "adm_in_channels": None, "use_temporal_attention": False},
        unet_outputs, LAST_SIX_OF_SEVEN, (77, 768),
    ),
    "SD2, noise prediction": Small(
        "SD20",
        {**TWO_LEVELS, "model_channels": 320, "context_dim": 1024, "use_linear_in_transformer": True,
         "adm_in_channels": None, "use_temporal_attention": False},
        unet_outputs, LAST_SIX_OF_SEVEN, (77, 1024),
    ),
    "SD2, v-prediction": Small(
        "SD20", {**TWO_LEVELS, "model_channels": 64, "context_dim": 96, "use_linear_in_transformer": True},
        unet_outputs, LAST_SIX_OF_SEVEN, (77, 96), through_loader=False, model_type=ModelType.V_PREDICTION,
    ),
    "SDXL": Small(
        "KOALA_700M",
        {**TWO_LEVELS, **SDXL_CLASSES, "model_channels": 320, "context_dim": 2048, "adm_in_channels": 2816,
         "num_res_blocks": [1, 1, 1], "channel_mult": [1, 1, 1], "transformer_depth": [0, 2, 5],
         "transformer_depth_middle": -1, "transformer_depth_output": [0, 0, 1, 1, 0, 0]},
        unet_outputs, tuple(range(3, 9)), (77, 2048), pooled=1280,
    ),
    "SDXL refiner": Small(
        "SDXLRefiner",
        {**TWO_LEVELS, **SDXL_CLASSES, "model_channels": 64, "context_dim": 96, "adm_in_channels": 2560},
        unet_outputs, LAST_SIX_OF_SEVEN, (77, 96), pooled=1280, through_loader=False,
    ),
    "SD3": Small(
        "SD3", {**SD3, "depth": 7, "context_embedder_config": {
            "target": "torch.nn.Linear", "params": {"in_features": 48, "out_features": 448}}},
        sd3_outputs, LAST_SIX_OF_SEVEN, (11, 48), pooled=32, channels=16,
    ),
    "SD3.5 medium": Small(
        "SD3", {**SD3, "qk_norm": "rms", "x_block_self_attn_layers": [0, 1, 2]},
        sd3_outputs, LAST_SIX_OF_SEVEN, (11, 48), pooled=32, channels=16,
    ),
    "FLUX.1-dev": Small(
        "Flux", {**FLUX, "image_model": "flux", "guidance_embed": True},
        flux_outputs, tuple(range(3, 10)), (11, 48), pooled=24, channels=16,
    ),
    "FLUX.2": Small(
        "Flux2",
        {**FLUX, "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "mlp_ratio": 3.0,
         "axes_dim": [32, 32, 32, 32], "theta": 2000, "patch_size": 1, "qkv_bias": False, "txt_ids_dims": [3],
         "guidance_embed": True, "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
         "default_ref_method": "index"},
        flux_outputs, tuple(range(3, 10)), (11, 48), channels=128,
    ),
    "Chroma": Small(
        "Chroma",
        {**FLUX, "vec_in_dim": None, "image_model": "chroma", "in_channels": 64, "out_channels": 64, "in_dim": 64,
         "out_dim": 256, "hidden_dim": 64, "n_layers": 2},
        flux_outputs, tuple(range(4, 10)), (11, 48), through_loader=False, channels=16,
    ),
    "Lumina 2": Small(
        "Lumina2", {**LUMINA, "n_kv_heads": 2},
        lumina_outputs, LAST_SIX_OF_SEVEN, (11, 48), through_loader=False, channels=16,
    ),
    "Z-Image": Small(
        "ZImage",
        {**LUMINA, "dim": 288, "axes_dims": [24, 24, 24], "z_image_modulation": True, "time_scale": 1000.0,
         "pad_tokens_multiple": 32},
        lumina_outputs, LAST_SIX_OF_SEVEN, (11, 48), through_loader=False, channels=16,
    ),
    "AuraFlow": Small(
        "AuraFlow",
        {"dim": 128, "n_layers": 7, "n_double_layers": 2, "n_heads": 2, "global_conddim": 64, "cond_seq_dim": 48,
         "max_seq": 64},
        aura_outputs, LAST_SIX_OF_SEVEN, (11, 48), through_loader=False,
    ),
    "Qwen-Image": Small(
        "QwenImage",
        {"image_model": "qwen_image", "in_channels": 64, "num_layers": 7, "attention_head_dim": 24,
         "num_attention_heads": 2, "joint_attention_dim": 48, "axes_dims_rope": (8, 8, 8)},
        qwen_outputs, LAST_SIX_OF_SEVEN, (11, 48), through_loader=False, channels=16, frame=True,
    ),
    "Wan 2.1": Small(
        "WAN21_T2V",
        {"image_model": "wan2.1", "model_type": "t2v", "dim": 256, "ffn_dim": 96, "num_heads": 2, "num_layers": 7,
         "in_dim": 16, "out_dim": 16, "cross_attn_norm": True},
        wan_outputs, LAST_SIX_OF_SEVEN, (11, 4096), channels=16, frame=True,
    ),
    "Krea 2": Small(
        "Krea2",
        {"image_model": "krea2", "features": 256, "channels": 16, "layers": 7, "heads": 2, "kvheads": 1, "txtlayers": 3,
         "txtdim": 40},
        krea_outputs, LAST_SIX_OF_SEVEN, (11, 120), channels=16, frame=True, gates=krea_gates,
    ),
    "Anima": Small(
        "Anima", {**COSMOS, "image_model": "anima"},
        cosmos_outputs, tuple(range(4, 10)), (11, 1024), channels=16, frame=True,
        without=("llm_adapter.blocks.0.cross_attn.q_proj.weight", (1024, 1024)),
    ),
}  # fmt: skip


def load(small: Small, folder: Path) -> ModelPatcher:
    """The model with fixed random weights, as inference tensors, in float32."""
    with torch.inference_mode():
        model = _made(small)
        if not small.through_loader:
            return _patcher(model)
        path = folder / "small.safetensors"
        weights = {name: value.contiguous() for name, value in model.diffusion_model.state_dict().items()}
        if small.without is not None:
            weights[small.without[0]] = torch.zeros(small.without[1])
        comfy.utils.save_torch_file(weights, str(path))
        loaded = comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
        path.unlink()
    assert type(loaded.model) is type(model)
    assert type(loaded.model.model_config) is type(model.model_config)
    _take_out(small, loaded.model)
    return loaded


def _take_out(small: Small, model: nn.Module) -> None:
    if small.without is not None:
        setattr(model.diffusion_model, small.without[0].split(".")[0], nn.Identity())


@torch.inference_mode()
def load_packed(small: Small) -> tuple[ModelPatcher, ModelPatcher]:
    """The model with weights packed as in a GGUF file, and the same with these unpacked; all are inference tensors."""
    packed, plain = _empty(small, small_gguf.Ops), _made(small)
    weights = small_gguf.pack_weights(plain.diffusion_model)
    packed.diffusion_model.load_state_dict(weights)
    learned = plain.diffusion_model.state_dict()
    for name, weight in weights.items():
        learned[name].copy_(small_gguf.unpacked(weight, torch.float32))
    return _patcher(packed), _patcher(plain)


@torch.inference_mode()
def text_adapter() -> nn.Module:
    """What Anima makes its text with, small but for its list of words."""
    from comfy.ldm.anima.model import LLMAdapter  # older ComfyUI has none

    adapter = LLMAdapter(model_dim=32, num_layers=1, num_heads=2, dtype=torch.float32, operations=comfy.ops.manual_cast)
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
    return adapter


def _patcher(model: nn.Module) -> ModelPatcher:
    device = comfy.model_management.get_torch_device()
    return ModelPatcher(model, load_device=device, offload_device=device)


def _empty(small: Small, operations: type | None = None) -> nn.Module:
    """The model with whatever weights it is made with; operations: its layers, where they are not ComfyUI's own."""
    config = getattr(comfy.supported_models, small.config)({**small.unet_config, "dtype": torch.float32})
    config.set_inference_dtype(torch.float32, None)
    config.custom_operations = operations
    if small.model_type is not None:
        config.model_type = lambda *_: small.model_type
    model = config.get_model({}, device=torch.device("cpu"))
    _take_out(small, model)
    return model


def _made(small: Small) -> nn.Module:
    model = _empty(small)
    generator = torch.Generator().manual_seed(20250220)
    learned = model.diffusion_model.state_dict()  # SD3's positions are a buffer
    for name, parameter in learned.items():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            values = 1 + 0.1 * values if name.endswith("weight") else 0.05 * values
        else:
            values /= parameter[0].numel() ** 0.5
        parameter.copy_(values)
    return model


def with_lora(model, strength):
    """A clone with a patch on the last block's values."""
    clone, key = model.clone(), "diffusion_model.output_blocks.3.1.transformer_blocks.0.attn1.to_v.weight"
    shape = model.model.state_dict()[key].shape
    assert clone.add_patches({key: (torch.randn(shape, generator=torch.Generator().manual_seed(1)) / 40,)}, strength)
    return clone


def gradients(pack_module, model, small, choices):
    """Of the last four layers' features, with each choice of blocks run again."""
    sigma = 0.6
    conditioning, gradient = pack_module("attention.conditioning"), pack_module("attention.gradient")
    capture, layers = pack_module("attention.capture"), pack_module("attention.layers")
    x = torch.randn(1, small.channels, 8, 6, generator=torch.Generator().manual_seed(0))
    encoded = conditioning.encode(model, conditioning.from_socket(small.cond(3)), x, size=x.shape[-2:])
    chosen = layers.list_layers(model.diffusion_model)[-4:]
    for blocks in choices:
        with gradient.differentiable(model), gradient.saved_activations(model):
            z = x.clone().requires_grad_()
            conds = conditioning.for_pass(encoded, sigma, 1)
            found = capture.capture_features(model, z, torch.tensor(sigma), conds, chosen, again=blocks)
            loss = sum(of_layer.out.square().mean() + of_layer.q.square().mean() for of_layer in found.values())
            yield torch.autograd.grad(loss, z)[0]
