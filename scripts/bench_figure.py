"""One row of the table of figures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Figure:
    """One row: what was measured, what it must be and shall become, the value and the floor of the same run."""

    work: str
    unit: str
    must: float
    aim: float
    value: float
    floor: float | None
    floor_is: str
    more_is_better: bool = False

    def row(self) -> str:
        """The row of the table."""
        kept = self.value >= self.must if self.more_is_better else self.value <= self.must
        sign = "≥" if self.more_is_better else "≤"
        floor = "" if self.floor is None else f"{_short(self.floor)} ({self.floor_is})"
        ratio = "" if not self.floor else f"{self.value / self.floor:.1f}"
        value = f"{_short(self.value)} {self.unit}" if kept else f"**{_short(self.value)} {self.unit}, missed**"
        return f"| {self.work} | {sign} {_short(self.must)} | {_short(self.aim)} | {value} | {floor} | {ratio} |"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.2g}" if value < 10 else f"{value:.1f}"
