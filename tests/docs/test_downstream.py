"""``docs/downstream.md``: its programs, run on exported students in the libraries it names."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from scalekd.errors import DataError
from scalekd.export import check_weights, export_student
from scalekd.students import create_student
from scalekd.training import TrainedStudent, student_facts

DOCUMENT = "docs/downstream.md"
MAX_LINES = 15
SIZES = ((224, 224), (320, 320), (512, 640))
NAMES = ("ant", "bee", "cat")
SWIN = {"embed_dim": 12, "depths": (1, 1, 2, 2), "num_heads": (1, 2, 2, 4), "window_size": 2}
STUDENTS: dict[str, tuple[str, dict[str, Any]]] = {
    "cnn": ("test_resnet", {}),
    "vit": ("test_vit", {}),
    "convnext": ("test_convnext", {}),
    "swin": ("swin_tiny_patch4_window7_224", SWIN),
}
# What the page says of other students than the one that a block shows.
LEVELS = {"cnn": [1, 2, 3, 4], "vit": [3, 4, 5], "convnext": [0, 1, 2, 3], "swin": [0, 1, 2, 3]}
KINDS = [
    "cnn",
    "vit",
    *(
        pytest.param(kind, marks=pytest.mark.slow)
        for kind in STUDENTS
        if kind not in ("cnn", "vit")
    ),
]
Programs = dict[str, str]


@pytest.fixture(scope="module")
def blocks(programs: Callable[[str, str], Programs]) -> Programs:
    return programs(DOCUMENT, "python")


def export(kind: str, folder: Path, *, headless: bool = False) -> TrainedStudent:
    """A student in ``folder/student``, and the current state of its weights."""
    torch.manual_seed(3)
    model, kwargs = STUDENTS[kind]
    student = create_student(model, num_classes=len(NAMES), img_size=64, model_kwargs=kwargs)
    spec, names = student.spec, NAMES
    if headless:
        student.model.reset_classifier(0)  # type: ignore[operator]
        spec, names = spec.model_copy(update={"num_classes": 0}), None
    facts = {**student_facts(spec, names), "samples_viewed": 1, "epoch": 1}
    trained = TrainedStudent(Path("run/last"), spec, facts, student.model.eval())
    export_student(trained, folder / "student", export_format="hf")
    return trained


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def weights() -> dict[str, Tensor]:
    return load_file("student/model.safetensors")


def run(code: str, scope: dict[str, Any]) -> None:
    exec(compile(code, DOCUMENT, "exec"), scope)  # noqa: S102  (the page's own programs)


def images(size: tuple[int, int] = (96, 128)) -> Tensor:
    return torch.randn(2, 3, *size)


def check_step(loss: Tensor, backbone: nn.Module) -> None:
    """The weights are the student's, and the loss reaches all of the backbone that it uses."""
    check_weights(backbone, weights(), where="student")
    loss.backward()
    gradients = [parameter.grad is not None for parameter in backbone.parameters()]
    assert sum(gradients) > 0.8 * len(gradients)  # maps that are not used end in parameters


def test_blocks_are_short(blocks: Programs) -> None:
    assert {
        name: code.count("\n") for name, code in blocks.items() if code.count("\n") > MAX_LINES
    } == {}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("headless", [False, True])
