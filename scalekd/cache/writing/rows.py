"""What is stored of samples and views beside the teacher's targets, row by row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Rows = np.ndarray[Any, Any]


@dataclass(frozen=True)
class SampleRows:
    """What is stored of a shard's samples, row by row."""

    keys: tuple[str, ...]
    labels: Rows
    source_hashes: Rows

    def columns(self, max_key_bytes: int) -> dict[str, Rows]:
        keys = np.zeros((len(self.keys), max_key_bytes), np.uint8)
        for row, key in enumerate(self.keys):
            encoded = key.encode()
            keys[row, : len(encoded)] = np.frombuffer(encoded, np.uint8)
        return {
            "key": keys,
            "label": self.labels.astype(np.int32),
            "source_hash": self.source_hashes.astype(np.uint64),
        }


@dataclass(frozen=True)
class ViewRows:
    """What is stored of a block's views beside the teacher's targets, row by row.

    Attributes:
        samples: Samples of the views.
        columns: By array: how each view was drawn, and the hash of its pixels.
        images: Encoded, for a cache whose tars hold images.
    """

    samples: SampleRows
    columns: dict[str, Rows]
    images: tuple[bytes, ...] | None = None

    @staticmethod
    def joined(blocks: Sequence["ViewRows"]) -> "ViewRows":
        """The rows of several blocks, without their images."""
        samples = [block.samples for block in blocks]
        empty = SampleRows((), np.empty(0, np.int32), np.empty(0, np.uint64))
        return ViewRows(
            SampleRows(
                tuple(key for found in samples for key in found.keys),
                np.concatenate([empty.labels, *(found.labels for found in samples)]),
                np.concatenate([empty.source_hashes, *(found.source_hashes for found in samples)]),
            ),
            {
                name: np.concatenate([block.columns[name] for block in blocks])
                for name in (blocks[0].columns if blocks else ())
            },
        )
