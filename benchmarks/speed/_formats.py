"""Ways to keep float16 features and logits on disk, each as its library's documentation shows it.

A form is written by ``write`` from arrays in memory and read a batch at a time, in three orders:
``sequential``, ``shuffled`` (as well as the form can: whole permutations where reading is by index,
its own buffer where it streams) and ``random`` (views one by one; not where the form streams).
Every read ends in the same two arrays. Torch and the libraries are imported where they are used:
one of them needs an environment of its own.
"""

import io
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

Rows = np.ndarray[Any, Any]
Batch = tuple[Rows, Rows]
BATCH = 64
_CALIBRATION_VIEWS = 512


class Form(ABC):
    """One way to keep features and logits.

    Args:
        root: Its folder.
        num_views: How many it holds.
    """

    streams: ClassVar[bool] = False

    def __init__(self, root: Path, num_views: int) -> None:
        self.root, self.num_views = root, num_views

    def prepare(self, features: Rows) -> None:
        """Learn what is learnt once for a whole data set; not counted as writing."""
        del features

    @abstractmethod
    def write(self, features: Rows, logits: Rows) -> None:
        """Write everything."""

    @abstractmethod
    def open(self) -> None:
        """Do what must be done before the first view can be read."""

    @abstractmethod
    def batches(self, order: str) -> Iterator[Batch]:
        """Views in an order; after :meth:`open`."""

    def _indices(self, order: str) -> Rows:
        if order == "sequential":
            return np.arange(self.num_views)
        return np.random.default_rng(0).permutation(self.num_views)


class _ByIndex(Form):
    """Forms that read any view by its number."""

    @abstractmethod
    def view(self, index: int) -> Batch:
        """One view."""

    def batches(self, order: str) -> Iterator[Batch]:
        indices = self._indices(order).tolist()
        for first in range(0, len(indices), BATCH):
            views = [self.view(index) for index in indices[first : first + BATCH]]
            yield np.stack([f for f, _ in views]), np.stack([s for _, s in views])


class TorchFiles(_ByIndex):
    """One ``.pt`` a sample, as torchdistill's cache."""

    def write(self, features: Rows, logits: Rows) -> None:
        import torch

        for index in range(self.num_views):
            torch.save(
                {
                    "features": torch.from_numpy(features[index].copy()),
                    "logits": torch.from_numpy(logits[index].copy()),
                },
                self.root / f"{index}.pt",
            )

    def open(self) -> None:
        import torch

        self._load: Callable[..., Any] = torch.load

    def view(self, index: int) -> Batch:
        arrays = self._load(self.root / f"{index}.pt", weights_only=True)
        return arrays["features"].numpy(), arrays["logits"].numpy()


class NumpyFiles(_ByIndex):
    """One ``.npz`` a sample."""

    def write(self, features: Rows, logits: Rows) -> None:
        for index in range(self.num_views):
            np.savez(self.root / f"{index}.npz", features=features[index], logits=logits[index])

    def open(self) -> None:
        pass

    def view(self, index: int) -> Batch:
        with np.load(self.root / f"{index}.npz", allow_pickle=False) as found:
            return found["features"], found["logits"]


class ZarrDefault(_ByIndex):
    """Two Zarr arrays with the chunks and codecs that ``zarr.create_array`` chooses itself."""

    def write(self, features: Rows, logits: Rows) -> None:
        import zarr

        group = zarr.create_group(self.root)
        for name, rows in (("features", features), ("logits", logits)):
            array = group.create_array(name, shape=rows.shape, dtype=rows.dtype)
            array[:] = rows

    def open(self) -> None:
        import zarr

        group = zarr.open_group(self.root, mode="r")
        self._features: Any = group["features"]
        self._logits: Any = group["logits"]

    def view(self, index: int) -> Batch:
        return self._features[index], self._logits[index]

    def batches(self, order: str) -> Iterator[Batch]:
        if order != "sequential":
            yield from super().batches(order)
            return
        for first in range(0, self.num_views, BATCH):
            part = slice(first, min(first + BATCH, self.num_views))
            yield self._features[part], self._logits[part]


class WebDatasetMembers(Form):
    """Tar shards of 256 samples with one ``.npy`` member an array."""

    streams = True

    def write(self, features: Rows, logits: Rows) -> None:
        for shard, first in enumerate(range(0, self.num_views, 256)):
            with tarfile.open(self.root / f"{shard:06d}.tar", "w") as tar:
                for index in range(first, min(first + 256, self.num_views)):
                    for name, rows in (("features", features), ("logits", logits)):
                        content = io.BytesIO()
                        np.save(content, rows[index])
                        info = tarfile.TarInfo(f"{index:08d}.{name}.npy")
                        info.size = content.tell()
                        content.seek(0)
                        tar.addfile(info, content)

    def open(self) -> None:
        import webdataset

        self._dataset: Any = webdataset.WebDataset
        self._urls = sorted(map(str, self.root.glob("*.tar")))

    def batches(self, order: str) -> Iterator[Batch]:
        shuffled = order != "sequential"
        dataset = self._dataset(
            self._urls,
            shardshuffle=len(self._urls) if shuffled else False,
            seed=0,
            empty_check=False,
        )
        if shuffled:
            dataset = dataset.shuffle(1024)
        dataset = dataset.decode().to_tuple("features.npy", "logits.npy").batched(BATCH)
        for features, logits in dataset:
            yield np.asarray(features), np.asarray(logits)


