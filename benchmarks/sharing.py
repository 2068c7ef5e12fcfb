"""Training from a web server: requests and bytes against the least possible, and speed.

    python -m benchmarks.sharing --json

A cache of random images is read by the training loader from a local folder and from a web server,
a process of its own, whose every answer waits 20 ms. The server counts. Local and remote epochs
alternate, so that a machine that others use, too, slows both; the ratio is of the medians.
``blocks`` reads what the loader reads of the cache and does nothing else with it: no image is
decoded, no student trained.
"""

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from PIL import Image

from scalekd.cache import CacheReader, open_cache
from scalekd.data import CachedViewLoader, ImageDataset, open_dataset
from scalekd.data.blocks import BlockReader
from scalekd.data.order import EpochOrder
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.pipelines.share_cache import ShareConfig, share_cache
from scalekd.teachers import TeacherConfig

RESULT = Path(__file__).with_name("results") / "sharing.json"
LATENCY_SECONDS = 0.02
BATCH_SIZE = 64
BLOCK_SIZE = 64  # of 440 kB here; the usual 256 views of a large teacher are several megabytes
_COUNT = "/__count__"
GROUPS = ("stage4", "logits")
_SERVERS = Path(__file__).parents[1] / "tests" / "storage" / "servers.py"


def make_cache(root: Path, num_images: int) -> tuple[Path, ImageDataset]:
    """Photograph-sized noise, smoothed so that it decodes like photographs, and its cache."""
    random = np.random.default_rng(0)
    for number in range(num_images):
        folder = root / "images/train" / f"class{number % 10}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = random.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((320, 240)).save(folder / f"{number:05d}.jpg", quality=85)
    cache_teacher(
        CacheTeacherConfig(
            teacher=TeacherConfig(model="vit_tiny_patch16_224", pretrained=False, img_size=64),
            data_dir=str(root / "images"),
            output=root / "cache",
            passes=2,
            stages=(4,),
            codec="float16",
            logits="topk:10",
            shard_size=1024,
            block_size=BLOCK_SIZE,
            workers=0,
        )
    )
    return root / "cache", open_dataset(str(root / "images"))


def least(reader: CacheReader, pass_index: int) -> dict[str, int]:
    """Files that hold what the objective reads of a pass, once each, and their bytes."""
    groups = (*GROUPS, "view", "pixel_hash")
    found = [
        digest.num_bytes
        for shard in reader.shards
        for path, digest in reader.record(pass_index, shard).files.items()
        if path.split("/")[2] in groups
    ]
    return {"requests": len(found), "bytes": sum(found)}


def loader_epochs(reader: CacheReader, images: ImageDataset) -> Callable[[int], int]:
    """A function that runs one epoch and returns its views."""
    loader = CachedViewLoader(reader, images, batch_size=BATCH_SIZE, num_workers=2, groups=GROUPS)
    return lambda epoch: sum(len(batch["label"]) for batch in loader.epoch(epoch))


def block_epochs(reader: CacheReader, images: ImageDataset) -> Callable[[int], int]:
    """The same for blocks alone, wanted sixteen batches ahead."""
    del images
    names = [a.name for a in reader.layout.views if a.name.split("/")[0] != "stage3"]
    order = EpochOrder(tuple(reader.blocks()), BATCH_SIZE, seed=0)

    def run(epoch: int) -> int:
        blocks = BlockReader(reader, names)
        pass_index = reader.passes[epoch % len(reader.passes)]
        batches, count = list(order.batches(epoch)), 0
        for number, samples in enumerate(batches):
            for coming in batches[number : number + 16]:
                blocks.want(pass_index, [int(sample) for sample in coming])
            for sample in samples:
                block, row = blocks.find(pass_index, int(sample))
                count += len(block["logits/indices"][row : row + 1])
        return count

    return run


