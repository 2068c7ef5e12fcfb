"""Mutations of meaning: a value of a document changes, and the whole cache is hashed again.

What a hostile author would do: no digest, identity or manifest disagrees with any other, so that
only the values themselves can be refused. Half of the changes are made wherever the same name has
the same value, in the tail's configuration too, so that they pass the comparisons between
documents and meet the bounds behind them.
"""

import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scalekd.cache import ChosenTargets
from scalekd.cache.care.verify import verify
from scalekd.distillation import build_objective
from scalekd.errors import ScaleKDError
from scalekd.pipelines.convert_cache import ConvertConfig, convert_cache
from scalekd.pipelines.inspect_cache import cache_info
from scalekd.pipelines.list_caches import list_caches
from scalekd.pipelines.share_cache import ShareConfig, share_cache
from scalekd.shapes import FeatureShape
from scalekd.teachers import TeacherSpec, load_tail_bytes
from tests.reliability.mutations import Files, canonical, odd_value, sealed

_SAME = {"view_size": "img_size", "num_kept": "num_classes"}
_EXTENSION = "extensions/other/"
_BLOCKS = 2
_WEIGHTS = {"value of plan": 8, "value of records": 3, "value of tail header": 4}


class WholeCache:
    """A cache in memory and in a folder, with what else may lie in one: an extension, a selection.

    Args:
        root: Folder of the sound cache.
        folder: Where to keep what commands write.
    """

    def __init__(self, root: Path, folder: Path) -> None:
        self.root, self.scratch = root, folder / f"{root.name}-scratch"
        self.files: Files = {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }
        self.tables = [name for name in self.files if name.endswith(".safetensors")]
        self._by_kind: dict[str, list[str]] = {}
        for name in self.files:
            if name.endswith((".json", ".safetensors")):
                self._by_kind.setdefault(_kind(name), []).append(name)

    def mutate(self, rng: random.Random) -> tuple[str, Files]:
        """Change one value; returns what it was of, and all files that differ then."""
        kinds = list(self._by_kind)
        (kind,) = rng.choices(kinds, [_WEIGHTS.get(kind, 1) for kind in kinds])
        name = rng.choice(self._by_kind[kind])
        header = _Header(self.files[name]) if name in self.tables else None
        document = header.document if header else json.loads(self.files[name])
        places = list(_leaves(document))
        if not places:
            return kind, {}
        parent, key = rng.choice(places)
        old, new = parent[key], odd_value(rng, parent[key])
        parent[key] = new
        changed = {name: header.content() if header else canonical(document)}
        if rng.random() < 0.5:
            changed |= self._everywhere(str(key), old, new)
        below = _EXTENSION if name.startswith(_EXTENSION) else ""
        base = {n.removeprefix(below): c for n, c in self.files.items() if n.startswith(below)}
        if not below:
            base = {n: c for n, c in base.items() if not n.startswith(_EXTENSION)}
        own = {
            n.removeprefix(below): c for n, c in changed.items() if n.removeprefix(below) in base
        }
        return kind, {below + n: c for n, c in sealed(base, own).items()}

    def _everywhere(self, key: str, old: Any, new: Any) -> Files:
        names = {key, _SAME.get(key, key), *(k for k, v in _SAME.items() if v == key)}
        changed: Files = {}
        for name in ("plan.json", *self.tables):
            if name not in self.files:
                continue
            header = _Header(self.files[name]) if name in self.tables else None
            document = header.document if header else json.loads(self.files[name])
            hits = [(p, k) for p, k in _leaves(document) if str(k) in names and p[k] == old]
            hits += [(p, k) for p, k in _lists(document) if str(k) in names and p[k] == old]
            for parent, at in hits:
                parent[at] = new
            if hits:
                changed[name] = header.content() if header else canonical(document)
        return changed

    def write(self, files: Files) -> None:
        """Put files in place."""
        for name, content in files.items():
            (self.root / name).write_bytes(content)

    def meet(self, changed: Files, rng: random.Random) -> None:
        """Put the changed files in place, and use the cache in one of the ways that it is used.

        Raises:
            ScaleKDError: The cache was refused.
            BaseException: Anything that no reader may raise.
        """
        self.write(changed)
        try:
            self._use(rng)
        finally:
            shutil.rmtree(self.scratch, ignore_errors=True)
            self.write({name: self.files[name] for name in changed})

    def _use(self, rng: random.Random) -> None:
        way = rng.random()
        if way < 0.1:
            list_caches(self.root)
            cache_info(self.root).lines()
        elif way < 0.25:
            problems = verify(self.root).problems
            if problems:
                raise Refused("; ".join(problems)[:1000])
        elif way < 0.4:
            try:
                share_cache(ShareConfig(source=str(self.root), target=str(self.scratch), jobs=1))
            finally:
                self._check_planted()
        elif way < 0.45:
            form = "zarr" if "webdataset.json" in self.files else "webdataset"
            output = str(self.scratch)
            try:
                convert_cache(
                    ConvertConfig(source=str(self.root), output=output, format=form, workers=0)
                )
            finally:
                self._check_planted()
        else:
            _train_on(self.root, extension=_EXTENSION + "plan.json" in self.files)

    def _check_planted(self) -> None:
        """Every file that arrived has a name that the sound cache could have."""
        for path in self.scratch.rglob("*"):
            relative = path.relative_to(self.scratch)
            if path.is_file() and relative.parts[0] not in _TOP:
                raise AssertionError(f"{relative} was planted")


