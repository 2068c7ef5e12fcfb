"""Tails on their own: gradients, constant prefix, and files that nobody vouches for."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from scalekd.errors import CacheCorrupt, EnvironmentFault
from scalekd.teachers import Tail, TailConfig, TeacherConfig, load_tail, load_teacher, save_tail

VIT = TailConfig(
    architecture="vit_small_patch16_224",
    family="vit",
    model_kwargs={"embed_dim": 32, "depth": 4, "num_heads": 2},
    img_size=(64, 64),
    num_classes=7,
    global_pool="token",
)


def _tail(config: TailConfig = VIT) -> Tail:
    tail = Tail.from_config(config)
    generator = torch.Generator().manual_seed(1)
    tail.load_state_dict(
        {n: 0.2 * torch.randn(t.shape, generator=generator) for n, t in tail.state_dict().items()}
    )
    shape = tail.stages[3]
    if shape.num_prefix_tokens:
        size = (shape.num_prefix_tokens, shape.num_channels)
        tail.set_prefix_tokens(torch.randn(size, generator=generator))
    return tail


def _tokens(tail: Tail, batch: int = 2) -> Tensor:
    shape = tail.stages[3]
    generator = torch.Generator().manual_seed(2)
    return torch.randn((batch, shape.num_patch_tokens, shape.num_channels), generator=generator)


def test_gradients_run_through_a_frozen_tail() -> None:
    tail = _tail()
    tokens = _tokens(tail).requires_grad_()
    tail(tokens).square().sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad != 0).all()
    assert all(p.grad is None and not p.requires_grad for p in tail.parameters())


def test_checkpointed_gradients_are_the_same() -> None:
    tail = _tail()
    gradients = []
    for enable in (False, True):
        tail.set_grad_checkpointing(enable)
        tokens = _tokens(tail).requires_grad_()
        tail(tokens).square().sum().backward()
        gradients.append(tokens.grad)
    assert torch.equal(gradients[0], gradients[1])


def test_a_tail_never_leaves_eval_mode() -> None:
    kwargs = {**VIT.model_kwargs, "drop_path_rate": 0.9}
    tail = _tail(VIT.model_copy(update={"model_kwargs": kwargs}))
    torch.nn.ModuleList([tail]).train()
    assert not any(module.training for module in tail.modules())
    assert torch.equal(tail(_tokens(tail)), tail(_tokens(tail)))


def test_the_constant_prefix_stands_in_for_missing_prefix_tokens() -> None:
    tail = _tail()
    tokens = _tokens(tail)
    prefix = tail.prefix_tokens
    assert prefix is not None
    assert torch.equal(tail(tokens), tail(tokens, prefix.expand(2, -1, -1)))
    assert not torch.equal(tail(tokens), tail(tokens, -prefix.expand(2, -1, -1)))


def test_a_tail_without_its_prefix_refuses_to_guess(tmp_path: Path) -> None:
    tail = _tail()
    tail.prefix_tokens = None
    with pytest.raises(ValueError, match="calibrate_prefix"):
        tail(_tokens(tail))
    with pytest.raises(ValueError, match="calibrate_prefix"):
        save_tail(tail, tmp_path / "tail.safetensors")
    with pytest.raises(ValueError, match=r"\(3, 32\).*\(1, 32\)"):
        tail.set_prefix_tokens(torch.zeros(3, 32))


@pytest.mark.parametrize("shape", [(2, 15, 32), (2, 17, 32), (2, 16, 31), (16, 32)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\(batch, 16, 32\) patch tokens of a 4 x 4 grid"):
        _tail()(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"\(batch, 17, 32\) features with 1 prefix"):
        _tail().head(torch.zeros((2, 16, 32)))


# Files


def _write(
    path: Path, *, config: Any = None, tensors: Any = None, header: str = "scalekd_tail"
) -> Path:
    """A sound tail file with some part replaced."""
    sound = path.with_name("sound.safetensors")
    save_tail(_tail(), sound)
    state = load_file(sound)
    text = (
        config
        if isinstance(config, str)
        else json.dumps({**VIT.model_dump(mode="json"), **(config or {})})
    )
    save_file(tensors(state) if tensors else state, path, metadata={header: text})
    return path


def test_a_file_gives_back_the_tail_bit_for_bit(tmp_path: Path) -> None:
    tail = _tail()
    save_tail(tail, tmp_path / "a.safetensors")
    again = load_tail(tmp_path / "a.safetensors")
    assert again.config == tail.config
    assert again.stages == tail.stages
    assert torch.equal(again(_tokens(tail)), tail(_tokens(tail)))
    save_tail(again, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    others_may_read = 0o044
    (tmp_path / "plain").write_bytes(b"")
    mode = (tmp_path / "plain").stat().st_mode
    assert (tmp_path / "a.safetensors").stat().st_mode & others_may_read == mode & others_may_read


def test_double_precision_survives(tmp_path: Path) -> None:
    tail = _tail().double()
    save_tail(tail, tmp_path / "tail.safetensors")
    again = load_tail(tmp_path / "tail.safetensors")
    tokens = _tokens(tail).double()
    assert torch.equal(again(tokens), tail(tokens))


def test_weights_that_are_halves_are_stored_as_halves(tmp_path: Path) -> None:
    tail = _tail()
    save_tail(tail, tmp_path / "full.safetensors")
    tail.load_state_dict({name: t.half().float() for name, t in tail.state_dict().items()})
    save_tail(tail, tmp_path / "half.safetensors")
    full, half = ((tmp_path / f"{n}.safetensors").stat().st_size for n in ("full", "half"))
    assert half < 0.6 * full
    tokens = _tokens(tail)
    assert torch.equal(load_tail(tmp_path / "half.safetensors")(tokens), tail(tokens))


class _CountAllocations(TorchDispatchMode):
    """Elements of every tensor that an operation makes with memory behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.device.type != "meta":
                storage = tensor.untyped_storage()
                made = self.made.get(storage.data_ptr(), 0)
                self.made[storage.data_ptr()] = max(made, storage.nbytes() // 4)
        return result


@pytest.mark.parametrize(
    ("architecture", "family", "pool", "share"),
    [
        ("vit_large_patch16_224", "vit", "token", 0.10),  # 2 of 24 blocks
        ("swin_large_patch4_window7_224", "swin", "avg", 0.35),  # its last stage is a third
        ("beit_large_patch16_224", "beit", "avg", 0.10),
        ("eva02_large_patch14_448", "eva", "avg", 0.10),
    ],
)
def test_a_tail_is_built_without_the_memory_of_its_teacher(
    architecture: str, family: Any, pool: str, share: float
) -> None:
    import timm

    whole = timm.create_model(architecture, device="meta")
    num_whole = sum(p.numel() for p in whole.parameters())
    config = TailConfig(
        architecture=architecture,
        family=family,
        img_size=(224, 224),
        num_classes=1000,
        global_pool=pool,
    )
    with _CountAllocations() as count:
        tail = Tail.from_config(config)
    num_tail = sum(p.numel() for p in tail.parameters())
    assert num_tail <= share * num_whole
    num_tables = sum(b.numel() * b.element_size() // 4 for b in tail.buffers())
    assert sum(count.made.values()) <= 1.1 * (num_tail + num_tables) + 1e6


HOSTILE: dict[str, tuple[dict[str, Any], str]] = {
    "no metadata": ({"header": "other"}, "so it is not a tail"),
    "no json": ({"config": "{"}, "configuration is not valid"),
    "other version": ({"config": {"format_version": 2}}, "format_version"),
    "unknown key": ({"config": {"run": "rm -rf"}}, "run"),
    "other family": ({"config": {"family": "resnet"}}, "family"),
    "a download": ({"config": {"architecture": "hf-hub:evil/model"}}, "is not a timm backbone"),
    "a folder": ({"config": {"architecture": "local-dir:/tmp"}}, "is not a timm backbone"),
    "no backbone": ({"config": {"architecture": "resnet50"}}, "is not a timm backbone"),
    "wrong family": ({"config": {"family": "beit"}}, "is not a timm backbone of family beit"),
    "pretrained": ({"config": {"model_kwargs": {"pretrained": True}}}, "pretrained"),
    "checkpoint": (
        {"config": {"model_kwargs": {"checkpoint_path": "/etc/passwd"}}},
        "checkpoint_path",
    ),
    "nested": ({"config": {"model_kwargs": {"norm_layer": {"a": 1}}}}, "norm_layer"),
    "a callable's name": (
        {"config": {"model_kwargs": {"embed_layer": "os.system"}}},
        "embed_layer",
    ),
    "endless depth": ({"config": {"model_kwargs": {"depth": 10**9}}}, "depth=1000000000"),
    "deep enough": ({"config": {"model_kwargs": {"depth": 300}}}, "depth=300"),
    "huge width": ({"config": {"model_kwargs": {"embed_dim": 2**40}}}, "embed_dim"),
    "wide": (
        {"config": {"model_kwargs": {**VIT.model_kwargs, "embed_dim": 65536}}},
        "shapes differ",
    ),
    "huge image": ({"config": {"img_size": [10**9, 10**9]}}, "img_size"),
    "huge head": ({"config": {"num_classes": 60000}}, "head.weight"),
    "no image": ({"config": {"img_size": [0, 0]}}, "cannot be built"),
    "no tail": ({"config": {"tail_blocks": 9}}, "a tail of 9 blocks"),
    "a long text": ({"config": {"global_pool": "x" * 999}}, "global_pool"),
    "missing tensor": (
        {"tensors": lambda s: {n: t for n, t in s.items() if "norm1" not in n}},
        "only in the model",
    ),
    "extra tensor": (
        {"tensors": lambda s: {**s, "more": torch.zeros(3)}},
        "only in the file: more (3,)",
    ),
    "other shape": (
        {"tensors": lambda s: {**s, "prefix_tokens": torch.zeros(2, 32)}},
        "prefix_tokens (2, 32)",
    ),
    "integers": (
        {"tensors": lambda s: {**s, "prefix_tokens": torch.zeros(1, 32, dtype=torch.int64)}},
        "I64",
    ),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_refused_quickly_and_in_one_line(case: str, tmp_path: Path) -> None:
    options, says = HOSTILE[case]
    file = _write(tmp_path / "hostile.safetensors", **options)
    start = time.perf_counter()
    with pytest.raises(CacheCorrupt) as raised, _CountAllocations() as count:
        load_tail(file)
    assert says in str(raised.value)
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)
    assert time.perf_counter() - start < 10
    assert sum(count.made.values()) < 10**5


def test_a_swin_of_many_stages_or_blocks_is_refused(tmp_path: Path) -> None:
    for depths in ([200, 200], [1] * 65):
        config = {
            "architecture": "swin_tiny_patch4_window7_224",
            "family": "swin",
            "model_kwargs": {"depths": depths},
        }
        with pytest.raises(CacheCorrupt, match="depths"):
            load_tail(_write(tmp_path / "hostile.safetensors", config=config))


def test_tables_far_beyond_the_file_are_refused(tmp_path: Path) -> None:
    """A BEiT's index table grows with the square of what the file must hold."""
    config = TailConfig(
        architecture="beit_base_patch16_224",
        family="beit",
        model_kwargs={"embed_dim": 2, "depth": 3, "num_heads": 1, "patch_size": 1},
        img_size=(128, 128),
        num_classes=0,
        global_pool="avg",
    )
    tail = Tail.on_meta(config)
    state = {n: torch.zeros(t.shape) for n, t in tail.state_dict().items()}
    state["prefix_tokens"] = torch.zeros(1, 2)
    file = tmp_path / "hostile.safetensors"
    save_file(state, file, metadata={"scalekd_tail": config.model_dump_json()})
    assert file.stat().st_size < 2**20
    with pytest.raises(CacheCorrupt, match=r"position tables would take 4\.0 GiB"):
        load_tail(file)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-100],
        lambda data: data + b"more",
        lambda data: b"\xff" * 8 + data[8:],
        lambda data: b"not a tail at all",
    ],
    ids=["empty", "truncated", "longer", "header length", "text"],
)
def test_a_damaged_file_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = tmp_path / "tail.safetensors"
    save_tail(_tail(), file)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CacheCorrupt, match=r"tail\.safetensors"):
        load_tail(file)
    file.unlink()
    with pytest.raises(CacheCorrupt, match=r"tail\.safetensors is missing"):
        load_tail(file)


def test_a_tail_that_cannot_be_written_is_an_environment_fault(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="cannot write"):
        save_tail(_tail(), tmp_path / "absent" / "tail.safetensors")


def test_the_configuration_can_be_read_without_scalekd(tmp_path: Path) -> None:
    teacher = load_teacher(TeacherConfig(model="test_vit", pretrained=False))
    pixels = torch.zeros((1, 3, *teacher.spec.img_size), dtype=torch.uint8)
    teacher.calibrate_prefix([teacher(pixels).features[3]])
    save_tail(teacher.tail(), tmp_path / "tail.safetensors")
    with safe_open(tmp_path / "tail.safetensors", framework="np") as file:
        config = json.loads(file.metadata()["scalekd_tail"])
    assert config["architecture"] == "test_vit"
    assert config["img_size"] == list(teacher.spec.img_size)
