"""Read mutated caches: every outcome must be success or one of our own errors, in little memory.

    python -m benchmarks.fuzz_reader --mutations 100000

Each mutation changes one file of a tiny cache of format 1 (``tests/cache/frozen``): plan,
manifest, a commit record, metadata of an array, a chunk, tables, tail. Half of them are found by
their digests. For the other half all digests are made to agree, so that the mutated bytes get
past them to the parsers and decoders, as a hostile author of a cache would have it. After some
changes of the plan all other documents are made anew to fit it.

A share of the mutations changes meaning: a number, text, list or null in a document of a whole
cache, with an extension, in tars, or a part; every hash is made anew, and the cache is trained on,
verified, listed, fetched or converted.

Mutations run in forked children with a limit on their address space; a crash is seen by the parent,
which names the mutation and goes on behind it. ``--only N`` runs one and shows its traceback.
"""

import argparse
import dataclasses
import json
import math
import mmap
import os
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from scalekd.errors import ScaleKDError
from tests.reliability.document import write_documentation
from tests.reliability.fuzz_cases import CACHES, NAMES, Subject, mutate_and_read
from tests.reliability.semantic import whole_caches

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "fuzz_reader.json"
SEMANTIC_SHARE = 0.3
_BATCH = 2_000
_MEMORY_BYTES = 1 << 30  # a child may map so much more than it starts with
_SLOW_SECONDS = 20  # of processor time
_HANG_SECONDS = 300  # of the clock: a busy machine may let a process wait for a minute
_MOST_KEPT = 20


class Slow(BaseException):
    """A mutation took too long."""


@dataclasses.dataclass
class Outcomes:
    """What came of mutations, by kind."""

    refused: Counter[str] = dataclasses.field(default_factory=Counter)
    accepted: Counter[str] = dataclasses.field(default_factory=Counter)
    unchanged: int = 0
    errors: Counter[str] = dataclasses.field(default_factory=Counter)
    failures: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    slowest_seconds: float = 0.0
    peak_growth_bytes: int = 0

    def add(self, other: "Outcomes") -> None:
        self.refused += other.refused
        self.accepted += other.accepted
        self.errors += other.errors
        self.unchanged += other.unchanged
        self.failures += other.failures
        self.slowest_seconds = max(self.slowest_seconds, other.slowest_seconds)
        self.peak_growth_bytes = max(self.peak_growth_bytes, other.peak_growth_bytes)


class Subjects:
    """Caches that are changed: some file by file, some as wholes (:mod:`semantic`)."""

    def __init__(self, folder: Path, *, share: float) -> None:
        self.by_file = [Subject(cache, folder) for cache in NAMES]
        self.wholes = whole_caches(CACHES, folder) if share else []
        self._share = share

    def mutate_and_read(self, rng: random.Random) -> tuple[str, str]:
        """One mutation: what was changed, and what came of it."""
        if not self.wholes or rng.random() >= self._share:
            return mutate_and_read(rng.choice(self.by_file), rng)
        whole = rng.choice(self.wholes)
        kind, changed = whole.mutate(rng)
        if not changed:
            return kind, "unchanged"
        try:
            whole.meet(changed, rng)
        except ScaleKDError as error:
            return f"{kind}, sealed", type(error).__name__
        return f"{kind}, sealed", "accepted"

    def restore(self) -> None:
        """Put back what a process that died had changed."""
        for subject in (*self.by_file, *self.wholes):
            subject.write(subject.files)


def run_batch(
    subjects: Subjects, seed: int, first: int, last: int, progress: mmap.mmap
) -> Outcomes:
    """Mutations ``first`` to ``last``, in this process; ``progress`` holds the one at work."""
    found, before = Outcomes(), _resident_bytes()
    for number in range(first, last):
        progress[:8] = number.to_bytes(8, "little")
        rng = random.Random(f"{seed}:{number}")
        start = time.process_time()
        signal.setitimer(signal.ITIMER_REAL, _HANG_SECONDS)
        signal.setitimer(signal.ITIMER_PROF, _SLOW_SECONDS)
        try:
            label, outcome = subjects.mutate_and_read(rng)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            _stop_timers()
            where = traceback.extract_tb(error.__traceback__)
            place = [f"{Path(f.filename).name}:{f.lineno}" for f in where[-4:]]
            found.failures.append(
                {
                    "mutation": number,
                    "error": f"{type(error).__name__}: {str(error)[:300]}",
                    "place": " > ".join(place),
                }
            )
            continue
        finally:
            _stop_timers()
        if outcome == "unchanged":
            found.unchanged += 1
        elif outcome == "accepted":
            found.accepted[label] += 1
        else:
            found.refused[label] += 1
            found.errors[outcome] += 1
        found.slowest_seconds = max(found.slowest_seconds, time.process_time() - start)
    found.peak_growth_bytes = max(0, _peak_bytes() - before)
    return found


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) * 1024


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise Slow(
        f"more than {_SLOW_SECONDS} s of processor time"
        if number == signal.SIGPROF
        else f"more than {_HANG_SECONDS} s"
    )


