"""What the fuzzer does to a cache, and how it then reads it. See ``benchmarks.fuzz_reader``."""

import contextlib
import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

from scalekd.cache import CacheReader, TargetDecoder, open_cache
from scalekd.cache.cache import Cache
from scalekd.cache.care.verify import verify
from scalekd.cache.documents import canonical as model_bytes
from scalekd.cache.documents.manifest import Identity, Manifest, Plan, Provenance, ShardRecord
from scalekd.cache.documents.records import samples_hash
from scalekd.cache.files import FileDigest, digest
from scalekd.cache.forms.chunks import decode_chunk
from scalekd.cache.forms.store import metadata_documents
from scalekd.cache.layout import Layout, ShardId
from scalekd.cache.tables import table_files
from scalekd.errors import CacheCorrupt, ScaleKDError
from scalekd.teachers import load_tail
from scalekd.views import decode_image, render, unpack_view
from tests.reliability.mutations import (
    Files,
    canonical,
    entry,
    mutate_bytes,
    mutate_document,
    mutate_tables,
    sealed,
    with_checksum,
)

CACHES = Path(__file__).parents[1] / "cache" / "frozen" / "format1"
NAMES = ("float16", "int8", "transform")
_KINDS = {  # kind: weight, prefix of the files
    "target chunk": 30,
    "view chunk": 14,
    "sample chunk": 10,
    "array metadata": 6,
    "codec tables": 8,
    "witnesses": 3,
    "tail": 5,
    "plan": 12,
    "manifest": 7,
    "record": 8,
}
_MOST_REBUILT_SHARDS = 8
_MOST_REBUILT_FILES = 200


class Subject:
    """One cache, in memory and in a folder of its own, with a reader that has read it."""

    def __init__(self, name: str, folder: Path) -> None:
        self.root = Path(shutil.copytree(CACHES / name, folder / name))
        self.files: Files = {
            path.relative_to(self.root).as_posix(): path.read_bytes()
            for path in sorted(self.root.rglob("*"))
            if path.is_file()
        }
        self.reader = open_cache(self.root)
        images = sorted((CACHES / "images").rglob("*.png"), key=lambda path: path.stat().st_size)
        self.image = decode_image(images[-1].read_bytes(), key="largest")
        self.by_kind = {kind: [f for f in self.files if kind_of(f) == kind] for kind in _KINDS}
        use_everything(self.reader, self.image)

    def write(self, files: Files) -> None:
        for name, content in files.items():
            path = self.root / name
            if name not in self.files:
                path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def restore(self, names: Files) -> None:
        for name in names:
            if name in self.files:
                (self.root / name).write_bytes(self.files[name])
            else:
                (self.root / name).unlink()


def kind_of(name: str) -> str:
    """Kind of a file of a cache."""
    if name in ("plan.json", "manifest.json"):
        return name.removesuffix(".json")
    if name.endswith("zarr.json"):
        return "array metadata"
    for start, kind in (
        ("records/", "record"),
        ("samples/", "sample chunk"),
        ("tables/tail", "tail"),
        ("tables/witnesses", "witnesses"),
        ("tables/", "codec tables"),
    ):
        if name.startswith(start):
            return kind
    return "target chunk" if "/stage" in name or "/logits/" in name else "view chunk"


def use_everything(reader: CacheReader, image: Any) -> None:
    """What training reads, of every pass."""
    _ = reader.samples, reader.witnesses
    blocks = reader.blocks()
    for pass_index in range(min(reader.num_passes, 3)):
        for block in blocks[:4]:
            use_block(reader, pass_index, block, image)


def use_block(reader: CacheReader, pass_index: int, block: tuple[int, int], image: Any) -> None:
    """Read, decode and redraw one block."""
    names = [array.name for array in reader.layout.views]
    use_rows(reader, reader.read_rows(pass_index, *block, names), block[1], image)


def use_rows(reader: CacheReader, rows: dict[str, Any], count: int, image: Any) -> None:
    """Decode targets and redraw views, as far as their arrays are among ``rows``."""
    tensors = {name.replace("/", "."): torch.from_numpy(value) for name, value in rows.items()}
    codecs = reader.codecs
    groups = {name.split("/")[0] for name in rows}
    for stage, codec in codecs.stages.items():
        if f"stage{stage}" in groups:
            planes = {p.name: tensors[f"stage{stage}.{p.name}"] for p in codec.planes}
            codec.decoder()(planes)
    if groups >= {"stage4"} and codecs.logits is not None and "logits" in groups:
        TargetDecoder(codecs, features=True, logits=True)(tensors)
    if "view" in groups or "pixel_hash" in groups:
        columns = {n.removeprefix("view/"): v for n, v in rows.items() if n.startswith("view/")}
        for row in range(count):
            view = unpack_view(columns, row, reader.policy)
            render(image, view, view_size=(24, 24))


