"""Write an HTML page that compares training runs: settings, scores and curves.

    scalekd report output/train/* --output report.html

Runs that differ only in their seed form one row, with mean and standard deviation.
"""

import json
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel

from scalekd.errors import DataError, UsageError
from scalekd.pipelines.plots import runs_svg
from scalekd.storage.files import commit_file
from scalekd.text import MAX_CELL, html, one_line
from scalekd.training.checkpoint import find_run_checkpoint, read_state
from scalekd.training.config import TrainConfig
from scalekd.training.logs import read_summary
from scalekd.training.run_folder import ARGS_FILE

_SUMMARY = "summary.csv"
_CACHE_PAGE = "cache.html"
_ABOUT_THE_LAUNCH = frozenset(
    {"output", "resume", "overwrite", "workers", "log_interval", "log_with", "seed"}
)
_MAX_NAME = 60  # characters in the table and the legend
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem;
       color: #1c1c1c; background: #fff }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #ddd }
th:first-child, td:first-child { text-align: left }
pre { overflow-x: auto }
svg { width: 100%; height: auto; margin: 1.5rem 0 }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem }
dt { font-weight: 600 } dd { margin: 0; overflow-wrap: anywhere }
"""


class ReportRow(BaseModel):
    """Summary of runs that differ only in their seed.

    Attributes:
        name: Settings in which this row differs from the other rows.
        runs: Folders of the runs.
        model: Name of the student.
        objective: Training objective.
        teacher: Name of the teacher; ``None`` for training without one.
        epochs: Number of epochs that all runs have finished.
        samples_viewed: Number of views trained on, the minimum over the runs.
        top1: Top-1 in percent after the last validated epoch, mean over the runs.
        neighbours: Whether top-1 is measured by nearest neighbours (students without a classifier).
        top1_spread: Standard deviation of ``top1`` over the runs; ``None`` for a single run.
        top1_ema: Top-1 in percent of the averaged weights, mean over the runs.
        best_top1: Top-1 in percent of each run's best epoch, mean over the runs.
        feature_loss: Validation feature loss after the last epoch, mean over the runs.
        train_loss: Training loss of the last epoch, mean over the runs.
        seconds: Training time, mean over the runs.
    """

    name: str
    runs: tuple[str, ...]
    model: str
    objective: str
    teacher: str | None
    epochs: int
    samples_viewed: int
    top1: float | None
    top1_spread: float | None
    top1_ema: float | None
    best_top1: float | None
    neighbours: bool
    feature_loss: float | None
    train_loss: float
    seconds: float


class Report(BaseModel):
    """Rows of the page's table, and the path of the page."""

    output: str
    rows: tuple[ReportRow, ...]

    def lines(self) -> list[str]:
        """Return the table as lines of text."""
        width = max(len(row.name) for row in self.rows)
        lines = [f"{'run':<{width}}  {'top-1':>15}  {'views':>12}  {'seconds':>9}"]
        lines += [
            f"{row.name:<{width}}  {_score(row):>15}  {row.samples_viewed:>12,}"
            f"  {row.seconds:>9,.0f}"
            for row in self.rows
        ]
        return [*lines, "", f"curves and settings: {self.output}"]


