"""Loading a teacher: weights from every source, what it says of itself, and what it refuses."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from huggingface_hub import constants as hub_constants
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from scalekd.errors import DataError, EnvironmentFault, UsageError
from scalekd.models.weights import read_state_dict, weights_sha256
from scalekd.shapes import FeatureShape
from scalekd.teachers import Teacher, TeacherConfig, TeacherSpec, load_teacher

TINY = {"embed_dim": 32, "depth": 4, "num_heads": 2, "num_classes": 7, "patch_size": 16}
SWIN = {"embed_dim": 12, "depths": [1, 1, 2, 2], "num_heads": [1, 2, 2, 4], "num_classes": 7}


def _vit(**options: Any) -> TeacherConfig:
    kwargs = {**TINY, **options.pop("model_kwargs", {})}
    settings = {"pretrained": False, "img_size": 64, **options}
    return TeacherConfig(model="vit_small_patch16_224", model_kwargs=kwargs, **settings)


def _pixels(teacher: Teacher, batch: int = 2, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, 3, *teacher.spec.img_size)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _other_weights(teacher: Teacher) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    return {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in teacher.model.state_dict().items()
    }


# Weights


def test_random_weights_are_the_same_everywhere_and_leave_the_generator_alone() -> None:
    torch.manual_seed(1)
    first = load_teacher(_vit())
    drawn = torch.rand(3)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3), drawn)
    torch.manual_seed(2)
    second = load_teacher(_vit())
    assert first.spec == second.spec
    assert first.spec.weights_source == "random"
    assert first.spec.licence is None


def test_weight_hash_sees_names_values_shapes_and_dtypes() -> None:
    state = {"b": torch.zeros(2, 3), "a": torch.ones(1)}
    same = {"a": torch.ones(1), "b": torch.zeros(2, 3)}
    assert weights_sha256(state) == weights_sha256(same)
    different: list[dict[str, Tensor]] = [
        {**state, "a": torch.tensor([1.0 + 2**-23])},
        {**state, "b": torch.zeros(3, 2)},
        {**state, "b": torch.zeros(2, 3, dtype=torch.float16)},
        {"c": state["a"], "b": state["b"]},
        {"b": state["b"]},
    ]
    hashes = {weights_sha256(other) for other in [state, *different]}
    assert len(hashes) == 1 + len(different)


@pytest.mark.parametrize("wrapping", ["bare", "state_dict", "compiled", "ema"])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_is_loaded_whatever_it_is_wrapped_in(
    suffix: str, wrapping: str, tmp_path: Path
) -> None:
    weights = _other_weights(load_teacher(_vit()))
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(weights, file)
    elif wrapping == "bare":
        torch.save(weights, file)
    elif wrapping == "state_dict":
        torch.save({"state_dict": weights, "epoch": 3}, file)
    elif wrapping == "compiled":
        torch.save({"model": {f"_orig_mod.{name}": t for name, t in weights.items()}}, file)
    else:
        zeros = {name: torch.zeros_like(t) for name, t in weights.items()}
        torch.save({"state_dict": zeros, "state_dict_ema": weights}, file)
    teacher = load_teacher(_vit(checkpoint=str(file), pretrained=True))
    assert teacher.spec.weights_source == "checkpoint"
    for name, tensor in teacher.model.state_dict().items():
        assert torch.equal(tensor, weights[name])


def test_a_half_precision_checkpoint_runs_in_single_precision(tmp_path: Path) -> None:
    weights = {n: t.half() for n, t in _other_weights(load_teacher(_vit())).items()}
    save_file(weights, tmp_path / "half.safetensors")
    teacher = load_teacher(_vit(checkpoint=str(tmp_path / "half.safetensors")))
    assert {p.dtype for p in teacher.parameters()} == {torch.float32}
    assert torch.equal(teacher.model.norm.weight, weights["norm.weight"].float())


def test_an_original_swin_checkpoint_is_converted(tmp_path: Path) -> None:
    """The authors' files downsample at a stage's end and store index tables; timm's do not."""
    config = TeacherConfig(
        model="swin_tiny_patch4_window7_224", pretrained=False, model_kwargs=SWIN
    )
    reference = load_teacher(config)
    weights = _other_weights(reference)
    original = {"layers.0.blocks.0.attn.relative_position_index": torch.zeros(49, 49)}
    for name, tensor in weights.items():
        name = name.replace("head.fc.", "head.")
        if ".downsample." in name:
            stage = int(name.split(".")[1])
            name = name.replace(f"layers.{stage}.", f"layers.{stage - 1}.")
        original[name] = tensor
    torch.save({"model": original}, tmp_path / "swin.pth")
    loaded = load_teacher(config.model_copy(update={"checkpoint": str(tmp_path / "swin.pth")}))
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    assert (
        "state_dict" not in loaded.model.pretrained_cfg
        or not loaded.model.pretrained_cfg["state_dict"]
    )


