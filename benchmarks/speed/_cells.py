"""Cells and tables of the speed part of ``docs/benchmarks.md``."""

from collections.abc import Sequence
from typing import Any

Result = dict[str, Any]


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def micro(cost: dict[str, float], clock: str = "cpu") -> str:
    return f"{cost[f'{clock}_us']:,.0f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def goal(is_reached: bool) -> str:
    return "reached" if is_reached else "**missed**"
