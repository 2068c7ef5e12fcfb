"""Kill ``cache-teacher`` at random moments, resume it, and see what is left.

    python -m benchmarks.kill_harness --kills 100 --processes 1
    python -m benchmarks.kill_harness --kills 100 --processes 2

A cache of 13 shards in two passes is written again and again; SIGKILL comes at a moment drawn
uniformly over the time that an undisturbed run takes, so that calibration, plan, shards and
manifest are all hit. After every kill: each committed record and each file that it names is as it
was, and no more shards are half done than there are processes. When a run comes to its end, every
file is compared with an undisturbed run's, and the next cache is begun.

The job is forked from a process that has already imported torch, so that a try takes a second.
"""

import argparse
import contextlib
import io
import json
import os
import random
import signal
import socket
import sys
import tarfile
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from scalekd.cache.care.verify import verify
from scalekd.cache.documents.manifest import ShardRecord
from scalekd.cache.files import digest_on_disk
from scalekd.cli.main import main as scalekd
from scalekd.pipelines import cache_teacher  # noqa: F401 (imported before the first fork)
from tests.reliability.document import write_documentation

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "kill_harness.json"
_NUM_IMAGES, _SHARD_SIZE, _PASSES = 104, 8, 2
_NUM_SHARDS = _PASSES * _NUM_IMAGES // _SHARD_SIZE
_LONGEST_RUN_SECONDS = 180


@dataclass
class Outcome:
    """What the kills did.

    Attributes:
        processes: Processes of the job.
        kills: SIGKILLs that met a running job.
        caches: Caches written to the end.
        different_files: Files that differed from an undisturbed run's; must stay 0.
        lost_or_changed: Records or committed files found missing or changed; must stay 0.
        most_half_done: Most shards that were begun and not committed after one kill.
        killed_during: Kills by what the job was doing.
        shards_redone: Shards whose work was lost, over all kills.
        seconds: Time taken.
    """

    processes: int
    kills: int = 0
    caches: int = 0
    different_files: int = 0
    lost_or_changed: int = 0
    most_half_done: int = 0
    killed_during: Counter[str] = field(default_factory=Counter)
    shards_redone: int = 0
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        unharmed = self.different_files == 0 and self.lost_or_changed == 0
        return unharmed and self.most_half_done <= self.processes


def write_images(folder: Path) -> Path:
    """Small JPEG images of noise over a ramp, as one WebDataset shard."""
    folder.mkdir(parents=True)
    with tarfile.open(folder / "train-000000.tar", "w") as tar:
        for number in range(_NUM_IMAGES):
            noise = np.random.default_rng(number).integers(0, 60, (40, 40, 3))
            ramp = np.arange(40)[:, None, None] * 4
            buffer = io.BytesIO()
            Image.fromarray((noise + ramp).astype(np.uint8)).save(buffer, "JPEG")
            for name, content in (
                (f"{number:04d}.jpg", buffer.getvalue()),
                (f"{number:04d}.cls", b"1"),
            ):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


class Job:
    """``scalekd cache-teacher`` in forked processes that form one process group.

    Args:
        images: The image set.
        output: Folder of the cache.
        log: Where its output goes.
        num_processes: Ranks of the job.
        prepare: Called in each process before the command, to take something away from it.
    """

    def __init__(
        self,
        images: Path,
        output: Path,
        log: Path,
        num_processes: int,
        prepare: Callable[[], None] = lambda: None,
    ) -> None:
        arguments = f"""
            cache-teacher --model test_vit --no-pretrained --img-size 32
            --model-kwargs num_classes=10 --data-dir {images} --output {output}
            --passes {_PASSES} --shard-size {_SHARD_SIZE} --codec float16 -b 8 -j 1
        """.split()
        port = _free_port()
        self.processes: list[int] = []
        for rank in range(num_processes):
            process = os.fork()
            if process == 0:
                _be_child(arguments, log, rank, num_processes, port, prepare)
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.setpgid(process, self.processes[0] if self.processes else process)
            self.processes.append(process)
        self._left = set(self.processes)
        self.codes: list[int] = []

    def wait(self, seconds: float) -> bool:
        """Whether all processes ended within the time."""
        deadline = time.monotonic() + seconds
        while self._left:
            for process in list(self._left):
                done, status = os.waitpid(process, os.WNOHANG)
                if done:
                    self._left.discard(process)
                    self.codes.append(os.waitstatus_to_exitcode(status))
            if time.monotonic() > deadline:
                break
            time.sleep(0.002)
        return not self._left

    def kill(self, chance: random.Random) -> None:
        """Kill one process, and the others a moment later, loader workers included."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(chance.choice(self.processes), signal.SIGKILL)
        if len(self.processes) > 1:
            time.sleep(chance.random() * 0.05)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.processes[0], signal.SIGKILL)
        self.wait(10)


def _be_child(
    arguments: list[str],
    log: Path,
    rank: int,
    num_processes: int,
    port: int,
    prepare: Callable[[], None],
) -> None:
    if rank == 0:
        os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a script's background
    if num_processes > 1:
        os.environ.update(
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            WORLD_SIZE=str(num_processes),
            LOCAL_WORLD_SIZE=str(num_processes),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    code = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        # A test runner has put objects of its own in their place.
        sys.stdout, sys.stderr = os.fdopen(1, "w", 1), os.fdopen(2, "w", 1)
        try:
            prepare()
            scalekd(arguments)
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def contents(root: Path) -> dict[str, bytes]:
    """Every file of a cache."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def _records(root: Path) -> dict[str, bytes]:
    found = {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.glob("records/*/*.json")
    }
    return found


