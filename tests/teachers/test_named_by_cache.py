"""A cache's word for its teacher reaches nothing but timm's own models."""

import pytest

from scalekd.errors import UsageError
from scalekd.teachers import teacher_named_by_cache


def test_models_of_timm_pass() -> None:
    for name in ("test_vit", "vit_base_patch16_224.augreg_in21k", "swin_tiny_patch4_window7_224"):
        assert teacher_named_by_cache(name, option="--teacher") == name


@pytest.mark.parametrize(
    "name",
    [
        "hf-hub:stranger/model",
        "hf_hub:stranger/model",
        "local-dir:/home/someone/model",
        "/home/someone/model",
        "../model",
        "~/model",
        "test_vit/../../model",
        "test_vit.tag/../x",
        "test_vit\n",
        "no_such_model",
        "",
        ".",
    ],
)
def test_anything_else_needs_the_users_word(name: str) -> None:
    with pytest.raises(UsageError, match="name it with --teacher"):
        teacher_named_by_cache(name, option="--teacher")