def test_timm(blocks: Programs, here: Path, kind: str, headless: bool) -> None:
    student = export(kind, here, headless=headless)
    scope: dict[str, Any] = {"images": images((64, 64))}
    run(blocks["timm-classifier"], scope)
    assert scope["logits"].shape == (2, 4)
    own = dict(student.model.named_parameters())
    changed = [
        name
        for name, parameter in scope["model"].named_parameters()
        if name not in own or not torch.equal(parameter, own[name])
    ]
    head = scope["model"].pretrained_cfg["classifier"]
    assert changed == [f"{head}.weight", f"{head}.bias"]
    for size in SIZES:
        scope = {"images": images(size)}
        run(blocks["timm-backbone"], scope)
        for level, channels, stride in zip(
            *(scope[n] for n in ("maps", "channels", "strides")), strict=True
        ):
            assert level.shape == (2, channels, *(-(-side // stride) for side in size))
        check_step(sum(level.square().mean() for level in scope["maps"]), scope["backbone"])


def detect(scope: dict[str, Any]) -> None:
    detector = scope["detector"]
    boxes = {"boxes": torch.tensor([[10.0, 10.0, 60.0, 70.0]]), "labels": torch.tensor([1])}
    detector.transform.min_size, detector.transform.max_size = (128,), 192
    losses = detector([torch.rand(3, 128, 160), torch.rand(3, 120, 130)], [boxes, boxes])
    check_step(sum(losses.values()), detector.backbone.body)
    with torch.no_grad():
        (found,) = detector.eval()([torch.rand(3, 224, 320)])
    assert {"boxes", "labels", "scores"} <= found.keys()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("detector", ["faster-rcnn", "fcos"])
def test_torchvision(blocks: Programs, here: Path, kind: str, detector: str) -> None:
    export(kind, here)
    scope: dict[str, Any] = {}
    run(blocks["torchvision-backbone"] + blocks[f"torchvision-{detector}"], scope)
    detect(scope)


@pytest.mark.parametrize("kind", KINDS)
def test_segmentation_models_pytorch(blocks: Programs, here: Path, kind: str) -> None:
    pytest.importorskip("segmentation_models_pytorch")
    export(kind, here)
    code = blocks["smp-vit" if kind == "vit" else "smp"]
    if kind == "swin":
        code = code.replace("classes=4", "classes=4, strict_img_size=False")
    scope: dict[str, Any] = {"images": images()}
    run(code, scope)
    assert scope["masks"].shape == (2, 4, 96, 128)
    check_step(scope["masks"].square().mean(), scope["segmenter"].encoder)


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_classifies(blocks: Programs, here: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    student = export(kind, here)
    scope: dict[str, Any] = {"images": images((64, 64))}
    run(blocks["transformers-classifier"], scope)
    assert scope["logits"].shape == (2, 4)
    opened = transformers.AutoModelForImageClassification.from_pretrained("student").eval()
    with torch.no_grad():
        assert torch.equal(opened(scope["images"]).logits, student.model(scope["images"]))
    classify = transformers.pipeline("image-classification", model="student")
    assert {answer["label"] for answer in classify(Image.new("RGB", (80, 70)))} == set(NAMES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("network", ["upernet", "detr"])
def test_transformers_with_a_timm_backbone(
    blocks: Programs, here: Path, kind: str, network: str
) -> None:
    pytest.importorskip("transformers")
    export(kind, here)
    code = re.sub(
        r"levels = \[.*?\]", f"levels = {LEVELS[kind]}", blocks[f"transformers-{network}"]
    )
    small = {
        "upernet": ("num_labels=4,", "num_labels=4, hidden_size=16,"),
        "detr": ("num_labels=4)", "num_labels=4, d_model=32, encoder_layers=1, decoder_layers=1)"),
    }
    assert small[network][0] in code
    scope: dict[str, Any] = {"images": images()}
    run(code.replace(*small[network]), scope)
    model = scope["model"]
    if network == "upernet":
        assert scope["masks"].shape == (2, 4, 96, 128)
        check_step(scope["masks"].square().mean(), model.backbone)
    else:
        check_step(scope["boxes"].square().mean(), model.model.backbone)


def test_onnx(blocks: Programs, here: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    student = export("cnn", here)
    export_student(
        student, here / "student.onnx", export_format="onnx", img_size="any", features=True
    )
    scope: dict[str, Any] = {"images": images((160, 96))}
    run(blocks["onnx"], scope)
    with torch.no_grad():
        expected = student.model(scope["images"])
    logits = torch.from_numpy(scope["outputs"]["logits"])
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert "features_0" in scope["outputs"]


def test_the_mmdetection_configuration_has_timms_arguments(blocks: Programs, here: Path) -> None:
    scope: dict[str, Any] = {}
    run(blocks["mmdetection"], scope)
    model = scope["model"]
    given = {k: v for k, v in model["backbone"].items() if k not in ("_delete_", "type")}
    # What TIMMBackbone takes itself; it passes everything else to timm.create_model.
    own = {"model_name", "features_only", "pretrained", "checkpoint_path", "in_channels"}
    assert {"model_name", "features_only", "pretrained"} <= given.keys() <= own | {"out_indices"}
    published = timm.create_model("resnet50", features_only=True, out_indices=given["out_indices"])
    assert published.feature_info.channels() == model["neck"]["in_channels"]
    mean, std = (model["data_preprocessor"][name] for name in ("mean", "std"))
    config = timm.data.resolve_data_config({}, model=published)
    assert [value / 255 for value in mean] == pytest.approx(config["mean"], abs=1e-3)
    assert [value / 255 for value in std] == pytest.approx(config["std"], abs=1e-3)
    export("cnn", here)
    opened = timm.create_model(**given | {"model_name": f"local-dir:{here / 'student'}"})
    check_weights(opened, weights(), where="student")


def test_the_ways_that_the_page_warns_of_give_random_weights(here: Path) -> None:
    smp = pytest.importorskip("segmentation_models_pytorch")
    from transformers import TimmBackbone, TimmBackboneConfig

    export("convnext", here)
    bare = timm.create_model("local-dir:student", features_only=True)
    bare.load_state_dict(weights(), strict=False)
    described = TimmBackboneConfig(backbone="local-dir:student", out_indices=[0, 1, 2, 3])
    for opened in (
        timm.create_model("local-dir:student"),
        bare,
        TimmBackbone(described),
        smp.Unet("tu-local-dir:student", encoder_weights=None, classes=4).encoder,
    ):
        with pytest.raises(DataError, match="the weights were not loaded"):
            check_weights(opened, weights(), where="student")
