"""Chunks of zeros are written as files too."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from scalekd.cache.documents.manifest import Identity
from scalekd.cache.forms.store import CommittingStore, metadata_documents, open_array, write_rows
from scalekd.cache.layout import ArraySpec


class _Sizes:
    """As much of an identity as an array's shape needs."""

    class data:
        num_samples = 8

    shard_size = block_size = 4


@pytest.mark.parametrize("value", [0, 3])
def test_a_chunk_of_equal_values_is_written_as_a_file(tmp_path: Path, value: int) -> None:
    identity: Identity = _Sizes()  # type: ignore[assignment]
    array = ArraySpec("label", np.dtype(np.int32))
    for path, content in metadata_documents(identity, "samples", (array,)).items():
        target = tmp_path / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    store = CommittingStore(tmp_path)
    opened = open_array(store, identity, "samples", array)
    write_rows(opened, array, 4, np.full(4, value, np.int32), span=4)
    assert set(store.written) == {"samples/label/c/1"}
    assert zarr.open_array(tmp_path, path="samples/label", mode="r")[4:].tolist() == [value] * 4
