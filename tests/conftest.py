"""A small image set and a real cache of it, made once a session by the shipped pipeline."""

import importlib.util
import io
import logging
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import urllib.request
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

# Tests started in the background of a script inherit an ignored SIGINT, and so would every command
# that they start; a command at a terminal does not.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

NUM_IMAGES = 70
NUM_CLASSES = 10
BLOCK_SIZE = 8  # below the shipped 256, so that a shard of a test has several blocks
SHARD_SIZE = 24  # shards of 24, 24 and 22 views


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="session")
def _no_sync() -> Iterator[None]:
    """No test cuts the power, and waiting for the disk would be most of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


def encoded_image(number: int) -> bytes:
    """Image number ``number``: smooth shading and texture, of its own size; every fifth a PNG."""
    random = np.random.default_rng(number)
    height, width = (int(side) for side in random.integers(24, 60, 2))
    y, x = np.mgrid[:height, :width]
    shade = np.stack([3 * x + number, 4 * y + 2 * number, x + y + 5 * number], axis=-1) % 200
    pixels = (shade + random.integers(0, 50, shade.shape)).astype(np.uint8)
    buffer = io.BytesIO()
    if number % 5 == 0:
        Image.fromarray(pixels).save(buffer, "PNG")
    else:
        Image.fromarray(pixels).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def member_names(number: int) -> tuple[str, str]:
    """Names of the image and the label of sample ``number`` in a shard."""
    key = f"sample-{number:03d}"
    return f"{key}.{'png' if number % 5 == 0 else 'jpg'}", f"{key}.cls"


def tar_bytes(members: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


@pytest.fixture(scope="session")
def write_tar() -> Callable[[Path, Mapping[str, bytes]], Path]:
    """Writes a shard of named members."""

    def write(path: Path, members: Mapping[str, bytes]) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(tar_bytes(members))
        return path

    return write


def write_image_set(folder: Path, images: Mapping[int, bytes], *, per_shard: int = 40) -> Path:
    """WebDataset shards ``train-*.tar`` of numbered images, label ``number % 10``."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = sorted(images)
    for shard, first in enumerate(range(0, len(numbers), per_shard)):
        members = {}
        for number in numbers[first : first + per_shard]:
            image, label = member_names(number)
            members[image] = images[number]
            members[label] = b"%d" % (number % NUM_CLASSES)
        (folder / f"train-{shard:06d}.tar").write_bytes(tar_bytes(members))
    (folder / "classes.txt").write_text("\n".join(f"class {c}" for c in range(NUM_CLASSES)))
    return folder


@pytest.fixture(scope="session")
def image_bytes() -> dict[int, bytes]:
    return {number: encoded_image(number) for number in range(NUM_IMAGES)}


