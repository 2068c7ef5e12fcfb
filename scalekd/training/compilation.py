"""``--torchcompile``: compilation of student and objective, and its errors."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from scalekd.errors import EnvironmentFault, UsageError
from scalekd.text import did_you_mean, one_line


def compile_parts(module: nn.Module, backend: str) -> None:
    """Compile student and objective on their first call; their names stay as they are.

    The objective is projectors, the teacher's tail and the losses in one graph: the losses are
    bound by memory and gain most from being fused.

    Args:
        module: A `DistillationModule`.
        backend: A name from ``torch.compiler.list_backends``.

    Raises:
        UsageError: torch has no such backend.
    """
    check_backend(backend)
    for name in ("student", "objective"):
        module.get_submodule(name).compile(backend=backend)


def check_backend(backend: str) -> None:
    """Raise ``UsageError`` unless torch has this backend."""
    known = torch.compiler.list_backends(exclude_tags=None)
    if backend not in known:
        usual = ", ".join(["eager", "aot_eager", *torch.compiler.list_backends()])
        raise UsageError(
            f"--torchcompile {backend}: no such backend; there are {usual}"
            f"{did_you_mean(backend, known)}"
        )


@contextmanager
def compile_faults(backend: str | None) -> Iterator[None]:
    """Report a failed compilation, which happens in the first forward and backward, in one line.

    Raises:
        EnvironmentFault: Compilation failed.
    """
    try:
        yield
    except RuntimeError as error:
        if backend is None or not isinstance(error, torch._dynamo.exc.TorchDynamoException):
            raise
        message = str(error).strip().partition("\n\n")[0]  # hints on debugging torch follow
        reason = one_line(message, limit=300) or type(error).__name__
        raise EnvironmentFault(
            f"--torchcompile {backend}: {reason}; leave the option out, or try another "
            "backend such as aot_eager"
        ) from error