def _lost_or_changed(root: Path, before: dict[str, bytes], now: dict[str, bytes]) -> int:
    """Records of before that are not what they were, and files that are not as records say."""
    lost = sum(now.get(name) != content for name, content in before.items())
    for content in now.values():
        for relative, expected in ShardRecord.model_validate_json(content).files.items():
            path = root / relative
            lost += not path.is_file() or digest_on_disk(path) != expected
    return lost


def _half_done(root: Path) -> int:
    """Shards of which files stand, but no record."""
    begun = {
        (path.relative_to(root).parts[1], int(path.relative_to(array).parts[1]))
        for array in (path.parent for path in root.glob("passes/*/**/c"))
        for path in array.glob("c/**/*")
        if path.is_file() and path.suffix != ".partial"
    }
    return sum(not (root / f"records/{unit}/{shard:06d}.json").exists() for unit, shard in begun)


def _phase(root: Path) -> str:
    if not (root / "plan.json").exists():
        return "start and calibration"
    if (root / "manifest.json").exists():
        return "after the manifest"
    committed = len(list(root.glob("records/0*/*.json")))
    return "manifest" if committed == _NUM_SHARDS else "shards"


def run(num_kills: int, num_processes: int, seed: int, folder: Path) -> Outcome:
    """Kill and resume until there were ``num_kills`` kills and the last cache is complete."""
    started, chance, outcome = time.monotonic(), random.Random(seed), Outcome(num_processes)
    images, log = write_images(folder / "images"), folder / "log"

    def finish(output: Path) -> float:
        begun = time.monotonic()
        job = Job(images, output, log, num_processes)
        if not job.wait(_LONGEST_RUN_SECONDS) or any(job.codes):
            job.kill(chance)
            raise RuntimeError(
                f"an undisturbed run failed ({job.codes}):\n{log.read_text()[-2000:]}"
            )
        return time.monotonic() - begun

    typical = finish(folder / "reference")
    reference = contents(folder / "reference")
    while outcome.kills < num_kills:
        output = folder / f"cache-{outcome.caches}"
        before: dict[str, bytes] = {}
        while outcome.kills < num_kills:
            job = Job(images, output, log, num_processes)
            if job.wait(chance.uniform(0, typical)):
                if any(job.codes):
                    raise RuntimeError(f"a resumed run failed:\n{log.read_text()[-2000:]}")
                break
            job.kill(chance)
            outcome.kills += 1
            outcome.killed_during[_phase(output)] += 1
            now = _records(output)
            outcome.lost_or_changed += _lost_or_changed(output, before, now)
            half_done = _half_done(output)
            outcome.shards_redone += half_done
            outcome.most_half_done = max(outcome.most_half_done, half_done)
            before = now
        finish(output)
        found = contents(output)
        names = found.keys() | reference.keys()
        outcome.different_files += sum(found.get(name) != reference.get(name) for name in names)
        outcome.lost_or_changed += len(verify(output).problems)
        outcome.caches += 1
    outcome.seconds = time.monotonic() - started
    return outcome


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        outcome = run(options.kills, options.processes, options.seed, Path(folder))
    result: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    name = "1 process" if options.processes == 1 else f"{options.processes} processes"
    result[name] = {
        **{key: value for key, value in vars(outcome).items() if key != "killed_during"},
        "killed_during": dict(sorted(outcome.killed_during.items())),
        "shards_in_a_cache": _NUM_SHARDS,
        "seconds": round(outcome.seconds, 1),
        "passed": outcome.passed,
        "seed": options.seed,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")
    write_documentation()
    print(json.dumps(result[name], indent=2))
    if not outcome.passed:
        sys.exit(1)


if __name__ == "__main__":
    main()
