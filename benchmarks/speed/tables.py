"""The speed half of ``docs/benchmarks.md``, made from the results alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def speed_section(results: Path, images: Path) -> str:
    """Markdown of every question that was answered; nothing where none was.

    Args:
        results: Folder of ``speed.json``; where it lacks a question, ``speed-quick.json`` answers.
        images: Folder for the picture.
    """
    found: dict[str, Result] = {}
    for path in (results / "speed-quick.json", results / "speed.json"):
        found |= json.loads(path.read_text()) if path.exists() else {}
    if not found:
        return ""
    if "formats" in found:
        _draw_forms(found["formats"], images / "speed-forms.png")
    return markdown(found)


def markdown(results: dict[str, Result]) -> str:
    """Tables of the answers, by question."""
    parts = [
        "## Speed\n\nProcessor time includes all threads and processes, each with one torch thread."
        " A ratio is the median of the ratios of runs that were measured in turn. The load is"
        " that of the machine before and after the measurement; above 2, other work ran at the"
        " same time, and the times are less reliable."
    ]
    for name, (title, body) in _PARTS.items():
        if name in results:
            parts.append(f"### {title}\n\n{body(results[name])}\n\n{_origin(results[name])}")
    return "\n\n".join(parts) + "\n"


def _origin(result: Result) -> str:
    where = result["environment"]
    software = ", ".join(f"{name} {version}" for name, version in where["software"].items())
    before, after = where["load_average"]
    return (
        f"*{where['date']}, {where['processor']}, {where['cores']} cores, load {before} before and"
        f" {after} after; Python {where['python']}, {software};"
        f" `{where['command']}`{' (quick form)' if result['quick'] else ''}.*"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _micro(cost: dict[str, float], clock: str = "cpu") -> str:
    return f"{cost[f'{clock}_us']:,.0f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _goal(is_reached: bool) -> str:
    return "reached" if is_reached else "**missed**"


def _cache_teacher(result: Result) -> str:
    names = {
        "forward": "bare teacher forward",
        "write": "from decoded views to a committed cache",
        "draw_and_write": "from files to a committed cache, one worker",
    }
    rows = []
    for name, label in names.items():
        over = result["over_forward"].get(name, {"wall": 1.0, "cpu": 1.0, "thread": 1.0})
        cost = result["per_view"][name]
        rows.append(
            [
                label,
                *(_micro(cost, clock) for clock in ("wall", "cpu", "thread")),
                *(f"{over[clock]:.3f}" for clock in ("wall", "cpu", "thread")),
                "" if name == "forward" else _goal(over["wall"] <= 1.05),
            ]
        )
    parts = ", ".join(f"{name} {value:,.0f} µs" for name, value in result["parts_us"].items())
    height, width = result["view_size"]
    return (
        f"Teacher `{result['teacher']}` at {height} × {width}, {result['views']:,} views, stages"
        f" {' and '.join(map(str, result['stages']))}, the default codec. The theoretical limit of"
        " the ratios is 1, and the goal is 1.05. If the coders have their own cores, a run waits"
        " only for the teacher's thread.\n\n"
        + _table(
            [
                "µs per view, and ratio to the forward pass",
                "clock",
                "processor",
                "teacher's thread",
                "clock ×",
                "processor ×",
                "thread ×",
                "goal, by the clock",
            ],
            rows,
        )
        + f"\n\nThe coders' time per view consists of: {parts}."
    )


def _scheduling(result: Result) -> str:
    rows = [
        [
            f"`-b {row['batch_size']}`",
            f"{row['bare_seconds']:.1f}",
            f"{row['seconds']:.1f}",
            f"{row['over_bare']:.3f}",
            _goal(row["over_bare"] <= 1.05),
        ]
        for row in result["rows"]
    ]
    device = result.get("device")
    simulated = "" if device is None else _device_scheduling(device)
    return (
        "This measures the pipeline of `cache-teacher` with a teacher and coders that sleep instead"
        " of computing, which simulates a machine with free cores:"
        f" {result['teacher_views_per_second']:,.0f} views/s of the teacher,"
        f" {result['coding_ms_per_view']:.1f} ms of coding per view, {result['threads']} threads,"
        f" {result['views']:,} views in shards of 4,096, all times multiplied by"
        f" {result['stretch']:.0f}. The theoretical limit of the ratio is 1, and the goal is 1.05."
        " Before coding was divided into small tasks and commits moved to the background, the"
        " ratios were 2.24 and 4.26.\n\n"
        + _table(
            ["teacher's batch", "bare teacher, s", "cached, s", "cached/bare", "goal"],
            rows,
        )
        + simulated
    )


def _device_scheduling(device: Result) -> str:
    row = [
        f"{device['seconds']:.1f}",
        f"{device['over_bare']:.3f}",
        f"{device['steady_over_bare']:.3f}",
        _goal(device["steady_over_bare"] <= 1.05),
    ]
    return (
        "\n\nThe second simulation is that of a device that encodes, with the figures of the H200"
        f" below: {device['teacher_views_per_second']:,.0f} views/s, {device['threads']} threads,"
        f" and {device['writing_ms_per_view']:.1f} ms per view to compress and write a block. The"
        " steady ratio leaves out the first quarter and the end of the last block, as the GPU"
        " benchmark does. With at most four blocks in memory it was 1.38; the H200 had 1.31.\n\n"
        + _table(["cached, s", "cached/bare", "steady", "goal"], [row])
    )


def _encoding(result: Result) -> str:
    cost = result["per_view"]
    different = ", ".join(
        f"{100 * share:.4f} % of the {name}" for name, share in result["different"].items()
    )
    rows, columns, channels = result["shape"]
    return (
        f"Features of {rows} × {columns} × {channels}, {result['views']} views per call, one"
        f" thread. The two encoders differ in {different}.\n\n"
        + _table(
            ["encoder", "processor ms per view"],
            [[name, f"{cost[name]['cpu_us'] / 1e3:.2f}"] for name in ("numpy", "torch")],
        )
        + f"\n\ntorch/NumPy: {result['torch_over_numpy']:.2f}."
    )


def _embedded(result: Result) -> str:
    rows = [
        [
            name,
            f"{cost['cpu_us'] / 1e3:.2f}",
            f"{result['over_view'][name]:.2f}",
            f"{sizes / 1e3:.1f}" if (sizes := result["bytes_per_view"].get(name)) else "",
            _goal(cost["cpu_us"] <= 1e3 * result["goal_ms"]) if name in _PIXELS else "",
        ]
        for name, cost in result["per_view"].items()
    ]
    height, width = result["view_size"]
    return (
        f"The table shows processor time of the loader on the host, without targets, for views of"
        f" {height} × {width} of photographs, by what the cache embeds: the images themselves (read"
        " from files here), `--embed view` and `--embed pixels`. Restoring pixels from differences"
        f" takes {result['undo_on_cpu_us'] / 1e3:.2f} ms on this processor; in training a GPU does"
        f" it. The goal is {result['goal_ms']} ms.\n\n"
        + _table(["embedded", "host ms per view", "of `view`", "kB per view", "goal"], rows)
    )


_PIXELS = ("pixels, tars", "pixels, Zarr")


def _updates(result: Result) -> str:
    rows = [
        [what, f"{result[name]:.3f}", f"{goal:g}", _goal(result[name] <= goal)]
        for what, name, goal in (
            ("device reads", "reads_per_update", 0),
            ("agreements between processes", "agreements_per_update", 0.1),
        )
    ]
    return (
        f"Counted over {result['updates']} updates of {result['processes']} processes within an"
        f" epoch, with a line of the log every {result['log_interval']}; before, 1 and 3.\n\n"
        + _table(["an update", "number", "goal", ""], rows)
    )


def _step(result: Result) -> str:
    rows = [
        [
            f"{model} at {result['img_size']} px",
            *(_micro(found["per_view"][arm]) for arm in ("online", "teacher", "cached", "decode")),
            f"{found['cached_over_online']:.3f}",
            f"{found['limit_over_online']:.3f}",
            f"{found['cached_over_limit']:.3f}",
            _goal(found["cached_over_limit"] <= 1.05),
        ]
        for model, found in result["students"].items()
    ]
    waits = ", ".join(
        f"{model} {_percent(found['data_wait_share'])} at {found['images_per_second']:.0f} images/s"
        for model, found in result["training"].items()
    )
    return (
        f"The table shows processor µs per view of ScaleKD steps with {result['batch_size']} views"
        f" and the teacher at {result['teacher_size'][0]} px. The limit is the online step without"
        " the teacher's forward pass, and the goal is to be within 5 % of it.\n\n"
        + _table(
            [
                "student",
                "online",
                "teacher",
                "cached",
                "of which decoding",
                "cached/online",
                "limit/online",
                "cached/limit",
                "goal",
            ],
            rows,
        )
        + f"\n\nShare of time that training runs with one loader worker wait for data: {waits}."
    )


def _pairs(result: Result) -> str:
    rows = [
        [
            f"{row['teacher']} → {row['student']}",
            *(f"{row['gflop_per_view'][arm]:.0f}" for arm in ("teacher", "online", "cached")),
            f"{row['flops']['online_over_cached']:.2f}×",
            f"{row['flops']['cached_over_limit']:.3f}",
            *(f"{row['cpu_seconds_per_view'][arm]:.2f}" for arm in ("teacher", "online", "cached")),
            f"{row['seconds']['online_over_cached']:.2f}×",
            f"{row['seconds']['cached_over_limit']:.3f}",
        ]
        for row in result["pairs"]
    ]
    return (
        f"The pairs use the published objective, random weights and batches of"
        f" {result['batch_size']}. GFLOP include forward and backward passes; seconds also include"
        " AdamW's update.\n\n"
        + _table(
            [
                "pair, 224 px",
                "teacher GFLOP",
                "online",
                "cached",
                "online/cached",
                "cached/limit",
                "teacher s",
                "online",
                "cached",
                "online/cached",
                "cached/limit",
            ],
            rows,
        )
    )


def _loader(result: Result) -> str:
    rows = []
    for name, found in result["sets"].items():
        cost, two = found["per_view"], found["two_workers"]
        rows.append(
            [
                name,
                *(_micro(cost[arm]) for arm in ("decode_and_crop", "without", "with")),
                f"{found['rate_with_over_without']:.3f}",
                f"{two['rate_with_over_without']:.3f}",
                _percent(found["target_reading_over_decode_and_crop"]),
                f"{found['target_bytes_per_view'] / 1e3:.1f} kB",
                f"{_goal(found['rate_with_over_without'] >= 0.9)},"
                f" {_goal(found['target_reading_over_decode_and_crop'] <= 0.1)}",
            ]
        )
    return (
        "The table shows processor µs per view. The goals are a rate with targets of at least 0.9"
        " of the rate without targets, and a time for reading targets of at most 10 % of the time"
        " for decoding and cropping.\n\n"
        + _table(
            [
                "images, targets",
                "decode and crop",
                "loader without targets",
                "with",
                "rate with/without",
                "the same, two workers (clock)",
                "targets/decode and crop",
                "targets per view",
                "goals",
            ],
            rows,
        )
    )


def _formats(result: Result) -> str:
    rows = []
    for row in result["forms"]:
        rates = [
            f"{1e6 / row[order]['cpu_us']:,.0f}" if order in row else "–"
            for order in ("shuffled", "sequential", "random")
        ]
        rows.append(
            [
                row["form"],
                f"{row['bytes_per_view'] / 1e3:.1f}",
                str(row["files"]),
                f"{1e6 / row['write']['cpu_us']:,.0f}",
                *rates,
                f"{1e3 * row['open_seconds']:.0f}",
            ]
        )
    left_out = "".join(f" {name} was left out: {why}." for name, why in result["left_out"].items())
    return (
        "![views per second and bytes per view](img/speed-forms.png)\n\nAll forms contain the same"
        " features and logits (65 × 384 and 10, float16 except with a codec), read in batches of 64"
        " in one process. Rates are views per second of processor time. scalekd checks SHA-256 and"
        " crc32c of every file that it reads, and syncs every file that it writes; the others do"
        " neither. Bytes include the codec's tables, 2 to 3 MB per cache, divided by these few"
        " views. The integers of the transform codec are converted to features on the training"
        " device; on this processor the conversion takes"
        f" {result['transform_to_features_cpu_us']:.0f} µs per view.{left_out}\n\n"
        + _table(
            [
                "form",
                "kB per view",
                "files",
                "written/s",
                "shuffled/s",
                "sequential/s",
                "random, one by one/s",
                "open, ms",
            ],
            rows,
        )
    )


def _growth(result: Result) -> str:
    rows = [
        [
            f"{row['views']:,}",
            f"{1e3 * row['open_seconds']:.1f}",
            f"{1e3 * row['sample_table_seconds']:.0f}",
            f"{1e3 * row['first_batch_order_seconds']:.1f}",
            f"{row['read_us_per_view']:.1f}",
            f"{row['write_us_per_view']:.0f}",
            f"{row['resident_bytes_more'] / 1e6:.1f}",
            f"{row['bytes_per_view']:.0f}",
        ]
        for row in result["rows"]
    ]
    return (
        f"The caches contain tiny synthetic targets, read in {result['batches']} shuffled batches"
        f" of {result['batch_size']}; times are processor times. Only the table of samples (keys,"
        " labels, hashes) is read completely.\n\n"
        + _table(
            [
                "views",
                "open, ms",
                "table of samples, ms",
                "order until the first batch, ms",
                "read, µs per view",
                "write, µs per view",
                "memory, MB",
                "bytes per view",
            ],
            rows,
        )
    )


def _profiles(result: Result) -> str:
    if "stages" not in result:
        return str(result["left_out"])
    parts = []
    for stage, found in result["stages"].items():
        if "shares" not in found:
            parts.append(f"`{stage}`: {found['left_out']}")
            continue
        shares = [*found["shares"].items(), ("everything else", found["other_share"])]
        parts.append(
            f"`{stage}`, {result['views'][stage]:,} views, {found['samples']:,} samples of the"
            f" profiler. Start-up took {found['start_up_seconds']:.0f} s and calibration"
            f" {found['calibration_seconds']:.0f} s, once per run (py-spy slows both).\n\n"
            + _table(["activity", "share"], [[n, _percent(s)] for n, s in shares if s >= 0.005])
        )
    return "\n\n".join(parts)


def _draw_forms(result: Result, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = result["forms"][::-1]
    colours = ["tab:blue" if row["form"].startswith("scalekd") else "tab:gray" for row in rows]
    figure, (rates, sizes) = pyplot.subplots(1, 2, figsize=(10, 3.2), sharey=True)
    names = [row["form"] for row in rows]
    rates.barh(names, [1e6 / row["shuffled"]["cpu_us"] for row in rows], color=colours)
    rates.set_xlabel("views read shuffled, a processor second")
    sizes.barh(names, [row["bytes_per_view"] / 1e3 for row in rows], color=colours)
    sizes.set_xlabel("kB a view")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


_PARTS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "cache_teacher": ("Caching compared with the bare teacher", _cache_teacher),
    "scheduling": ("Scheduling of caching on an accelerator, simulated", _scheduling),
    "step": ("Training steps with a cache and with a live teacher", _step),
    "updates": ("Waiting of an update", _updates),
    "pairs": ("The published pairs", _pairs),
    "loader": ("Loader with and without targets", _loader),
    "encoding": ("Encoding by torch operations on a CPU", _encoding),
    "embedded": ("Views in the cache", _embedded),
    "formats": ("Other formats for the same targets", _formats),
    "growth": ("Growth", _growth),
    "profiles": ("Where the time goes", _profiles),
}
