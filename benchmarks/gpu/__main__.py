"""Is scalekd fit for this machine's GPU? One machine, bounded time, one JSON line a finding.

    python -m benchmarks.gpu --tiny            # the same code on a CPU, in a minute or two
    python -m benchmarks.gpu --photos DIR --output benchmarks/results/gpu-NAME.jsonl

Every section runs in a process of its own. One that fails or runs out of time says so in a line,
and the others go on. Nothing needs a network; photographs make the decoding of images realistic.
"""

import argparse
import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.gpu._setting import Setting

# In the order of importance, with the most seconds that each may take.
SECTIONS = {"machine": 40, "encoding": 60, "caching": 120, "checks": 90, "training": 120}
_LEAST_SECONDS = 12


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true", help="small models and counts, for a CPU")
    parser.add_argument("--only", help="sections, joined by commas")
    parser.add_argument("--budget", type=float, default=400, help="seconds in all (default: 400)")
    parser.add_argument("--photos", type=Path, help="folder of JPEG files")
    parser.add_argument("--work", type=Path, help="scratch folder (default: a temporary one)")
    parser.add_argument("--output", type=Path, help="file of the findings, one JSON line each")
    parser.add_argument("--section", choices=[*SECTIONS, "inputs"], help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=float, default=float("inf"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    wanted = arguments.only.split(",") if arguments.only else list(SECTIONS)
    unknown = [name for name in wanted if name not in SECTIONS]
    if unknown:
        parser.error(f"--only {unknown[0]}: the sections are {', '.join(SECTIONS)}")
    with tempfile.TemporaryDirectory(prefix="scalekd-gpu-") as temporary:
        work = (arguments.work or Path(temporary)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        output = (arguments.output or work / "gpu.jsonl").resolve()
        setting = Setting(arguments.tiny, work, output, arguments.photos, arguments.ends)
        if arguments.section:
            importlib.import_module(f"benchmarks.gpu.{arguments.section}").run(setting)
            return
        output.unlink(missing_ok=True)
        _run_sections(setting, wanted, arguments.budget)


def _run_sections(setting: Setting, names: list[str], budget: float) -> None:
    started = time.monotonic()
    _start(setting, "inputs", float("inf")).wait()
    for name in names:
        left = budget - (time.monotonic() - started)
        if left < _LEAST_SECONDS:
            setting.report("driver", skipped=name, seconds_left=round(left))
            continue
        limit = min(SECTIONS[name], left)
        begun = time.monotonic()
        process = _start(setting, name, time.time() + limit - 3)
        try:
            code: int | str = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = "out of time"
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        setting.report("driver", done=name, code=code, seconds=round(time.monotonic() - begun, 1))


def _start(setting: Setting, name: str, ends: float) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "benchmarks.gpu", "--section", name, "--ends", str(ends)]
    command += ["--work", str(setting.work), "--output", str(setting.output)]
    if setting.tiny:
        command.append("--tiny")
    if setting.photos:
        command += ["--photos", str(setting.photos)]
    return subprocess.Popen(command, start_new_session=True)


def failures(path: Path) -> list[str]:
    """Findings that say that something went wrong."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [
        json.dumps(line)
        for line in lines
        if "failed" in line or line.get("code", 0) != 0 or line.get("problems")
    ]


if __name__ == "__main__":
    main()
