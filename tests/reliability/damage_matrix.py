"""Every kind of damage to every kind of file of a cache: who notices.

    python -m benchmarks.damage_matrix            # minutes on one core; writes docs/reliability.md
    python -m benchmarks.damage_matrix --files 1  # a quick look

A real cache is written by ``cache-teacher`` (two stages, logits, tail, codec tables, two passes).
One file at a time is damaged; ``cache verify`` judges the cache, an epoch of every pass is read as
training reads it (plan, tail, witnesses, tables, targets, views, decoded), and ``cache repair`` has
to bring every byte back. Then the file is put back.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr

from scalekd.cache import TargetDecoder, open_cache
from scalekd.cache.care.verify import verify
from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import Manifest, ShardRecord
from scalekd.cache.documents.records import record_hash
from scalekd.cache.files import digest
from scalekd.codecs import quiet_zarr
from scalekd.errors import CacheError
from scalekd.images import open_dataset
from scalekd.loading.loader import CachedViewLoader
from scalekd.pipelines._source_options import RepairConfig
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.pipelines.repair_cache import repair_cache
from scalekd.teachers import TeacherConfig, load_tail
from tests.reliability.document import write_documentation
from tests.reliability.kill_harness import write_images

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "damage_matrix.json"

KINDS = {
    "manifest": "manifest.json",
    "plan": "plan.json",
    "commit records": "records/*/*.json",
    "array metadata": "**/zarr.json",
    "samples": "samples/*/c/**/*",
    "targets": "passes/*/[sl]*[4s]/*/c/**/*",
    "views": "passes/*/*/c/**/*",
    "tail": "tables/tail-*",
    "codec tables": "tables/stage*",
    "witnesses": "tables/witnesses-*",
}
_PREFIXES = {"views": ("view/", "pixel_hash/"), "targets": ("stage4/", "logits/")}

Damage = Callable[["Patient", str, random.Random], "str | None"]


class Patient:
    """A cache under treatment: remembers every file, so that each can be put back."""

    def __init__(self, root: Path, images: Path, other: Path, younger: bytes) -> None:
        self.root, self.images, self.other, self.younger = root, images, other, younger
        self.sound = _contents(root)

    def files(self, kind: str) -> list[str]:
        """Files of a kind; of the metadata, only that of arrays which training reads."""
        found = [
            path.relative_to(self.root).as_posix()
            for path in sorted(self.root.glob(KINDS[kind]))
            if path.is_file()
        ]
        if kind in _PREFIXES:
            return [n for n in found if n.split("/", 2)[2].startswith(_PREFIXES[kind])]
        if kind == "array metadata":
            arrays = ("stage4/", "logits/", "view/", "pixel_hash/", "samples/")
            deep = [n for n in found if any(array in n for array in arrays)]
            return [n for n in deep if (self.root / n).with_name("c").is_dir()]
        return found

    def write(self, name: str, content: bytes) -> None:
        (self.root / name).write_bytes(content)

    def heal(self) -> bool:
        """Put everything back; says whether anything had to be."""
        now, differed = _contents(self.root), False
        for name in now.keys() - self.sound.keys():
            (self.root / name).unlink()
            differed = True
        for name, content in self.sound.items():
            if now.get(name) != content:
                (self.root / name).parent.mkdir(parents=True, exist_ok=True)
                self.write(name, content)
                differed = True
        return differed


def _contents(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def _flip(patient: Patient, name: str, chance: random.Random) -> str:
    content = bytearray(patient.sound[name])
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    patient.write(name, content)
    return name


def _cut(share: float, less: int = 0) -> Damage:
    def damage(patient: Patient, name: str, chance: random.Random) -> str:
        del chance
        content = patient.sound[name]
        patient.write(name, content[: int(len(content) * share) - less])
        return name

    return damage


def _missing(patient: Patient, name: str, chance: random.Random) -> str:
    del chance
    (patient.root / name).unlink()
    return name


def _extra(patient: Patient, name: str, chance: random.Random) -> str:
    """One more of its kind, beside it."""
    del chance
    path = Path(name)
    extra = path.with_name(f"9{path.name}").as_posix()
    patient.write(extra, patient.sound[name])
    return extra


def _sibling(patient: Patient, name: str, chance: random.Random) -> str | None:
    """Another file of the same name's kind, with other content: another shard's, or pass's."""
    kind = next(kind for kind in KINDS if name in patient.files(kind))
    others = [n for n in patient.files(kind) if patient.sound[n] != patient.sound[name]]
    if kind in ("plan", "manifest"):
        others = ["plan.json" if name == "manifest.json" else "manifest.json"]
    elif kind in ("tail", "codec tables", "witnesses"):
        others = [n for n in patient.sound if n.startswith("tables/") and n != name]
    else:
        array = name.split("/c/")[0].split("/", 2)[-1]
        others = [n for n in others if array in n] or others
    return chance.choice(sorted(others)) if others else None


