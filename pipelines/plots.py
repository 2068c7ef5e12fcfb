"""Plot losses and scores of runs as SVG."""

import io
import warnings
from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

Epochs = Sequence[Mapping[str, float]]
"""Rows of a run's ``summary.csv``, one per epoch."""

_LOSSES = {"train_task_loss": "label loss, as weighted", "train_loss": "training loss"}
_SCORES = {
    "eval_top1": "validation top-1, %",
    "eval_knn_top1": "top-1 of nearest neighbours, %",
}
_FEATURE_LOSS = {"eval_feature_loss": "validation feature loss"}


def runs_svg(runs: Mapping[str, Sequence[Epochs]]) -> str:
    """Plot training loss and validation score of groups of runs.

    The score of a group is top-1; for runs without a classifier, the top-1 of nearest neighbours.
    If no group has a top-1, the validation feature loss is plotted. A line is the mean of a group,
    a band its smallest and largest value.

    Args:
        runs: Epochs of the runs of each group, by the name of the group; the runs may differ in
            their seed, for example.

    Returns:
        An ``<svg>`` element for an HTML page; the same runs give the same text.
    """
    text = io.StringIO()
    with plt.rc_context({"svg.hashsalt": "scalekd", "svg.fonttype": "none"}):
        figure, (left, right) = plt.subplots(
            1, 2, figsize=(10, 4.2), sharex=True, layout="constrained"
        )
        losses = [_first(group, _LOSSES) for group in runs.values()]
        scores = [_first(group, _SCORES) for group in runs.values()]
        if not any(scores):
            scores = [_first(group, _FEATURE_LOSS) for group in runs.values()]
        for number, group in enumerate(runs.values()):
            _band(left, group, losses[number] or "train_loss", f"C{number}")
            _band(right, group, scores[number] or "eval_top1", f"C{number}")
        left.set(xlabel="epoch", ylabel=_label(losses, _LOSSES))
        if any((line.get_ydata() > 0).any() for line in left.get_lines()):
            left.set(yscale="log")
        right.set(xlabel="epoch", ylabel=_label(scores, {**_SCORES, **_FEATURE_LOSS}))
        for axes in (left, right):
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.3)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        handles, _ = left.get_legend_handles_labels()
        # Names are shown as they are: `$` starts no formula, and a leading `_` hides no entry.
        legend = figure.legend(
            handles, list(runs), loc="outside lower center", ncols=2, frameon=False
        )
        for label in legend.get_texts():
            label.set_parse_math(False)
        with warnings.catch_warnings():  # the font lacks a letter, or a loss is zero
            warnings.simplefilter("ignore", UserWarning)
            figure.savefig(text, format="svg", metadata={"Date": None})
        plt.close(figure)
    return text.getvalue()[text.getvalue().index("<svg") :]


def _first(group: Sequence[Epochs], columns: Mapping[str, str]) -> str | None:
    """Return the first column that every run of a group has."""
    present = [{name for row in epochs for name in row} for epochs in group]
    return next((name for name in columns if all(name in names for names in present)), None)


def _label(chosen: Sequence[str | None], labels: Mapping[str, str]) -> str:
    shown = [label for name, label in labels.items() if name in chosen]
    return " / ".join(shown or [next(iter(labels.values()))])


def _band(axes: Axes, group: Sequence[Epochs], column: str, colour: str) -> None:
    curves = [[row for row in epochs if column in row] for epochs in group]
    shared = min(map(len, curves))  # a run of the group may still be in progress
    epochs = [row["epoch"] + 1 for row in curves[0][:shared]]
    values = np.array([[row[column] for row in curve[:shared]] for curve in curves])
    axes.plot(epochs, values.mean(axis=0), color=colour, marker="o", markersize=3, label=colour)
    axes.fill_between(epochs, values.min(axis=0), values.max(axis=0), color=colour, alpha=0.15)