_TOP = frozenset(
    {"plan.json", "manifest.json", "zarr.json", "webdataset.json", "_info.json", "tables"}
    | {"records", "samples", "passes", "extensions", "selection"}
)


class Refused(ScaleKDError):
    """Verification found problems."""


class _Header:
    """The JSON header of a safetensors file, with the documents inside it opened."""

    def __init__(self, content: bytes) -> None:
        length = int.from_bytes(content[:8], "little")
        self.document = json.loads(content[8 : 8 + length])
        self._rest = content[8 + length :]
        self._inner = self.document.get("__metadata__", {})
        for name, text in self._inner.items():
            self._inner[name] = json.loads(text)

    def content(self) -> bytes:
        document = dict(self.document)
        if isinstance(self._inner, dict) and self._inner:
            texts = {name: json.dumps(value) for name, value in self._inner.items()}
            document["__metadata__"] = texts
        text = json.dumps(document).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text + self._rest


def _leaves(node: Any) -> Iterator[tuple[Any, Any]]:
    """Every place of a document that holds a number, a text, a truth, null or something empty."""
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        value = node[key]
        if isinstance(value, dict | list) and value:
            yield from _leaves(value)
        elif not (isinstance(value, str) and len(value) == 64):  # a digest: made anew anyway
            yield node, key


def _lists(node: Any) -> Iterator[tuple[Any, Any]]:
    for key in list(node) if isinstance(node, dict) else range(len(node)):
        if isinstance(node[key], list):
            yield node, key
        if isinstance(node[key], dict | list):
            yield from _lists(node[key])


def _kind(name: str) -> str:
    name = name.removeprefix(_EXTENSION)
    if name.startswith("tables/"):
        return f"value of {name[7:].split('-')[0].rstrip('34')} header"
    if name.startswith("passes/") and name.endswith(".safetensors"):
        return "value of index header"
    for start in ("plan", "manifest", "records", "selection", "webdataset", "passes/fields"):
        if name.startswith(start):
            return f"value of {start.split('/')[-1]}"
    return "value of array metadata"


def _train_on(root: Path, *, extension: bool) -> None:
    """Open, read some blocks, decode them, and build what a student run would build."""
    chosen = ChosenTargets.open(root, targets="other" if extension else None)
    reader = chosen.reader
    spec = TeacherSpec.model_validate(chosen.caches[chosen.features[0]].identity.teacher)
    _ = reader.samples, reader.witnesses
    names = [array.name for array in reader.layout.views]
    for block in reader.blocks()[:_BLOCKS]:
        reader.read_rows(reader.passes[0], *block, names)
    codecs = chosen.caches[chosen.features[0]].codecs
    for codec in codecs.stages.values():
        codec.decoder()
    owner = chosen.caches[chosen.features[0]]
    tail = None
    if owner.identity.tail is not None and owner.part.has_tail:
        content = owner.file(owner.identity.tail, owner.identity.tail_digest)
        tail = load_tail_bytes(content, owner.storage.locate(owner.identity.tail))
    levels = (FeatureShape((4, 4), 8), FeatureShape((2, 2), 16))
    build_objective("scalekd", student_levels=levels, teacher_stages=spec.stages, tail=tail)


def add_selection(root: Path) -> None:
    """Say that the whole of a cache is a part of itself."""
    cache_id = json.loads((root / "plan.json").read_bytes())["cache_id"]
    document = {"cache_id": cache_id, "passes": [[0, 0]], "shards": [[0, 1]], "targets": None}
    path = root / "selection/000001.json"
    path.parent.mkdir()
    path.write_bytes(canonical(document))


def whole_caches(sources: Path, folder: Path) -> list[WholeCache]:
    """Zarr arrays with an extension, tars, and a part of a cache."""
    extended = Path(shutil.copytree(sources / "int8", folder / "extended"))
    shutil.copytree(sources / "int8", extended / _EXTENSION)
    tars = folder / "tars"
    convert_cache(
        ConvertConfig(
            source=str(sources / "transform"), output=str(tars), format="webdataset", workers=0
        )
    )
    part = Path(shutil.copytree(sources / "float16", folder / "part"))
    add_selection(part)
    found = [WholeCache(root, folder) for root in (extended, tars, part)]
    for cache in found:
        for number in range(40):
            cache.meet({}, random.Random(number))
    return found
