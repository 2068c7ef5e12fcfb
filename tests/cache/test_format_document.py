"""A reader that is written from ``docs/cache-format.md`` alone reads the same values as scalekd.

Everything above the line *Comparison* knows the document and no line of scalekd.
"""

import ast
import hashlib
import io
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import xxhash
import zarr
from PIL import Image, ImageEnhance
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

Document = dict[str, Any]


def canonical(document: Document) -> bytes:
    return (json.dumps(document, sort_keys=True, indent=2) + "\n").encode()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class DocumentReader:
    """Reads a cache, with every check that the document asks for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = self._document("manifest.json")
        identity = self.manifest["plan"]["identity"]
        assert (identity["format"], identity["format_version"]) == ("scalekd-cache", 1)
        unsealed = {**self.manifest, "digest": ""}
        assert sha256(canonical(unsealed)) == self.manifest["digest"]
        assert sha256(canonical(identity)) == self.manifest["plan"]["cache_id"]
        assert self._file("plan.json") == canonical(self.manifest["plan"])
        self.identity = identity
        self.shard_size, self.block_size = identity["shard_size"], identity["block_size"]
        self.num_samples = identity["data"]["num_samples"]
        self.num_shards = -(-self.num_samples // self.shard_size)
        assert len(self.manifest["records"]) == self.num_shards * (self.num_passes + 1)
        for name in self.manifest["files"]:
            self._file(name)

    @property
    def num_passes(self) -> int:
        return int(self.manifest["num_passes"])

    def _document(self, name: str) -> Document:
        content = (self.root / name).read_bytes()
        document: Document = json.loads(content)
        assert canonical(document) == content
        return document

    def _file(self, name: str) -> bytes:
        return self._checked(name, self.manifest["files"][name])

    def _checked(self, name: str, digest: Document) -> bytes:
        path = self.root / name
        assert not path.is_symlink()
        content = path.read_bytes()
        assert {"num_bytes": len(content), "sha256": sha256(content)} == digest
        return content

    def tensors(self, name: str) -> dict[str, np.ndarray]:
        return safetensors.numpy.load(self._file(name))

    # Layout

    def planes(self) -> dict[str, tuple[np.dtype, tuple[int, ...], tuple[int, ...]]]:
        """Per-block arrays: type, axes before the view axis, axes after it."""
        found = {}
        for stage, info in self.identity["stages"].items():
            tokens = info["num_prefix_tokens"] + math.prod(info["grid"])
            name, shape = info["codec"]["config"]["codec"], (tokens, info["num_channels"])
            if name == "float16":
                planes = {"values": ("float16", (), shape)}
            elif name == "int8":
                planes = {"codes": ("int8", (), shape), "scales": ("float32", (), (tokens,))}
            else:
                tables = self.tensors(info["codec"]["tables"])
                gains = tokens if info["codec"]["config"]["gain"] == "token" else 1
                planes = {
                    "coefficients": ("int16", (len(tables["order"]),), ()),
                    "gains": ("int16", (gains,), ()),
                }
            found |= {f"stage{stage}/{plane}": value for plane, value in planes.items()}
        logits = self.identity["logits"]
        if logits and logits["config"]["codec"] == "full":
            found["logits/values"] = ("float16", (), (logits["config"]["num_classes"],))
        elif logits:
            kept = (logits["config"]["num_kept"],)
            index = "uint16" if logits["config"]["num_classes"] <= 65_536 else "uint32"
            found |= {
                "logits/indices": (index, kept, ()),
                "logits/scores": ("float16", kept, ()),
                "logits/log_sum_exp": ("float32", (), ()),
                "logits/tail_mass": ("float32", (), ()),
            }
        if (self.root / "images.json").exists():
            form = {"embed": "pixels", "format": "scalekd-images", "format_version": 1}
            assert self._document("images.json") == form
            found["pixels/differences"] = ("uint8", (), (3, *self.identity["views"]["view_size"]))
        return {n: (np.dtype(dtype), before, after) for n, (dtype, before, after) in found.items()}

    def components(self) -> dict[str, str]:
        """Components of the view policy by name, with what follows the colon or first hyphen."""
        text = self.identity["views"]["policy"]["policy"]
        matches = (re.match(r"([a-z]+)[:-]?(.*)", part) for part in text.split("+"))
        return {match[1]: match[2] for match in matches if match}

    def view_columns(self) -> dict[str, tuple[np.dtype, tuple[int, ...], tuple[int, ...]]]:
        components, found = self.components(), {}
        if "crop" in components:
            found["crop"] = ("uint16", (4,))
        if "flip" in components and 0 < float(components["flip"] or 0.5) < 1:
            found["flip"] = ("uint8", ())
        if "rand" in components:
            option = re.search(r"(?:^|-)n(\d+)", components["rand"])
            count = int(option[1]) if option else 2
            found |= {"operations": ("uint8", (count,)), "arguments": ("float16", (count,))}
        if "jitter" in components:
            found["jitter"] = ("float16", (len(_strengths(components["jitter"])),))
            found["jitter_order"] = ("uint8", ())
        if float(components.get("erase", 0)) > 0:
            found |= {"erase": ("uint16", (4,)), "noise_seed": ("uint32", ())}
        return {f"view/{n}": (np.dtype(dtype), (), after) for n, (dtype, after) in found.items()}

    def arrays(self, unit: str | int) -> dict[str, Any]:
        """Arrays of a unit by path: type, axes before and after, rows of a chunk."""
        by_shard: dict[str, Any] = {}
        if unit == "samples":
            width = self.identity["data"]["max_key_bytes"]
            by_shard["key"] = (np.dtype(np.uint8), (), (width,))
            by_shard["label"] = (np.dtype(np.int32), (), ())
            by_shard["source_hash"] = (np.dtype(np.uint64), (), ())
            folder, by_block = "samples", {}
        else:
            by_shard = self.view_columns() | {"pixel_hash": (np.dtype(np.uint64), (), ())}
            folder, by_block = f"passes/{unit:04d}", self.planes()
        return {f"{folder}/{n}": (*v, self.shard_size) for n, v in by_shard.items()} | {
            f"{folder}/{n}": (*v, self.block_size) for n, v in by_block.items()
        }

    def rows(self, unit: str | int) -> tuple[dict[str, np.ndarray], list[int], list[str]]:
        """All valid rows of a unit, view axis first; rows of each shard; hashes of its samples."""
        arrays = self.arrays(unit)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in arrays}
        counts, hashes = [], []
        for shard in range(self.num_shards):
            folder = unit if unit == "samples" else f"{unit:04d}"
            path = f"records/{folder}/{shard:06d}.json"
            assert sha256((self.root / path).read_bytes()) == self.manifest["records"][path]
            record = self._document(path)
            assert record["cache_id"] == self.manifest["plan"]["cache_id"]
            assert (record["unit"], record["shard"]) == (unit, shard)
            start = shard * self.shard_size
            given = min(self.shard_size, self.num_samples - start)
            count = record["num_rows"]
            assert count + len(record["skipped"]) == given
            expected = set()
            for name, (_, before, after, step) in arrays.items():
                first = start // step
                for index in range(first, first + -(-count // step)):
                    place = ["0"] * len(before) + [str(index)] + ["0"] * len(after)
                    expected.add(f"{name}/c/{'/'.join(place)}")
            assert set(record["files"]) == expected
            for name, digest in record["files"].items():
                self._checked(name, digest)
            for name, (dtype, before, after, step) in arrays.items():
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", message="Numcodecs codecs are not in")
                    array = zarr.open_array(self.root, path=name, mode="r")
                assert array.shape == (*before, self.num_samples, *after)
                assert array.chunks == (*before, step, *after)
                assert array.dtype == dtype
                axis = len(before)
                found = np.asarray(array[(slice(None),) * axis + (slice(start, start + count),)])
                parts[name].append(np.moveaxis(found, axis, 0))
            counts.append(count)
            hashes.append(record["samples_sha256"])
        whole = {name.split("/", 1 if unit == "samples" else 2)[-1]: p for name, p in parts.items()}
        return {name: np.concatenate(p) for name, p in whole.items()}, counts, hashes

    def samples(self) -> tuple[list[str], np.ndarray, np.ndarray]:
        columns, counts, hashes = self.rows("samples")
        keys = [bytes(row).rstrip(b"\0").decode() for row in columns["key"]]
        first = 0
        for count, expected in zip(counts, hashes, strict=True):
            part = slice(first, first + count)
            content = "\n".join(keys[part]).encode()
            content += columns["label"][part].astype("<i4").tobytes()
            content += columns["source_hash"][part].astype("<u8").tobytes()
            assert sha256(content) == expected
            first += count
        for unit in range(self.num_passes):
            assert self.rows(unit)[2] == hashes
        return keys, columns["label"], columns["source_hash"]

    # Codecs

    def features(self, stage: str, rows: dict[str, np.ndarray]) -> np.ndarray:
        info = self.identity["stages"][stage]
        config = info["codec"]["config"]
        if config["codec"] == "float16":
            return rows[f"stage{stage}/values"].astype(np.float32)
        if config["codec"] == "int8":
            codes, scales = rows[f"stage{stage}/codes"], rows[f"stage{stage}/scales"]
            return codes * scales[..., None]
        tables = self.tensors(info["codec"]["tables"])
        values = _dequantised(rows[f"stage{stage}/coefficients"], config, tables["groups"])
        channels, prefix = info["num_channels"], info["num_prefix_tokens"]
        height, width = info["grid"]
        bands = _bands(height, width, prefix, config["num_bands"])
        row, component = np.divmod(tables["order"], channels)
        transformed = np.zeros((len(values), len(bands), channels))
        for number in range(len(bands)):
            of_row = row == number
            basis = tables[f"basis_{bands[number]}"].astype(np.float64)
            transformed[:, number] = values[:, of_row] @ basis[component[of_row]]
        grid = transformed[:, prefix:].reshape(-1, height, width, channels)
        grid = np.einsum("ia,jb,vijc->vabc", _cosine(height), _cosine(width), grid)
        tokens = np.concatenate(
            [transformed[:, :prefix], grid.reshape(len(values), -1, channels)], axis=1
        )
        gains = rows[f"stage{stage}/gains"] / 8 + config["reference"]
        return (tokens + tables["mean"]) * np.exp2(gains)[..., None]

    def log_probabilities(self, rows: dict[str, np.ndarray]) -> np.ndarray:
        scores = rows["logits/scores"].astype(np.float32)
        return scores - rows["logits/log_sum_exp"][:, None]

    # Views

    def redraw(self, image: Image.Image, rows: dict[str, np.ndarray], row: int) -> np.ndarray:
        views, components = self.identity["views"], self.components()
        height, width = views["view_size"]
        policy = views["policy"]
        name = policy["interpolation"]
        filter_ = Image.Resampling[name.removesuffix("-opencv").upper()]
        fill = tuple(min(255, round(255 * mean)) for mean in policy["mean"])
        if "crop" in components:
            top, left, rows_, columns = (int(v) for v in rows["view/crop"][row])
            image = image.crop((left, top, left + columns, top + rows_))
            image = _resize(image, height, width, name)
        else:
            image = _centre(image, float(components["center"] or 0.875), height, width, name)
        if "view/flip" in rows:
            flipped = bool(rows["view/flip"][row])
        else:
            flipped = "flip" in components and float(components["flip"] or 0.5) == 1
        if flipped:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if "view/operations" in rows:
            pairs = zip(rows["view/operations"][row], rows["view/arguments"][row], strict=True)
            for number, argument in pairs:
                if number:
                    image = _operate(image, int(number), float(argument), filter_, fill)
        if "view/jitter" in rows:
            names, factors = _strengths(components["jitter"]), rows["view/jitter"][row].tolist()
            orders = list(itertools.permutations(zip(names, factors, strict=True)))
            for name, factor in orders[rows["view/jitter_order"][row]]:
                image = _adjust(image, name, factor)
        pixels = np.array(image)
        if "view/erase" in rows and rows["view/erase"][row].any():
            box = [int(v) for v in rows["view/erase"][row]]
            _erase(pixels, box, int(rows["view/noise_seed"][row]), policy["mean"], policy["std"])
        return pixels


def _dequantised(stored: np.ndarray, config: Document, groups: np.ndarray) -> np.ndarray:
    count, num_trellis = stored.shape[1], config["num_trellis"]
    k = stored.astype(np.int64)
    points = 2.0 * k
    lanes = num_trellis // 128
    group = np.empty(count, np.int64)
    for i in range(count):
        if i < num_trellis:
            group[i] = i // lanes
        else:
            group[i] = (i - num_trellis) // 128 + (128 if num_trellis else 0)
    for lane in range(lanes):
        path = k[:, lane:num_trellis:lanes]
        z = np.zeros_like(path)
        for s in range(128):
            before = z[:, s - 1] if s >= 1 else 0
            third = z[:, s - 3] if s >= 3 else 0
            parity = path[:, s - 2] & 1 if s >= 2 else 0
            z[:, s] = before ^ third ^ parity
        points[:, lane:num_trellis:lanes] = np.where(z == 1, -1, 1) * (2 * path + 0.5)
    scale, pull = groups[group, 0], groups[group, 1]
    return np.asarray(config["step"] * (scale * points + pull * np.clip(points, -0.5, 0.5)))


def _bands(height: int, width: int, prefix: int, num_bands: int) -> list[int]:
    q = [(i / height) ** 2 + (j / width) ** 2 for i in range(height) for j in range(width)]
    largest = max(*q, 1e-12)
    bands = [min(int(math.sqrt(r / largest) * num_bands), num_bands - 1) for r in q]
    used = sorted(set(bands))
    return [len(used)] * prefix + [used.index(band) for band in bands]


def _cosine(size: int) -> np.ndarray:
    f, x = np.mgrid[:size, :size]
    basis = np.sqrt(2 / size) * np.cos(np.pi * (x + 0.5) * f / size)
    basis[0] /= np.sqrt(2)
    return np.asarray(basis)


def _resize(image: Image.Image, height: int, width: int, interpolation: str) -> Image.Image:
    if interpolation != "bilinear-opencv":
        filter_ = Image.Resampling[interpolation.upper()]
        return image.resize((width, image.height), filter_).resize((width, height), filter_)
    pixels = np.array(image).astype(int)
    upper, lower, down = _neighbours(image.height, height)
    left, right, across = _neighbours(image.width, width)
    sums = pixels[:, left] * (2048 - across)[:, None] + pixels[:, right] * across[:, None] >> 4
    above, below = (
        sums[rows] * weight[:, None, None] >> 16
        for rows, weight in ((upper, 2048 - down), (lower, down))
    )
    return Image.fromarray((above + below + 2 >> 2).astype(np.uint8))


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    x = ((np.arange(new) + 0.5) * (1 / (new / old)) - 0.5).astype(np.float32)
    first = np.floor(x).astype(int)
    weight = np.array([round(2048 * float(w)) for w in x - np.floor(x)])
    return first.clip(0, old - 1), (first + 1).clip(0, old - 1), weight


def _centre(image: Image.Image, f: float, height: int, width: int, name: str) -> Image.Image:
    rows, columns = math.floor(height / f), math.floor(width / f)
    if rows == columns:
        shorter = min(image.size)
        size = [rows if side == shorter else int(rows * side / shorter) for side in image.size]
    else:
        ratio = min(image.height / rows, image.width / columns)
        size = [round(side / ratio) for side in image.size]
    image = _resize(image, size[1], size[0], name)
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _operate(image: Image.Image, number: int, a: float, filter_: Any, fill: Any) -> Image.Image:
    name = InterpolationMode(Image.Resampling(filter_).name.lower())
    tv: Any = functional
    plain = {1: tv.autocontrast, 2: tv.equalize, 3: tv.invert}
    factors = {8: tv.adjust_saturation, 9: tv.adjust_contrast, 10: tv.adjust_brightness}
    factors[11] = tv.adjust_sharpness
    matrices = {
        12: (1, a, 0, 0, 1, 0),
        13: (1, 0, 0, a, 1, 0),
        14: (1, 0, a * image.width, 0, 1, 0),
        15: (1, 0, 0, 0, 1, a * image.height),
    }
    if number in plain:
        found = plain[number](image)
    elif number in factors:
        found = factors[number](image, a)
    elif number in matrices:
        found = image.transform(
            image.size, Image.Transform.AFFINE, matrices[number], filter_, fillcolor=fill
        )
    elif number == 4:
        found = tv.rotate(image, a, interpolation=name, fill=list(fill))
    elif number == 5:
        found = tv.posterize(image, int(a)) if a else Image.new("RGB", image.size)
    elif number == 6:
        found = tv.solarize(image, int(a))
    else:
        found = image.point([min(255, i + int(a)) if i < 128 else i for i in range(256)] * 3)
    return found


def _strengths(text: str) -> list[str]:
    """Adjustments that the text of jitter gives a strength, in the order of the document."""
    numbers = [float(part) for part in text.split("-")]
    numbers = numbers * 3 if len(numbers) == 1 else numbers
    names = ("brightness", "contrast", "saturation", "hue")
    return [name for name, strength in zip(names, numbers, strict=False) if strength]


def _adjust(image: Image.Image, name: str, factor: float) -> Image.Image:
    if name == "brightness":
        return ImageEnhance.Brightness(image).enhance(factor)
    if name == "contrast":
        return ImageEnhance.Contrast(image).enhance(factor)
    if name == "saturation":
        return ImageEnhance.Color(image).enhance(factor)
    hsv = np.array(image.convert("HSV"))
    hsv[..., 0] = (hsv[..., 0].astype(int) + int(factor * 255)) % 256
    return Image.merge("HSV", [Image.fromarray(hsv[..., i]) for i in range(3)]).convert("RGB")


def _erase(
    pixels: np.ndarray, box: list[int], seed: int, mean: list[float], std: list[float]
) -> None:
    sides = (pixels.shape[0], pixels.shape[1]) * 2
    top, left, height, width = (
        (2 * value * side + 65536) // 131072 for value, side in zip(box, sides, strict=True)
    )
    region = pixels[top : top + max(1, height), left : left + max(1, width)]
    height, width = region.shape[:2]
    key = np.array([seed, int.from_bytes(b"erasenoi", "little")], np.uint64)
    raw = np.random.Philox(key=key).random_raw(-(-3 * height * width // 4))
    words = raw.astype("<u8").view("<u2")[: 3 * height * width].reshape(3, height, width)
    for channel in range(3):
        normal = NormalDist(mean[channel], std[channel])
        ends = [round(65536 * normal.cdf((v + 0.5) / 255)) for v in range(255)]
        region[..., channel] = np.searchsorted(ends, words[channel], side="right")


# Comparison

_FROZEN = Path(__file__).parent / "frozen" / "format1"
_CACHES = ["float16", "int8", "transform"]


def test_the_reader_imports_nothing_from_scalekd() -> None:
    tree = ast.parse(Path(__file__).read_text())
    imported = [
        alias.name if isinstance(node, ast.Import) else str(node.module)
        for node in tree.body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    ]
    assert not [name for name in imported if name.startswith(("scalekd", "tests"))]
    for node in tree.body:
        if isinstance(node, ast.ClassDef) or not getattr(node, "name", "test").startswith("test"):
            assert "scalekd." not in ast.unparse(node)


@pytest.mark.parametrize("name", _CACHES)
def test_samples_and_every_array_are_those_of_our_reader(name: str) -> None:
    from scalekd.cache import open_cache

    theirs, ours = DocumentReader(_FROZEN / name), open_cache(_FROZEN / name)
    keys, labels, hashes = theirs.samples()
    assert keys == [ours.samples.key(sample) for sample in range(len(ours.samples))]
    np.testing.assert_array_equal(labels, ours.samples.labels)
    np.testing.assert_array_equal(hashes, ours.samples.source_hashes)
    assert theirs.num_passes == ours.num_passes
    assert theirs.manifest["num_views"] == theirs.num_passes * len(keys)
    names = [array.name for array in ours.layout.views]
    for index in range(theirs.num_passes):
        rows = theirs.rows(index)[0]
        assert set(rows) == set(names)
        blocks = [ours.read_rows(index, *block, names) for block in ours.blocks()]
        for array in names:
            np.testing.assert_array_equal(rows[array], np.concatenate([b[array] for b in blocks]))


@pytest.mark.parametrize("name", _CACHES)
def test_features_equal_those_of_our_decoder(name: str) -> None:
    theirs = DocumentReader(_FROZEN / name)
    found = theirs.features("4", theirs.rows(0)[0])
    with np.load(_FROZEN / "features.npz", allow_pickle=False) as frozen:
        np.testing.assert_allclose(found, frozen[name], rtol=1e-3, atol=2e-3)
        largest = np.abs(frozen[name]).max()
        assert np.abs(found - frozen[name]).max() < 1e-4 * largest


def test_logits_equal_those_of_our_decoder() -> None:
    from scalekd.cache import open_cache

    theirs, ours = DocumentReader(_FROZEN / "float16"), open_cache(_FROZEN / "float16")
    rows, codec = theirs.rows(1)[0], ours.codecs.logits
    assert codec is not None
    stored = {p.name: np.moveaxis(rows[f"logits/{p.name}"], 0, p.view_axis) for p in codec.planes}
    decoded = codec.decode(stored)
    np.testing.assert_array_equal(rows["logits/indices"], decoded["indices"])
    np.testing.assert_allclose(theirs.log_probabilities(rows), decoded["log_probs"], rtol=1e-6)
    kept = np.exp(theirs.log_probabilities(rows)).sum(axis=1)
    np.testing.assert_allclose(kept + rows["logits/tail_mass"], 1, atol=1e-3)


@pytest.mark.parametrize("name", _CACHES)
def test_views_are_redrawn_to_the_stored_hashes(name: str) -> None:
    theirs = DocumentReader(_FROZEN / name)
    keys, _, hashes = theirs.samples()
    witnesses = theirs.tensors(theirs.identity["views"]["witnesses"])["pixels"]
    for index in range(theirs.num_passes):
        rows = theirs.rows(index)[0]
        for row, key in enumerate(keys):
            path = _FROZEN / "images" / "train" / key
            assert xxhash.xxh3_64_intdigest(path.read_bytes()) == hashes[row]
            with Image.open(path) as image:
                pixels = theirs.redraw(image.convert("RGB"), rows, row)
            assert xxhash.xxh3_64_intdigest(pixels.tobytes()) == rows["pixel_hash"][row]
            if index == 0 and row < len(witnesses):
                np.testing.assert_array_equal(pixels, witnesses[row])


@pytest.mark.parametrize("jitter", ["jitter:0.4", "jitter:0.8-0-0.3-0.2"])
def test_jittered_views_are_redrawn_to_the_stored_hashes(
    jitter: str,
    make_cache: Callable[..., Any],
    image_bytes: dict[int, bytes],
    tmp_path: Path,
) -> None:
    aug = f"crop+flip+rand-m9-n2-mstd0.5-inc1+{jitter}+erase:0.25"
    assert make_cache(tmp_path / "cache", aug=aug, passes=1, stages=(4,), limit=24).complete
    theirs = DocumentReader(tmp_path / "cache")
    keys, rows = theirs.samples()[0], theirs.rows(0)[0]
    assert len(set(rows["view/jitter_order"].tolist())) > 1
    for row, key in enumerate(keys):
        with Image.open(io.BytesIO(image_bytes[int(key[-3:])])) as image:
            pixels = theirs.redraw(image.convert("RGB"), rows, row)
        assert xxhash.xxh3_64_intdigest(pixels.tobytes()) == rows["pixel_hash"][row]


@pytest.mark.parametrize("num_bands", range(1, 17))
def test_bands_are_those_of_the_codec_on_every_grid(num_bands: int) -> None:
    """Dividing radii instead of their squares gives other bands, on a grid of 5 x 5 for example."""
    from scalekd.codecs._spatial import radial_bands
    from scalekd.shapes import FeatureShape

    for side in range(1, 33):
        for grid in ((side, side), (side, side + 1), (2 * side, side)):
            ours = radial_bands(FeatureShape(grid, 8, 1), num_bands).tolist()
            assert _bands(*grid, 1, num_bands) == ours, grid


@pytest.mark.parametrize("aug", ["crop+rand-m9-n4-p1-inc1", "center:0.7"])
def test_views_with_the_filter_of_opencv_are_redrawn(
    aug: str, make_cache: Callable[..., Any], image_bytes: dict[int, bytes], tmp_path: Path
) -> None:
    made = make_cache(
        tmp_path / "cache",
        aug=aug,
        interpolation="bilinear-opencv",
        passes=1,
        stages=(4,),
        limit=24,
    )
    assert made.complete
    theirs = DocumentReader(tmp_path / "cache")
    assert theirs.identity["views"]["policy"]["interpolation"] == "bilinear-opencv"
    keys, rows = theirs.samples()[0], theirs.rows(0)[0]
    for row, key in enumerate(keys):
        with Image.open(io.BytesIO(image_bytes[int(key[-3:])])) as image:
            pixels = theirs.redraw(image.convert("RGB"), rows, row)
        assert xxhash.xxh3_64_intdigest(pixels.tobytes()) == rows["pixel_hash"][row]


def test_embedded_pixels_are_restored_to_the_stored_hashes(
    make_cache: Callable[..., Any], tmp_path: Path
) -> None:
    made = make_cache(tmp_path / "cache", embed="pixels", passes=1, stages=(4,), limit=30)
    assert made.complete
    rows = DocumentReader(tmp_path / "cache").rows(0)[0]
    for differences, expected in zip(rows["pixels/differences"], rows["pixel_hash"], strict=True):
        planes = differences.cumsum(2, dtype=np.uint8).cumsum(1, dtype=np.uint8)
        planes[0] += planes[1]
        planes[2] += planes[1]
        pixels = np.ascontiguousarray(planes.transpose(1, 2, 0))
        assert xxhash.xxh3_64_intdigest(pixels.tobytes()) == expected


@pytest.mark.parametrize("kind", ["manifest.json", "plan.json", "records/0000/000001.json"])
def test_the_reader_refuses_edited_documents(kind: str, tmp_path: Path) -> None:
    """Of this reader: a number changed in a document, canonical as before, is noticed."""
    import shutil

    root = Path(shutil.copytree(_FROZEN / "int8", tmp_path / "cache"))
    document = json.loads((root / kind).read_bytes())
    place = {"manifest.json": "num_passes", "plan.json": "cache_id"}.get(kind, "num_rows")
    document[place] = document[place] + 1 if place != "cache_id" else "0" * 64
    (root / kind).write_bytes(canonical(document))
    with pytest.raises(AssertionError):
        DocumentReader(root).rows(0)