class LitData(Form):
    """litdata's chunks, by ``optimize``'s own writer, read by ``StreamingDataset``."""

    def write(self, features: Rows, logits: Rows) -> None:
        from litdata.streaming.writer import BinaryWriter

        writer = BinaryWriter(str(self.root), chunk_bytes="64MB")
        for index in range(self.num_views):
            writer[index] = {"features": features[index], "logits": logits[index]}
        writer.done()
        writer.merge()

    def open(self) -> None:
        self._dataset = self._open(shuffle=False)
        len(self._dataset)

    def _open(self, *, shuffle: bool) -> Any:
        from litdata import StreamingDataset

        return StreamingDataset(str(self.root), shuffle=shuffle, seed=0)

    def batches(self, order: str) -> Iterator[Batch]:
        if order == "random":
            views = (self._dataset[index] for index in self._indices(order).tolist())
        else:
            views = iter(self._open(shuffle=order == "shuffled"))
        while batch := list(islice(views, BATCH)):
            yield np.stack([v["features"] for v in batch]), np.stack([v["logits"] for v in batch])


class MosaicStreaming(Form):
    """mosaicml-streaming's shards, read where they lie."""

    def write(self, features: Rows, logits: Rows) -> None:
        from streaming import MDSWriter

        columns = {
            "features": f"ndarray:float16:{','.join(map(str, features.shape[1:]))}",
            "logits": f"ndarray:float16:{logits.shape[1]}",
        }
        with MDSWriter(out=str(self.root), columns=columns) as writer:
            for index in range(self.num_views):
                writer.write({"features": features[index], "logits": logits[index]})

    def open(self) -> None:
        self._dataset = self._open(shuffle=False)

    def _open(self, *, shuffle: bool) -> Any:
        from streaming import StreamingDataset

        return StreamingDataset(
            local=str(self.root), shuffle=shuffle, shuffle_seed=0, batch_size=BATCH
        )

    def batches(self, order: str) -> Iterator[Batch]:
        if order == "random":
            views = (self._dataset[index] for index in self._indices(order).tolist())
        else:
            if order == "shuffled":
                self._dataset = self._open(shuffle=True)
            views = iter(self._dataset)
        while batch := list(islice(views, BATCH)):
            yield np.stack([v["features"] for v in batch]), np.stack([v["logits"] for v in batch])


class _Scalekd(Form):
    """This project's cache; reads end where the worker's work does, in stored types."""

    codec: ClassVar[str]

    def prepare(self, features: Rows) -> None:
        from scalekd.codecs import fit_codec
        from scalekd.shapes import FeatureShape

        tokens, channels = features.shape[1:]
        side = int(tokens**0.5)
        shape = FeatureShape((side, side), channels, tokens - side * side)
        self._codec = fit_codec(self.codec, shape, [features[:_CALIBRATION_VIEWS]])

    def write(self, features: Rows, logits: Rows) -> None:
        from benchmarks.speed import _inputs
        from scalekd.codecs import create_logit_codec

        _inputs.write_plain_cache(
            self.root,
            num_views=self.num_views,
            codec=self._codec,
            logits=create_logit_codec("full", logits.shape[1]),
            targets=lambda first, count: (
                features[first : first + count],
                logits[first : first + count],
            ),
        )

    def open(self) -> None:
        from scalekd.cache import open_cache

        self.reader: Any = open_cache(self.root)
        self._names = [
            array.name for array in self.reader.layout.views if array.name.startswith("stage4/")
        ]
        len(self.reader.samples)

    def batches(self, order: str) -> Iterator[Batch]:
        from scalekd.loading.blocks import BlockReader, gather
        from scalekd.loading.order import EpochOrder

        names = [*self._names, "logits/values"]
        if order == "random":
            # Measures the cost of a single view: no block is kept for later views.
            blocks = BlockReader(self.reader, names, kept_blocks=1)
            indices = self._indices(order)[: self.num_views // BATCH * BATCH]
            chosen: Any = indices.reshape(-1, BATCH)
        else:
            blocks = BlockReader(self.reader, names)
            extents = tuple(self.reader.blocks())
            chosen = EpochOrder(extents, BATCH, 0, shuffle=order == "shuffled").batches(0)
        for samples in chosen:
            located = [blocks.find(0, int(sample)) for sample in samples]
            planes = []
            for name in names:
                rows = located[0][0][name]
                planes.append(np.empty((len(located), *rows.shape[1:]), rows.dtype))
                gather(located, name, planes[-1])
            yield planes[0], planes[-1]


class ScalekdFloat16(_Scalekd):
    codec = "float16"


class ScalekdTransform(_Scalekd):
    codec = "transform:error=0.01"


FORMS: dict[str, type[Form]] = {
    "scalekd transform": ScalekdTransform,
    "scalekd float16": ScalekdFloat16,
    ".pt a sample": TorchFiles,
    ".npz a sample": NumpyFiles,
    "zarr, default layout": ZarrDefault,
    "webdataset, a member an array": WebDatasetMembers,
    "litdata": LitData,
    "mosaicml-streaming": MosaicStreaming,
}
