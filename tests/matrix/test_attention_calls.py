"""Attention calls are told apart by their order: what disturbs it is found out. What they ask for is honoured."""

import pytest
import small_models
import torch
from comfy.ldm.modules.attention import attention_pytorch, optimized_attention
from comfy.patcher_extension import WrappersMP
from guided import Graph

import nodes

SIZE = (8, 8)
STATED = {  # models that say which block they are in: a list of their blocks, and how often one attends
    "FLUX.1-dev": ("single_blocks", 1), "FLUX.2": ("single_blocks", 1), "Chroma": ("single_blocks", 1),
    "Lumina 2": ("layers", 1), "Z-Image": ("layers", 1), "Qwen-Image": ("transformer_blocks", 1),
    "Wan 2.1": ("blocks", 2), "Krea 2": ("blocks", 1), "Anima": ("blocks", 2),
}  # fmt: skip

ALSO_STATED = {
    "Cosmos-Predict2",
    "HunyuanImage 2.1",
    "Chroma Radiance",
    "Kandinsky 5 Image",
    "Lens",
    "Mage-Flow",
    "JoyImage",
}


@pytest.fixture
def read(pack_module, tmp_path):
    """A function that loads a small model, lets it be changed, and reads some layers of it."""

    def read(name, change=lambda network: None, chosen=slice(None)):
        small = small_models.MODELS[name]
        model = small_models.load(small, tmp_path).model
        change(model.diffusion_model)
        conditioning = pack_module("attention.conditioning")
        x = torch.randn(1, small.channels, *SIZE, generator=torch.Generator().manual_seed(0))
        conds = conditioning.for_pass(
            conditioning.encode(model, conditioning.from_socket(small.cond(3)), x, size=x.shape[-2:]), 0.6, 1
        )
        layers = pack_module("attention.layers").list_layers(model.diffusion_model)[chosen]
        with torch.inference_mode():
            return pack_module("attention.capture").capture_features(model, x, torch.tensor(0.6), conds, layers)

    return read


def attend_once_more(block, args, kwargs):
    """What a patch of another pack may do before a block."""
    q = torch.zeros(1, 1, 200, 8)
    optimized_attention(q, q, q, 1, skip_reshape=True, transformer_options=kwargs["transformer_options"])


@pytest.mark.parametrize("name", STATED)
def test_an_attention_more_is_found_out(read, name):
    blocks, _ = STATED[name]

    def change(network):
        getattr(network, blocks)[1].register_forward_pre_hook(attend_once_more, with_kwargs=True)

    with pytest.raises(
        ValueError, match=r"model: layer \d+ is expected in (\w+ )?block \d, and came by in (\w+ )?block \d; an"
    ):
        read(name, change)


@pytest.mark.parametrize("name", STATED)
def test_an_attention_less_is_found_out(read, name):
    """A block that another pack leaves out (Skip Layer Guidance is of this kind)."""
    blocks, _ = STATED[name]

    def change(network):
        def left_out(x, *args, **kwargs):
            return (kwargs["encoder_hidden_states"], kwargs["hidden_states"]) if x is None else x

        block = getattr(network, blocks)[1]
        block.forward = (lambda **kwargs: left_out(None, **kwargs)) if name == "Qwen-Image" else left_out

    with pytest.raises(
        ValueError, match=r"model: layer \d+ is expected in (\w+ )?block 1, and came by in (\w+ )?block 2; an"
    ):
        read(name, change)


def test_what_every_model_states_is_known(pack_module, read, monkeypatch):
    """The models above, and no others, say where they are; what they say fits every layer that has a name for it."""
    capture = pack_module("attention.capture")
    check, seen = capture.check_place, set()

    def checking(layer, options):
        check(layer, options)
        if "block_index" in options:
            seen.add((name, (options.get("block_type"), options["block_index"]) == (layer.block_type, layer.block[1])))
        else:
            assert layer.block_type is None

    monkeypatch.setattr(capture, "check_place", checking)
    for name in small_models.MODELS:
        read(name)
    assert seen == {(name, True) for name in STATED.keys() | ALSO_STATED}


@pytest.mark.parametrize("name", ["FLUX.1-dev", "SD1.5", "SD3"])
def test_fewer_tokens_than_the_picture_has(pack_module, read, monkeypatch, name):
    """Tokens that another node has merged or dropped."""
    layer = pack_module("attention.architectures").AttentionLayer
    monkeypatch.setattr(layer, "grid", lambda self, height, width: (height * 4, width))
    with pytest.raises(ValueError, match=r"model: its attention in layer 0 has \d+ tokens, too few for 32 x 8 of the"):
        read(name)