def _swapped(patient: Patient, name: str, chance: random.Random) -> str | None:
    other = _sibling(patient, name, chance)
    if other is None:
        return None
    patient.write(name, patient.sound[other])
    patient.write(other, patient.sound[name])
    return name


def _duplicated(patient: Patient, name: str, chance: random.Random) -> str | None:
    other = _sibling(patient, name, chance)
    if other is None:
        return None
    patient.write(name, patient.sound[other])
    return name


def _foreign(patient: Patient, name: str, chance: random.Random) -> str | None:
    """The file at the same place of a cache of the same images, shapes and codec, other views."""
    del chance
    path = patient.other / name
    if not path.exists():  # a table, named after its content
        stem = name.split("-")[0]
        path = next(patient.other.glob(f"{stem}-*"))
    if path.read_bytes() == patient.sound[name]:
        return None
    patient.write(name, path.read_bytes())
    return name


def _stale(patient: Patient, name: str, chance: random.Random) -> str | None:
    """The manifest of the time when the cache had one pass."""
    del chance
    if name != "manifest.json":
        return None
    patient.write(name, patient.younger)
    return name


def _edited(patient: Patient, name: str, chance: random.Random) -> str | None:
    """A number in a document, changed with an editor."""
    del chance
    if not name.endswith(".json"):
        return None
    text = patient.sound[name].decode()
    for field in ("num_views", "seed", "num_rows", "shape"):
        start = text.find(f'"{field}"')
        if start >= 0:
            digit = next(i for i in range(start, len(text)) if text[i].isdigit())
            changed = str((int(text[digit]) + 1) % 10)
            patient.write(name, (text[:digit] + changed + text[digit + 1 :]).encode())
            return name
    return None


def _edited_and_sealed(patient: Patient, name: str, chance: random.Random) -> str | None:
    """The same, with the digest that the document carries of itself made to match."""
    del chance
    if name != "manifest.json":
        return None
    manifest = Manifest.model_validate_json(patient.sound[name])
    files = {**manifest.files}
    tail = next(n for n in files if n.startswith("tables/tail"))
    files[tail] = digest(b"")
    edited = manifest.model_copy(update={"files": files, "digest": ""}).sealed()
    patient.write(name, canonical(edited))
    return name


def _wrong_order(patient: Patient, name: str, chance: random.Random) -> str | None:
    """Two rows of a table of samples change places; record and manifest are made to match."""
    del chance
    if not name.startswith("samples/key/c/"):
        return None
    shard = int(name.split("/c/")[1].split("/")[0])
    with quiet_zarr():
        array = zarr.open_array(patient.root / "samples/key", mode="r+", zarr_format=3)
        first = shard * array.chunks[0]
        rows = np.asarray(array[first : first + 2])
        array[first : first + 2] = rows[::-1]
    record_name = f"records/samples/{shard:06d}.json"
    record = ShardRecord.model_validate_json(patient.sound[record_name])
    files = {**record.files, name: digest((patient.root / name).read_bytes())}
    record = record.model_copy(update={"files": files})
    patient.write(record_name, canonical(record))
    manifest = Manifest.model_validate_json(patient.sound["manifest.json"])
    records = {**manifest.records, record_name: record_hash(record)}
    sealed = manifest.model_copy(update={"records": records, "digest": ""}).sealed()
    patient.write("manifest.json", canonical(sealed))
    return name


DAMAGES: dict[str, Damage] = {
    "bit flipped": _flip,
    "one byte short": _cut(1.0, less=1),
    "cut in half": _cut(0.5),
    "cut to nothing": _cut(0.0),
    "missing": _missing,
    "extra": _extra,
    "swapped": _swapped,
    "duplicated": _duplicated,
    "of another cache": _foreign,
    "stale": _stale,
    "edited": _edited,
    "edited and sealed": _edited_and_sealed,
    "wrong key order": _wrong_order,
}
_NOT_READ = {"extra", "stale"}  # training ignores unexpected files; an older cache is complete
_BEYOND_REPAIR = {"wrong key order"}  # every document was forged: a person decides