@pytest.fixture(scope="session")
def tiny_images(image_bytes: dict[int, bytes], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 images of ten classes in two shards. Read only."""
    return write_image_set(tmp_path_factory.mktemp("images"), image_bytes)


@pytest.fixture
def image_set(tmp_path: Path) -> Callable[[Mapping[int, bytes]], Path]:
    """Writes an image set of a test's own."""

    def make(images: Mapping[int, bytes], name: str = "own-images") -> Path:
        return write_image_set(tmp_path / name, images)

    return make


def tiny_teacher(img_size: int = 32) -> Any:
    """Return the configuration of a ViT with random weights and the classes of ``tiny_images``."""
    from scalekd.teachers import TeacherConfig

    return TeacherConfig(
        model="test_vit",
        pretrained=False,
        img_size=img_size,
        model_kwargs={"num_classes": NUM_CLASSES},
    )


def run_script(script: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script of bash in a folder, with this environment's programs; it must end with 0."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    ended = subprocess.run(
        ["bash", "-euc", script],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended


def run_program(code: str, folder: Path, *launcher: str) -> str:
    """Run a Python program in a folder; return what it prints.

    Args:
        code: Text of the program.
        folder: Folder that the program runs in.
        launcher: Arguments of Python before the program, such as ``-m torch.distributed.run``.
    """
    (folder / "program.py").write_text(code)
    ended = subprocess.run(
        [sys.executable, *launcher, "program.py"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1800,  # against a program that hangs; a loaded machine may be slow
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.fixture(scope="session")
def make_cache(tiny_images: Path) -> Callable[..., Any]:
    """Runs stage one with a tiny random ViT; keywords go to its configuration."""
    from scalekd.pipelines import _sizes
    from scalekd.pipelines import cache_teacher as stage_one

    def make(output: Path, *, img_size: int = 32, **changes: Any) -> Any:
        settings = {
            "teacher": tiny_teacher(img_size),
            "data_dir": str(tiny_images),
            "output": output,
            "passes": 2,
            "batch_size": 10,
            "workers": 0,
            "shard_size": SHARD_SIZE,
            "codec": "float16",
            **changes,
        }
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_sizes, "BLOCK_SIZE", BLOCK_SIZE)
            return stage_one.cache_teacher(stage_one.CacheTeacherConfig(**settings))

    return make


@pytest.fixture(scope="session")
def sound_cache(make_cache: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two passes over ``tiny_images``, both stages and all logits. Read only."""
    root = tmp_path_factory.mktemp("sound") / "cache"
    assert make_cache(root).complete
    return root


@pytest.fixture(scope="session")
def make_tars(
    sound_cache: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Returns ``sound_cache`` as tars that embed a kind of images. Read only."""
    from scalekd.pipelines.convert_cache import ConvertConfig, convert_cache

    folder = tmp_path_factory.mktemp("tars")

    def convert(embed: str) -> Path:
        root = folder / embed
        if not root.exists():
            images = None if embed == "none" else str(tiny_images)
            options: dict[str, Any] = {"format": "webdataset", "embed": embed, "data_dir": images}
            config = ConvertConfig(source=str(sound_cache), output=str(root), workers=0, **options)
            assert convert_cache(config).complete
        return root

    return convert


@pytest.fixture
def cache_copy(sound_cache: Path, tmp_path: Path) -> Path:
    """A copy of ``sound_cache`` to do harm to."""
    return Path(shutil.copytree(sound_cache, tmp_path / "cache"))


@pytest.fixture(scope="session")
def file_contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file below a folder by path, to compare two caches byte by byte."""

    def read(root: Path) -> dict[str, bytes]:
        return {
            path.relative_to(root).as_posix(): path.read_bytes()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }

    return read


@pytest.fixture(scope="session")
def servers() -> ModuleType:
    """``tests/storage/servers.py``: servers on loopback that can be made to fail."""
    path = Path(__file__).with_name("storage") / "servers.py"
    spec = importlib.util.spec_from_file_location("loopback_servers", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def _moto(servers: ModuleType) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of moto's own packages
        from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    with servers.Faulty(servers.forward(*server.get_host_and_port())).serving() as faulty:
        yield faulty
    server.stop()


@pytest.fixture
def s3(_moto: Any, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Any:
    """A real S3 API on loopback, as the environment names it, with an empty bucket.

    ``s3.bucket`` is the bucket's URL; see ``servers.Faulty`` for faults and the list of requests.
    """
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", _moto.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-the-tests")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-the-tests")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    _moto.reset()
    name = f"bucket-{abs(hash(request.node.nodeid)):x}"
    urllib.request.urlopen(urllib.request.Request(f"{_moto.url}/{name}", method="PUT")).close()
    _moto.bucket = f"s3://{name}"
    _moto.reset()
    return _moto


@pytest.fixture
def web(servers: ModuleType, tmp_path: Path) -> Iterator[Any]:
    """A static web server on loopback of the folder ``web.root``; see ``servers.Faulty``."""
    root = tmp_path / "web"
    root.mkdir()
    with servers.Faulty(servers.folder(root)).serving() as faulty:
        faulty.root = root
        yield faulty


@pytest.fixture
def upload() -> Callable[[Path, str], None]:
    """Copies a folder to a store as it is."""
    from scalekd.storage import LocalStorage, open_storage

    def copy(folder: Path, place: str) -> None:
        source, target = LocalStorage(folder), open_storage(place)
        for found in source.list():
            target.commit(found.path, source.read(found.path, max_bytes=found.size))

    return copy