@pytest.fixture
def counted(pack_module):
    """A function that gives a reader one attention call, its only layer, and returns output and features."""

    def counted(q, k, v, heads, layers=1, **kwargs):
        kind = pack_module("attention.architectures").AttentionLayer
        reader = pack_module("attention.capture")._Reader(
            [kind(i, ("x", i, 0), 0, i) for i in range(2)][:2], (2, 2), {}
        )
        reader._by_call = {0: reader._layers[0]} if layers else {}
        out = reader._counted(None, q, k, v, heads, skip_output_reshape=True, **kwargs)
        return out, reader.features.get(0)

    return counted


def reference(q, k, v, scale):
    """softmax(scale q k^T) v, written out, [b heads t d]."""
    return torch.softmax(q @ k.transpose(-1, -2) * scale, dim=-1) @ v


@pytest.mark.parametrize("layers", [1, 0], ids=["a layer", "not a layer"])
@pytest.mark.parametrize("flat", [False, True], ids=["heads apart", "heads together"])
def test_scale_and_shared_heads_are_honoured(counted, layers, flat):
    """And the features are such that plain attention of them, with 1 / sqrt(d), is the layer's."""
    q, k, v = (torch.randn(2, heads, 4, 8, generator=torch.Generator().manual_seed(heads)) for heads in (6, 2, 2))
    given = [tensor.transpose(1, 2).flatten(2) if flat else tensor for tensor in (q, k, v)]
    nothing = {"low_precision_attention": False, "is_causal": False, "dropout_p": 0.0, "not_known": None}
    out, features = counted(*given, 6, layers, skip_reshape=not flat, scale=0.7, enable_gqa=True, **nothing)
    expected = reference(q, k.repeat_interleave(3, dim=1), v.repeat_interleave(3, dim=1), 0.7)
    torch.testing.assert_close(out, expected)
    if layers:
        torch.testing.assert_close(reference(features.q, features.k, features.v, 8**-0.5), expected)
        torch.testing.assert_close(features.out, expected)


@pytest.mark.parametrize("layers", [1, 0], ids=["a layer", "not a layer"])
def test_what_is_not_known_is_declined(counted, layers):
    q = torch.zeros(1, 1, 4, 8)
    with pytest.raises(
        ValueError, match=r"model: its attention is computed with is_causal, sinks, which this pack does"
    ):
        counted(q, q, q, 1, layers, skip_reshape=True, sinks=q, is_causal=True)


def exchange_of(pack_module, strength=1.5, before=None):
    """An exchange in the second call, of a picture of 2 x 3 tokens behind three of the text."""
    layer = pack_module("attention.layers").AttentionLayer(0, ("blocks", 0, 0), 0, call=1, joint=True)
    k_s, v_s = torch.randn(2, 1, 4, 5, 8, generator=torch.Generator().manual_seed(9))
    bank = pack_module("attention.bank").TokenBank(k_s, v_s)
    return pack_module("attention.exchange").KeyValueExchange([layer], {0: bank}, (2, 3), strength, before)


def test_what_is_not_known_is_declined_where_a_reference_is_injected(pack_module):
    """In the layers that are injected; the others are ComfyUI's own."""
    exchange, q = exchange_of(pack_module), torch.zeros(1, 4, 10, 8)

    def future(q, k, v, heads, *, sinks, **kwargs):
        return q + sinks

    assert torch.equal(exchange(future, q, q, q, 4, skip_reshape=True, sinks=1), q + 1)
    with pytest.raises(ValueError, match="model: its attention is computed with sinks, which this pack does not know"):
        exchange(future, q, q, q, 4, skip_reshape=True, sinks=1)


class Held:
    """As newer versions of ComfyUI hand on q, k and v: a kernel takes the tensor out, and it is gone."""

    def __init__(self, tensor):
        self.tensor = tensor

    def peek(self):
        assert self.tensor is not None
        return self.tensor

    def take(self):
        tensor, self.tensor = self.peek(), None
        return tensor


