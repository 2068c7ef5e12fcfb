"""Render the page of a cache: numbers and pictures are made here, markup is in a template."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from scalekd.pipelines._cache_answers import (
    Answers,
    ClassAnswers,
    likeliest,
    teacher_class_names,
)
from scalekd.pipelines._shown_views import ShownView, crop_box, steps_text
from scalekd.pipelines._token_maps import ColourBasis, heat, png, thumbnail, token_errors
from scalekd.pipelines.inspect_cache import CacheInfo
from scalekd.shapes import FeatureShape
from scalekd.teachers import TeacherSpec
from scalekd.text import MAX_CELL, counted, format_cache_size, printable

_TEMPLATES = Path(__file__).with_name("pages")
_THUMBNAIL = 220  # longest side of a whole image, in pixels
_LIKELIEST = 5
_BINS = 20
_MOST_CLASSES = 40  # rows of the table of classes: half of them the worst, half the best

Errors = Mapping[int, Mapping[int, float]]


@dataclass(frozen=True, kw_only=True)
class CachePage:
    """Content of the page.

    Attributes:
        info: Description of the cache.
        spec: Description of the teacher.
        shapes: Shape of the features by stage.
        class_names: Names of the classes of the data; ``None`` if they have none.
        data_fingerprint: Fingerprint of the image set.
        num_labelled: Number of samples with a label.
        pass_index: Pass whose views are shown.
        choice: How the views were chosen.
        views: The shown views.
        errors: Spatial coding errors by row and stage, of all views that the teacher ran on.
        answers: The teacher's answers; ``None`` for a cache without logits.
    """

    info: CacheInfo
    spec: TeacherSpec
    shapes: Mapping[int, FeatureShape]
    class_names: Sequence[str] | None
    data_fingerprint: str
    num_labelled: int
    pass_index: int
    choice: str
    views: Sequence[ShownView]
    errors: Errors
    answers: Answers | None


@dataclass(frozen=True)
class Figure:
    """A picture with its caption; ``address`` is a ``data:`` address."""

    caption: str
    address: Markup
    kind: str = "tokens"
    box: tuple[float, float, float, float] | None = None


@dataclass(frozen=True)
class Bar:
    """A bar of a histogram: its range, its count, and its height relative to the largest."""

    label: str
    count: int
    share: float


def render_page(page: CachePage) -> str:
    """Return the HTML of the page. Every text is escaped and shows invisible characters."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_finalised,
    )
    environment.filters["percent"] = _percent
    names = teacher_class_names(page.spec)
    return environment.get_template("cache.html").render(
        title=f"Cache of {page.info.teacher}",
        facts=_facts(page),
        views=_view_blocks(page, names),
        choice=page.choice,
        pass_index=page.pass_index,
        has_teacher=any(view.live for view in page.views),
        histograms=_histograms(page),
        answers=page.answers,
        classes=_class_rows(page.answers, page.class_names) if page.answers else [],
        num_classes=len(page.answers.classes) if page.answers else 0,
    )


def _finalised(value: Any) -> Any:
    """Make text printable before it is escaped; numbers and ``data:`` addresses stay."""
    if isinstance(value, Markup | int | float):
        return value
    return printable(value, limit=MAX_CELL)


def _percent(value: float) -> str:
    return f"{100 * value:.3g} %"


def _facts(page: CachePage) -> list[tuple[str, str]]:
    """Describe the cache in about ten lines."""
    info, spec = page.info, page.spec
    labels = f"{page.num_labelled:,} with a label"
    if page.class_names:
        labels += f", {len(page.class_names):,} classes"
    facts = [
        ("teacher", f"{info.teacher}, {spec.img_size[0]} x {spec.img_size[1]} px"),
        ("data", f"{info.num_samples:,} samples, {labels}, {info.num_skipped:,} left out"),
        ("fingerprint", page.data_fingerprint[:16]),
        ("views", f"{counted(info.num_passes, 'pass')} of {info.views}"),
    ]
    for stage, stored in info.stages.items():
        grid = " x ".join(map(str, stored["grid"]))
        text = f"{grid} tokens of {stored['num_channels']:,} channels, {stored['codec']}"
        if stored["errors"]:
            spatial = stored["errors"]["spatial"]
            text += f", error {_percent(spatial['mean'])} (p95 {_percent(spatial['p95'])})"
        facts.append((f"stage {stage}", text))
    logits = "none"
    if info.logits:
        kept = info.logits.get("num_kept")
        logits = f"the {kept} likeliest of " if kept else "all "
        logits += f"{info.logits['num_classes']:,} classes"
    facts += [
        ("logits", logits),
        ("size", format_cache_size(info.total_bytes, info.fixed_bytes, info.bytes_per_view)),
        ("licence", info.licence or "not stated"),
        ("identifier", info.cache_id[:16]),
    ]
    if info.note:
        facts.append(("note", info.note))
    return facts


