"""Pictures of runs, made from the CSV files that every run keeps."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

from scalekd.errors import DataError

_SUMMARY = "summary.csv"


def plot_runs(runs: Mapping[str, Sequence[Path]], path: Path, *, title: str) -> Path:
    """Plot training loss and validation accuracy of groups of runs.

    Args:
        runs: Folders of the runs of each group, such as the seeds of one objective. A line is a
            group's mean, a band its smallest and largest value.
        path: PNG to write.
        title: Above the picture.

    Raises:
        DataError: A folder has no summary.
    """
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for name, folders in runs.items():
        _band(left, name, folders, "train_task_loss")
        _band(right, name, folders, "eval_top1")
    left.set(xlabel="epoch", ylabel="label loss, as weighted", yscale="log")
    right.set(xlabel="epoch", ylabel="validation top-1, %")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    return path


def _band(axes: Axes, name: str, folders: Sequence[Path], column: str) -> None:
    curves = [_curve(folder / _SUMMARY, column) for folder in folders]
    epochs = curves[0][0]
    values = np.array([curve for _, curve in curves])
    (line,) = axes.plot(epochs, values.mean(axis=0), label=name)
    axes.fill_between(
        epochs, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.15
    )


def _curve(path: Path, column: str) -> tuple[list[int], list[float]]:
    if not path.is_file():
        raise DataError(f"{path} is missing; is that the folder of a run?")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(column)]
    return [int(row["epoch"]) + 1 for row in rows], [float(row[column]) for row in rows]