def mutate_and_read(subject: Subject, rng: random.Random) -> tuple[str, str]:
    """Make one mutation and meet it.

    Returns:
        Kind of file and what came of it: ``unchanged``, ``accepted`` or the name of our error.

    Raises:
        BaseException: Anything that a reader must not raise.
    """
    kinds = [kind for kind in _KINDS if subject.by_kind[kind]]
    kind = rng.choices(kinds, [_KINDS[kind] for kind in kinds])[0]
    name = rng.choice(subject.by_kind[kind])
    is_json = name.endswith(".json")
    if is_json and rng.random() < 0.7:
        document = json.loads(subject.files[name])
        mutate_document(rng, document)
        content = canonical(document)
    elif name.endswith(".safetensors") and rng.random() < 0.6:
        content = mutate_tables(rng, subject.files[name])
    else:
        other = subject.files[rng.choice(list(subject.files))]
        content = mutate_bytes(rng, subject.files[name], other)
    if content == subject.files[name]:
        return kind, "unchanged"
    seal = rng.random() < 0.5
    if seal and "chunk" in kind and rng.random() < 0.8 and len(content) > 4:
        content = with_checksum(content)
    label = f"{kind}, {'sealed' if seal else 'found by digest'}"
    try:
        if "chunk" in kind:
            _meet_chunk(subject, name, content, seal, rng)
        else:
            _meet_document(subject, name, content, seal, rng)
    except ScaleKDError as error:
        if str(subject.root) not in str(error) and not seal:
            raise AssertionError(f"the message names no file: {error}") from error
        return label, type(error).__name__
    if not seal:
        raise AssertionError(f"{name} was changed and nobody noticed")
    return label, "accepted"


def _meet_chunk(
    subject: Subject, name: str, content: bytes, seal: bool, rng: random.Random
) -> None:
    """With a reader that has read everything before; its records are made to agree if asked to."""
    reader, parts = subject.reader, name.split("/")
    reader._open_units()
    subject.write({name: content})
    try:
        if parts[0] == "samples":
            _meet_samples(subject, name, content, seal)
            return
        unit, array = int(parts[1]), reader.layout.find("/".join(parts[2 : parts.index("c")]))
        index = int(parts[parts.index("c") + 1 + array.view_axis])
        shard = index * array.rows_per_chunk(reader.identity) // reader.identity.shard_size
        reader.record(unit, shard)
        store = reader._of_pass._files
        before = dict(store._expected)
        if seal:
            store.expect({name: FileDigest(**entry(content))})
        starts = reader.samples.starts
        step = array.rows_per_chunk(reader.identity)
        first = int(starts[shard]) + index * step - shard * reader.identity.shard_size
        count = min(step, int(starts[shard + 1]) - first)
        group = array.name.split("/")[0]
        names = [a.name for a in reader.layout.views if a.name.split("/")[0] == group]
        try:
            rows = reader.read_rows(unit, first, count, names)
            if group in ("stage3", "stage4", "logits"):
                use_rows(reader, rows, count, subject.image)
                if group == "logits" and reader.codecs.logits is not None:
                    tensors = {n.split("/")[1]: torch.from_numpy(v) for n, v in rows.items()}
                    reader.codecs.logits.decoder()(tensors)
            elif group == "view":
                use_rows(reader, rows, count, subject.image)
        finally:
            store._expected = before
    finally:
        subject.restore({name: b""})


