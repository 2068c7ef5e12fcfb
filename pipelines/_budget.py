"""Choose the number of passes and the error of the codec from a budget of bytes or hours.

More passes give the student more views of every image; a smaller error gives it more exact
features. `docs/benchmarks.md` (*Many coarse passes, or few fine ones*) measures both.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

from pydantic import BaseModel, ByteSize, TypeAdapter, ValidationError

from scalekd.cache.documents.manifest import Request
from scalekd.cache.writing.planning import read_plan
from scalekd.codecs import parse_codec
from scalekd.errors import UsageError
from scalekd.pipelines._cache_config import CacheTeacherConfig
from scalekd.pipelines._job import Job
from scalekd.pipelines._processes import Processes
from scalekd.pipelines.estimate import CacheEstimate, estimate_cache, estimate_job
from scalekd.teachers import Teacher
from scalekd.text import counted, format_bytes, format_duration

ERRORS = (0.01, 0.02, 0.05, 0.1)
"""Errors of the transform codec among which bytes are divided; finer ones gained nothing."""

MAX_PASSES = 300  # the epochs of the paper: each sees another view of every image

# Points of top-1 that are lost against unlimited passes and exact features, read from the tables
# of passes and of codecs (docs/benchmarks.md; 500 labelled images, ScaleKD-light): 8.7, 5.9, 2.7
# and 1.1 with 1, 2, 4 and 8 passes, and at most 0.5 with an error of 10 %.
_POINTS_OF_ONE_PASS = 9.0
_POINTS_OF_ERROR_ONE = 5.0

_HOURS = {"min": 1 / 60, "h": 1.0, "d": 24.0}
_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(min|h|d)\s*")
_SIZE = TypeAdapter(ByteSize)


@dataclass(frozen=True)
class Budget:
    """Limits on the cost of a cache: bytes on disk, hours of writing, or both."""

    num_bytes: int | None = None
    hours: float | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read ``200GB``, ``1.5TiB``, ``90min``, ``40h`` or ``3d``, or a size and a time by comma.

        Raises:
            UsageError: ``text`` has another form, or a size or time of zero.
        """
        sizes: list[int] = []
        times: list[float] = []
        for part in text.split(","):
            if match := _TIME.fullmatch(part):
                times.append(float(match[1]) * _HOURS[match[2]])
                continue
            try:
                sizes.append(int(_SIZE.validate_python(part.strip())))
            except ValidationError:
                sizes.append(0)
        if len(sizes) > 1 or len(times) > 1 or not all([*sizes, *times]):
            raise UsageError(
                f"--budget {text}: give bytes on disk, such as 200GB or 1.5TiB, the time that"
                " writing may take, such as 90min, 40h or 3d, or both, as 200GB,40h"
            )
        return cls(next(iter(sizes), None), next(iter(times), None))


@dataclass(frozen=True)
class Price:
    """Cost of one pass with a codec, and of the calibration before the first pass.

    Attributes:
        codec: Value of ``--codec``.
        error: Relative squared error of the codec; 0 if the codec does not let one choose it, or if
            no features are kept.
        pass_bytes: Bytes of one pass.
        pass_hours: Hours of one pass.
        start_hours: Hours of calibration.
        start_bytes: Bytes beside the passes: those of the teacher's tail.
    """

    codec: str
    error: float
    pass_bytes: float
    pass_hours: float
    start_hours: float
    start_bytes: float = 0.0

    @classmethod
    def of(cls, codec: str, error: float, estimate: CacheEstimate, start_bytes: float) -> Self:
        """Divide an estimate into the cost of a pass and the cost of calibration."""
        passes = estimate.num_passes
        return cls(
            codec=codec,
            error=error,
            pass_bytes=estimate.total_bytes / passes,
            pass_hours=(estimate.hours - estimate.calibration_hours) / passes,
            start_hours=estimate.calibration_hours,
            start_bytes=start_bytes,
        )


class Spending(BaseModel):
    """One way to spend a budget.

    ``expected_loss`` is in points of top-1, relative to unlimited passes and exact features. It is
    derived from one benchmark; use it only to compare ways to spend a budget.
    """

    codec: str
    passes: int
    total_bytes: float
    hours: float
    expected_loss: float

    def line(self) -> str:
        """Describe the spending in one line."""
        return (
            f"{counted(self.passes, 'pass')} with {self.codec}: {format_bytes(self.total_bytes)},"
            f" about {format_duration(3600 * self.hours)}, expected loss"
            f" {self.expected_loss:.2f} points"
        )


def frontier(
    budget: Budget, prices: Sequence[Price], *, passes: int | None = None
) -> list[Spending]:
    """List what the budget buys with each codec: the most passes, or the given number of them.

    Args:
        budget: What may be spent.
        prices: Costs, one for each codec to choose from.
        passes: Number of passes; chosen if ``None``.

    Raises:
        UsageError: The budget does not pay for one pass, or for ``passes``.
    """
    ways = []
    for price in prices:
        count = _affordable(budget, price, passes)
        if count >= (passes or 1):
            ways.append(_spending(price, count))
    if not ways:
        least = _spending(min(prices, key=lambda price: price.pass_bytes), passes or 1)
        raise UsageError(
            f"--budget: even the smallest cache costs more ({least.line()}); give a larger budget,"
            " or --limit for fewer images"
        )
    return ways


