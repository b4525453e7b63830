"""The kinds of diffusion models this pack reads: which self-attention layers each has, and how to find them in a pass.

In a UNet ComfyUI names each layer. In a transformer every attention call of a forward pass can be observed, and the
place of a call in their order says which layer it is. That order is fixed by the model's class, so classes are told
apart by their exact name: a class that is not listed is refused, not guessed at.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from comfy.ldm.modules.attention import SpatialTransformer, SpatialVideoTransformer
from comfy.ldm.modules.diffusionmodules.openaimodel import Downsample, TimestepBlock, UNetModel, Upsample

AUTO_LAYER_COUNT = 6  # the paper: the last six layers of the network, whatever its depth

# By list of blocks, what most transformers say of them in their transformer_options, beside the block's number. SD3,
# AuraFlow and the refiners of Lumina say nothing.
_BLOCK_TYPES = {
    "double_blocks": "double", "single_blocks": "single", "transformer_blocks": "double", "blocks": "double",
    "layers": "double",
}  # fmt: skip


@dataclass(frozen=True)
class AttentionLayer:
    """One self-attention layer.

    Attributes:
        index: position in execution order, from 0.
        block: where it is. In a UNet ComfyUI's name for it, the key of patches_replace["attn1"]: (stage, block number,
            transformer index). In a transformer (list of blocks, block number, attention in it).
        halvings: how often the latent has been halved in size before it gets here; a patch of 2x2 is one halving.
        call: in a transformer, which attention call of a forward pass it is, from 0; None in a UNet.
        joint: whether text and other tokens take part, before those of the picture.
        text_behind: whether, where they take part, they stand behind those of the picture.
        padded_to: the picture's tokens are filled up to a multiple of this.
        block_type: what ComfyUI calls its kind of block as `block_type`; None where it says nothing.
    """

    index: int
    block: tuple[str, int, int]
    halvings: int
    call: int | None = None
    joint: bool = False
    padded_to: int = 1
    block_type: str | None = None
    text_behind: bool = False

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the layer's token grid for a latent of height x width (latent pixels)."""
        for _ in range(self.halvings):
            height, width = (height + 1) // 2, (width + 1) // 2  # padding: odd sizes are rounded up
        return height, width

    def picture_start(self, tokens: int, grid: tuple[int, int]) -> int:
        """Which of the layer's tokens is the first of the picture."""
        padded = -(-grid[0] * grid[1] // self.padded_to) * self.padded_to
        return tokens - padded if self.joint and not self.text_behind else 0


@dataclass(frozen=True)
class Call:
    """One attention call of a transformer's forward pass.

    Attributes:
        block: see `AttentionLayer.block`.
        joint: see `AttentionLayer.joint`.
        is_layer: False for attention that is no self-attention of the picture.
    """

    block: tuple[str, int, int]
    joint: bool = True
    is_layer: bool = True


@dataclass(frozen=True)
class Architecture:
    """How to read one class of transformers.

    Attributes:
        calls: yields all attention calls of a forward pass in execution order.
        text_width: how wide a token of the text condition is.
        text_tokens: about how many tokens an empty prompt has.
        auto: how many layers, from the last, `auto` stands for.
        patch: how many latent pixels a token is wide, or the attribute that says so.
        block_types: see `AttentionLayer.block_type`, by list of blocks.
        padding: attribute that says what the picture's tokens are filled up to a multiple of.
        overwrites: whether its blocks add to their input in place, which autograd must be told of.
        text_behind: see `AttentionLayer.text_behind`.
        pooled: how wide the pooled prompt is that it cannot do without; None where it can.
        beside: what else an empty prompt must hold.
        distilled_guidance: whether it is told how much guidance to imitate, as FLUX.1-dev is.
    """

    calls: Callable[[torch.nn.Module], Iterator[Call]]
    text_width: Callable[[torch.nn.Module], int]
    text_tokens: int
    auto: int = AUTO_LAYER_COUNT
    patch: str | int = "patch_size"
    block_types: Mapping[str, str] = field(default_factory=lambda: _BLOCK_TYPES)
    padding: str | None = None
    overwrites: bool = False
    text_behind: bool = False
    pooled: Callable[[torch.nn.Module], int] | None = None
    beside: Callable[[torch.nn.Module], dict[str, torch.Tensor]] | None = None
    distilled_guidance: bool = False


def _into(layer: str) -> Callable[[torch.nn.Module], int]:
    """What the linear layer of this name takes."""
    return lambda model: model.get_submodule(layer).in_features


def _blocks(*names: str) -> Callable[[torch.nn.Module], Iterator[Call]]:
    """Lists of blocks that run one after the other, each with one joint attention."""

    def calls(model: torch.nn.Module) -> Iterator[Call]:
        for name in names:
            for number in range(len(getattr(model, name))):
                yield Call((name, number, 0))

    return calls


_FLUX_BLOCKS = _blocks("double_blocks", "single_blocks")


def _sd3_calls(model: torch.nn.Module) -> Iterator[Call]:
    """SD3.5 medium has blocks with a second attention, of the picture alone, after the joint one."""
    for number, block in enumerate(model.joint_blocks):
        yield Call(("joint_blocks", number, 0))
        if block.x_block.x_block_self_attn:
            yield Call(("joint_blocks", number, 1), joint=False)


def _refiners(model: torch.nn.Module) -> Iterator[Call]:
    """Text alone, then the picture alone."""
    for number in range(len(model.context_refiner)):
        yield Call(("context_refiner", number, 0), is_layer=False)
    for number in range(len(model.noise_refiner)):
        yield Call(("noise_refiner", number, 0), joint=False)


def _lumina_calls(model: torch.nn.Module) -> Iterator[Call]:
    yield from _refiners(model)
    yield from _blocks("layers")(model)


def _boogu_calls(model: torch.nn.Module) -> Iterator[Call]:
    """Blocks with a second attention, of the picture alone, after the joint one; then blocks with one."""
    yield from _refiners(model)
    for number in range(len(model.double_stream_layers)):
        yield Call(("double_stream_layers", number, 0))
        yield Call(("double_stream_layers", number, 1), joint=False)
    yield from _blocks("single_stream_layers")(model)


def _self_and_cross(model: torch.nn.Module) -> Iterator[Call]:
    """The picture alone, and then a look at the text, which is no layer."""
    for number in range(len(model.blocks)):
        yield Call(("blocks", number, 0), joint=False)
        yield Call(("blocks", number, 1), is_layer=False)


def _wan_calls(model: torch.nn.Module) -> Iterator[Call]:
    if model.model_type != "t2v":
        raise ValueError("model: Wan image-to-video is not supported, because it needs a video; use text-to-video")
    return _self_and_cross(model)


def _cosmos_calls(model: torch.nn.Module) -> Iterator[Call]:
    if model.in_channels != model.out_channels:
        raise ValueError(
            "model: Cosmos-Predict2 Video2World is not supported, because it needs a video; use Text2Image"
        )
    return _self_and_cross(model)


def _kandinsky_calls(model: torch.nn.Module) -> Iterator[Call]:
    """The text alone; then as in Wan."""
    if model.visual_embed_dim != model.in_visual_dim * math.prod(model.patch_size):
        raise ValueError("model: Kandinsky 5 Video is not supported, because it makes videos; use Kandinsky 5 Image")
    for number in range(len(model.text_transformer_blocks)):
        yield Call(("text_transformer_blocks", number, 0), is_layer=False)
    for number in range(len(model.visual_transformer_blocks)):
        yield Call(("visual_transformer_blocks", number, 0), joint=False)
        yield Call(("visual_transformer_blocks", number, 1), is_layer=False)


def _hunyuan_calls(model: torch.nn.Module) -> Iterator[Call]:
    """The text alone, then as in FLUX."""
    if len(model.patch_size) != 2:
        raise ValueError("model: HunyuanVideo is not supported, because it makes videos; use HunyuanImage 2.1")
    if model.time_r_in is not None:
        raise ValueError(
            "model: HunyuanImage 2.1 distilled is not supported, because it must be told of the next step; use the "
            "model that is not distilled"
        )
    name = "txt_in.individual_token_refiner.blocks"
    for number in range(len(model.get_submodule(name))):
        yield Call((name, number, 0), is_layer=False)
    yield from _FLUX_BLOCKS(model)


def _krea_calls(model: torch.nn.Module) -> Iterator[Call]:
    """The layers of the text encoder among each other, the tokens of the text, then text and picture together."""
    for name in ("txtfusion.layerwise_blocks", "txtfusion.refiner_blocks"):
        for number in range(len(model.get_submodule(name))):
            yield Call((name, number, 0), is_layer=False)
    yield from _blocks("blocks")(model)


def _llama_of_hidream(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    width = model.caption_projection[0].linear.in_features
    return {"conditioning_llama3": torch.zeros(1, max(model.llama_layers) + 1, 128, width)}


def _all_tokens(tokens: int) -> Callable[[torch.nn.Module], dict[str, torch.Tensor]]:
    """Its text has no padding."""
    return lambda _model: {"attention_mask": torch.ones(1, tokens, dtype=torch.long)}


TRANSFORMERS: dict[str, Architecture] = {
    "comfy.ldm.flux.model.Flux": Architecture(
        _FLUX_BLOCKS, _into("txt_in"), 256, auto=7, overwrites=True, distilled_guidance=True
    ),
    "comfy.ldm.chroma.model.Chroma": Architecture(_FLUX_BLOCKS, _into("txt_in"), 256, overwrites=True),
    "comfy.ldm.modules.diffusionmodules.mmdit.OpenAISignatureMMDITWrapper": Architecture(
        _sd3_calls, _into("context_embedder"), 154, pooled=_into("y_embedder.mlp.0")
    ),
    "comfy.ldm.lumina.model.NextDiT": Architecture(
        _lumina_calls, _into("cap_embedder.1"), 32, padding="pad_tokens_multiple"
    ),
    "comfy.ldm.aura.mmdit.MMDiT": Architecture(
        _blocks("double_layers", "single_layers"), _into("cond_seq_linear"), 256
    ),
    "comfy.ldm.qwen_image.model.QwenImageTransformer2DModel": Architecture(
        _blocks("transformer_blocks"), _into("txt_in"), 32
    ),
    "comfy.ldm.wan.model.WanModel": Architecture(_wan_calls, _into("text_embedding.0"), 512),
    "comfy.ldm.anima.model.Anima": Architecture(
        _self_and_cross, _into("blocks.0.cross_attn.k_proj"), 512,
        patch="patch_spatial", block_types={},
    ),
    "comfy.ldm.krea2.model.SingleStreamDiT": Architecture(
        _krea_calls, lambda model: model.txtlayers * model.txtdim, 5, patch="patch", block_types={"blocks": "single"}
    ),
    "comfy.ldm.cosmos.predict2.MiniTrainDIT": Architecture(
        _cosmos_calls, _into("blocks.0.cross_attn.k_proj"), 512, patch="patch_spatial", block_types={}
    ),
    "comfy.ldm.hidream.model.HiDreamImageTransformer2DModel": Architecture(
        _blocks("double_stream_blocks", "single_stream_blocks"),
        lambda model: model.caption_projection[-1].linear.in_features, 128,
        text_behind=True, pooled=_into("p_embedder.pooled_embedder.linear_1"), beside=_llama_of_hidream,
    ),
    "comfy.ldm.hunyuan_video.model.HunyuanVideo": Architecture(
        _hunyuan_calls, _into("txt_in.input_embedder"), 32, overwrites=True, distilled_guidance=True
    ),
    "comfy.ldm.omnigen.omnigen2.OmniGen2Transformer2DModel": Architecture(
        _lumina_calls, _into("time_caption_embed.caption_embedder.1"), 32, block_types={}, beside=_all_tokens(32)
    ),
    "comfy.ldm.boogu.model.BooguTransformer2DModel": Architecture(
        _boogu_calls, _into("time_caption_embed.caption_embedder.1"), 32, beside=_all_tokens(32)
    ),
    "comfy.ldm.chroma_radiance.model.ChromaRadiance": Architecture(_FLUX_BLOCKS, _into("txt_in"), 256, overwrites=True),
    "comfy.ldm.kandinsky5.model.Kandinsky5": Architecture(
        _kandinsky_calls, _into("text_embeddings.in_layer"), 32, block_types={"visual_transformer_blocks": "double"},
        pooled=_into("pooled_text_embeddings.in_layer"),
    ),
    "comfy.ldm.ideogram4.model.Ideogram4Transformer2DModel": Architecture(
        _blocks("layers"), _into("llm_cond_proj"), 32, patch=1, block_types={}
    ),
    "comfy.ldm.lens.model.LensTransformer2DModel": Architecture(
        _blocks("transformer_blocks"), _into("txt_in"), 32, patch=1, text_behind=True
    ),
    "comfy.ldm.mage_flow.model.MageFlowTransformer2DModel": Architecture(
        _blocks("transformer_blocks"), _into("txt_in"), 32
    ),
    "comfy.ldm.joyimage.model.JoyImageTransformer3DModel": Architecture(
        _blocks("double_blocks"), _into("condition_embedder.text_embedder.linear_1"), 32, text_behind=True,
    ),
}  # fmt: skip

SUPPORTED = (
    "SD1.x, SD2.x, SDXL and its refiner, SD3 and SD3.5, FLUX, Chroma, Lumina 2 and Z-Image, AuraFlow, Qwen-Image, Wan, "
    "Anima, Krea 2, Cosmos-Predict2, HiDream, HunyuanImage 2.1, OmniGen2, Boogu, Chroma Radiance, Kandinsky 5 Image, "
    "Ideogram 4, Lens, Mage-Flow, JoyImage"
)

_UNSEEN = "ComfyUI does not let custom nodes see its attention"

REFUSED: dict[str, tuple[str, str]] = {
    "comfy.ldm.pixart.pixartms.PixArtMS": ("PixArt", _UNSEEN),
    "comfy.ldm.hydit.models.HunYuanDiT": ("HunyuanDiT", _UNSEEN),
    "comfy.ldm.ernie.model.ErnieImageModel": ("ERNIE-Image", _UNSEEN),
    "comfy.ldm.hidream_o1.model.HiDreamO1Transformer": ("HiDream-O1", "it keeps parts of one pass for the next"),
    "comfy.ldm.pixeldit.model.PixDiT_T2I": ("PixelDiT", "its gradient would depend on the memory that there is"),
}


def transformer(diffusion_model: torch.nn.Module) -> Architecture | None:
    """How to read a transformer; None for UNets and for models that cannot be read."""
    return TRANSFORMERS.get(_class_name(diffusion_model))


def attention_calls(diffusion_model: torch.nn.Module) -> int:
    """How many attention calls a forward pass of a transformer makes, those that are no layer among them."""
    return sum(1 for _ in TRANSFORMERS[_class_name(diffusion_model)].calls(diffusion_model))


def auto_layer_count(diffusion_model: torch.nn.Module) -> int:
    """How many layers, from the last, `auto` stands for in a model."""
    found = transformer(diffusion_model)
    return AUTO_LAYER_COUNT if found is None else found.auto


def token_width(diffusion_model: torch.nn.Module) -> int:
    """How many pixels of the latent a token is wide and high where a model begins."""
    found = transformer(diffusion_model)
    if found is None:
        return 1
    patch = getattr(diffusion_model, found.patch) if isinstance(found.patch, str) else found.patch
    return patch if isinstance(patch, int) else patch[-1]  # Wan: (frames, h, w)


def overwrites_activations(diffusion_model: torch.nn.Module) -> bool:
    """Whether a model's blocks add to their input in place, after autograd has saved it."""
    found = transformer(diffusion_model)
    return found is not None and found.overwrites


def blocks(diffusion_model: torch.nn.Module) -> tuple[list[torch.nn.Module], ...]:
    """The blocks that a pass can run again in its backward, in ever larger choices; none lies within another.

    Of a UNet first the transformers alone, in which the most is kept for the least time, then the rest too.
    """
    if isinstance(diffusion_model, UNetModel):
        found = [module for _, _, block in _unet_blocks(diffusion_model) for module in block]
        transformers = [module for module in found if isinstance(module, SpatialTransformer)]
        return transformers, [module for module in found if isinstance(module, SpatialTransformer | TimestepBlock)]
    names = dict.fromkeys(call.block[0] for call in TRANSFORMERS[_class_name(diffusion_model)].calls(diffusion_model))
    return ([block for name in names for block in diffusion_model.get_submodule(name)],)


def blocks_of_fused_kernels(network: torch.nn.Module) -> list[torch.nn.Module]:
    """The blocks of a network, or of a model around one, that may call kernels without a backward in training, too.

    Some transformers do so in each version of ComfyUI, and not the same ones; UNets have no such kernels.
    """
    diffusion_model = getattr(network, "diffusion_model", network)
    return [] if transformer(diffusion_model) is None else blocks(diffusion_model)[-1]


def list_layers(diffusion_model: torch.nn.Module) -> tuple[AttentionLayer, ...]:
    """The self-attention layers of a model in execution order.

    Raises:
        ValueError: the model is of a kind this pack cannot read, or has no self-attention.
    """
    if isinstance(diffusion_model, UNetModel):
        return _unet_layers(diffusion_model)
    name = _class_name(diffusion_model)
    if name in TRANSFORMERS:
        return _transformer_layers(diffusion_model, TRANSFORMERS[name])
    if name in REFUSED:
        raise ValueError("model: {} is not supported, because {}; use one of {}".format(*REFUSED[name], SUPPORTED))
    kind = type(diffusion_model).__name__
    raise ValueError(
        f"model: {kind} is not supported, because this pack does not know its layers; use one of {SUPPORTED}"
    )


def _class_name(diffusion_model: torch.nn.Module) -> str:
    return f"{type(diffusion_model).__module__}.{type(diffusion_model).__qualname__}"


def _transformer_layers(model: torch.nn.Module, architecture: Architecture) -> tuple[AttentionLayer, ...]:
    halvings = token_width(model).bit_length() - 1
    padded_to = 1 if architecture.padding is None else getattr(model, architecture.padding) or 1
    found = [(number, call) for number, call in enumerate(architecture.calls(model)) if call.is_layer]
    return tuple(
        AttentionLayer(
            index, call.block, halvings, number, call.joint, padded_to,
            architecture.block_types.get(call.block[0]), architecture.text_behind,
        )
        for index, (number, call) in enumerate(found)
    )  # fmt: skip


def _unet_layers(unet: UNetModel) -> tuple[AttentionLayer, ...]:
    found: list[tuple[tuple[str, int, int], int]] = []
    halvings = 0
    for stage, number, block in _unet_blocks(unet):
        for module in block:
            if isinstance(module, SpatialVideoTransformer):
                raise ValueError("model: video models are not supported; use an image model such as SD1.5 or SDXL")
            if isinstance(module, SpatialTransformer):
                for i, block_of_it in enumerate(module.transformer_blocks):
                    if not block_of_it.disable_self_attn:
                        found.append(((stage, number, i), halvings))
            elif isinstance(module, Downsample):
                halvings += 1
            elif isinstance(module, Upsample):
                halvings -= 1
    if not found:
        raise ValueError(
            f"model: this {type(unet).__name__} has no self-attention layer; choose a checkpoint that has some, such "
            "as SD1.5"
        )
    return tuple(AttentionLayer(index, block, level) for index, (block, level) in enumerate(found))


def _unet_blocks(unet: UNetModel) -> Iterator[tuple[str, int, torch.nn.Module]]:
    """Yield (stage, number, block) in execution order, named as ComfyUI names them in transformer_options."""
    for number, block in enumerate(unet.input_blocks):
        yield "input", number, block
    if unet.middle_block is not None:
        yield "middle", 0, unet.middle_block
    for number, block in enumerate(unet.output_blocks):
        yield "output", number, block