def _stop_timers() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.setitimer(signal.ITIMER_PROF, 0)


def _prepare_child() -> None:
    signal.signal(signal.SIGALRM, _interrupt)
    signal.signal(signal.SIGPROF, _interrupt)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM counts from here
    limit = _mapped_bytes() + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Rust's panics are reported through their exceptions; their own words go nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


def _forked(work: Callable[[], Outcomes]) -> tuple[Outcomes | None, int]:
    """Run in a child; its outcomes, or none and how it ended."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            _prepare_child()
            with os.fdopen(writing, "w") as pipe:
                json.dump(vars(work()), pipe)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    status = os.waitpid(child, 0)[1]
    if status or not text:
        return None, status
    fields = json.loads(text)
    for name in ("refused", "accepted", "errors"):
        fields[name] = Counter(fields[name])
    return Outcomes(**fields), 0


def fuzz(
    num_mutations: int,
    *,
    seed: int = 0,
    quiet: bool = True,
    share: float = SEMANTIC_SHARE,
    minutes: float = math.inf,
) -> dict[str, Any]:
    """Run the mutations and say what came of them.

    Args:
        num_mutations: How many.
        seed: The same seed makes the same mutations.
        quiet: Print no progress.
        share: Share of mutations that change the meaning of a whole cache.
        minutes: Begin no further batch of mutations after so many minutes.

    Returns:
        The content of ``results/fuzz_reader.json``; ``failures`` must be empty.
    """
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # NaN among mutated features is no news
    shared = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    start, total, first = time.perf_counter(), Outcomes(), 0
    with tempfile.TemporaryDirectory(dir=shared, prefix="fuzz-reader-") as name:
        subjects = Subjects(Path(name), share=share)
        progress = mmap.mmap(-1, 8)
        while first < num_mutations and time.perf_counter() - start < 60 * minutes:
            last = min(first + _BATCH, num_mutations)
            begin, end = first, last
            found, status = _forked(lambda: run_batch(subjects, seed, begin, end, progress))  # noqa: B023
            if found is None:
                at = int.from_bytes(progress[:8], "little")
                found = Outcomes(
                    failures=[{"mutation": at, "error": f"the process ended with {status}"}]
                )
                subjects.restore()
                last = at + 1
            total.add(found)
            first = last
            if not quiet:
                pace = first / (time.perf_counter() - start)
                print(f"{first:,} done, {pace:.0f}/s, {len(total.failures)} failures", flush=True)
                for failure in found.failures:
                    print(failure, flush=True)
    seconds = time.perf_counter() - start
    refused, accepted = sum(total.refused.values()), sum(total.accepted.values())
    return {
        "mutations": first,
        "seed": seed,
        "semantic_share": share,
        "seconds": round(seconds, 1),
        "mutations_per_second": round(first / seconds),
        "refused": refused,
        "accepted": accepted,
        "unchanged": total.unchanged,
        "errors": dict(total.errors.most_common()),
        "by_kind": {
            label: {"refused": total.refused[label], "accepted": total.accepted[label]}
            for label in sorted(total.refused | total.accepted)
        },
        "slowest_seconds": round(total.slowest_seconds, 2),
        "peak_growth_megabytes": round(total.peak_growth_bytes / 2**20),
        "allowed_growth_megabytes": _MEMORY_BYTES >> 20,
        "num_failures": len(total.failures),
        "failures": total.failures[:_MOST_KEPT],
        "software": {
            name: metadata.version(name)
            for name in (
                "scalekd",
                "numcodecs",
                "pcodec",
                "safetensors",
                "pydantic",
                "numpy",
                "torch",
            )
        },
    }


def run_one(number: int, seed: int, share: float) -> None:
    """One mutation in this process, for a debugger."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        subjects = Subjects(Path(name), share=share)
        rng = random.Random(f"{seed}:{number}")
        print(subjects.mutate_and_read(rng))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--share", type=float, default=SEMANTIC_SHARE, help="of mutations of meaning; 0 to 1"
    )
    parser.add_argument("--only", type=int, help="run this mutation alone, here")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.only is not None:
        run_one(arguments.only, arguments.seed, arguments.share)
        return
    result = fuzz(
        arguments.mutations,
        seed=arguments.seed,
        quiet=False,
        share=arguments.share,
        minutes=arguments.minutes,
    )
    arguments.output.write_text(json.dumps(result, indent=2) + "\n")
    write_documentation()
    print(json.dumps({k: v for k, v in result.items() if k != "by_kind"}, indent=2))
    sys.exit(1 if result["num_failures"] else 0)


if __name__ == "__main__":
    np.seterr(all="ignore")
    main()