def test_position_tables_of_another_image_size_are_resampled(tmp_path: Path) -> None:
    small = load_teacher(_vit())
    save_file(small.model.state_dict(), tmp_path / "small.safetensors")
    large = load_teacher(_vit(checkpoint=str(tmp_path / "small.safetensors"), img_size=96))
    assert large.model.pos_embed.shape[1] == 1 + 36
    assert torch.equal(large.model.head.weight, small.model.head.weight)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            lambda w: {**w, "head.weight": torch.zeros(3, 32)},
            "head.weight (3, 32) in the file, (7, 32) in the model",
        ),
        (
            lambda w: {n: t for n, t in w.items() if n != "norm.weight"},
            "only in the model: norm.weight (32,)",
        ),
        (lambda w: {**w, "extra.weight": torch.zeros(4)}, "only in the file: extra.weight (4,)"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_naming_both_sides(
    change: Any, says: str, tmp_path: Path
) -> None:
    weights = _other_weights(load_teacher(_vit()))
    save_file(change(weights), tmp_path / "wrong.safetensors")
    with pytest.raises(UsageError) as raised:
        load_teacher(_vit(checkpoint=str(tmp_path / "wrong.safetensors")))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


class _Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("exploded"),))


def test_a_checkpoint_is_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "extra": _Bomb()}, "bomb.pth")
    Path("plain.pth").write_bytes(pickle.dumps(_Bomb()))
    for name in ("bomb.pth", "plain.pth"):
        with pytest.raises(DataError, match="never loaded") as raised:
            load_teacher(_vit(checkpoint=name))
        assert name in str(raised.value)
        assert not Path("exploded").exists()


def test_safetensors_of_any_name_are_read(tmp_path: Path) -> None:
    tensors = {"weight": torch.arange(6.0).reshape(2, 3)}
    for name in ("weights", "weights.pth", "weights.v2"):
        save_file(tensors, tmp_path / name)
        assert torch.equal(read_state_dict(tmp_path / name)["weight"], tensors["weight"])
    (tmp_path / "model.onnx").write_bytes(b"\x08\x0a\x12\x07pytorch" * 9)
    with pytest.raises(DataError, match="is damaged"):
        read_state_dict(tmp_path / "model.onnx")


def test_a_damaged_checkpoint_is_a_data_error(tmp_path: Path) -> None:
    for suffix in (".safetensors", ".pth"):
        file = tmp_path / f"damaged{suffix}"
        file.write_bytes(b"\0" * 100)
        with pytest.raises(DataError, match="damaged"):
            load_teacher(_vit(checkpoint=str(file)))
    with pytest.raises(UsageError, match="there is no such file"):
        load_teacher(_vit(checkpoint=str(tmp_path / "absent.safetensors")))


def test_published_weights_without_network_fail_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(EnvironmentFault) as raised:
        load_teacher(TeacherConfig(model="test_vit"))
    message = str(raised.value)
    assert "test_vit.r160_in1k" in message
    assert "--checkpoint" in message
    assert "--no-pretrained" in message
    assert "\n" not in message


def test_a_model_without_published_weights_says_so() -> None:
    with pytest.raises(UsageError, match="--no-pretrained"):
        load_teacher(TeacherConfig(model="test_vit4"))


# What it says of itself


