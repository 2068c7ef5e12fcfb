"""Pictures of runs, made from the CSV files that every run keeps."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from scalekd.errors import DataError

_SUMMARY = "summary.csv"


def runs_svg(runs: Mapping[str, Sequence[Path]]) -> str:
    """Training loss and validation accuracy of groups of runs, as an SVG element for a page.

    The same runs give the same text.

    Args:
        runs: Folders of the runs of each group, such as the seeds of one objective. A line is a
            group's mean, a band its smallest and largest value.

    Raises:
        DataError: A folder has no summary.
    """
    text = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "scalekd", "svg.fonttype": "none"}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(10, 4.2), sharex=True, layout="constrained"
        )
        for number, (name, folders) in enumerate(runs.items()):
            _band(left, name, folders, "train_task_loss", f"C{number}")
            _band(right, name, folders, "eval_top1", f"C{number}")
        left.set(xlabel="epoch", ylabel="label loss, as weighted", yscale="log")
        right.set(xlabel="epoch", ylabel="validation top-1, %")
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
        figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _band(axes: Axes, name: str, folders: Sequence[Path], column: str, colour: str) -> None:
    curves = [_curve(folder / _SUMMARY, column) for folder in folders]
    shared = min(len(epochs) for epochs, _ in curves)  # of seeds, one may still be running
    epochs = curves[0][0][:shared]
    values = np.array([curve[:shared] for _, curve in curves])
    axes.plot(epochs, values.mean(axis=0), color=colour, marker="o", markersize=3, label=name)
    axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15)


def _curve(path: Path, column: str) -> tuple[list[int], list[float]]:
    if not path.is_file():
        raise DataError(f"{path} is missing; is that the folder of a run?")
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get(column)]
    return [int(row["epoch"]) + 1 for row in rows], [float(row[column]) for row in rows]