def rebuilt(subject: Subject, document: Any, rng: random.Random) -> Files:
    """All documents of a cache made anew for a changed plan, as a hostile author would.

    Metadata, records and manifest agree with the plan; chunks are files of the sound cache.

    Raises:
        ScaleKDError, ValueError: The plan is refused before anything else is asked for.
    """
    identity = Identity.model_validate(document["identity"])
    provenance = Provenance.model_validate(document["provenance"])
    plan, root = Plan.of(identity, provenance), subject.root
    layout = Cache(root, plan).layout
    chunks = [name for name in subject.files if "/c/" in name]
    files: Files = {"plan.json": canonical(plan.model_dump(mode="json"))}
    names = dict(table_files(identity))
    samples: dict[int, str] = {}
    if identity.num_shards > _MOST_REBUILT_SHARDS:
        raise ValueError("the records of so many shards are not worth their time")
    for unit in ("samples", 0):
        files |= metadata_documents(identity, unit, layout.arrays(unit))
        for shard in range(identity.num_shards):
            rows = identity.rows_of(shard)
            held: Files = {}
            for array in layout.arrays(unit):
                alike = [c for c in chunks if f"/{array.name}/" in c] or chunks
                for path in array.chunk_files(identity, unit, shard, rows):
                    held[path] = subject.files[rng.choice(alike)]
                    if len(held) > _MOST_REBUILT_FILES:
                        raise ValueError("so many files are not worth their time")
            if unit == "samples":
                samples[shard] = _hash_of_samples(identity, layout, held, shard, rows)
            record = ShardRecord(
                cache_id=plan.cache_id,
                unit=unit,  # type: ignore[arg-type]
                shard=shard,
                num_rows=rows,
                samples_sha256=samples[shard],
                files={path: digest(content) for path, content in held.items()},
            )
            files |= held
            files[ShardId(unit, shard).record_path] = model_bytes(record)
    documents = {n: c for n, c in files.items() if n.endswith("zarr.json") or n == "plan.json"}
    records = {n: entry(c)["sha256"] for n, c in files.items() if n.startswith("records/")}
    manifest = Manifest(
        plan=plan,
        num_passes=1,
        num_views=identity.data.num_samples,
        skipped=(),
        files={**names, **{name: digest(content) for name, content in documents.items()}},
        records=records,
        total_bytes=0,
    ).sealed()
    return {**files, "manifest.json": model_bytes(manifest)}


def _hash_of_samples(identity: Identity, layout: Layout, held: Files, shard: int, rows: int) -> str:
    """What the record must say for the table to be believed."""
    columns = {}
    for array in layout.samples:
        path = next(array.chunk_files(identity, "samples", shard, rows))
        chunk = decode_chunk(held[path], "blosc", array.dtype, array.chunks(identity))
        columns[array.name] = chunk[:rows]
    width = columns["key"].shape[1]
    keys = np.ascontiguousarray(columns["key"]).view(f"S{width}")[:, 0].tolist()
    names = [key.decode(errors="replace") for key in keys]
    return samples_hash(names, columns["label"], columns["source_hash"])


def _meet_samples(subject: Subject, name: str, content: bytes, seal: bool) -> None:
    reader = subject.reader
    twin = CacheReader(reader.cache, reader.manifest)
    for shard in range(reader.identity.num_shards):
        record = twin.record("samples", shard)
        if not seal or name not in record.files:
            continue
        changed = record.model_copy(
            update={"files": {**record.files, name: FileDigest(**entry(content))}}
        )
        twin._of_samples._files.expect(changed.files)
        start = shard * reader.identity.shard_size
        columns = {
            a.name: twin._of_samples.arrays.rows("samples", a, start, record.num_rows)
            for a in twin.layout.samples
        }
        width = columns["key"].shape[1]
        keys = [
            bytes(k).decode(errors="replace")
            for k in columns["key"].view(f"S{width}")[:, 0].tolist()
        ]
        digest = samples_hash(keys, columns["label"], columns["source_hash"])
        changed = changed.model_copy(update={"samples_sha256": digest})
        twin._of_samples._records._values[shard].result = lambda record=changed: record  # type: ignore[method-assign,misc]
    samples = twin.samples
    for sample in range(len(samples)):
        samples.key(sample)


def _meet_document(
    subject: Subject, name: str, content: bytes, seal: bool, rng: random.Random
) -> None:
    """Open the cache anew and use all of it."""
    changed: Files = {name: content}
    if seal and name == "plan.json" and rng.random() < 0.6:
        with contextlib.suppress(ScaleKDError, ValueError, TypeError, KeyError, AttributeError):
            changed = rebuilt(subject, json.loads(content), rng)
    if seal and len(changed) == 1:
        # What is no JSON any more, or no longer the tree that holds the digests, stays as it is.
        with contextlib.suppress(ValueError, TypeError, AttributeError, KeyError, RecursionError):
            changed = sealed(subject.files, changed)
    subject.write(changed)
    try:
        reader = open_cache(subject.root)
        # Each has its own readers; what the mutation cannot reach is left out.
        if kind_of(name) == "tail" or (not seal and kind_of(name) in ("plan", "manifest")):
            path, digest = reader.identity.tail, reader.identity.tail_digest
            reader.file(path, digest)
            load_tail(subject.root / str(path))
        elif name.startswith("tables/witnesses"):
            _ = reader.witnesses
        else:
            use_everything(reader, subject.image)
        # Documents of groups hold nothing, and reading does not need them: verify does.
        of_group = name.endswith("zarr.json") and b'"group"' in subject.files[name]
        if of_group or rng.random() < 0.05:
            problems = verify(subject.root).problems
            if of_group and problems and not seal:
                raise CacheCorrupt("; ".join(problems))
    finally:
        subject.restore(changed)
