"""Image sets: what is found in tars and folders, and what is refused by name."""

import io
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import xxhash

from scalekd.errors import DataError, UsageError
from scalekd.images import open_dataset

WriteTar = Callable[[Path, Mapping[str, bytes]], Path]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "set"


def test_samples_of_shards_come_in_order_with_labels(root: Path, write_tar: WriteTar) -> None:
    write_tar(root / "train-1.tar", {"c.jpg": b"cc", "c.cls": b"2"})
    write_tar(
        root / "train-0.tar",
        {"b.cls": b" 7\n", "b.JPEG": b"bbb", "a.png": b"a", "a.json": b"{}", "notes": b"none"},
    )
    write_tar(root / "val-0.tar", {"v.jpg": b"v"})
    images = open_dataset(str(root))
    assert [images.key(i) for i in range(3)] == ["b", "a", "c"]
    assert [images[i].image for i in range(3)] == [b"bbb", b"a", b"cc"]
    assert images.labels.tolist() == [7, -1, 2]
    assert images[0].source_hash == xxhash.xxh3_64_intdigest(b"bbb")
    assert images.num_classes == 8
    assert len(open_dataset(str(root), "val")) == 1


def test_class_names_are_read_where_they_stand(root: Path, write_tar: WriteTar) -> None:
    write_tar(root / "train-0.tar", {"a.jpg": b"a", "a.cls": b"1"})
    (root / "classes.txt").write_text("cat\ndog\nold fox\n")
    images = open_dataset(str(root))
    assert images.class_names == ("cat", "dog", "old fox")
    assert images.num_classes == 3
    (root / "classes.txt").write_bytes(b"caf\xe9")
    with pytest.raises(DataError, match=r"classes\.txt.*UTF-8"):
        open_dataset(str(root))


@pytest.mark.parametrize(
    ("data_dir", "split", "expected"),
    [
        ("{root}", "train-{{0..1}}.tar", 2),
        ("{root}", "train-?.tar", 3),
        ("{root}/train-{{0,2}}.tar", "train", 2),
        ("{root}/*-1.tar", "train", 1),
        ("{root}/train-1.tar", "train", 1),
        ("{root}", "train-2.tar", 1),
    ],
)
def test_patterns_choose_shards(
    data_dir: str, split: str, expected: int, root: Path, write_tar: WriteTar
) -> None:
    for shard in range(3):
        write_tar(root / f"train-{shard}.tar", {f"k{shard}.jpg": b"x"})
    images = open_dataset(data_dir.format(root=root), split.format())
    assert len(images) == expected


def test_a_folder_whose_name_looks_like_a_pattern_is_a_folder(
    tmp_path: Path, write_tar: WriteTar
) -> None:
    write_tar(tmp_path / "my [set]" / "train-0.tar", {"a.jpg": b"x"})
    assert len(open_dataset(str(tmp_path / "my [set]"))) == 1


def test_a_pattern_with_a_gap_names_the_missing_shard(root: Path, write_tar: WriteTar) -> None:
    write_tar(root / "train-0.tar", {"a.jpg": b"x"})
    with pytest.raises(DataError, match=r"no file matches .*train-1\.tar"):
        open_dataset(str(root), "train-{0..1}.tar")


def test_a_folder_set_has_classes_by_name_and_mixes_them(root: Path) -> None:
    for name in ("zebra", "ant"):
        (root / "train" / name / "deeper").mkdir(parents=True)
        for number in range(20):
            folder = root / "train" / name / ("deeper" if number % 2 else "")
            (folder / f"{number}.png").write_bytes(f"{name}{number}".encode())
        (root / "train" / name / "readme.txt").write_text("not an image")
    images = open_dataset(str(root))
    assert images.class_names == ("ant", "zebra")
    assert len(images) == 40
    for index in range(40):
        sample = images[index]
        name, number = sample.key.split("/")[0], Path(sample.key).stem
        assert sample.image == f"{name}{number}".encode()
        assert sample.label == images.class_names.index(name)
    # A block of the cache is read as it stands, so neighbours must not share their class.
    runs = 1 + int(np.count_nonzero(np.diff(images.labels)))
    assert runs > 10


