"""Tables of what is stored: embedded views, formats, growth; and the profiles."""

from pathlib import Path

from benchmarks.speed._cells import Result, goal, percent, table


def embedded(result: Result) -> str:
    rows = [
        [
            name,
            f"{cost['cpu_us'] / 1e3:.2f}",
            f"{result['over_view'][name]:.2f}",
            f"{sizes / 1e3:.1f}" if (sizes := result["bytes_per_view"].get(name)) else "",
            goal(cost["cpu_us"] <= 1e3 * result["goal_ms"]) if name in _PIXELS else "",
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
        + table(["embedded", "host ms per view", "of `view`", "kB per view", "goal"], rows)
    )


_PIXELS = ("pixels, tars", "pixels, Zarr")


def formats(result: Result) -> str:
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
        + table(
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


def growth(result: Result) -> str:
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
        + table(
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


def profiles(result: Result) -> str:
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
            + table(["activity", "share"], [[n, percent(s)] for n, s in shares if s >= 0.005])
        )
    return "\n\n".join(parts)


def draw_forms(result: Result, path: Path) -> None:
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
