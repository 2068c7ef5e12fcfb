"""What varies in a cache's features: classes, views of one class, or places within a view.

    python -m benchmarks.accuracy.variance --cache output/accuracy/caches/70px-500x48/both-stages

Tokens are scaled to unit length, as the losses see them; pass 0. Writes
``benchmarks/results/target_variance.json``. Features that vary between classes and little else
say what logits say.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from scalekd.cache import CacheReader, open_cache

_RESULTS = Path(__file__).parents[1] / "results" / "target_variance.json"


def shares(reader: CacheReader, stage: int) -> dict[str, float]:
    """Parts of the tokens' variance about their mean; they sum to one."""
    name = f"stage{stage}/values"
    blocks = [reader.read_rows(0, first, count, [name])[name] for first, count in reader.blocks()]
    prefix = reader.codecs.stages[stage].shape.num_prefix_tokens
    tokens = np.concatenate(blocks)[:, prefix:].astype(np.float64)
    tokens /= np.linalg.norm(tokens, axis=-1, keepdims=True)
    tokens -= tokens.mean(axis=(0, 1))
    labels = reader.samples.labels
    total = np.square(tokens).sum(axis=-1).mean()
    views = tokens.mean(axis=1)
    between_views = np.square(views).sum(axis=-1).mean()
    between_classes = sum(
        (labels == label).mean() * np.square(views[labels == label].mean(axis=0)).sum()
        for label in np.unique(labels)
    )
    return {
        "between classes": float(between_classes / total),
        "between views of a class": float((between_views - between_classes) / total),
        "within a view": float(1 - between_views / total),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", type=Path, required=True, help="a float16 cache, both stages")
    reader = open_cache(parser.parse_args().cache)
    shares_by_stage = {
        f"stage {stage}": shares(reader, stage) for stage in sorted(reader.codecs.stages)
    }
    teacher = reader.identity.teacher
    result = {
        "teacher": teacher["model"],
        "img_size": teacher["img_size"],
        "shares": shares_by_stage,
    }
    _RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
