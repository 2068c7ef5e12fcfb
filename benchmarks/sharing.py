"""Training from a web server: requests and bytes against the least possible, and speed.

    python -m benchmarks.sharing --json

A cache of random images is read by the training loader from a local folder and from a web server,
a process of its own on one thread, whose every answer waits 20 ms. The server counts. Local and
remote epochs alternate, so that a machine that others use, too, slows both; the ratio is of the
medians.
``blocks`` reads shuffled views of a cache of made-up targets, in blocks of the usual 256 views, and
does nothing else with them: no image is decoded, no student trained.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.speed._inputs import made_up_features, write_plain_cache
from scalekd.cache import CacheReader, open_cache
from scalekd.codecs import create_logit_codec, fit_codec
from scalekd.images import ImageDataset, open_dataset
from scalekd.loading import CachedViewLoader
from scalekd.loading.blocks import BlockReader
from scalekd.loading.order import EpochOrder
from scalekd.pipelines.cache_teacher import CacheTeacherConfig, cache_teacher
from scalekd.pipelines.share_cache import ShareConfig, share_cache
from scalekd.shapes import FeatureShape
from scalekd.teachers import TeacherConfig

RESULT = Path(__file__).with_name("results") / "sharing.json"
LATENCY_SECONDS = 0.02
BATCH_SIZE = 64
BLOCK_SIZE = 64  # of 440 kB here; the usual 256 views of a large teacher are several megabytes
_COUNT = "/__count__"
GROUPS = ("stage4", "logits")
NUM_BLOCK_VIEWS = 16_384
BATCHES_AHEAD = 64


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


def least(reader: CacheReader, pass_index: int, groups: Sequence[str]) -> dict[str, int]:
    """Count the files of some groups of arrays of a pass, and their bytes."""
    sizes = [
        digest.num_bytes
        for shard in reader.shards
        for path, digest in reader.record(pass_index, shard).files.items()
        if path.split("/")[2] in groups
    ]
    return {"requests": len(sizes), "bytes": sum(sizes)}


def loader_epochs(reader: CacheReader, images: ImageDataset) -> Callable[[int], int]:
    """Return a function that runs one epoch and returns its number of views."""
    loader = CachedViewLoader(reader, images, batch_size=BATCH_SIZE, num_workers=2, groups=GROUPS)
    return lambda epoch: sum(len(batch["label"]) for batch in loader.epoch(epoch))


def make_blocks(root: Path) -> Path:
    """Write a cache of random half-precision features, 4.8 MB per block, without images."""
    shape = FeatureShape((7, 7), 192)
    features = made_up_features(shape, 256, seed=0)
    scores = np.random.default_rng(0).standard_normal((256, 10), np.float32)
    write_plain_cache(
        root / "blocks",
        num_views=NUM_BLOCK_VIEWS,
        codec=fit_codec("float16", shape),
        logits=create_logit_codec("full", 10),
        targets=lambda _first, count: (features[:count], scores[:count]),
    )
    return root / "blocks"


def block_epochs(reader: CacheReader) -> Callable[[int], int]:
    """A function that reads the targets of one epoch, wanted some batches ahead."""
    names = [array.name for array in reader.layout.views]
    order = EpochOrder(tuple(reader.blocks()), BATCH_SIZE, seed=0)

    def run(epoch: int) -> int:
        blocks = BlockReader(reader, names)
        batches, count = list(order.batches(epoch)), 0
        for number, samples in enumerate(batches):
            seen = 0 if number == 0 else number + BATCHES_AHEAD - 1
            for coming in batches[seen : number + BATCHES_AHEAD]:
                blocks.prefetch(0, coming)
            for sample in samples:
                block, row = blocks.find(0, int(sample))
                count += len(block["pixel_hash"][row : row + 1])
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
    asyncio.run(_serve(root.resolve()))


async def _serve(root: Path) -> None:
    counted = {"requests": 0, "bytes": 0}

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, target, _ = lines[0].split(" ")
                headers = {
                    k.lower(): v.strip() for k, _, v in (x.partition(":") for x in lines[1:])
                }
                if target == _COUNT:
                    text = json.dumps(counted).encode()
                    counted.update(requests=0, bytes=0)
                    writer.write(_head(200, len(text)) + text)
                    continue
                await asyncio.sleep(LATENCY_SECONDS)
                counted["requests"] += 1
                path = root / urllib.parse.unquote(target).lstrip("/")
                if not path.is_file():
                    writer.write(_head(404, 0))
                    continue
                size = path.stat().st_size
                first, last = 0, size - 1
                if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", headers.get("range", "")):
                    first, last = int(wanted[1]), min(int(wanted[2] or last), last)
                    writer.write(_head(206, last - first + 1, f"bytes {first}-{last}/{size}"))
                else:
                    writer.write(_head(200, size))
                if method == "GET" and last >= first:
                    counted["bytes"] += last - first + 1
                    await writer.drain()
                    with path.open("rb") as file:
                        await asyncio.get_running_loop().sendfile(
                            writer.transport, file, first, last - first + 1
                        )

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await asyncio.to_thread(sys.stdin.read)
    os._exit(0)  # connections that are still open have nothing to say


def _head(status: int, num_bytes: int, content_range: str = "") -> bytes:
    lines = [f"HTTP/1.1 {status} -", f"Content-Length: {num_bytes}", "Accept-Ranges: bytes"]
    lines += ["Last-Modified: Mon, 01 Jan 2024 00:00:00 GMT"]
    lines += [f"Content-Range: {content_range}"] * bool(content_range)
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


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
        made_up = make_blocks(Path(folder))
        with serving(cache.parent) as url:
            near, far = open_cache(cache), open_cache(f"{url}/cache")
            blocks = open_cache(made_up), open_cache(f"{url}/blocks")
            result: dict[str, Any] = {
                "num_images": num_images,
                "num_block_views": NUM_BLOCK_VIEWS,
                "latency_seconds": LATENCY_SECONDS,
                "blocks": compare(*map(block_epochs, blocks), url, repeats),
                "loader": compare(
                    loader_epochs(near, images), loader_epochs(far, images), url, repeats
                ),
            }
            # The columns that a shard has of a pass stay in memory: blocks alone need them once.
            for name, reader, groups in (
                ("blocks", blocks[0], GROUPS),
                ("loader", near, (*GROUPS, "view", "pixel_hash")),
            ):
                bounds = [least(reader, pass_index, groups) for pass_index in reader.passes]
                result[name]["least_in_a_pass"] = bounds
                for epoch, asked in enumerate(result[name]["epochs"], start=1):
                    bound = bounds[epoch % len(bounds)]
                    asked["requests_over_least"] = round(asked["requests"] / bound["requests"], 3)
                    asked["bytes_over_least"] = round(asked["bytes"] / bound["bytes"], 3)
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
