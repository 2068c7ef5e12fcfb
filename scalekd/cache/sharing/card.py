"""The dataset card of a cache on the Hugging Face Hub, and the Hub's limits on files.

The Hub accepts at most 10,000 files in a folder and recommends fewer than 100,000 in a repository
(https://huggingface.co/docs/hub/storage-limits, read in November 2026). Files of a cache are far
smaller than its limit on the size of a file.
"""

import shlex
from collections import Counter
from collections.abc import Iterable

from huggingface_hub import DatasetCardData

from scalekd.cache.documents.manifest import Manifest, Plan
from scalekd.errors import UsageError
from scalekd.text import MAX_CELL, markdown, markdown_code, markdown_fence, one_line, printable

MAX_FILES_PER_FOLDER = 10_000
MAX_FILES = 100_000
# Those of https://huggingface.co/docs/hub/repositories-licenses that model weights commonly have.
_KNOWN_LICENCES = frozenset(
    {
        *("afl-3.0", "agpl-3.0", "apache-2.0", "bsd-2-clause", "bsd-3-clause", "gpl-3.0"),
        *("cc-by-4.0", "cc-by-nc-4.0", "cc-by-nc-nd-4.0", "cc-by-nc-sa-4.0", "cc-by-sa-4.0"),
        *("cc0-1.0", "lgpl-3.0", "mit", "mpl-2.0", "openrail", "unlicense"),
    }
)


def check_hub_limits(paths: Iterable[str], location: str) -> None:
    """Raise ``UsageError`` if a repository would contain more files than the Hub accepts.

    Args:
        paths: Paths of all files of the repository.
        location: Location of the repository, for the message.
    """
    folders = Counter(path.rpartition("/")[0] for path in paths)
    folder, most = max(folders.items(), key=lambda item: item[1], default=("", 0))
    for count, limit, what in (
        (most, MAX_FILES_PER_FOLDER, f"files in {folder}/"),
        (sum(folders.values()), MAX_FILES, "files in all"),
    ):
        if count > limit:
            raise UsageError(
                f"{location}: the cache has {count:,} {what}, and the Hub accepts {limit:,};"
                " send only some passes or shards, or convert it to the webdataset form (`scalekd"
                " cache convert`), which has two files per shard"
            )


def dataset_card(plan: Plan, manifest: Manifest | None, location: str) -> str:
    """Return the README.md of a repository: description, licence and use of the cache.

    Args:
        plan: Plan of the cache.
        manifest: Manifest of the cache; ``None`` if it is not complete.
        location: URL of the repository.
    """
    identity, provenance = plan.identity, plan.provenance
    teacher, licence = str(identity.teacher["model"]), one_line(provenance.licence or "")
    known = licence.lower() in _KNOWN_LICENCES
    metadata = DatasetCardData(
        license=licence.lower() if known else "other",
        license_name=None if known else one_line(licence, limit=MAX_CELL) or "not-stated",
        pretty_name=f"scalekd cache of {one_line(teacher, limit=MAX_CELL)}",
        task_categories=["image-classification"],
        tags=["knowledge-distillation", "scalekd", "soft-labels"],
    )
    views, data = identity.views, identity.data
    height, width = views.view_size
    rows = [
        (
            "teacher",
            f"{markdown_code(teacher, limit=MAX_CELL)}, weights SHA-256"
            f" {markdown_code(identity.teacher['weights_sha256'])}",
        ),
        ("licence of the teacher's weights", markdown(licence) or "not stated"),
        ("note", markdown(provenance.note or "none")),
        (
            "images",
            f"{data.num_samples:,}, fingerprint {markdown_code(data.fingerprint)}; not included",
        ),
        (
            "views",
            f"{markdown(views.policy['policy'])}, {height} x {width} px, seed {views.seed}",
        ),
        ("passes", f"{manifest.num_passes}" if manifest else "not complete yet"),
        *(
            (f"stage {stage}", _stage(plan, stage, str(identity.request.get("codec"))))
            for stage in identity.stages
        ),
        ("logits", markdown(identity.request.get("logits")) if identity.logits else "none"),
        ("size", f"{manifest.total_bytes:,} bytes" if manifest else "not complete yet"),
        ("cache", f"{markdown_code(plan.cache_id)}, format {identity.format_version}"),
    ]
    source = shlex.quote(printable(location))
    fence = markdown_fence(source)
    lines = [
        "---",
        metadata.to_yaml(),
        "---",
        "",
        f"# Features and logits of {markdown(teacher, limit=MAX_CELL)}"
        f" for {data.num_samples:,} images",
        "",
        "One record of the teacher's outputs for every augmented view, to train students with"
        " [ScaleKD](https://arxiv.org/abs/2411.06786) or logit distillation. Made with `scalekd`;"
        " reading it executes and unpickles nothing.",
        "",
        "| | |",
        "| --- | --- |",
        *(f"| {name} | {value} |" for name, value in rows),
        "",
        f"{fence}sh",
        f"scalekd cache pull {source} ./cache                # or --passes 0-3, --logits-only, …",
        "scalekd cache verify ./cache",
        "scalekd train-student --cache ./cache --data-dir IMAGES --model resnet50 --output ./run",
        fence,
        "",
    ]
    return "\n".join(lines)


def _stage(plan: Plan, stage: str, codec: str) -> str:
    info = plan.identity.stages[stage]  # type: ignore[index]  # a key of this dictionary
    error = plan.provenance.measured.get(stage, {}).get("spatial", {}).get("mean")
    grid = " x ".join(map(str, info.grid))
    text = f"{grid} tokens, {info.num_channels} channels, {markdown_code(codec, limit=MAX_CELL)}"
    return text + (f", mean relative squared error {error:.3%}" if error is not None else "")