def test_empty_and_hidden_folders_are_no_classes_and_hidden_files_no_images(root: Path) -> None:
    """Nor may they shift the labels of the classes after them."""
    for path in (
        ".ipynb_checkpoints/cat-checkpoint.jpg",
        "ant/1.jpg",
        "ant/._1.jpg",
        "ant/.ipynb_checkpoints/1-checkpoint.jpg",
        "bee/.DS_Store",
        "bee/._1.jpg",
        "dog/readme.txt",
        "dog/jpg",
        "dog/deeper/1.jpg",
        "not-in-a-class.jpg",
    ):
        (root / "train" / path).parent.mkdir(parents=True, exist_ok=True)
        (root / "train" / path).write_bytes(b"x")
    (root / "train/aardvark/deeper").mkdir(parents=True)
    images = open_dataset(str(root))
    assert images.class_names == ("ant", "dog")
    labels = {images.key(i): int(images.labels[i]) for i in range(len(images))}
    assert labels == {"ant/1.jpg": 0, "dog/deeper/1.jpg": 1}


def test_shards_win_over_a_folder_of_the_same_name(root: Path, write_tar: WriteTar) -> None:
    write_tar(root / "train-0.tar", {"tar.jpg": b"x"})
    (root / "train" / "a").mkdir(parents=True)
    (root / "train" / "a" / "file.jpg").write_bytes(b"x")
    assert open_dataset(str(root)).key(0) == "tar"


def test_what_is_not_there_is_said(root: Path, write_tar: WriteTar) -> None:
    with pytest.raises(DataError, match="no such folder"):
        open_dataset(str(root))
    root.mkdir()
    with pytest.raises(DataError, match="it is empty"):
        open_dataset(str(root))
    (root / "pictures").mkdir()
    with pytest.raises(DataError, match=r"neither train-\*\.tar nor a folder.*it has pictures"):
        open_dataset(str(root))
    (root / "train").mkdir()
    (root / "train" / ".cat").mkdir()
    with pytest.raises(DataError, match="no image in it"):
        open_dataset(str(root))
    (root / "train" / "cat").mkdir()
    with pytest.raises(DataError, match="no image in it"):
        open_dataset(str(root))
    write_tar(root / "val-0.tar", {"a.txt": b"words"})
    with pytest.raises(DataError, match=r"val-0\.tar: no image in it"):
        open_dataset(str(root), "val")


def test_a_key_must_be_its_own(root: Path, write_tar: WriteTar) -> None:
    write_tar(root / "train-0.tar", {"a.jpg": b"x", "a.png": b"y"})
    with pytest.raises(DataError, match=r"train-0\.tar: sample 'a' has two images"):
        open_dataset(str(root))
    write_tar(root / "train-0.tar", {"a.jpg": b"x"})
    write_tar(root / "train-1.tar", {"a.jpg": b"y"})
    with pytest.raises(DataError, match="the key 'a' occurs twice"):
        open_dataset(str(root))
    write_tar(root / "train-1.tar", {"other/a.jpg": b"y"})
    assert {open_dataset(str(root)).key(i) for i in range(2)} == {"a", "other/a"}


@pytest.mark.parametrize("label", [b"cat", b"-2", b"1.5", b"", b"9" * 40, b"\x80\x04K\x01."])
def test_a_label_is_a_decimal_number_and_nothing_is_unpickled(
    label: bytes, root: Path, write_tar: WriteTar
) -> None:
    write_tar(root / "train-0.tar", {"a.jpg": b"x", "a.cls": label})
    with pytest.raises(DataError, match=r"a\.cls is not a class number"):
        open_dataset(str(root))