def report(
    folders: Sequence[Path],
    output: Path,
    *,
    cache_page: Path | None = None,
    names: Sequence[str] | None = None,
    title: str = "Students compared",
    introduction: str = "",
    table: Sequence[str] = (),
) -> Report:
    """Compare training runs and write the page.

    Args:
        folders: Folders of runs, or folders that contain such folders.
        output: HTML file to write; it needs no other file.
        cache_page: Page of the runs' cache to link to; ``cache.html`` beside ``output``, if it
            exists, if ``None``.
        names: Names of the rows, in the order of ``folders``; made from the settings if not given.
        title: Heading of the page.
        introduction: Paragraph below the heading.
        table: Lines of text below the introduction, such as measurements.

    Raises:
        UsageError: A folder contains no run, or ``output`` is a folder.
        DataError: A run finished no epoch, or its files are damaged.
    """
    if output.is_dir():
        raise UsageError(f"--output {output}: is a folder; name an HTML file")
    run_folders = [run for folder in folders for run in _runs_in(folder)]
    groups: dict[str, list[_Run]] = {}
    for run in map(_Run, dict.fromkeys(run_folders)):
        groups.setdefault(json.dumps(run.settings, sort_keys=True), []).append(run)
    names = _names(list(groups.values())) if names is None else names
    named = dict(zip(names, groups.values(), strict=True))
    rows = tuple(_row(name, group) for name, group in named.items())
    picture = runs_svg({name: [run.epochs for run in group] for name, group in named.items()})
    link = _cache_link(output, cache_page)
    opening = f"<h1>{html(title)}</h1>\n"
    opening += f"<p>{html(introduction)}</p>\n" if introduction else ""
    opening += "<pre>" + "\n".join(map(html, table)) + "</pre>\n" if table else ""
    settings = [group[0].settings for group in groups.values()]
    commit_file(output, _page(rows, settings, picture + link, opening).encode())
    return Report(output=str(output), rows=rows)


class _Run:
    """Settings and scores of one run, read from its folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = TrainConfig.from_yaml(folder / ARGS_FILE)
        dumped = self.config.model_dump(mode="json")
        self.settings = {k: v for k, v in dumped.items() if k not in _ABOUT_THE_LAUNCH}
        path = folder / _SUMMARY
        if not path.is_file():
            raise DataError(f"{folder}: the run has not finished an epoch (no {_SUMMARY})")
        self.epochs = read_summary(path)
        last = self.epochs[-1]
        self.samples_viewed = int(last["samples_viewed"])
        self.train_loss = last["train_loss"]
        self.seconds = sum(row["seconds"] for row in self.epochs)

    def teacher(self) -> str | None:
        """Return the teacher named by the run's checkpoint; ``None`` if it names no teacher."""
        checkpoint = find_run_checkpoint(self.folder)
        if checkpoint is None or self.config.objective == "none":
            return None
        teacher = read_state(checkpoint).get("teacher")
        return str(teacher) if teacher else None

    def column(self, name: str) -> list[float]:
        return [row[name] for row in self.epochs if name in row]


def _runs_in(folder: Path) -> list[Path]:
    if (folder / ARGS_FILE).is_file():
        return [folder]
    inside = sorted(path.parent for path in folder.glob(f"*/{ARGS_FILE}"))
    if not inside:
        raise UsageError(f"{folder}: neither a training run nor a folder of runs (no {ARGS_FILE})")
    return inside


def _names(groups: Sequence[Sequence[_Run]]) -> list[str]:
    """Name each row by its objective and differing settings, or, if too long, by its folder."""
    settings = [group[0].settings for group in groups]
    differing = [
        key
        for key in settings[0]
        if key not in ("objective", "recipe")
        and len({json.dumps(each[key], sort_keys=True) for each in settings}) > 1
    ]
    names = [
        ", ".join([each["objective"], *(f"{key}={_text(each[key])}" for key in differing)])
        for each in settings
    ]
    if max(map(len, names)) > _MAX_NAME:
        names = [f"{group[0].config.objective} ({group[0].folder.name})" for group in groups]
    if len(set(names)) < len(names):
        names = [f"{group[0].config.objective} ({group[0].folder})" for group in groups]
    return [one_line(name, limit=MAX_CELL) for name in names]


