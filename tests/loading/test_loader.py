"""Loaders read from disk the views that the teacher saw, and its targets for them."""

import os
import pickle
import shutil
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import get_worker_info

from scalekd.cache import TargetDecoder, open_cache
from scalekd.cache.documents import canonical
from scalekd.cache.documents.manifest import Manifest, ShardRecord
from scalekd.cache.files import digest_on_disk
from scalekd.cache.forms.store import CommittingStore, open_array
from scalekd.cache.layout import MANIFEST_FILE, ShardId
from scalekd.errors import CacheCorrupt, CacheMismatch, EnvironmentFault, UsageError
from scalekd.images import ImageDataset, open_dataset
from scalekd.loading import CachedViewLoader, cached_views
from scalekd.loading import views as data_views
from scalekd.loading.order import EpochOrder

GROUPS = ("stage3", "stage4", "logits")


@pytest.fixture
def images(tiny_images: Path) -> ImageDataset:
    return open_dataset(str(tiny_images))


def _keys(loader: CachedViewLoader, order: EpochOrder, epoch: int) -> Iterator[list[str]]:
    samples = loader.views.reader.samples
    for batch in order.batches(epoch):
        yield [samples.key(int(sample)) for sample in batch]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_view_of_every_pass_is_bit_for_bit_what_the_teacher_saw(
    num_workers: int, recorded: Any, images: ImageDataset
) -> None:
    reader = open_cache(recorded.root)
    loader = CachedViewLoader(
        reader, images, batch_size=7, num_workers=num_workers, groups=GROUPS, seed=3
    )
    decode = TargetDecoder(reader.codecs, features=True, logits=True)
    order = EpochOrder(tuple(reader.blocks()), 7, seed=3)
    labels = {images.key(i): int(images.labels[i]) for i in range(len(images))}
    replayed = set()
    for epoch in (0, 1, 2):
        pass_index = epoch % 2
        for keys, batch in zip(_keys(loader, order, epoch), loader.epoch(epoch), strict=True):
            targets = decode(batch)
            for row, key in enumerate(keys):
                heard = recorded.views[pass_index, key]
                assert np.array_equal(batch["pixels"][row].numpy(), heard.pixels)
                assert int(batch["label"][row]) == labels[key]
                for stage in (3, 4):
                    stored = batch[f"stage{stage}.values"][row].numpy()
                    assert np.array_equal(stored, heard.features[stage].astype(np.float16))
                # What the losses get: patch tokens without the one prefix token, float32.
                expected = heard.features[4][1:].astype(np.float16).astype(np.float32)
                assert np.array_equal(targets.features[row].numpy(), expected)
                logits = heard.logits.astype(np.float16).astype(np.float32)
                assert np.array_equal(targets.logits.logits[row].numpy(), logits)
                replayed.add((pass_index, key))
    assert replayed == set(recorded.views)
    assert len(replayed) == 140


def test_passes_and_samples_differ_in_their_views(recorded: Any) -> None:
    views = recorded.views
    keys = {key for _, key in views}
    same = sum(np.array_equal(views[0, key].pixels, views[1, key].pixels) for key in keys)
    assert same == 0
    assert len({views[0, key].pixels.tobytes() for key in keys}) == len(keys)


def test_the_stored_targets_are_the_teachers_answer_to_the_replayed_pixels(
    recorded: Any, images: ImageDataset
) -> None:
    """Shard 1 of pass 1, replayed in the order and batches of stage one: the same float16."""
    from scalekd.pipelines._write_shards import run_teacher
    from scalekd.teachers import TeacherConfig, TeacherSpec, load_teacher

    reader = open_cache(recorded.root)
    spec = TeacherSpec.model_validate(reader.identity.teacher)
    teacher = load_teacher(
        TeacherConfig(
            model=spec.model,
            pretrained=False,
            img_size=spec.img_size,
            model_kwargs={**spec.model_kwargs, "num_classes": spec.num_classes},
        )
    )
    assert teacher.spec.weights_sha256 == spec.weights_sha256
    loader = CachedViewLoader(reader, images, batch_size=1, groups=GROUPS)
    names = [array.name for array in reader.layout.views]
    rows = reader.read_rows(1, 24, 24, names)
    for first in range(0, 24, 10):
        batch = slice(first, min(first + 10, 24))
        pixels = [
            loader.views._replay(24 + row, rows, row, check=True)[0]
            for row in range(batch.start, batch.stop)
        ]
        stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        answer = run_teacher(teacher, stacked, "fp32")
        for stage in (3, 4):
            expected = answer.features[stage].astype(np.float16)
            assert np.array_equal(rows[f"stage{stage}/values"][batch], expected)
        assert np.array_equal(rows["logits/values"][batch], answer.logits.astype(np.float16))


