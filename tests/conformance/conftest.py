"""Golden files: found by folder, sorted by kind, compared within their README's tolerances.

``SCALEKD_GOLDEN=DIR pytest tests/conformance`` checks every ``.npz`` in DIR; without the
variable, ``../shared/golden`` beside the repository. Shapes, head counts and modes come from
the files, so that another folder of the same kinds is checked unchanged.

Error is ``max|a - b| / max|b|``. Files hold float64 results of the published code; ours runs
in float64, where only a wrong formula can be off, and in float32, where rounding is seen.
"""

import json
import os
import re
from collections import defaultdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scalekd.distillation import CrossAttentionProjector
from scalekd.teachers import Teacher, TeacherConfig, load_teacher

_REPOSITORY = Path(__file__).parents[2]
_DEFAULT_FOLDER = _REPOSITORY.parent / "shared" / "golden"

VALUE_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-5}
GRADIENT_TOLERANCE = {torch.float64: 2e-6, torch.float32: 5e-5}
ZERO_GRADIENT = 1e-4  # of parameters whose exact gradient is zero: absolute, rounding noise only
_ZERO_NORM = 1e-10  # a float64 gradient norm below this is zero in exact arithmetic

# Published parameter names -> ours.
_PROJECTOR_NAMES = {
    "proj_student.0": "stem.conv",
    "proj_student.1": "stem.norm",
    "pos_embed": "pos_embed",
    "query.weight": "query_embed",
    "proj_pos.0": "query_proj",  # a 1 x 1 convolution there, a linear layer here
    "pos_attention.q": "q",
    "pos_attention.k": "k",
    "pos_attention.v": "v",
    "pos_attention.proj": "out",
    "norm": "norm",
    "ffn.layers.0.0": "fc1",
    "ffn.layers.1": "fc2",
}
_NO_EFFECT = "k.bias"  # softmax ignores it, so ours has none; goldens show a zero gradient


class Golden:
    """One file, with the comparisons that more than one kind needs."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with np.load(path, allow_pickle=False) as arrays:
            self.names = list(arrays.files)
            self.meta: dict[str, Any] = json.loads(str(arrays["meta_json"]))
        self.kind = str(self.meta["kind"])

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        with np.load(self.path, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def tensor(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        return torch.from_numpy(np.array(self.arrays[name])).to(dtype)

    def leaf(self, name: str, dtype: torch.dtype) -> Tensor:
        return self.tensor(name, dtype).requires_grad_()

    def below(self, prefix: str) -> dict[str, np.ndarray]:
        """Arrays whose name starts with ``prefix``, by the rest of their name."""
        return {n.removeprefix(prefix): a for n, a in self.arrays.items() if n.startswith(prefix)}

    def value_tolerance(self, dtype: torch.dtype) -> float:
        return VALUE_TOLERANCE[dtype]

    def assert_value(self, actual: Tensor, name: str, tolerance: float | None = None) -> None:
        expected = self.arrays[name]
        assert_close(actual, expected, tolerance or VALUE_TOLERANCE[actual.dtype], name)

    def assert_gradient(self, leaf: Tensor, name: str, tolerance: float | None = None) -> None:
        assert leaf.grad is not None, f"{name}: no gradient arrived"
        expected = self.arrays[name].reshape(leaf.shape)
        assert_close(leaf.grad, expected, tolerance or GRADIENT_TOLERANCE[leaf.dtype], name)

    def merged_channel_order(self, num_merged: int) -> np.ndarray:
        return merged_channel_order(num_merged)

    def load_projector(self, projector: nn.Module, prefix: str = "") -> None:
        """Load ``w/<prefix>*`` and ``buf_before/<prefix>*``; every parameter must be covered."""
        state = {our_name(n): torch.from_numpy(a) for n, a in self.below(f"w/{prefix}").items()}
        for name, buffer in self.below(f"buf_before/{prefix}").items():
            state[our_name(name)] = torch.from_numpy(np.array(buffer))
        state.pop(_NO_EFFECT)
        if projector.query_embed is None:
            state.pop("query_embed", None)  # there without use in the published code
        state["query_proj.weight"] = state["query_proj.weight"].flatten(1)
        projector.load_state_dict(state, strict=True)

    def assert_projector(self, projector: nn.Module, prefix: str = "") -> None:
        """Compare gradients (values where stored, norms everywhere) and batch statistics."""
        parameters = dict(projector.named_parameters())
        dtype = parameters["pos_embed"].dtype
        for name, gradient in self.below(f"grad/w/{prefix}").items():
            if not self._is_zero(prefix + name):
                assert gradient.shape
                self.assert_gradient(parameters[our_name(name)], f"grad/w/{prefix}{name}")

        norms = self.meta["grad_l2_norm"]
        seen = set()
        for name in (n.removeprefix(prefix) for n in norms if n.startswith(prefix)):
            if prefix + name in self.meta.get("params_without_grad", ()):
                continue
            if our_name(name) == _NO_EFFECT:
                assert self._is_zero(prefix + name)
                continue
            parameter = parameters[our_name(name)]
            seen.add(our_name(name))
            assert parameter.grad is not None, f"{prefix}{name}: no gradient arrived"
            if self._is_zero(prefix + name):
                assert parameter.grad.abs().max() < ZERO_GRADIENT, prefix + name
            else:
                found, expected = float(parameter.grad.double().norm()), norms[prefix + name]
                error = abs(found - expected) / expected
                assert error <= GRADIENT_TOLERANCE[dtype], f"{prefix}{name}: {found} {expected}"
        assert seen == set(parameters), "a parameter of ours is unknown to the golden file"

        buffers = dict(projector.named_buffers())
        for name, after in self.below(f"buf_after/{prefix}").items():
            assert_close(buffers[our_name(name)], after, 1e-5, f"buf_after/{prefix}{name}")

    def relu_inputs(self, module: nn.Module) -> "ReluInputs":
        return ReluInputs(module)

    def timm_weights(self) -> dict[str, Tensor]:
        """Teacher weights in timm's names, float32."""
        weights = self.below("w_timm/") or _from_mmcls(self.below("w_mmcls/"))
        return {
            name: torch.from_numpy(np.array(a, np.float32, order="C"))
            for name, a in weights.items()
        }

    def _is_zero(self, name: str) -> bool:
        listed = self.meta.get("params_with_zero_grad_in_exact_arithmetic", ())
        return name in listed or self.meta["grad_l2_norm"].get(name, 1.0) < _ZERO_NORM


