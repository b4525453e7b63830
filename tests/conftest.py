"""Pytest set-up: a real ComfyUI on the CPU, the pack loaded the way ComfyUI loads it, and a small SD1.5.

The ComfyUI folder is taken from the environment variable COMFYUI_PATH, else from `.comfyui/ComfyUI-0.30.0`
inside the checkout. ComfyUI keeps its models, input, output and user folders in a temporary directory.
"""

from __future__ import annotations

import asyncio
import atexit
import gc
import importlib
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).resolve().parent.parent
COMFYUI = Path(os.environ.get("COMFYUI_PATH", CHECKOUT / ".comfyui" / "ComfyUI-0.30.0")).resolve()
BASE_DIRECTORY = Path(tempfile.mkdtemp(prefix="attention-distillation-tests-"))
atexit.register(shutil.rmtree, BASE_DIRECTORY, ignore_errors=True)


def _start_comfyui() -> None:
    """Put ComfyUI first on the import path and let it parse the command line of these tests, not pytest's."""
    if not (COMFYUI / "comfy").is_dir():
        pytest.exit(f"No ComfyUI in {COMFYUI}: set COMFYUI_PATH to a ComfyUI folder.", returncode=4)
    sys.path.insert(0, str(COMFYUI))
    import comfy.options

    comfy.options.enable_args_parsing()
    argv = sys.argv
    sys.argv = ["main.py", "--cpu", "--use-pytorch-cross-attention", "--disable-all-custom-nodes"]
    sys.argv += ["--base-directory", str(BASE_DIRECTORY), "--database-url", "sqlite:///:memory:"]
    try:
        importlib.import_module("comfy.cli_args")
        importlib.import_module("utils")  # early, as main.py does: nodes.py of 0.24 puts comfy/utils.py in front of it
    finally:
        sys.argv = argv
        comfy.options.enable_args_parsing(False)


_start_comfyui()

import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402
import comfy.ops  # noqa: E402
import comfy.supported_models  # noqa: E402
import comfy.utils  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel  # noqa: E402
from comfy.model_patcher import ModelPatcher  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:  # its neighbours use the other cores
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for servers that tests start: two of them would wait for each other

CONTEXT_DIM = 768
WIDTH = 64
"""A fifth of a real one's: most of a test's time would go into arithmetic that shows nothing more."""
UNET_CONFIG = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": WIDTH,
    "num_res_blocks": [1, 1],
    "channel_mult": [1, 1],
    "transformer_depth": [1, 1],
    "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1],
    "num_heads": 8,
    "use_spatial_transformer": True,
    "context_dim": CONTEXT_DIM,
    "legacy": False,
}
"""A two-level SD1.5: seven self-attention layers of eight heads."""

QUERY_KEY_GAIN = 1.7
BRANCH_GAIN = 0.5
BRANCH_ENDS = ("out_layers.3.weight", "proj_out.weight", "to_out.0.weight", "ff.net.2.weight")


def _fill(unet: UNetModel, generator: torch.Generator) -> None:
    """Give every parameter fixed random values that keep the activations near unit size.

    Queries and keys are a little larger, so that the attention weights are neither equal nor one-hot; the
    last layer of every residual branch is smaller.
    """
    for name, parameter in unet.named_parameters():
        values = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim == 1:
            values = 1 + 0.1 * values if name.endswith("weight") else 0.05 * values
        else:
            gain = 1.0
            if name.endswith(("attn1.to_q.weight", "attn1.to_k.weight")):
                gain = QUERY_KEY_GAIN
            elif name.endswith(BRANCH_ENDS):
                gain = BRANCH_GAIN
            values *= gain / parameter[0].numel() ** 0.5
        parameter.copy_(values)


def _fit_output(unet: UNetModel, generator: torch.Generator) -> None:
    """Fit the output convolution (centre tap only, ridge regression) to the noise of smooth noised latents.

    A random network becomes a rough denoiser, so that samples stay in the range of real latents.
    """
    count = 16
    sigma = torch.logspace(-1.5, 1.16, count)[:, None, None, None]
    smooth = torch.randn(count, 4, 5, 5, generator=generator)
    clean = F.interpolate(smooth, size=(16, 16), mode="bicubic", align_corners=True)
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.linspace(20, 999, count)
    features: list[torch.Tensor] = []
    handle = unet.out[2].register_forward_pre_hook(lambda module, inputs: features.append(inputs[0]))
    context = torch.randn(count, 77, CONTEXT_DIM, generator=generator)
    unet((clean + sigma * noise) / (sigma**2 + 1) ** 0.5, timesteps, context=context, transformer_options={})
    handle.remove()
    rows = features[0].permute(0, 2, 3, 1).reshape(-1, features[0].shape[1]).double()
    rows = torch.cat([rows, torch.ones_like(rows[:, :1])], dim=1)
    target = noise.permute(0, 2, 3, 1).reshape(-1, 4).double()
    gram = rows.T @ rows + 1e-3 * len(rows) * torch.eye(rows.shape[1], dtype=rows.dtype)
    solution = torch.linalg.solve(gram, rows.T @ target).float()
    unet.out[2].weight.zero_()
    unet.out[2].weight[:, :, 1, 1] = solution[:-1].T
    unet.out[2].bias.copy_(solution[-1])