@pytest.mark.parametrize("held", [True, False])
def test_a_kernel_that_uses_up_what_it_is_given(pack_module, counted, held):
    """What is injected and what is read is found in what the model asked for, not in what is left of it."""
    tensors = torch.randn(3, 1, 4, 10, 8, generator=torch.Generator().manual_seed(0))
    asked = {"skip_reshape": True, "skip_output_reshape": True}

    def using_up(q, k, v, heads, **asked):
        given = [each.take() if held else each for each in (q, k, v)]
        out = attention_pytorch(*given, heads, **asked)
        for each in given:
            each.zero_()
        return out

    def shown():
        return [Held(each.clone()) if held else each.clone() for each in tensors]

    tried, known = exchange_of(pack_module), exchange_of(pack_module)
    found = [tried(using_up, *shown(), 4, **asked) for _ in range(2)]
    expected = [known(attention_pytorch, *tensors, 4, **asked) for _ in range(2)]
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not torch.equal(found[0], found[1])
    if held:
        torch.testing.assert_close(counted(*shown(), 4, skip_reshape=True)[0], expected[0])


@pytest.fixture(scope="module", params=["SD1.5", "Lumina 2"])
def chosen(request, pack, custom_samplers, tmp_path_factory, random_latent):
    """A styled graph of one step."""
    small = small_models.MODELS[request.param]
    model, text = small_models.load(small, tmp_path_factory.mktemp("model")), small.cond(1)
    graph = Graph(pack, model, text, text, {"samples": torch.zeros(1, small.channels, *SIZE)}, steps=1)
    return graph.styled(random_latent(1, (1, small.channels, *SIZE))).but(iterations=1)


@torch.inference_mode()
def node(name, *args, **kwargs):
    """What a node of ComfyUI puts out."""
    return nodes.NODE_CLASS_MAPPINGS[name].execute(*args, **kwargs).result


def backend(model, called, kernel=attention_pytorch):
    """As a node of newer versions does that chooses the kernel of one model: an override, for containers another."""

    def override(_func, *args, **kwargs):
        called.append(torch.is_grad_enabled())
        return kernel(*args, **kwargs)

    override.container_function = override
    clone = model.clone()
    clone.model_options["transformer_options"]["optimized_attention_override"] = override
    return clone


def wrapped_inside(model, called):
    """As nodes do that wrap what overrides the attention by then, within the model."""

    def wrapper(executor, *args, **kwargs):
        options = next(each for each in [*args, *kwargs.values()] if isinstance(each, dict) and "sigmas" in each)
        before = options.get("optimized_attention_override")

        def override(func, *args, **kwargs):
            called.append(torch.is_grad_enabled())
            return func(*args, **kwargs) if before is None else before(func, *args, **kwargs)

        options["optimized_attention_override"] = override
        return executor(*args, **kwargs)

    clone = model.clone()
    clone.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "another pack", wrapper)
    return clone


@pytest.mark.parametrize(
    ("chosen", "set_by"),
    [("SD1.5", backend), ("Lumina 2", backend), ("Lumina 2", wrapped_inside)],
    indirect=["chosen"],
)
def test_a_node_that_chooses_the_kernel_of_a_model(chosen, set_by):
    """Before and behind ours, and below and above: it is called in each denoising pass, in none of the pack's."""
    ways = {
        "inject": lambda graph: node(
            "ADInjectReferenceKV", graph.model, graph.style, strength=0.5, start_percent=0.0, end_percent=1.0
        )[0],
        "guide": lambda graph: graph.patched(),
    }
    called = []
    plain = chosen.core()
    alike = chosen.core(set_by(chosen.model, called))
    assert torch.equal(alike, plain)
    passes = len(called)
    assert passes > 0
    for way in ways.values():
        expected = chosen.core(way(chosen))
        assert not torch.equal(expected, plain)
        for model in (way(chosen.but(model=set_by(chosen.model, called))), set_by(way(chosen), called)):
            called.clear()
            assert torch.equal(chosen.core(model), expected)
            assert len(called) in (passes, 2 * passes) and not any(called)
    assert torch.equal(chosen.core(), plain)


def test_the_attention_map_is_made_by_plain_attention(chosen):
    """A kernel that another node has chosen, one that is far off here, has no part in it."""
    latent = {"samples": torch.randn(1, chosen.latent["samples"].shape[1], *SIZE)}

    def found(model):
        return node("ADAttentionMap", model, chosen.style, latent, conditioning=chosen.positive, layer="mean")[0]

    off = []
    other = backend(chosen.model, off, lambda q, *args, **kwargs: 0 * attention_pytorch(q, *args, **kwargs))
    assert torch.equal(found(other), found(chosen.model))
    assert off == []


