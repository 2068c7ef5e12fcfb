"""The speed half of ``docs/benchmarks.md``, made from the results alone."""

import json
from collections.abc import Callable
from pathlib import Path

from benchmarks.speed import compare
from benchmarks.speed._cells import Result, goal, micro, percent, table
from benchmarks.speed._storage_tables import draw_forms, embedded, formats, growth, profiles


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
        draw_forms(found["formats"], images / "speed-forms.png")
    path = results / "speed-compared.json"
    return markdown(found) + (_compared(json.loads(path.read_text())) if path.exists() else "")


def _compared(result: Result) -> str:
    before, after = result["releases"]
    least, most = result["load_average"]
    return (
        "\n### Before and after the work for accelerators\n\nThe quick forms of caching, steps and"
        f" loader on a CPU, at the commits {before} and {after}, in turn: median and extremes of"
        f" {len(result['rows'][0]['before'])} runs of each. Ratios are of processor times within a"
        " run, for the loader of rates. The machine was shared: a change within the extremes of"
        " the other commit's runs shows nothing.\n\n"
        + table(["", "before", "after"], compare.rows(result))
        + f"\n\n*{result['date']}, {result['processor']}, {result['cores']} cores, load {least}"
        f" to {most}; `python -m benchmarks.speed.compare`.*\n"
    )


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
                *(micro(cost, clock) for clock in ("wall", "cpu", "thread")),
                *(f"{over[clock]:.3f}" for clock in ("wall", "cpu", "thread")),
                "" if name == "forward" else goal(over["wall"] <= 1.05),
            ]
        )
    parts = ", ".join(f"{name} {value:,.0f} µs" for name, value in result["parts_us"].items())
    height, width = result["view_size"]
    return (
        f"Teacher `{result['teacher']}` at {height} × {width}, {result['views']:,} views, stages"
        f" {' and '.join(map(str, result['stages']))}, the default codec. The theoretical limit of"
        " the ratios is 1, and the goal is 1.05. If the coders have their own cores, a run waits"
        " only for the teacher's thread.\n\n"
        + table(
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
            goal(row["over_bare"] <= 1.05),
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
        + table(
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
        goal(device["steady_over_bare"] <= 1.05),
    ]
    return (
        "\n\nThe second simulation is that of a device that encodes, with the figures of the H200"
        f" below: {device['teacher_views_per_second']:,.0f} views/s, {device['threads']} threads,"
        f" and {device['writing_ms_per_view']:.1f} ms per view to compress and write a block. The"
        " steady ratio leaves out the first quarter and the end of the last block, as the GPU"
        " benchmark does. With at most four blocks in memory it was 1.38; the H200 had 1.31.\n\n"
        + table(["cached, s", "cached/bare", "steady", "goal"], [row])
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
        + table(
            ["encoder", "processor ms per view"],
            [[name, f"{cost[name]['cpu_us'] / 1e3:.2f}"] for name in ("numpy", "torch")],
        )
        + f"\n\ntorch/NumPy: {result['torch_over_numpy']:.2f}."
        + _host_of_encoding(result)
    )


def _host_of_encoding(result: Result) -> str:
    if "host" not in result:
        return ""
    host = result["host"]
    stages = {name: cost for name, cost in host.items() if name.startswith("stage")}
    total = sum(cost["cpu_us"] for cost in stages.values()) / 1e3
    rows = [
        [name, f"{cost['cpu_us'] / 1e3:.2f}", f"{cost['bytes'] / 1e3:.1f}", ""]
        for name, cost in stages.items()
    ]
    rows.append(["both", f"{total:.2f}", "", goal(total <= host["goal_ms"])])
    return (
        "\n\nIf a GPU encodes, the host compresses and writes the integers. The table shows its"
        " processor time for views of Swin-L's stages, without drawing, in batches of"
        " 128; each row includes logits of 1,000 classes, and the features are synthetic. The"
        f" goal for both is {host['goal_ms']:.0f} ms.\n\n"
        + table(["host, by stage", "processor ms per view", "kB per view", "goal"], rows)
    )


def _updates(result: Result) -> str:
    rows = [
        [what, f"{result[name]:.3f}", f"{limit:g}", goal(result[name] <= limit)]
        for what, name, limit in (
            ("device reads", "reads_per_update", 0),
            ("agreements between processes", "agreements_per_update", 0.1),
        )
    ]
    return (
        f"Counted over {result['updates']} updates of {result['processes']} processes within an"
        f" epoch, with a line of the log every {result['log_interval']}; before, 1 and 3.\n\n"
        + table(["an update", "number", "goal", ""], rows)
    )


def _step(result: Result) -> str:
    rows = [
        [
            f"{model} at {result['img_size']} px",
            *(micro(found["per_view"][arm]) for arm in ("online", "teacher", "cached", "decode")),
            f"{found['cached_over_online']:.3f}",
            f"{found['limit_over_online']:.3f}",
            f"{found['cached_over_limit']:.3f}",
            goal(found["cached_over_limit"] <= 1.05),
        ]
        for model, found in result["students"].items()
    ]
    waits = ", ".join(
        f"{model} {percent(found['data_wait_share'])} at {found['images_per_second']:.0f} images/s"
        for model, found in result["training"].items()
    )
    return (
        f"The table shows processor µs per view of ScaleKD steps with {result['batch_size']} views"
        f" and the teacher at {result['teacher_size'][0]} px. The limit is the online step without"
        " the teacher's forward pass, and the goal is to be within 5 % of it.\n\n"
        + table(
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
        + table(
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
                *(micro(cost[arm]) for arm in ("decode_and_crop", "without", "with")),
                f"{found['rate_with_over_without']:.3f}",
                f"{two['rate_with_over_without']:.3f}",
                percent(found["target_reading_over_decode_and_crop"]),
                f"{found['target_bytes_per_view'] / 1e3:.1f} kB",
                f"{goal(found['rate_with_over_without'] >= 0.9)},"
                f" {goal(found['target_reading_over_decode_and_crop'] <= 0.1)}",
            ]
        )
    return (
        "The table shows processor µs per view. The goals are a rate with targets of at least 0.9"
        " of the rate without targets, and a time for reading targets of at most 10 % of the time"
        " for decoding and cropping.\n\n"
        + table(
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


_PARTS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "cache_teacher": ("Caching compared with the bare teacher", _cache_teacher),
    "scheduling": ("Scheduling of caching on an accelerator, simulated", _scheduling),
    "step": ("Training steps with a cache and with a live teacher", _step),
    "updates": ("Waiting of an update", _updates),
    "pairs": ("The published pairs", _pairs),
    "loader": ("Loader with and without targets", _loader),
    "encoding": ("Encoding by torch operations on a CPU", _encoding),
    "embedded": ("Views in the cache", embedded),
    "formats": ("Other formats for the same targets", formats),
    "growth": ("Growth", growth),
    "profiles": ("Where the time goes", profiles),
}
