"""The sound cache as tars."""

from pathlib import Path

import pytest

from scalekd.pipelines.convert_cache import ConvertConfig, convert_cache


@pytest.fixture(scope="session")
def sound_tars(
    sound_cache: Path, tiny_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The sound cache as tars with the encoded images. Read only."""
    root = tmp_path_factory.mktemp("tars") / "cache"
    convert_cache(
        ConvertConfig(
            source=str(sound_cache),
            output=str(root),
            format="webdataset",
            embed="source",
            data_dir=str(tiny_images),
            workers=0,
        )
    )
    return root