def read_as_training(root: Path, images: Path) -> None:
    """Everything that ``train-student`` reads, over one epoch of every pass, decoded."""
    reader = open_cache(root)
    identity = reader.identity
    reader.file(identity.tail, identity.tail_digest)
    load_tail(root / str(identity.tail))
    decoder = TargetDecoder(reader.codecs, features=True, logits=True)
    loader = CachedViewLoader(
        reader, open_dataset(str(images)), batch_size=13, groups=decoder.groups
    )
    for epoch in range(reader.num_passes):
        for batch in loader.epoch(epoch):
            decoder(batch)


def _write_cache(root: Path, images: Path, **changes: Any) -> None:
    cache_teacher(
        CacheTeacherConfig(
            teacher=TeacherConfig(
                model="test_vit", pretrained=False, img_size=32, model_kwargs={"num_classes": 10}
            ),
            data_dir=str(images),
            output=root,
            **{"passes": 2, "batch_size": 26, "workers": 0, "shard_size": 26, **changes},
        )
    )


def _cell() -> dict[str, int]:
    return {
        "tried": 0,
        "verify": 0,
        "quick": 0,
        "train": 0,
        "train_tried": 0,
        "repair": 0,
        "repair_tried": 0,
    }


def examine(patient: Patient, name: str, damage: str, cell: dict[str, int]) -> None:
    """Judge one damaged cache; what goes unnoticed is counted by what is not."""
    cell["tried"] += 1
    names = {name}
    if damage == "wrong key order":
        names.add("the table of shard 1 ")
    elif damage == "swapped" and name == "plan.json":
        names.add("manifest.json")
    for quick in (True, False):
        try:
            said = verify(patient.root, quick=quick).problems
        except CacheError as error:
            said = [str(error)]
        cell["quick" if quick else "verify"] += any(n in line for n in names for line in said)
    if damage not in _NOT_READ:
        cell["train_tried"] += 1
        try:
            read_as_training(patient.root, patient.images)
        except CacheError:
            cell["train"] += 1
    if damage not in _BEYOND_REPAIR:
        cell["repair_tried"] += 1
        try:
            repair_cache(
                RepairConfig(
                    cache=patient.root,
                    data_dir=str(patient.images),
                    workers=0,
                    remove_extra=True,
                )
            )
            cell["repair"] += not patient.heal()
        except CacheError:
            pass


def run(folder: Path, files_per_kind: int, seed: int) -> dict[str, Any]:
    """The whole matrix."""
    started, chance = time.monotonic(), random.Random(seed)
    images = write_images(folder / "images")
    _write_cache(folder / "cache", images, passes=1)
    younger = (folder / "cache" / "manifest.json").read_bytes()
    _write_cache(folder / "cache", images)
    _write_cache(folder / "other", images, seed=1)
    patient = Patient(folder / "cache", images, folder / "other", younger)
    read_as_training(patient.root, images)
    matrix: dict[str, dict[str, dict[str, int]]] = {}
    for kind in KINDS:
        matrix[kind] = {}
        names = patient.files(kind)
        for damage, apply in DAMAGES.items():
            cell = _cell()
            for name in chance.sample(names, min(files_per_kind, len(names))):
                if damage == "wrong key order" and kind == "samples":
                    name = "samples/key/c/1/0"
                damaged = apply(patient, name, chance)
                if damaged is not None:
                    examine(patient, damaged, damage, cell)
                patient.heal()
            if cell["tried"]:
                matrix[kind][damage] = cell
            print(f"{kind}: {damage}: {cell}", flush=True)
    if verify(patient.root).problems:
        raise RuntimeError("the cache was not put back")
    cells = [cell for row in matrix.values() for cell in row.values()]
    totals = {key: sum(cell[key] for cell in cells) for key in _cell()}
    return {
        "files_per_kind": files_per_kind,
        "seed": seed,
        "seconds": round(time.monotonic() - started, 1),
        "totals": totals,
        "matrix": matrix,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=3, help="files of each kind to damage")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    try:
        result = run(folder, options.files, options.seed)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    write_documentation()
    print(json.dumps(result["totals"]))


if __name__ == "__main__":
    main()