def test_resuming_inside_an_epoch_gives_its_rest(recorded: Any, images: ImageDataset) -> None:
    loader = CachedViewLoader(open_cache(recorded.root), images, batch_size=8, groups=("logits",))
    whole = list(loader.epoch(1))
    rest = list(loader.epoch(1, start_batch=5))
    assert len(whole) == loader.num_batches == 8
    assert len(rest) == 3
    for resumed, original in zip(rest, whole[5:], strict=True):
        assert resumed.keys() == original.keys()
        assert all(torch.equal(resumed[name], original[name]) for name in original)
    assert list(loader.epoch(1, start_batch=8)) == []


def test_an_epoch_left_in_the_middle_does_not_leak_into_the_next(
    recorded: Any, images: ImageDataset
) -> None:
    reader = open_cache(recorded.root)
    plain = CachedViewLoader(reader, images, batch_size=8)
    loader = CachedViewLoader(reader, images, batch_size=8, num_workers=2)
    left = loader.epoch(0)
    next(left)
    left.close()
    for found, expected in zip(loader.epoch(1), plain.epoch(1), strict=True):
        assert torch.equal(found["pixels"], expected["pixels"])


def test_ranks_see_disjoint_views_and_as_many_batches(recorded: Any, images: ImageDataset) -> None:
    seen: list[set[bytes]] = []
    for rank in range(2):
        loader = CachedViewLoader(
            open_cache(recorded.root), images, batch_size=8, rank=rank, world_size=2
        )
        batches = list(loader.epoch(0))
        assert len(batches) == 4
        seen.append({view.numpy().tobytes() for batch in batches for view in batch["pixels"]})
    assert len(seen[0]) == len(seen[1]) == 32
    assert not seen[0] & seen[1]


def test_a_reader_that_was_used_may_be_sent_to_another_process(recorded: Any) -> None:
    reader = open_cache(recorded.root)
    names = [array.name for array in reader.layout.views]
    before = reader.read_rows(1, 48, 22, names)
    for twin in (pickle.loads(pickle.dumps(reader)), reader.reopened()):
        after = twin.read_rows(1, 48, 22, names)
        assert all(np.array_equal(before[name], after[name]) for name in names)


def test_memory_does_not_grow_with_passes(recorded: Any) -> None:
    reader = open_cache(recorded.root)
    kept = []
    for pass_index in (0, 1, 0, 1):
        for first, count in reader.blocks():
            reader.read_rows(pass_index, first, count, ["pixel_hash"])
        unit = reader._of_pass
        kept.append((len(unit._records._values), len(unit._files._expected)))
    assert len(set(kept)) == 1


# Another resolution


def test_a_student_of_another_size_sees_the_same_part_of_the_image(
    recorded: Any, images: ImageDataset
) -> None:
    reader = open_cache(recorded.root)
    small = CachedViewLoader(reader, images, batch_size=10)
    large = CachedViewLoader(reader, images, batch_size=10, view_size=(64, 64))
    for few, many in zip(small.epoch(0), large.epoch(0), strict=True):
        assert many["pixels"].shape == (10, 3, 64, 64)
        shrunk = torch.nn.functional.avg_pool2d(many["pixels"].float(), 2)
        per_view = (shrunk - few["pixels"].float()).abs().flatten(1).mean(1)
        assert per_view.median() < 20  # erased noise differs; an unrelated crop is beyond 50