def test_spec_survives_json() -> None:
    spec = load_teacher(_vit()).spec
    text = spec.model_dump_json()
    assert TeacherSpec.model_validate_json(text) == spec
    assert TeacherSpec.model_validate(json.loads(text)).stages[4] == FeatureShape((4, 4), 32, 1)


def test_config_survives_json() -> None:
    config = _vit(tail_blocks=3)
    assert TeacherConfig.model_validate_json(config.model_dump_json()) == config


def test_spec_of_the_papers_swin_l_at_its_real_size() -> None:
    """Shapes of golden README section 2.4: 14 x 14 x 768 and 7 x 7 x 1536."""
    teacher = load_teacher(
        TeacherConfig(model="swin_l", pretrained=False, model_kwargs={"depths": [1, 1, 1, 2]})
    )
    spec = teacher.spec
    assert spec.model == "swin_large_patch4_window7_224.ms_in22k_ft_in1k"
    assert (spec.family, spec.img_size, spec.num_classes) == ("swin", (224, 224), 1000)
    assert spec.stages == {3: FeatureShape((14, 14), 768), 4: FeatureShape((7, 7), 1536)}
    assert spec.mean == pytest.approx((0.485, 0.456, 0.406))
    assert (spec.interpolation, spec.crop_pct) == ("bicubic", 0.9)


def test_a_headless_teacher_gives_features_only() -> None:
    teacher = load_teacher(_vit(model_kwargs={"num_classes": 0}))
    assert teacher.spec.num_classes is None
    output = teacher(_pixels(teacher))
    assert output.logits is None
    assert output.features[4].shape == (2, 17, 32)
    tail = teacher.tail()
    assert tail.num_classes is None
    with pytest.raises(ValueError, match="without a classification head"):
        tail.head(output.features[4])


def test_dinov2_has_no_head_by_default() -> None:
    kwargs = {k: v for k, v in TINY.items() if k not in ("num_classes", "patch_size")}
    config = TeacherConfig(model="dinov2_s", pretrained=False, model_kwargs=kwargs, img_size=56)
    assert load_teacher(config).spec.num_classes is None


# How it runs


def test_a_teacher_stays_frozen_and_in_eval_mode() -> None:
    teacher = load_teacher(_vit(model_kwargs={"drop_path_rate": 0.9, "drop_rate": 0.9}))
    teacher.train()
    torch.nn.ModuleList([teacher]).train()
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    pixels = _pixels(teacher)
    first, second = teacher(pixels), teacher(pixels)
    assert torch.equal(first.features[4], second.features[4])


def test_pixels_are_normalised_as_timm_does() -> None:
    teacher = load_teacher(_vit(mean=(0.5, 0.25, 0.0), std=(0.5, 1.0, 0.25)))
    pixels = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    pixels[:, 0], pixels[:, 1] = 255, 51
    normalised = teacher.normalise(pixels)
    assert normalised.dtype == torch.float32
    expected = torch.tensor([1.0, -0.05, 0.0])  # (1 - .5) / .5, (.2 - .25) / 1, (0 - 0) / .25
    assert torch.allclose(normalised[0, :, 0, 0], expected, atol=1e-6)


@pytest.mark.parametrize(
    "pixels",
    [
        torch.zeros(1, 3, 64, 64),
        torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        torch.zeros(1, 1, 64, 64, dtype=torch.uint8),
    ],
    ids=["float", "size", "grey"],
)
def test_other_pixels_are_refused(pixels: Tensor) -> None:
    with pytest.raises(ValueError, match=r"takes uint8 pixels \(batch, 3, 64, 64\)"):
        load_teacher(_vit())(pixels)


def test_constant_prefix_is_the_mean_of_what_enters_the_tail() -> None:
    teacher = load_teacher(_vit())
    batches = [_pixels(teacher, 3, seed=1), _pixels(teacher, 1, seed=2)]
    prefix = teacher.calibrate_prefix(teacher(pixels).features[3] for pixels in batches)
    entering = torch.cat([teacher(pixels).features[3][:, :1] for pixels in batches])
    assert prefix is not None
    assert torch.allclose(prefix, entering.mean(dim=0), atol=1e-6)
    with pytest.raises(ValueError, match="no images"):
        teacher.calibrate_prefix([])


