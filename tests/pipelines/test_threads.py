"""The number of threads that a machine computes with decides no byte of a cache."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from threadpoolctl import threadpool_info, threadpool_limits

from scalekd.pipelines import _write_shards
from scalekd.teachers import TeacherConfig
from scalekd.threads import one_blas_thread, one_thread

# Wide enough that BLAS divides its products among threads, which it leaves alone in small ones.
_WIDE = TeacherConfig(
    model="vit_tiny_patch16_224",
    pretrained=False,
    img_size=64,
    model_kwargs={"num_classes": 10, "depth": 3},
)


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    with threadpool_limits(count):
        torch.set_num_threads(count)
        yield
    torch.set_num_threads(before)


def _blas_threads() -> set[int]:
    return {
        library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"
    }


def test_calibrating_and_coding_give_the_same_bytes_with_any_number_of_threads(
    tmp_path: Path,
    make_cache: Callable[..., Any],
    file_contents: Callable[[Path], dict[str, bytes]],
) -> None:
    for count in (1, 2):
        with _threads(count):
            make_cache(
                tmp_path / str(count),
                teacher=_WIDE,
                codec="transform",
                stages=(4,),
                limit=40,
                passes=1,
            )
            assert torch.get_num_threads() == count
            assert _blas_threads() == {count}
    assert file_contents(tmp_path / "2") == file_contents(tmp_path / "1")


def test_the_number_of_threads_is_restored_even_after_an_error() -> None:
    @one_thread()
    def failing() -> None:
        assert (torch.get_num_threads(), _blas_threads()) == (1, {1})
        raise ZeroDivisionError

    with _threads(3):
        with pytest.raises(ZeroDivisionError):
            failing()
        assert (torch.get_num_threads(), _blas_threads()) == (3, {3})


def test_coding_does_not_change_torchs_threads() -> None:
    with _threads(3), one_blas_thread():
        assert (torch.get_num_threads(), _blas_threads()) == (3, {1})


def test_blas_has_one_thread_while_shards_are_written(
    tmp_path: Path, make_cache: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()
    run = _write_shards.run_teacher

    def noting(*arguments: Any) -> Any:
        seen.update(_blas_threads())
        return run(*arguments)

    monkeypatch.setattr(_write_shards, "run_teacher", noting)
    with _threads(3):
        make_cache(tmp_path / "cache", passes=1)
    assert seen == {1}