def test_a_student_of_another_size_is_checked_at_the_teachers(
    recorded: Any, images: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = CachedViewLoader(open_cache(recorded.root), images, batch_size=10, view_size=(64, 64))
    _flip_one_bit(monkeypatch, when=lambda size: size == (32, 32))
    with pytest.raises(CacheMismatch, match="redraws a view of sample"):
        next(loader.epoch(0))


def test_later_batches_at_another_size_check_other_views_every_epoch(
    recorded: Any, images: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_views, "CHECKED_BATCHES", 0)
    monkeypatch.setattr(cached_views, "CHECK_ONE_IN", 4)
    loader = CachedViewLoader(open_cache(recorded.root), images, batch_size=10, view_size=(64, 64))
    checked: list[str] = []
    monkeypatch.setattr(
        data_views.ReplayContract,
        "check_pixels",
        lambda self, key, pixels, expected: checked.append(key),
    )
    epochs = []
    for epoch in range(0, 12, 2):  # of one pass
        checked.clear()
        list(loader.epoch(epoch))
        epochs.append(frozenset(checked))
    # Of 70 views a quarter; fewer than 3 or more than 35 in one epoch of ten thousand.
    assert all(3 <= len(keys) <= 35 for keys in epochs)
    assert len(set(epochs)) == len(epochs)
    assert len(frozenset().union(*epochs)) > 40  # 58 expected; the same quarter would be 18


def test_a_wrong_view_of_a_later_batch_stops_training_at_another_size(
    recorded: Any, images: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cached_views, "CHECKED_BATCHES", 0)
    monkeypatch.setattr(cached_views, "CHECK_ONE_IN", 10)
    loader = CachedViewLoader(open_cache(recorded.root), images, batch_size=10, view_size=(64, 64))
    _flip_one_bit(monkeypatch, when=lambda size: size == (32, 32))
    with pytest.raises(CacheMismatch, match="redraws a view of sample"):
        list(loader.epoch(0))


def test_one_view_in_a_hundred_is_chosen_by_sample_and_epoch() -> None:
    counts = [
        sum(cached_views.is_checked(sample, epoch) for sample in range(10_000))
        for epoch in range(5)
    ]
    assert all(60 <= count <= 140 for count in counts)  # 100 expected, four deviations are 40
    ever = {s for e in range(5) for s in range(10_000) if cached_views.is_checked(s, e)}
    assert len(ever) > 400  # 490 expected; the same hundred in every epoch would be 100


def test_a_live_teacher_gets_its_own_pixels_beside_a_student_of_another_size(
    recorded: Any, images: ImageDataset
) -> None:
    reader = open_cache(recorded.root)
    own = CachedViewLoader(reader, images, batch_size=10)
    both = CachedViewLoader(reader, images, batch_size=10, view_size=(64, 64), teacher_pixels=True)
    for alone, together in zip(own.epoch(1), both.epoch(1), strict=True):
        assert torch.equal(together["teacher_pixels"], alone["pixels"])
        assert together["pixels"].shape == (10, 3, 64, 64)
    same = CachedViewLoader(reader, images, batch_size=10, teacher_pixels=True)
    assert "teacher_pixels" not in next(same.epoch(0))  # they are the student's


# What stops training


def _flip_one_bit(
    monkeypatch: pytest.MonkeyPatch,
    *,
    when: Callable[[tuple[int, int]], bool] = lambda size: True,
    last_of: int = 1,
) -> None:
    """From now on every ``last_of``-th rendered view has one wrong bit."""
    render, calls = data_views.render, 0

    def drifting(image: Any, params: Any, *, view_size: tuple[int, int]) -> np.ndarray:
        nonlocal calls
        pixels = render(image, params, view_size=view_size).copy()
        calls += 1
        if when(view_size) and calls % last_of == 0:
            pixels[-1, -1, -1] ^= 1
        return pixels

    monkeypatch.setattr(data_views, "render", drifting)


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("position", [1, 69])
def test_one_wrong_bit_in_one_view_stops_training(
    position: int,
    num_workers: int,
    recorded: Any,
    images: ImageDataset,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the first view as in the last: at the teacher's size no view goes unchecked."""
    loader = CachedViewLoader(
        open_cache(recorded.root), images, batch_size=5, num_workers=num_workers
    )
    _flip_one_bit(monkeypatch, last_of=position)
    with pytest.raises(CacheMismatch) as caught:
        list(loader.epoch(0))
    message = str(caught.value)
    assert "redraws a view of sample sample-" in message
    assert "--allow-pixel-drift" in message
    assert "\n" not in message


def test_drift_is_reported_before_the_first_batch(
    recorded: Any, images: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    _flip_one_bit(monkeypatch)
    with pytest.raises(CacheMismatch, match="8 witness views with a mean difference"):
        CachedViewLoader(open_cache(recorded.root), images, batch_size=5)


def test_a_measured_drift_is_accepted_up_to_the_allowed_one(
    recorded: Any, images: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of 32 x 32 x 3 values off by one: a mean difference of 1 / 3072."""
    _flip_one_bit(monkeypatch)
    reader = open_cache(recorded.root)
    with pytest.raises(CacheMismatch, match=r"0\.000326/255"):
        CachedViewLoader(reader, images, batch_size=5, allowed_drift=0.0003)
    loader = CachedViewLoader(reader, images, batch_size=5, allowed_drift=0.0004)
    assert loader.views.drift == pytest.approx(1 / 3072)
    assert len(list(loader.epoch(0))) == 14


def test_if_witnesses_are_exact_no_view_may_differ_whatever_drift_is_allowed(
    recorded: Any, images: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = CachedViewLoader(open_cache(recorded.root), images, batch_size=5, allowed_drift=9.0)
    _flip_one_bit(monkeypatch, last_of=69)
    with pytest.raises(CacheMismatch, match="redraws a view of sample"):
        list(loader.epoch(0))


def test_versions_on_both_sides_are_named(
    recorded: Any, images: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = {**data_views.pixel_environment(), "pillow": "99.1"}
    there = data_views.pixel_environment()["pillow"]
    _flip_one_bit(monkeypatch)
    monkeypatch.setattr(data_views, "pixel_environment", lambda: here)
    with pytest.raises(CacheMismatch, match=f"pillow {there} in the cache, 99.1 here"):
        CachedViewLoader(open_cache(recorded.root), images, batch_size=5)


def _forge(root: Path, unit: int, shard: int, name: str, change: Callable[[Any], None]) -> None:
    """Change stored values and make every digest of the cache agree with them."""
    reader = open_cache(root)
    identity, array = reader.identity, reader.layout.find(name)
    store = CommittingStore(root)
    opened = open_array(store, identity, unit, array)
    first = shard * identity.shard_size
    rows = np.array(opened[first : first + identity.rows_of(shard)])
    change(rows)
    opened[first : first + identity.rows_of(shard)] = rows
    path = root / ShardId(unit, shard).record_path
    record = ShardRecord.model_validate_json(path.read_bytes())
    files = {name: digest_on_disk(root / name) for name in record.files}
    path.write_bytes(canonical(record.model_copy(update={"files": files})))
    manifest = reader.manifest
    records = {**manifest.records, ShardId(unit, shard).record_path: digest_on_disk(path).sha256}
    forged = manifest.model_copy(update={"records": records, "digest": ""}).sealed()
    (root / MANIFEST_FILE).write_bytes(canonical(Manifest.model_validate(forged.model_dump())))


@pytest.mark.parametrize("view_size", [None, (48, 48)])
def test_a_stored_crop_moved_by_one_pixel_stops_training(
    view_size: tuple[int, int] | None, recorded: Any, images: ImageDataset, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(recorded.root, tmp_path / "cache"))

    def move(crops: np.ndarray) -> None:
        row = int(np.argmax(crops[:, 0] > 0))
        crops[row, 0] -= 1

    _forge(root, 1, 2, "view/crop", move)
    loader = CachedViewLoader(open_cache(root), images, batch_size=7, view_size=view_size)
    list(loader.epoch(0))
    # At another size only an epoch's first batches are checked in full, so it may take several.
    with pytest.raises(CacheMismatch, match="redraws a view"):
        _ = [list(loader.epoch(epoch)) for epoch in (1, 3, 5, 7, 9)]


def test_another_image_under_the_same_key_stops_training(
    recorded: Any,
    image_bytes: dict[int, bytes],
    image_set: Callable[..., Path],
) -> None:
    """Neighbour's picture under a key; number 33 is no witness, so only the loader can tell."""
    swapped = {**image_bytes, 33: image_bytes[34]}
    images = open_dataset(str(image_set(swapped)))
    loader = CachedViewLoader(open_cache(recorded.root), images, batch_size=7)
    with pytest.raises(CacheMismatch, match="sample-033 is another image"):
        list(loader.epoch(0))
    images = open_dataset(str(image_set({**image_bytes, 3: image_bytes[4]}, "witness")))
    with pytest.raises(CacheMismatch, match="sample-003 is another image"):
        CachedViewLoader(open_cache(recorded.root), images, batch_size=7)


def test_samples_are_found_by_key_not_by_position(
    recorded: Any,
    tmp_path: Path,
    image_bytes: Mapping[int, bytes],
    write_tar: Callable[..., Path],
) -> None:
    members = {
        f"sample-{number:03d}.{'png' if number % 5 == 0 else 'jpg'}": image_bytes[number]
        for number in sorted(image_bytes, reverse=True)
    }
    write_tar(tmp_path / "set" / "train-0.tar", {"extra.jpg": b"never read", **members})
    images = open_dataset(str(tmp_path / "set"))
    loader = CachedViewLoader(open_cache(recorded.root), images, batch_size=35)
    order = EpochOrder(tuple(loader.views.reader.blocks()), 35, seed=0)
    for keys, batch in zip(_keys(loader, order, 0), loader.epoch(0), strict=True):
        for row, key in enumerate(keys):
            assert np.array_equal(batch["pixels"][row].numpy(), recorded.views[0, key].pixels)


def test_a_data_set_that_lacks_samples_is_refused_before_training(
    recorded: Any, image_bytes: dict[int, bytes], image_set: Callable[..., Path]
) -> None:
    few = {number: image_bytes[number] for number in range(68)}
    images = open_dataset(str(image_set(few)))
    with pytest.raises(CacheMismatch, match=r"lacks 2 of the 70 samples.*'sample-068'"):
        CachedViewLoader(open_cache(recorded.root), images, batch_size=5)


def test_a_cache_smaller_than_one_batch_is_a_usage_error(
    recorded: Any, images: ImageDataset
) -> None:
    with pytest.raises(UsageError, match=r"70 views, fewer than one batch of 36 on 2 processes"):
        CachedViewLoader(open_cache(recorded.root), images, batch_size=36, world_size=2)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_damage_met_while_training_is_one_line_that_names_the_file(
    num_workers: int, recorded: Any, images: ImageDataset, tmp_path: Path
) -> None:
    root = Path(shutil.copytree(recorded.root, tmp_path / "cache"))
    loader = CachedViewLoader(
        open_cache(root), images, batch_size=10, num_workers=num_workers, groups=("stage4",)
    )
    path = root / "passes/0001/stage4/values/c/4/0/0"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    list(loader.epoch(0))
    with pytest.raises(CacheCorrupt) as caught:
        list(loader.epoch(1))
    assert "passes/0001/stage4/values/c/4/0/0: its bytes changed" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_killed_worker_is_explained(
    recorded: Any, images: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = CachedViewLoader(open_cache(recorded.root), images, batch_size=10, num_workers=1)
    render = data_views.render

    def killed(*arguments: Any, **options: Any) -> Any:
        if get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return render(*arguments, **options)

    monkeypatch.setattr(data_views, "render", killed)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    with pytest.raises(EnvironmentFault, match=r"a worker process (was killed|ended)"):
        next(loader.epoch(0))


def test_iterating_gives_epoch_after_epoch_and_counts_none_that_was_not_read(
    sound_cache: Path, images: ImageDataset
) -> None:
    loader = CachedViewLoader(open_cache(sound_cache), images, batch_size=16)
    assert len(loader) == loader.num_batches == 4

    def labels(batches: Iterable[Mapping[str, torch.Tensor]]) -> list[list[int]]:
        return [batch["label"].tolist() for batch in batches]

    stated = [labels(loader.epoch(epoch)) for epoch in range(3)]
    assert stated[0] != stated[1]
    iter(loader)
    assert [labels(loader) for _ in range(2)] == stated[:2]
    loader.set_epoch(1)
    assert [labels(loader) for _ in range(2)] == stated[1:]
