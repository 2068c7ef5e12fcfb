"""The versions that a mismatch message names."""

import json
import platform

import numpy
import PIL
import torchvision

from scalekd.views import pixel_environment


def test_versions_are_those_in_use() -> None:
    found = pixel_environment()
    assert found["pillow"] == PIL.__version__
    assert found["numpy"] == numpy.__version__
    assert torchvision.__version__.startswith(found["torchvision"])
    assert found["libjpeg"].startswith("libjpeg")
    assert any(character.isdigit() for character in found["libjpeg"])
    assert found["machine"] == platform.machine()
    assert all(isinstance(value, str) and value for value in found.values())
    assert json.loads(json.dumps(found)) == found