@pytest.fixture(scope="session")
def sd15_weights() -> dict[str, torch.Tensor]:
    """Weights of the small SD1.5, by their names in its network."""
    generator = torch.Generator("cpu").manual_seed(20250220)
    with torch.no_grad():
        unet = UNetModel(**UNET_CONFIG, dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
        _fill(unet, generator)
        _fit_output(unet, generator)
    return {name: value.contiguous() for name, value in unet.state_dict().items()}


@pytest.fixture(scope="session")
def load_sd15(sd15_weights: dict[str, torch.Tensor]) -> Callable[..., ModelPatcher]:
    """A function that makes a fresh small SD1.5 in inference mode, as ComfyUI's loader does once it knows the network.

    (It knows an SD1.5 by its width, so this one is told.) `load_sd15(dtype=torch.float32, compute_dtype=None)`: weights
    stored in dtype. On a CPU ComfyUI computes float16 and bfloat16 weights in another type; here the computation is in
    compute_dtype, which is dtype itself if not given.
    """

    def load(
        dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype | None = None, disable_dynamic: bool = True
    ) -> ModelPatcher:
        assert disable_dynamic  # ComfyUI asks for that where it reads the model once more
        stored = torch.float32 if dtype == torch.float64 else dtype
        device = comfy.model_management.get_torch_device()
        config = comfy.supported_models.SD15({**UNET_CONFIG, "adm_in_channels": None})
        supported = config.supported_inference_dtypes
        config.set_inference_dtype(stored, comfy.model_management.unet_manual_cast(stored, device, supported))
        with torch.inference_mode():
            model = config.get_model(sd15_weights, "")
            model.load_model_weights(dict(sd15_weights), "")
            patcher = ModelPatcher(model, load_device=device, offload_device=device)
            if dtype == torch.float64:
                model.diffusion_model.double()
                model.diffusion_model.dtype = torch.float64
            model.manual_cast_dtype = None if compute_dtype in (None, dtype) else compute_dtype
        patcher.cached_patcher_init = (load, (dtype, compute_dtype))
        assert all(p.is_inference() and p.dtype == dtype for p in model.diffusion_model.parameters())
        assert model.get_dtype_inference() == (compute_dtype or dtype)
        return patcher

    return load


@pytest.fixture(scope="session")
def sd15(load_sd15: Callable[..., ModelPatcher]) -> ModelPatcher:
    """The small SD1.5 in float32. Shared by all tests: clone it before patching it."""
    return load_sd15()


@pytest.fixture(scope="session")
def sd15_fp16(load_sd15: Callable[..., ModelPatcher]) -> ModelPatcher:
    """The small SD1.5 stored and computed in float16."""
    return load_sd15(torch.float16)


@pytest.fixture(scope="session")
def sd15_bf16(load_sd15: Callable[..., ModelPatcher]) -> ModelPatcher:
    """The small SD1.5 stored and computed in bfloat16."""
    return load_sd15(torch.bfloat16)


@pytest.fixture(scope="session")
def sd15_float64(load_sd15: Callable[..., ModelPatcher]) -> ModelPatcher:
    """The small SD1.5 in float64. BaseModel.apply_model ends in float32; the diffusion model does not."""
    return load_sd15(torch.float64)


@pytest.fixture(scope="session")
def pack() -> ModuleType:
    """The checkout, loaded as a custom node by ComfyUI's own loader: the pack's package module."""
    import nodes

    assert asyncio.run(nodes.load_custom_node(str(CHECKOUT))), "ComfyUI could not load the pack: see its log"
    return sys.modules[str(CHECKOUT).replace(".", "_x_")]


@pytest.fixture(scope="session")
def pack_module(pack: ModuleType) -> Callable[[str], ModuleType]:
    """A function that imports a module of the pack by its name inside it: `pack_module("guidance.step")`."""
    return lambda name: importlib.import_module(f"{pack.__name__}.{name}")


@pytest.fixture(scope="session")
def encode_zeros() -> Callable[[], list]:
    """A function that makes a conditioning of zeros, [1, 77, 768], in ComfyUI's list format."""
    return lambda: [[torch.zeros(1, 77, CONTEXT_DIM), {}]]


@pytest.fixture(scope="session")
def encode_random() -> Callable[[int], list]:
    """A function that makes a normally distributed conditioning from a seed, [1, 77, 768], as a list."""

    def encode(seed: int) -> list:
        generator = torch.Generator("cpu").manual_seed(seed)
        return [[torch.randn(1, 77, CONTEXT_DIM, generator=generator), {}]]

    return encode


@pytest.fixture(scope="session")
def random_latent() -> Callable[..., torch.Tensor]:
    """A function that makes a smooth random latent in the VAE's space (standard deviation about 5).

    `random_latent(seed, shape=(1, 4, 16, 16))`; two seeds differ in mean and spread per channel too.
    """

    def make(seed: int, shape: tuple[int, int, int, int] = (1, 4, 16, 16)) -> torch.Tensor:
        generator = torch.Generator("cpu").manual_seed(seed)
        batch, channels, height, width = shape
        coarse = torch.randn(batch, channels, max(2, height // 3), max(2, width // 3), generator=generator)
        smooth = F.interpolate(coarse, size=(height, width), mode="bicubic", align_corners=True)
        spread, mean = torch.rand(2, 1, channels, 1, 1, generator=generator)
        return (smooth * (0.5 + spread) + 2 * mean - 1) / 0.18215

    return make


@pytest.fixture(scope="session")
def custom_samplers() -> None:
    """ComfyUI's own extra nodes, RandomNoise, BasicScheduler and SamplerCustomAdvanced among them."""
    import nodes

    asyncio.run(
        nodes.load_custom_node(str(COMFYUI / "comfy_extras" / "nodes_custom_sampler.py"), module_parent="comfy_extras")
    )


@pytest.fixture(scope="session")
def graph(
    pack: ModuleType,
    sd15: ModelPatcher,
    encode_zeros: Callable,
    encode_random: Callable,
    custom_samplers: None,
):
    """A guided graph on the small SD1.5: empty 16x16 latent, one style reference, three Euler steps."""
    from guided import Graph

    made = Graph(pack, sd15, encode_random(1), encode_zeros(), {"samples": torch.zeros(1, 4, 16, 16)})
    return made


@pytest.fixture(scope="session")
def styled(graph, random_latent: Callable):
    """`graph` with a style reference."""
    return graph.styled(random_latent(1))


class Dynamic(ModelPatcher):
    """Says that its weights are paged. ComfyUI's own class cannot be made without a GPU."""

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.model.dynamic_vbars = {}
        self.non_dynamic_delegate_model = None

    def is_dynamic(self) -> bool:
        return True

    get_non_dynamic_delegate = comfy.model_patcher.ModelPatcherDynamic.get_non_dynamic_delegate


@pytest.fixture
def dynamic(load_sd15: Callable[..., ModelPatcher]) -> Callable[[], tuple[ModelPatcher, list]]:
    """Makes a dynamic patcher of the small SD1.5, and a list of what is read from disk from then on.

    Of each reading: a weak reference to the model, and whether it was read to be paged.
    """

    def make() -> tuple[ModelPatcher, list]:
        reads = []

        def paged() -> ModelPatcher:
            plain = load_sd15()
            patcher = Dynamic(plain.model, load_device=plain.load_device, offload_device=plain.offload_device)
            patcher.cached_patcher_init = (read, ("small_sd15",))
            return patcher

        def read(name: str, disable_dynamic: bool = False) -> ModelPatcher:
            assert name == "small_sd15"
            patcher = load_sd15() if disable_dynamic else paged()
            reads.append((weakref.ref(patcher.model), not disable_dynamic))
            return patcher

        return paged(), reads

    return make


@pytest.fixture(scope="session")
def demo_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The demo's checkpoint."""
    from demo_model import demo_checkpoint

    file = tmp_path_factory.mktemp("demo") / "demo.safetensors"
    demo_checkpoint.write_demo_checkpoint(file)
    return str(file)


@pytest.fixture(scope="session")
def split_node() -> type:
    """MultiGPU CFG Split, a node of ComfyUI, as it loads it."""
    import nodes

    file = COMFYUI / "comfy_extras" / "nodes_multigpu.py"
    asyncio.run(nodes.load_custom_node(str(file), module_parent="comfy_extras"))
    return nodes.NODE_CLASS_MAPPINGS["MultiGPU_WorkUnits"]


@pytest.fixture
def split(split_node: type, monkeypatch: pytest.MonkeyPatch) -> Callable[[ModelPatcher], ModelPatcher]:
    """A function that puts MultiGPU CFG Split behind a model, on two devices.

    Those of a CPU do: `cpu` and `cpu:0` are not equal, and tensors go to both.
    """
    devices = [torch.device("cpu"), torch.device("cpu:0")]
    monkeypatch.setattr(comfy.model_management, "get_all_torch_devices", lambda exclude_current=False: devices)

    @torch.inference_mode()
    def split(model: ModelPatcher) -> ModelPatcher:
        gc.collect()
        loaded = comfy.model_management.current_loaded_models
        loaded[:] = [one for one in loaded if one.model is not None]  # the node stumbles over models that are gone
        found = split_node.execute(model, max_gpus=2).result[0]
        assert [clone.load_device for clone in found.get_additional_models_with_key("multigpu")] == devices[1:]
        return found

    return split


@pytest.fixture
def nothing_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test fails if a model is loaded."""

    def refuse(*args, **kwargs):
        raise AssertionError("loading was started before the error")

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", refuse)


@pytest.fixture
def unsampled(nothing_loads: None, styled, monkeypatch: pytest.MonkeyPatch):
    """`styled`; the test fails if a model is loaded or this one is run."""

    def refuse(*args, **kwargs):
        raise AssertionError("the model was run before the error")

    monkeypatch.setattr(styled.model.model, "apply_model", refuse)
    return styled