def compare(
    local: Callable[[int], int], remote: Callable[[int], int], url: str, repeats: int
) -> dict[str, Any]:
    """Views a second of both, alternating, and what the server was asked in a remote epoch."""
    local(0)
    remote(0)  # starts the workers
    rates: dict[str, list[float]] = {"local": [], "remote": []}
    epochs: list[dict[str, int]] = []
    for epoch in range(1, repeats + 1):
        for name, run in (("local", local), ("remote", remote)):
            asked(url)
            started = time.monotonic()
            views = run(epoch)
            rates[name].append(views / (time.monotonic() - started))
        epochs.append(asked(url))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    return {
        "views_per_second": {name: [round(rate, 1) for rate in r] for name, r in rates.items()},
        "remote_over_local": round(medians["remote"] / medians["local"], 3),
        "epochs": epochs,
    }


def asked(url: str) -> dict[str, int]:
    """Requests that the server answered since this was last asked, and their bytes."""
    with urllib.request.urlopen(f"{url}{_COUNT}") as answer:
        counted: dict[str, int] = json.load(answer)
    return counted


def serve(root: Path) -> None:
    """Serve a folder until standard input ends; the first line of output is the URL."""
    servers = _load_servers()
    files = servers.folder(root)

    def backend(request: Any, body: bytes) -> Any:
        if request.path != _COUNT:
            return files(request, body)
        found = [r for r in faulty.requests if r.path != _COUNT]
        faulty.requests.clear()
        counted = {"requests": len(found), "bytes": sum(r.num_bytes for r in found)}
        return 200, {}, json.dumps(counted).encode()

    faulty = servers.Faulty(backend, latency=LATENCY_SECONDS)
    with faulty.serving():
        print(faulty.url, flush=True)
        sys.stdin.read()


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """The URL of a server of ``root``, a process of its own."""
    command = [sys.executable, "-m", "benchmarks.sharing", "--serve", str(root)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        if process.stdin is None or process.stdout is None:
            raise SystemExit("the server has no pipes")
        yield process.stdout.readline().strip()
        process.stdin.close()


def run(num_images: int, repeats: int) -> dict[str, Any]:
    """All measurements."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        cache, images = make_cache(Path(folder), num_images)
        with serving(cache.parent) as url:
            near, far = open_cache(cache), open_cache(f"{url}/cache")
            bounds = [least(near, pass_index) for pass_index in near.passes]
            result: dict[str, Any] = {
                "num_images": num_images,
                "latency_seconds": LATENCY_SECONDS,
                "least_in_a_pass": bounds,
            }
            for name, epochs in (("blocks", block_epochs), ("loader", loader_epochs)):
                found = compare(epochs(near, images), epochs(far, images), url, repeats)
                for epoch, asked in enumerate(found["epochs"], start=1):
                    bound = bounds[epoch % len(bounds)]
                    asked["requests_over_least"] = round(asked["requests"] / bound["requests"], 3)
                    asked["bytes_over_least"] = round(asked["bytes"] / bound["bytes"], 3)
                result[name] = found
            result["pull"] = pull(url, Path(folder))
    return result


def pull(url: str, folder: Path) -> dict[str, Any]:
    """A whole pull, and one that finds everything there."""
    asked(url)
    config = ShareConfig(source=f"{url}/cache", target=str(folder / "back"))
    first = share_cache(config)
    requests = asked(url)["requests"]
    share_cache(config)
    return {
        "files": first.num_files,
        "bytes": first.num_bytes,
        "seconds": round(first.seconds, 2),
        "requests": requests,
        "requests_when_all_is_there": asked(url)["requests"],
    }


def _load_servers() -> ModuleType:
    """The web server of the tests."""
    spec = importlib.util.spec_from_file_location("loopback_servers", _SERVERS)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{_SERVERS} is missing: run this from a clone")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help=f"write {RESULT}")
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve is not None:
        serve(arguments.serve)
        return
    result = run(arguments.images, arguments.repeats)
    text = json.dumps(result, indent=2)
    if arguments.json:
        RESULT.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