def test_hidden_members_links_and_folders_are_no_samples(root: Path) -> None:
    root.mkdir()
    with tarfile.open(root / "train-0.tar", "w") as tar:
        for name in ("._a.jpg", ".jpg", "a.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        folder = tarfile.TarInfo("b.jpg")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        link = tarfile.TarInfo("c.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    images = open_dataset(str(root))
    assert [images.key(i) for i in range(len(images))] == ["a"]


@pytest.mark.parametrize("form", ["tar", "folder"])
def test_keys_may_be_in_any_script(form: str, root: Path, write_tar: WriteTar) -> None:
    keys = ["日本/猫", "grün", "🦊", "a b"]
    if form == "tar":
        write_tar(root / "train-0.tar", {f"{key}.jpg": key.encode() for key in keys})
        names = keys
    else:
        names = [f"class/{key}.jpg" for key in keys]
        for key, name in zip(keys, names, strict=True):
            path = root / "train" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(key.encode())
    images = open_dataset(str(root))
    found = {images.key(i): images[i].image.decode() for i in range(len(images))}
    assert found == dict(zip(names, keys, strict=True))
    assert sorted(images.positions(images.keys).tolist()) == list(range(4))


def test_names_that_no_cache_can_hold_are_refused(root: Path, write_tar: WriteTar) -> None:
    write_tar(root / "train-0.tar", {"a\nb.jpg": b"x"})
    with pytest.raises(DataError, match="control character"):
        open_dataset(str(root))
    write_tar(root / "train-0.tar", {"long" * 2000 + ".jpg": b"x"})
    with pytest.raises(DataError, match="more than 4,096 bytes"):
        open_dataset(str(root))
    (root / "train-0.tar").unlink()
    (root / "train" / "a").mkdir(parents=True)
    Path(os.fsdecode(bytes(root / "train" / "a") + b"/caf\xe9.jpg")).write_bytes(b"x")
    with pytest.raises(DataError, match="not UTF-8"):
        open_dataset(str(root))


def test_a_tar_cut_anywhere_is_refused(root: Path, write_tar: WriteTar) -> None:
    """Cuts inside data, inside a header, and between members, where tarfile sees nothing wrong."""
    path = write_tar(
        root / "train-0.tar", {f"{i}.jpg": bytes([65 + i]) * (700 * i + 1) for i in range(4)}
    )
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        members = tar.getmembers()
    ends, last = [member.offset for member in members], members[-1]
    data_end = last.offset_data + -(-last.size // 512) * 512
    for length in {*range(1, data_end, 300), *ends[1:], data_end}:
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"train-0\.tar"):
            open_dataset(str(root))
    path.write_bytes(whole[: data_end + 512])
    assert len(open_dataset(str(root))) == 4


def test_a_damaged_header_does_not_end_the_set_early(root: Path, write_tar: WriteTar) -> None:
    path = write_tar(root / "train-0.tar", {f"{i}.jpg": b"x" for i in range(4)})
    content = bytearray(path.read_bytes())
    content[2 * 1024 + 100] ^= 1  # in the third member's header
    path.write_bytes(content)
    with pytest.raises(DataError, match="damaged or cut short at byte 2,048"):
        open_dataset(str(root))


def test_a_file_that_changed_after_indexing_is_named(root: Path, write_tar: WriteTar) -> None:
    path = write_tar(root / "train-0.tar", {"a.jpg": b"x" * 600, "b.jpg": b"y" * 600})
    images = open_dataset(str(root)).stored_order()
    path.write_bytes(path.read_bytes()[:2100])
    assert images[0].image == b"x" * 600
    with pytest.raises(DataError, match=r"sample b: .*train-0\.tar ends at byte 2,100, and 2,048"):
        images[1]
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read sample a: .*train-0\.tar is missing"):
        images[0]


def test_positions_are_found_by_key_whatever_the_order_and_width(
    root: Path, write_tar: WriteTar
) -> None:
    write_tar(root / "train-0.tar", {f"{key}.jpg": b"x" for key in ("bb", "a", "ccc")})
    images = open_dataset(str(root)).stored_order()
    asked = np.array([b"ccc", b"a", b"zzzzzz", b"bb", b"", b"b"])
    assert images.positions(asked).tolist() == [2, 1, -1, 0, -1, -1]


def test_the_fingerprint_sees_keys_labels_sizes_and_order(root: Path, write_tar: WriteTar) -> None:
    def fingerprint(members: Mapping[str, bytes]) -> str:
        write_tar(root / "train-0.tar", members)
        return open_dataset(str(root)).fingerprint

    base = {"a.jpg": b"x", "a.cls": b"0", "b.jpg": b"y", "b.cls": b"1"}
    variants = [
        base,
        {**base, "b.cls": b"2"},
        {**base, "b.jpg": b"yy"},
        {"c.jpg": b"x", "c.cls": b"0", "b.jpg": b"y", "b.cls": b"1"},
        {"b.jpg": b"y", "b.cls": b"1", "a.jpg": b"x", "a.cls": b"0"},
    ]
    assert len({fingerprint(members) for members in variants}) == len(variants)
    assert fingerprint(base) == fingerprint(dict(base))


def test_a_limit_takes_the_first_samples(root: Path, write_tar: WriteTar) -> None:
    write_tar(root / "train-0.tar", {f"{i}.jpg": bytes([65 + i]) for i in range(5)})
    images = open_dataset(str(root)).stored_order()
    few = images.limited(2)
    assert [few[i].image for i in range(len(few))] == [b"A", b"B"]
    assert few.fingerprint != images.fingerprint
    assert images.limited(None) is images.limited(99) is images
    with pytest.raises(UsageError, match="--limit 0"):
        images.limited(0)