def test_autocast_changes_the_precision_of_the_model_only() -> None:
    teacher = load_teacher(_vit())
    pixels = _pixels(teacher)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = teacher(pixels)
    assert logits is not None
    assert logits.dtype == torch.bfloat16
    exact = teacher(pixels).features[4]
    assert (features[4].float() - exact).abs().max() < 0.05 * exact.abs().max()


# What it refuses


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"img_size": 70}, "multiples of 16 px, such as 64, 80, 96"),
        ({"tail_blocks": 4}, "a tail of 4 blocks needs a teacher of more; this one has 4"),
        (
            {"model_kwargs": {"embed_dimension": 3}},
            "no argument 'embed_dimension'; did you mean embed_dim",
        ),
        ({"model_kwargs": {"num_heads": 5}}, "cannot be built with"),
    ],
)
def test_impossible_settings_are_refused_with_a_reason(options: dict[str, Any], says: str) -> None:
    with pytest.raises(UsageError) as raised:
        load_teacher(_vit(**options))
    assert says in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_swin_takes_multiples_of_its_patch() -> None:
    config = TeacherConfig(model="swin_t", pretrained=False, model_kwargs=SWIN, img_size=(90, 96))
    with pytest.raises(UsageError, match="multiples of 4 px, such as 88, 92, 96, not 90 x 96"):
        load_teacher(config)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"pretrained": True},
        {"checkpoint_path": "x"},
        {"features_only": True},
        {"in_chans": 1},
        {"norm_layer": object()},
        {"depth": {"a": 1}},
        {"init_values": float("nan")},
        {"a-b": 1},
    ],
)
def test_model_arguments_are_plain_data_of_the_model_itself(kwargs: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(kwargs))):
        TeacherConfig(model="test_vit", model_kwargs=kwargs)


def test_a_folder_timm_exported_is_a_teacher(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=4, img_size=96, global_pool="avg").eval()
    timm.models.save_for_hf(model, tmp_path / "mine", safe_serialization=True)
    teacher = load_teacher(TeacherConfig(model=f"local-dir:{tmp_path / 'mine'}"))
    assert (teacher.spec.model, teacher.spec.architecture) == ("mine", "test_vit")
    assert (teacher.spec.img_size, teacher.spec.num_classes) == ((96, 96), 4)
    pixels = _pixels(teacher)
    features, logits = teacher(pixels)
    assert torch.equal(logits, model(teacher.normalise(pixels)))
    tail = teacher.tail()
    assert torch.allclose(tail.head(features[4]), logits, atol=1e-6)


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_what_a_teacher_says_of_itself_rebuilds_it_by_its_bare_name(
    tmp_path: Path, pool: str
) -> None:
    model = timm.create_model("test_vit", num_classes=4, img_size=96, global_pool=pool)
    timm.models.save_for_hf(model, tmp_path / "mine", safe_serialization=True)
    there = load_teacher(TeacherConfig(model=f"local-dir:{tmp_path / 'mine'}")).spec
    assert ("global_pool" in there.model_kwargs) == (pool == "avg")  # as test_vit is anyway
    here = load_teacher(
        TeacherConfig(
            model=there.architecture,
            checkpoint=str(tmp_path / "mine/model.safetensors"),
            model_kwargs={**there.model_kwargs, "num_classes": there.num_classes},
            img_size=there.img_size,
        )
    )
    assert here.spec.weights_sha256 == there.weights_sha256
    pixels = _pixels(here)
    assert torch.equal(here(pixels).logits, model.eval()(here.normalise(pixels)))


def test_a_folder_with_a_broken_configuration_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json"):
        load_teacher(TeacherConfig(model=f"local-dir:{tmp_path}"))
    (tmp_path / "config.json").write_text('{"architecture": "no_such_net"}')
    with pytest.raises(UsageError, match="no_such_net"):
        load_teacher(TeacherConfig(model=f"local-dir:{tmp_path}"))
