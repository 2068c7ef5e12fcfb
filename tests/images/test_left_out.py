"""Everything in an image set is taken, or counted and named."""

import io
import os
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torchvision
import webdataset.tariterators
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from scalekd.errors import DataError
from scalekd.images import IMAGE_EXTENSIONS, ImageDataset, ImageOptions, open_dataset
from scalekd.images.tars import key_and_extension
from scalekd.views import decode_image

WriteTar = Callable[[Path, Mapping[str, bytes]], Path]


def put(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(path.encode())
    return root


def keys(images: ImageDataset) -> list[str]:
    return sorted(images.key(index) for index in range(len(images)))


# Folders


def test_links_are_followed_as_torchvision_does(tmp_path: Path) -> None:
    put(tmp_path, "data/train/a/1.jpg", "data/train/c/1.jpg", "elsewhere/x/1.jpg", "one.jpg")
    train = tmp_path / "data/train"
    (train / "b").mkdir()
    (train / "b/part1").symlink_to("../../../elsewhere/x")
    (train / "d").symlink_to(tmp_path / "elsewhere")
    (train / "a/2.jpg").symlink_to("../../../one.jpg")
    images = open_dataset(str(tmp_path / "data"))
    theirs = torchvision.datasets.ImageFolder(train)
    assert images.class_names == tuple(theirs.classes) == ("a", "b", "c", "d")
    assert {f"{train}/{images.key(i)}": int(images.labels[i]) for i in range(len(images))} == dict(
        theirs.samples
    )
    assert images[keys_index(images, "a/2.jpg")].image == b"one.jpg"
    assert images.notes == ()


def keys_index(images: ImageDataset, key: str) -> int:
    return next(index for index in range(len(images)) if images.key(index) == key)


def test_a_linked_root_and_a_linked_split_are_read(tmp_path: Path) -> None:
    put(tmp_path, "real/a/1.jpg")
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train").symlink_to("../real")
    (tmp_path / "alias").symlink_to("set")
    assert keys(open_dataset(str(tmp_path / "alias"))) == ["a/1.jpg"]


def test_links_that_lead_in_circles_end_and_are_named(tmp_path: Path) -> None:
    put(tmp_path, "set/train/a/1.jpg", "set/train/b/1.jpg")
    train = tmp_path / "set/train"
    (train / "a/up").symlink_to("..")
    (train / "a/everything").symlink_to("/")
    (train / "a/other").symlink_to("../b")
    (train / "b/other").symlink_to("../a")
    images = open_dataset(str(tmp_path / "set"))
    assert keys(images) == ["a/1.jpg", "a/other/1.jpg", "b/1.jpg", "b/other/1.jpg"]
    assert len(images.notes) == 1
    assert "6 links to a folder that contains them (first: 'a/everything')" in images.notes[0]


def test_links_that_multiply_folders_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scalekd.storage.linked._MAX_LINKED_FOLDERS", 100)
    put(tmp_path, "train/a/1.jpg")
    for level in range(10):  # 2 ** 10 ways down
        (tmp_path / f"l{level}").mkdir()
        for name in "xy":
            (tmp_path / f"l{level}/{name}").symlink_to(tmp_path / f"l{level + 1}")
    (tmp_path / "l10").mkdir()
    (tmp_path / "train/a/deep").symlink_to(tmp_path / "l0")
    with pytest.raises(DataError, match="links lead to more than 100 folders"):
        open_dataset(str(tmp_path))


def test_what_a_folder_has_beside_images_is_counted(tmp_path: Path) -> None:
    put(
        tmp_path,
        *("train/ant/1.jpg", "train/ant/notes.txt", "train/ant/2.heic", "train/ant/.DS_Store"),
        *("train/ant/.ipynb_checkpoints/1.jpg", "train/loose.jpg", "train/bee/deep/1.JPG"),
    )
    (tmp_path / "train/ant/gone.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "train/ant/pipe.jpg")
    (tmp_path / "train/empty/deeper").mkdir(parents=True)
    images = open_dataset(str(tmp_path))
    assert images.class_names == ("ant", "bee")
    (note,) = images.notes
    for kind in (
        "2 hidden files (first: 'ant/.DS_Store')",
        "2 files that are no images by their extension (first: 'ant/2.heic')",
        "1 broken links (first: 'ant/gone.jpg')",
        "1 pipes, sockets and devices (first: 'ant/pipe.jpg')",
        "1 class folders without files (first: 'empty')",
        "1 images outside the class folders (first: 'loose.jpg')",
    ):
        assert kind in note


def test_a_class_of_broken_links_is_an_error(tmp_path: Path) -> None:
    put(tmp_path, "train/ant/1.jpg")
    (tmp_path / "train/cow").mkdir()
    (tmp_path / "train/cow/1.jpg").symlink_to("nowhere")
    with pytest.raises(DataError, match=r"class folder 'cow' has no image.*'cow/1\.jpg'"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize("name", ["readme.txt", "1.heic", "jpg", "deep/1.npy"])
def test_a_class_folder_with_files_and_no_image_is_an_error(tmp_path: Path, name: str) -> None:
    """It is a class for torchvision, so that leaving it out would shift the labels after it."""
    put(tmp_path, "train/ant/1.jpg", f"train/cow/{name}", "train/dog/1.jpg")
    with pytest.raises(DataError, match=r"class folder 'cow' has no image.*'cow/"):
        open_dataset(str(tmp_path))


def test_every_extension_of_every_format_that_is_decoded_is_read(tmp_path: Path) -> None:
    Image.init()
    decoded = {"JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM"}
    theirs = {name[1:] for name, kind in Image.registered_extensions().items() if kind in decoded}
    assert set(IMAGE_EXTENSIONS) == theirs - {"pfm"}  # floating-point values
    picture = Image.new("RGB", (4, 4), (10, 200, 30))
    for extension in IMAGE_EXTENSIONS:
        path = tmp_path / f"train/a/{extension}.{extension.upper()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        mode = {"pgm": "L", "pbm": "1"}.get(extension, "RGB")
        buffer = io.BytesIO()
        picture.convert(mode).save(buffer, Image.registered_extensions()[f".{extension}"])
        path.write_bytes(buffer.getvalue())
    images = open_dataset(str(tmp_path))
    assert len(images) == len(IMAGE_EXTENSIONS)
    for index in range(len(images)):
        assert decode_image(images[index].image, key=images.key(index)).size == (4, 4)


# Tars


def test_shards_may_be_links_and_a_broken_one_is_an_error(
    tmp_path: Path, write_tar: WriteTar
) -> None:
    write_tar(tmp_path / "store/x.tar", {"a.jpg": b"a", "a.cls": b"0"})
    (tmp_path / "set").mkdir()
    (tmp_path / "set/train-0.tar").symlink_to("../store/x.tar")
    assert keys(open_dataset(str(tmp_path / "set"))) == ["a"]
    (tmp_path / "set/train-1.tar").symlink_to("../store/y.tar")
    for split in ("train", "train-*.tar", "train-{0..1}.tar"):
        with pytest.raises(DataError, match=r"train-1\.tar"):
            open_dataset(str(tmp_path / "set"), split)


@given(
    st.text("ab.-_ é", min_size=1, max_size=6).filter(lambda base: base[0] != "."),
    st.sampled_from(["", "./", "dir/", "v1.2/x/"]),
)
def test_keys_are_those_of_webdataset(base: str, folder: str) -> None:
    key, extension = key_and_extension(folder + base)
    theirs = webdataset.tariterators.base_plus_ext(folder + base)
    if "." not in base:
        assert theirs == (None, None)
        assert extension == ""
    else:
        assert (key, extension) == (theirs[0], theirs[1].lower())


def test_names_with_a_second_dot_are_counted_or_chosen(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(
        tmp_path / "train-0.tar",
        {
            **{"a.jpg": b"a", "a.cls": b"0", "22.05.jpg": b"b", "22.05.cls": b"1"},
            **{"img.v2.jpg": b"c", "img.v2.cls": b"2", "v1.2/b.jpg": b"d", "v1.2/b.cls": b"3"},
        },
    )
    images = open_dataset(str(tmp_path))
    assert keys(images) == ["a", "v1.2/b"]
    (note,) = images.notes
    assert "2 images whose names have a second dot" in note
    assert "(first: '22.05.jpg')" in note
    chosen = open_dataset(str(tmp_path), options=ImageOptions(input_key="v2.jpg;jpg"))
    assert keys(chosen) == ["a", "img", "v1.2/b"]
    write_tar(tmp_path / "train-0.tar", {"22.05.jpg": b"b", "22.06.jpg": b"b"})
    with pytest.raises(DataError, match=r"in it .*; left out .*second dot.*'22\.05\.jpg'"):
        open_dataset(str(tmp_path))


def test_a_sample_with_two_images_asks_which(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(tmp_path / "train-0.tar", {"a.jpg": b"a", "a.png": b"mask", "a.cls": b"0"})
    with pytest.raises(DataError, match=r"sample 'a' has two images; .*--input-key"):
        open_dataset(str(tmp_path))
    assert open_dataset(str(tmp_path), options=ImageOptions(input_key="png"))[0].image == b"mask"


@pytest.mark.parametrize("padding", [0, 512, 10240, 3 << 20])
def test_archives_that_were_appended_are_read(
    padding: int, tmp_path: Path, write_tar: WriteTar
) -> None:
    path = write_tar(tmp_path / "train-0.tar", {"a.jpg": b"a", "a.cls": b"1"})
    first = path.read_bytes() + bytes(padding)
    second = write_tar(path, {"b.jpg": b"bb", "b.cls": b"2"}).read_bytes()
    third = write_tar(path, {"c.jpg": b"c"}).read_bytes()
    path.write_bytes(first + second + third)
    images = open_dataset(str(tmp_path))
    assert [(images.key(i), images[i].image) for i in range(3)] == [
        *(("a", b"a"), ("b", b"bb"), ("c", b"c")),
    ]
    assert images.labels.tolist() == [1, 2, -1]


def test_other_bytes_after_the_end_of_an_archive_are_named(
    tmp_path: Path, write_tar: WriteTar
) -> None:
    path = write_tar(tmp_path / "train-0.tar", {"a.jpg": b"a", "a.cls": b"1"})
    path.write_bytes(path.read_bytes() + b"PK\3\4" + b"x" * 3000)
    (note,) = open_dataset(str(tmp_path)).notes
    assert "1 files after the end of an archive" in note
    assert "train-0.tar from byte 10,240 on" in note


def test_a_second_archive_that_is_cut_is_refused(tmp_path: Path, write_tar: WriteTar) -> None:
    path = write_tar(tmp_path / "train-0.tar", {"a.jpg": b"a"})
    whole = path.read_bytes()
    second = write_tar(path, {"b.jpg": b"b" * 2000}).read_bytes()
    for length in (512 + 700, 512 + 2048):
        path.write_bytes(whole + second[:length])
        with pytest.raises(DataError, match=r"train-0\.tar"):
            open_dataset(str(tmp_path))


def test_links_inside_a_shard_are_followed_and_others_named(tmp_path: Path) -> None:
    """Such as ``tar`` writes for files that are hard links of one another."""
    with tarfile.open(tmp_path / "train-0.tar", "w") as tar:
        for name, content in (("d/a.jpg", b"image"), ("d/a.cls", b"4")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
        for name, kind, target in (
            ("d/b.jpg", tarfile.LNKTYPE, "d/a.jpg"),
            ("d/b.cls", tarfile.LNKTYPE, "d/a.cls"),
            ("e/c.jpg", tarfile.SYMTYPE, "../d/a.jpg"),
            ("e/d.jpg", tarfile.SYMTYPE, "/etc/passwd"),
            ("e/e.jpg", tarfile.LNKTYPE, "d/missing.jpg"),
        ):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    images = open_dataset(str(tmp_path))
    assert [(s.key, s.image, s.label) for s in images.read_many(range(3))] == [
        *(("d/a", b"image", 4), ("d/b", b"image", 4), ("e/c", b"image", -1)),
    ]
    left_out = images.notes[0]
    assert "2 links to what is not an image of the shard (first: 'e/d.jpg')" in left_out


def test_what_a_shard_has_beside_images_is_counted(tmp_path: Path, write_tar: WriteTar) -> None:
    write_tar(
        tmp_path / "train-0.tar",
        {
            **{"a.jpg": b"a", "a.cls": b"0", "a.txt": b"a cat", "a.seg.npy": b"m"},
            **{"._a.jpg": b"x", "b.heic": b"x", "b.cls": b"1", "c.cls": b"1", "notes": b"x"},
        },
    )
    write_tar(tmp_path / "train-1.tar", {})
    (note,) = open_dataset(str(tmp_path)).notes
    for kind in (
        "1 hidden files (first: '._a.jpg')",
        "2 samples without an image (first: 'b.heic')",
        "1 files without an extension (first: 'notes')",
        "1 shards without members (first: 'train-1.tar')",
    ):
        assert kind in note
    assert "a.txt" not in note
    assert "a.seg" not in note


def test_names_in_notes_cannot_write_to_a_terminal(tmp_path: Path) -> None:
    put(tmp_path, "train/a/1.jpg", "train/a/\x1b[31mred\n.txt")
    (note,) = open_dataset(str(tmp_path)).notes
    assert "\\x1b[31mred\\n" in note
    assert note.isprintable()
