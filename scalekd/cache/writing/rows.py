"""The values that a cache stores for samples and views, besides the teacher's targets."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scalekd.shapes import Rows


@dataclass(frozen=True)
class SampleRows:
    """The stored values of samples.

    Attributes:
        keys: Keys of the samples.
        labels: Class numbers, or -1.
        source_hashes: xxh3-64 of the encoded images.
    """

    keys: tuple[str, ...]
    labels: Rows
    source_hashes: Rows

    def columns(self, max_key_bytes: int) -> dict[str, Rows]:
        """Return the rows of the sample arrays by name; keys are zero-padded."""
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
    """The stored values of views, besides the teacher's targets.

    Attributes:
        samples: Samples of the views.
        columns: View parameters and pixel hashes, by name of the array.
        images: Encoded images, if the cache embeds them.
    """

    samples: SampleRows
    columns: dict[str, Rows]
    images: tuple[bytes, ...] | None = None

    @staticmethod
    def joined(blocks: Sequence["ViewRows"]) -> "ViewRows":
        """Return the rows of several blocks, without their images."""
        if not blocks:  # every image of the shard was skipped
            return ViewRows(SampleRows((), np.empty(0, np.int32), np.empty(0, np.uint64)), {})
        samples = [block.samples for block in blocks]
        return ViewRows(
            SampleRows(
                tuple(key for rows in samples for key in rows.keys),
                np.concatenate([rows.labels for rows in samples]),
                np.concatenate([rows.source_hashes for rows in samples]),
            ),
            {
                name: np.concatenate([block.columns[name] for block in blocks])
                for name in blocks[0].columns
            },
        )
