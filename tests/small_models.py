"""Tiny random models of ComfyUI's own classes, one of each architecture, and where their attention can be seen."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils
import pytest
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
COSMOS = {
    "in_channels": 16, "out_channels": 16, "max_img_h": 240, "max_img_w": 240, "max_frames": 128, "patch_spatial": 2,
    "patch_temporal": 1, "pos_emb_cls": "rope3d", "use_adaln_lora": True, "rope_h_extrapolation_ratio": 4.0,
    "rope_w_extrapolation_ratio": 4.0, "rope_enable_fps_modulation": False,
}  # fmt: skip
SMALL_COSMOS = {
    **COSMOS, "model_channels": 64, "num_blocks": 7, "num_heads": 2, "adaln_lora_dim": 32, "crossattn_emb_channels": 64,
}  # fmt: skip
OMNIGEN = {
    "hidden_size": 96, "num_refiner_layers": 2, "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 32,
    "axes_dim_rope": (8, 8, 8),
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
        size: of a latent; odd, so that patches need padding, where the network can do with such.
        gates: by layer, what the attention output is multiplied by the sigmoid of before it goes to `outputs`.
        beside: what else a text condition holds.
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
    size: tuple[int, int] = (9, 12)
    gates: Callable[[nn.Module], list[nn.Module]] | None = None
    beside: dict[str, torch.Tensor] = field(default_factory=dict)
    without: tuple[str, tuple[int, ...]] | None = None

    def as_host(self, latent: torch.Tensor) -> torch.Tensor:
        """[b c h w] as ComfyUI hands it on for this model."""
        return latent.unsqueeze(2) if self.frame else latent

    def cond(self, seed: int) -> list:
        """A random conditioning in ComfyUI's list format."""
        generator = torch.Generator().manual_seed(seed)
        pooled = None if self.pooled is None else torch.randn(1, self.pooled, generator=generator)
        return [[torch.randn(1, *self.context, generator=generator), {"pooled_output": pooled, **self.beside}]]


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


def omnigen_outputs(omnigen: nn.Module) -> Outputs:
    """In OmniGen2, without the blocks that see text alone."""
    return [[block.attn.to_out[0]] for block in (*omnigen.noise_refiner, *omnigen.layers)]


def boogu_outputs(boogu: nn.Module) -> Outputs:
    """In Boogu, without the blocks that see text alone."""
    found = [[block.attn.to_out[0]] for block in boogu.noise_refiner]
    for block in boogu.double_stream_layers:
        joint = block.img_instruct_attn.processor
        found += [[joint.instruct_out, joint.img_out], [block.img_self_attn.to_out[0]]]
    return found + [[block.attn.to_out[0]] for block in boogu.single_stream_layers]


def hidream_outputs(hidream: nn.Module) -> Outputs:
    """In HiDream, where the picture comes first."""
    double = [[block.block.attn1.to_out, block.block.attn1.to_out_t] for block in hidream.double_stream_blocks]
    return double + [[block.block.attn1.to_out] for block in hidream.single_stream_blocks]


def kandinsky_outputs(kandinsky: nn.Module) -> Outputs:
    """In Kandinsky 5, without the blocks that see text alone and the attention to the text."""
    return [[block.self_attention.out_layer] for block in kandinsky.visual_transformer_blocks]


def ideogram_outputs(ideogram: nn.Module) -> Outputs:
    """In Ideogram 4."""
    return [[block.attention.o] for block in ideogram.layers]


def lens_outputs(lens: nn.Module) -> Outputs:
    """In Lens, where the picture comes first."""
    return [[block.attn.to_out[0], block.attn.to_add_out] for block in lens.transformer_blocks]


def joyimage_outputs(joyimage: nn.Module) -> Outputs:
    """In JoyImage, where the picture comes first."""
    return [[block.attn.img_attn_proj, block.attn.txt_attn_proj] for block in joyimage.double_blocks]


def krea_outputs(krea: nn.Module) -> Outputs:
    """In Krea 2, without the blocks that see text alone; a gate is between."""
    return [[block.attn.wo] for block in krea.blocks]


def krea_gates(krea: nn.Module) -> list[nn.Module]:
    """Of Krea 2."""
    return [block.attn.gate for block in krea.blocks]


def cosmos_outputs(cosmos: nn.Module) -> Outputs:
    """In Cosmos-Predict2 and Anima, without the attention to the text."""
    return [[block.self_attn.output_proj] for block in cosmos.blocks]