SKIPPED = {"FLUX.1-dev": ("single_block", r"layer 4 is expected in single block 2, and came by in single block 3"),
           "SD3": ("double_block", r"6 attention calls came by, 7 are expected")}  # fmt: skip


@pytest.mark.parametrize("name", SKIPPED)
def test_injection_refuses_a_pass_whose_blocks_are_skipped(name, pack, custom_samplers, tmp_path, random_latent):
    """By what the model says of its blocks, or by their number; a model node may skip some (Skip Layer Guidance)."""
    (block, says), small = SKIPPED[name], small_models.MODELS[name]
    model, text = small_models.load(small, tmp_path), small.cond(1)
    graph = Graph(pack, model, text, text, {"samples": torch.zeros(1, small.channels, *SIZE)}, steps=1)
    graph = graph.styled(random_latent(1, (1, small.channels, *SIZE)))
    node = nodes.NODE_CLASS_MAPPINGS["ADInjectReferenceKV"]
    with torch.inference_mode():
        injected = node.execute(model, graph.style, strength=1.0, start_percent=0.0, end_percent=1.0)[0]
    injected.set_model_patch_replace(
        lambda given, _: {k: given[k] for k in ("img", "txt") if k in given}, "dit", block, 2
    )
    with pytest.raises(ValueError, match=f"model: {says}"):
        graph.core(injected)


def biases(t, s):
    """Masks as models give them, and the same added to the logits, [b heads t t + s]: reference tokens are all seen."""
    hidden = torch.rand(2, 1, t, t, generator=torch.Generator().manual_seed(1)) < 0.3
    added = torch.randn(2, t, t, generator=torch.Generator().manual_seed(2))
    of_prompt = torch.zeros(2, 1, t)
    of_prompt[1, 0, 1] = -torch.inf
    yield None, torch.zeros(1, 1, t, t)
    yield ~hidden, torch.zeros(2, 1, t, t).masked_fill(hidden, -torch.inf)
    yield added, added[:, None]
    yield of_prompt, of_prompt[:, None].expand(-1, -1, t, -1)


@pytest.mark.parametrize("flat", [False, True], ids=["heads apart", "heads together"])
@pytest.mark.parametrize("weighted", [False, True], ids=["alike", "weighted"])
def test_exchanged_keys_and_values(pack_module, flat, weighted):
    """Against attention written out: the picture sees the reference and all other tokens, which stay what they are."""
    layer = pack_module("attention.layers").AttentionLayer(0, ("blocks", 0, 0), 0, call=1, joint=True)
    q, k, v, k_s, v_s = (
        torch.randn(batch, heads, t, 8, generator=torch.Generator().manual_seed(i))
        for i, (batch, heads, t) in enumerate(((2, 4, 10), (2, 2, 10), (2, 2, 10), (1, 4, 5), (1, 4, 5)))
    )
    log_weight = torch.tensor([0.0, 0, 0, -1, -1]) if weighted else None
    bank = pack_module("attention.bank").TokenBank(k_s, v_s, log_weight)
    given = [tensor.transpose(1, 2).flatten(2) if flat else tensor for tensor in (q, k, v)]
    picture, options = slice(3, 9), {"reference_image_num_tokens": [1]}  # three of the text, one of another picture
    others = [0, 1, 2, 9]
    for mask, bias in biases(10, 5):
        exchange = pack_module("attention.exchange").KeyValueExchange([layer], {0: bank}, (2, 3), 1.5, None)
        asked = {"mask": mask, "skip_reshape": not flat, "skip_output_reshape": not flat, "enable_gqa": True}
        own, found = (
            exchange(attention_pytorch, *given, 4, **asked, scale=0.5, transformer_options=options) for _ in range(2)
        )
        keys, values = (
            torch.cat([each.repeat_interleave(2, dim=1)[:, :, others], offered.expand(2, -1, -1, -1)], dim=2)
            for each, offered in ((k, k_s), (v, v_s))
        )
        logits = q[:, :, picture] @ keys.transpose(-1, -2) * 0.5
        logits[..., :4] += bias[:, :, picture][..., others]
        logits[..., 4:] += 0 if log_weight is None else log_weight
        looked = logits.softmax(-1) @ values
        if flat:
            looked = looked.transpose(1, 2).flatten(2)
        expected = own.clone()
        expected[..., picture, :] += 1.5 * (looked - own[..., picture, :])
        torch.testing.assert_close(found, expected)
        assert torch.equal(found[..., others, :], own[..., others, :])
        exchange.check_calls(2)