class ReluInputs:
    """What enters the ReLUs of a module's projectors, to keep two precisions on one side of zero.

    Rounding may carry a pre-activation of 5e-7 across zero. The unit's gradient is then off by
    all of itself, in ours as in anybody's float32 code, and nothing is wrong. So a float64 run
    records its pre-activations, and in the float32 run the few that changed sign are set to the
    recorded value, after a check that only rounding had moved them.
    """

    _ROUNDING = 1e-5  # of the largest pre-activation of the same layer

    def __init__(self, module: nn.Module) -> None:
        self._layers = {
            f"{name}.{layer}": projector.get_submodule(layer)
            for name, projector in module.named_modules()
            if isinstance(projector, CrossAttentionProjector)
            for layer in ("stem.norm", "query_proj", "fc1")
        }
        self._values: dict[str, Tensor] = {}
        for name, layer in self._layers.items():
            layer.register_forward_hook(partial(self._record, name))

    def pin_to(self, exact: "ReluInputs") -> None:
        assert exact._values.keys() == self._layers.keys()
        for name, layer in self._layers.items():
            layer.register_forward_hook(partial(self._pin, name, exact._values[name]))

    def _record(self, name: str, layer: nn.Module, inputs: object, output: Tensor) -> None:
        self._values[name] = output.detach()

    def _pin(
        self, name: str, exact: Tensor, layer: nn.Module, inputs: object, output: Tensor
    ) -> Tensor:
        crossed = (output > 0) != (exact > 0)
        correction = torch.where(crossed, exact - output.detach(), 0)
        moved = float(correction.abs().max() / exact.abs().max())
        assert moved <= self._ROUNDING, f"{name}: {moved:.1e} is not rounding"
        return output + correction.to(output.dtype)