def _row(name: str, group: Sequence[_Run]) -> ReportRow:
    neighbours = not any(run.column("eval_top1") for run in group)
    metric = "eval_knn_top1" if neighbours else "eval_top1"
    scores = [run.column(metric) for run in group]
    averaged = [run.column(f"ema_{metric}") for run in group]
    losses = [run.column("eval_feature_loss") for run in group]
    return ReportRow(
        name=name,
        runs=tuple(str(run.folder) for run in group),
        model=group[0].config.model,
        objective=group[0].config.objective,
        teacher=group[0].teacher(),
        epochs=min(len(run.epochs) for run in group),
        samples_viewed=min(run.samples_viewed for run in group),
        top1=statistics.mean(score[-1] for score in scores) if all(scores) else None,
        top1_spread=(
            statistics.stdev(score[-1] for score in scores)
            if len(group) > 1 and all(scores)
            else None
        ),
        top1_ema=statistics.mean(score[-1] for score in averaged) if all(averaged) else None,
        best_top1=statistics.mean(map(max, scores)) if all(scores) else None,
        neighbours=neighbours and all(map(bool, scores)),
        feature_loss=statistics.mean(loss[-1] for loss in losses) if all(losses) else None,
        train_loss=statistics.mean(run.train_loss for run in group),
        seconds=statistics.mean(run.seconds for run in group),
    )


def _score(row: ReportRow) -> str:
    if row.top1 is None:
        return (
            "not validated" if row.feature_loss is None else f"feature loss {row.feature_loss:.4g}"
        )
    spread = "" if row.top1_spread is None else f" ± {row.top1_spread:.2f}"
    return f"{row.top1:.2f}{spread} %" + (" by neighbours" if row.neighbours else "")


def _cache_link(output: Path, page: Path | None) -> str:
    """Return a paragraph that links to the page of the cache; empty without one.

    Raises:
        DataError: The page that was asked for does not exist.
    """
    if page is None:
        page = output.with_name(_CACHE_PAGE)
        if not page.is_file():
            return ""
    elif not page.is_file():
        raise DataError(
            f"--cache-page {page}: there is no such file; write it with `scalekd cache show CACHE"
            f" --output {page}`"
        )
    relative = os.path.relpath(page.absolute(), output.absolute().parent)
    address = quote(Path(relative).as_posix())
    return f'<p><a href="./{address}">What the cache contains</a>: views, features, answers.</p>\n'


def _page(
    rows: Sequence[ReportRow], settings: Sequence[Mapping[str, Any]], picture: str, opening: str
) -> str:
    header = ("run", "student", "teacher", "seeds", "epochs", "views seen", "top-1", "best", "EMA")
    cells = [
        (
            row.name,
            row.model,
            row.teacher or "–",
            str(len(row.runs)),
            str(row.epochs),
            f"{row.samples_viewed:,}",
            _score(row),
            "–" if row.best_top1 is None else f"{row.best_top1:.2f} %",
            "–" if row.top1_ema is None else f"{row.top1_ema:.2f} %",
        )
        for row in rows
    ]
    table = "".join(
        "<tr>" + "".join(f"<td>{html(cell)}</td>" for cell in line) + "</tr>\n" for line in cells
    )
    details = "".join(
        f"<details><summary>{html(row.name)}</summary><dl>"
        + "".join(f"<dt>folder</dt><dd>{html(run)}</dd>" for run in row.runs)
        + "".join(
            f"<dt>{html(key)}</dt><dd>{html(_text(value))}</dd>"
            for key, value in each.items()
            if value is not None
        )
        + "</dl></details>\n"
        for row, each in zip(rows, settings, strict=True)
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>scalekd: {len(rows)} students</title><style>{_STYLE}</style></head><body>\n"
        f"{opening}<table><thead><tr>"
        + "".join(f"<th>{name}</th>" for name in header)
        + f"</tr></thead><tbody>\n{table}</tbody></table>\n{picture}\n"
        "<p>Lines are means over seeds, bands reach from the lowest to the highest. Top-1 is that"
        " of the last epoch, with its standard deviation.</p>\n"
        f"<h2>Settings</h2>\n{details}</body></html>\n"
    )


def _text(value: Any) -> str:
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