def _view_blocks(page: CachePage, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the parts of each shown view."""
    bases = {
        stage: ColourBasis.fit([view.features[stage] for view in page.views])
        for stage in page.shapes
        if all(stage in view.features for view in page.views)
    }
    errors = {
        stage: [
            token_errors(view.features[stage], view.live[stage]) if stage in view.live else None
            for view in page.views
        ]
        for stage in bases
    }
    largest = {
        stage: max((float(each.max()) for each in maps if each is not None), default=0.0)
        for stage, maps in errors.items()
    }
    blocks = []
    for number, view in enumerate(page.views):
        figures = _pictures(view)
        for stage, basis in bases.items():
            grid, error = page.shapes[stage].grid, errors[stage][number]
            stored = png(basis.colours(view.features[stage], grid))
            figures.append(Figure(f"stage {stage}, stored", Markup(stored)))
            if error is None:
                continue
            live = png(basis.colours(view.live[stage], grid))
            figures.append(Figure(f"stage {stage}, teacher", Markup(live)))
            caption = f"error a token, 0 to {_percent(largest[stage])}"
            picture = png(heat(error, largest[stage], grid))
            figures.append(Figure(caption, Markup(picture)))
        blocks.append(
            {
                "key": view.key,
                "label": _label(view.label, page.class_names),
                "steps": steps_text(view.params),
                "note": view.note,
                "errors": page.errors.get(view.row) or {},
                "figures": figures,
                "answers": _answers(page, view, names),
            }
        )
    return blocks


def _answers(page: CachePage, view: ShownView, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return the likeliest classes of a view, and which of them is the label."""
    if view.logits is None:
        return []
    right = page.answers.class_of(view.label) if page.answers else None
    return [
        {
            "name": names[number] if number < len(names) else f"class {number}",
            "share": share,
            "is_label": number == right,
        }
        for number, share in likeliest(view.logits, _LIKELIEST)
    ]


def _pictures(view: ShownView) -> list[Figure]:
    """Return the view as the teacher saw it, and the whole image with the crop marked."""
    figures = []
    if view.pixels is not None:
        figures.append(Figure("view", Markup(png(view.pixels)), "view"))
    if view.image is not None:
        picture = Markup(thumbnail(view.image, _THUMBNAIL))
        figures.append(Figure("whole image and crop", picture, "whole", crop_box(view)))
    return figures


def _label(label: int, class_names: Sequence[str] | None) -> str:
    if label < 0:
        return "no label"
    # A teacher of more classes may answer one that the data does not name.
    names = class_names or ()
    return names[label] if label < len(names) else f"class {label}"


def _histograms(page: CachePage) -> list[dict[str, Any]]:
    """Return a histogram of confidence, and one of the coding error for each stage."""
    histograms = []
    if page.answers is not None:
        bars = _bars(page.answers.confidence, 1.0)
        histograms.append(
            {
                "title": "Confidence of the teacher",
                "about": f"probability of the likeliest class, {page.answers.num_views:,} views",
                "bars": bars,
                "largest": 1.0,
            }
        )
    for stage in page.shapes:
        errors = np.array([each[stage] for each in page.errors.values() if stage in each])
        if len(errors):
            largest = float(errors.max()) or 1.0
            mean = _percent(float(errors.mean()))
            histograms.append(
                {
                    "title": f"Coding error, stage {stage}",
                    "about": f"spatial error of each view, mean {mean}, {len(errors):,} views",
                    "bars": _bars(errors, largest),
                    "largest": largest,
                }
            )
    return histograms


def _bars(values: np.ndarray[Any, Any], largest: float) -> list[Bar]:
    """Return the bars of values between 0 and ``largest``."""
    counts, edges = np.histogram(np.clip(values, 0, largest), bins=_BINS, range=(0, largest))
    most = max(1, int(counts.max()))
    return [
        Bar(f"{_percent(start)} to {_percent(end)}", int(count), float(count) / most)
        for count, start, end in zip(counts, edges[:-1], edges[1:], strict=True)
    ]


def _class_rows(answers: Answers, class_names: Sequence[str] | None) -> list[dict[str, Any] | None]:
    """Return the rows of the table of classes; ``None`` marks classes that are left out."""

    def row(each: ClassAnswers) -> dict[str, Any]:
        mistaken = each.mistaken_for
        return {
            "name": _label(each.label, class_names),
            "num_views": each.num_views,
            "accuracy": each.accuracy,
            "mistaken_for": "" if mistaken < 0 else _label(mistaken, class_names),
        }

    classes = answers.classes
    if len(classes) <= _MOST_CLASSES:
        return [row(each) for each in classes]
    half = _MOST_CLASSES // 2
    return [*map(row, classes[:half]), None, *map(row, classes[-half:])]