def _from_mmcls(weights: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Published names of a Swin to timm's; the channels of patch merging are reordered."""
    renamed = {}
    for published, weight in weights.items():
        name = published.removeprefix("backbone.")
        name = name.replace("patch_embed.projection", "patch_embed.proj")
        name = name.replace(".attn.w_msa.", ".attn.")
        name = name.replace(".ffn.layers.0.0.", ".mlp.fc1.").replace(".ffn.layers.1.", ".mlp.fc2.")
        name = re.sub(r"^norm3\.", "norm.", name)
        name = re.sub(
            r"^stages\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) + 1}.downsample", name
        )
        name = re.sub(r"^stages\.", "layers.", name)
        if ".downsample." in name:
            weight = weight[..., merged_channel_order(weight.shape[-1])]
        renamed[name] = weight
    return renamed


def merged_channel_order(num_merged: int) -> np.ndarray:
    """Published index ``4c + 2dh + dw`` of each of timm's ``(2dw + dh) C + c``."""
    channel = np.arange(num_merged // 4)
    return np.concatenate([4 * channel + 2 * dh + dw for dw in (0, 1) for dh in (0, 1)])


def our_name(published: str) -> str:
    for theirs, ours in _PROJECTOR_NAMES.items():
        if published == theirs or published.startswith(theirs + "."):
            return ours + published.removeprefix(theirs)
    raise AssertionError(f"no parameter of ours corresponds to {published}")


def assert_close(actual: Tensor, expected: np.ndarray, tolerance: float, name: str) -> None:
    found = actual.detach().double().numpy()
    reference = np.asarray(expected, np.float64)
    assert found.shape == reference.shape, f"{name}: {found.shape} for {reference.shape}"
    assert np.isfinite(found).all(), f"{name}: not finite"
    error = np.abs(found - reference).max() / max(np.abs(reference).max(), np.finfo(float).tiny)
    assert error <= tolerance, f"{name}: error {error:.2e} exceeds {tolerance:.0e}"


class GoldenFolder:
    """The files of a folder by kind; unreadable ones are kept, to be reported."""

    def __init__(self) -> None:
        given = os.environ.get("SCALEKD_GOLDEN")
        self.is_default = given is None
        self.path = _DEFAULT_FOLDER if given is None else Path(given)
        self.by_kind: dict[str, list[Golden]] = defaultdict(list)
        self.unreadable: list[str] = []
        for path in sorted(self.path.glob("*.npz")):
            try:
                golden = Golden(path)
            except (OSError, ValueError, KeyError) as error:
                self.unreadable.append(f"{path.name}: {error}")
            else:
                self.by_kind[golden.kind].append(golden)

    def teacher_files(self, tag: str) -> tuple[Golden, list[Golden]]:
        """Inputs with outputs, and files of weights, of the teacher of this name."""
        files = [file for file in self.by_kind["teacher"] if file.meta["tag"] == tag]
        inputs = [file for file in files if file.meta["part"] == "io"]
        assert len(inputs) == 1, f"{len(inputs)} input files of teacher {tag} in {self.path}"
        return inputs[0], [file for file in files if file.meta["part"] == "weights"]

    def load_teacher(self, weights: Golden, inputs: Golden, folder: Path) -> Teacher:
        """Build a Swin of the sizes in the file, as a user would from a checkpoint."""
        checkpoint = folder / f"{weights.path.stem}.safetensors"
        save_file(weights.timm_weights(), checkpoint)
        sizes = weights.meta["cfg"]
        height, width = inputs.arrays["in/image_u8"].shape[2:]
        return load_teacher(
            TeacherConfig(
                model="swin_tiny_patch4_window7_224",
                checkpoint=str(checkpoint),
                model_kwargs={
                    "embed_dim": sizes["embed"],
                    "depths": sizes["depths"],
                    "num_heads": sizes["heads"],
                    "num_classes": weights.meta["num_classes"],
                },
                img_size=(height, width),
                mean=(128 / 255,) * 3,  # the files' images were scaled by (u8 - 128) / 64
                std=(64 / 255,) * 3,
            )
        )


_FOLDER = GoldenFolder()


@pytest.fixture(scope="session")
def golden_folder() -> GoldenFolder:
    if _FOLDER.is_default and not _FOLDER.path.is_dir():
        pytest.skip(f"no golden files at {_FOLDER.path}; set SCALEKD_GOLDEN to their folder")
    return _FOLDER


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    parameter: torch.dtype = request.param
    return parameter


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``golden`` runs over the files of the kind that the test's module names as ``KIND``."""
    if "golden" in metafunc.fixturenames:
        files = _FOLDER.by_kind.get(metafunc.module.KIND, [])
        metafunc.parametrize("golden", files, ids=[file.path.stem for file in files])