def best(ways: Sequence[Spending]) -> Spending:
    """Return the spending with the smallest expected loss."""
    return min(ways, key=lambda way: (way.expected_loss, way.total_bytes))


class Choice(BaseModel):
    """Number of passes and codec that a budget is spent on.

    ``ways`` contains one spending for each codec that the budget pays for; it is empty if an
    earlier run of the same command chose.
    """

    budget: str
    codec: str
    passes: int
    ways: list[Spending] = []

    def lines(self) -> list[str]:
        """Return the lines to print: the choice, and the possible spendings."""
        first = f"--budget {self.budget}: {counted(self.passes, 'pass')} with --codec {self.codec}"
        if not self.ways:
            return [f"{first}, as the cache was begun"]
        return [
            f"{first}, where the expected loss is smallest:",
            *(f"  {way.line()}" for way in self.ways),
        ]


def choose(job: Job, config: CacheTeacherConfig) -> Choice:
    """Choose passes and codec for a job, from a probe of its teacher and images.

    An existing cache keeps its codec and, if a budget chose it, its number of passes. Given values
    of ``--passes`` and ``--codec`` are kept. The codec's error is chosen by bytes alone, since it
    hardly changes the hours.

    Raises:
        UsageError: The budget does not pay for one pass.
    """
    text = config.budget or ""
    budget = Budget.parse(text)
    passes = config.passes if "passes" in config.model_fields_set else None
    plan = None if config.overwrite else read_plan(job.output)
    codecs = [job.request.codec]
    if plan is not None:
        codecs = [Request.model_validate(plan.identity.request).codec]
        passes = passes or plan.provenance.num_passes
        if passes is not None:
            return Choice(budget=text, codec=codecs[0], passes=passes)
    elif "codec" not in config.model_fields_set and job.request.stages and budget.num_bytes:
        codecs = [f"transform:error={error:g}" for error in ERRORS]
    if passes is None and job.drawn.policy.deterministic:
        passes = 1  # all passes would be equal
    estimates = estimate_job(job, config.passes, codecs)
    prices = [
        Price.of(codec, _error(job, codec), estimate, _tail_bytes(job.teacher))
        for codec, estimate in zip(codecs, estimates, strict=True)
    ]
    ways = frontier(budget, prices, passes=passes)
    way = best(ways)
    return Choice(budget=text, codec=way.codec, passes=way.passes, ways=ways)


def with_codec(job: Job, codec: str) -> Job:
    """Make the same job with another codec."""
    return replace(job, request=job.request.model_copy(update={"codec": str(parse_codec(codec))}))


def _error(job: Job, codec: str) -> float:
    """Return the error that a codec is asked for."""
    options = parse_codec(codec).options
    return options.error if options is not None and job.request.stages else 0.0


def _tail_bytes(teacher: Teacher) -> int:
    """Return the most that the file of a teacher's tail takes; float16 weights take half of it."""
    if not teacher.has_tail:
        return 0
    return sum(t.numel() * t.element_size() for t in teacher.tail().state_dict().values())


def _affordable(budget: Budget, price: Price, passes: int | None) -> int:
    """Return the number of passes that the budget pays for, up to those wanted."""
    counts: list[float] = [MAX_PASSES if passes is None else passes]
    if budget.num_bytes is not None:
        counts.append((budget.num_bytes - price.start_bytes) / price.pass_bytes)
    if budget.hours is not None:
        counts.append((budget.hours - price.start_hours) / price.pass_hours)
    return max(0, math.floor(min(counts)))


def _spending(price: Price, passes: int) -> Spending:
    return Spending(
        codec=price.codec,
        passes=passes,
        total_bytes=price.start_bytes + passes * price.pass_bytes,
        hours=price.start_hours + passes * price.pass_hours,
        expected_loss=_POINTS_OF_ONE_PASS / passes + _POINTS_OF_ERROR_ONE * price.error,
    )


def estimate_budget(config: CacheTeacherConfig) -> tuple[Choice, CacheEstimate]:
    """Choose passes and codec as a run would, and estimate the cost of the cache.

    Raises:
        ScaleKDError: Any fault that would stop a run before its first shard.
    """
    Budget.parse(config.budget or "")  # before the teacher is loaded
    job = Job.asked(config, Processes().device)
    choice = choose(job, config)
    (estimate,) = estimate_job(job, choice.passes, [choice.codec], with_student=True)
    return choice, estimate


class BudgetEstimate(CacheEstimate):
    """Estimated cost of a cache whose passes and codec were chosen from a budget."""

    budget: Choice

    def lines(self) -> list[str]:
        """Return the lines to print."""
        return [*self.budget.lines(), *super().lines()]


def dry_run_cache(config: CacheTeacherConfig) -> CacheEstimate:
    """Estimate the cost of a cache, with passes and codec that its budget pays for, if it has one.

    Raises:
        ScaleKDError: Any fault that would stop a run before its first shard.
    """
    if config.budget is None:
        return estimate_cache(config)
    choice, estimate = estimate_budget(config)
    return BudgetEstimate(**estimate.model_dump(), budget=choice)