ADAPTER = ("llm_adapter.blocks.0.cross_attn.q_proj.weight", (1024, 1024))  # of Anima
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
        "Anima", {**SMALL_COSMOS, "image_model": "anima"},
        cosmos_outputs, LAST_SIX_OF_SEVEN, (11, 64), through_loader=False, channels=16, frame=True, without=ADAPTER,
    ),
    "Cosmos-Predict2": Small(
        "CosmosT2IPredict2", {**SMALL_COSMOS, "image_model": "cosmos_predict2"},
        cosmos_outputs, LAST_SIX_OF_SEVEN, (11, 64), through_loader=False, channels=16, frame=True,
    ),
    "HiDream": Small(
        "HiDream",
        {"image_model": "hidream", "attention_head_dim": 24, "axes_dims_rope": (8, 8, 8), "caption_channels": [48, 40],
         "in_channels": 16, "llama_layers": [0, 1, 2, 2, 1, 0, 2], "num_attention_heads": 2, "num_layers": 2,
         "num_single_layers": 5, "patch_size": 2, "text_emb_dim": 24,
         "num_activated_experts": 4},  # all of them: where others are asked, the loss has a step
        hidream_outputs, LAST_SIX_OF_SEVEN, (11, 48), pooled=24, through_loader=False, channels=16,
        beside={"conditioning_llama3": torch.randn(1, 3, 11, 40, generator=torch.Generator().manual_seed(4))},
    ),
    "HunyuanImage 2.1": Small(
        "HunyuanImage21",
        {"image_model": "hunyuan_video", "vec_in_dim": None, "in_channels": 64, "out_channels": 64,
         "context_in_dim": 48, "hidden_size": 96, "mlp_ratio": 4.0, "num_heads": 4, "depth": 2,
         "depth_single_blocks": 5, "axes_dim": [12, 12], "theta": 256, "patch_size": [1, 1], "qkv_bias": True,
         "guidance_embed": False, "byt5": False, "meanflow": False, "use_cond_type_embedding": False,
         "vision_in_dim": None, "meanflow_sum": False},
        flux_outputs, LAST_SIX_OF_SEVEN, (11, 48), through_loader=False, channels=64,
    ),
    "OmniGen2": Small(
        "Omnigen2", {**OMNIGEN, "image_model": "omnigen2", "text_feat_dim": 48, "num_layers": 5},
        omnigen_outputs, LAST_SIX_OF_SEVEN, (11, 48), through_loader=False, channels=16,
        beside={"attention_mask": torch.ones(1, 11, dtype=torch.long)},
    ),
    "Boogu": Small(
        "Boogu",
        {**OMNIGEN, "image_model": "boogu", "instruction_feat_dim": 48, "num_double_stream_layers": 2, "num_layers": 1},
        boogu_outputs, LAST_SIX_OF_SEVEN, (11, 48), through_loader=False, channels=16,
        beside={"attention_mask": torch.ones(1, 11, dtype=torch.long)},
    ),
    "Chroma Radiance": Small(
        "ChromaRadiance",
        {**FLUX, "vec_in_dim": None, "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3,
         "hidden_size": 96, "num_heads": 4, "axes_dim": [8, 8, 8], "depth_single_blocks": 5,
         "in_dim": 64, "out_dim": 96, "hidden_dim": 64, "n_layers": 2, "nerf_hidden_size": 16, "nerf_mlp_ratio": 2,
         "nerf_depth": 1, "nerf_max_freqs": 2, "nerf_tile_size": 0, "nerf_final_head_type": "conv",
         "nerf_embedder_dtype": torch.float32, "use_x0": False, "use_sequential_txt_ids": True},
        flux_outputs, LAST_SIX_OF_SEVEN, (11, 48), through_loader=False, channels=3,
    ),
    "Kandinsky 5 Image": Small(
        "Kandinsky5Image",
        {"image_model": "kandinsky5", "model_dim": 96, "visual_embed_dim": 64, "in_text_dim": 48, "in_text_dim2": 24,
         "time_dim": 64, "ff_dim": 192, "axes_dims": (8, 8, 8), "rope_scale_factor": (1.0, 1.0, 1.0),
         "num_text_blocks": 1, "num_visual_blocks": 7},
        kandinsky_outputs, LAST_SIX_OF_SEVEN, (11, 48), pooled=24, through_loader=False, channels=16, size=(10, 12),
    ),
    "Ideogram 4": Small(
        "Ideogram4",
        {"image_model": "ideogram4", "num_layers": 7, "num_attention_heads": 2, "attention_head_dim": 24,
         "intermediate_size": 96, "adaln_dim": 32, "llm_features_dim": 48, "mrope_section": (4, 4, 4)},
        ideogram_outputs, LAST_SIX_OF_SEVEN, (11, 48), through_loader=False, channels=128,
    ),
    "Lens": Small(
        "Lens",
        {"image_model": "lens", "num_layers": 7, "attention_head_dim": 24, "num_attention_heads": 2,
         "enc_hidden_dim": 12, "axes_dims_rope": (8, 8, 8)},
        lens_outputs, LAST_SIX_OF_SEVEN, (11, 48), through_loader=False, channels=128,
    ),
    "Mage-Flow": Small(
        "MageFlow",
        {"image_model": "mage_flow", "num_layers": 7, "attention_head_dim": 24, "num_attention_heads": 2,
         "joint_attention_dim": 48, "axes_dims_rope": (8, 8, 8)},
        qwen_outputs, LAST_SIX_OF_SEVEN, (11, 48), through_loader=False, channels=128,
    ),
    "JoyImage": Small(
        "JoyImage",
        {"image_model": "joyimage", "hidden_size": 48, "num_attention_heads": 2, "text_dim": 48, "num_layers": 7,
         "rope_dim_list": [8, 8, 8]},
        joyimage_outputs, LAST_SIX_OF_SEVEN, (11, 48), through_loader=False, channels=16, frame=True,
    ),
}  # fmt: skip

# The loader gives a network of a width that it does not know ten blocks and sixteen heads.
LOADED_COSMOS = {
    name: Small(
        config, {**COSMOS, "image_model": image_model, "model_channels": 192},
        cosmos_outputs, tuple(range(4, 10)), (11, 1024), channels=16, frame=True, without=without,
    )
    for name, config, image_model, without in (
        ("Anima", "Anima", "anima", ADAPTER), ("Cosmos-Predict2", "CosmosT2IPredict2", "cosmos_predict2", None)
    )
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
    if not hasattr(comfy.supported_models, small.config):
        pytest.skip(f"this ComfyUI has no {small.config}")
    config = getattr(comfy.supported_models, small.config)({**small.unet_config, "dtype": torch.float32})
    config.unet_config.update(small.unet_config)  # where the class has sizes of its own
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
