"""A run's losses, a row for each step: in memory, and as the table from which a run that goes on has those before."""

import csv
from collections.abc import Sequence
from pathlib import Path

from .charts import LossRow, loss_chart, loss_csv
from .loop import Progress


class Losses:
    """The rows so far."""

    def __init__(self, path: Path, step: int) -> None:
        """path: of the table, whose rows up to a step are taken; they are empty ones where it is gone."""
        rows: list[LossRow] = []
        if step and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                rows = [
                    LossRow(int(row["step"]), *(float(x) if (x := row[key]) else None for key in LossRow._fields[1:]))
                    for row in csv.DictReader(file)
                ]
        known = {row.step: row for row in rows}
        self.rows = [known.get(i, LossRow(i, None, None, None, None)) for i in range(1, step + 1)]

    def __len__(self) -> int:
        """The steps that are done."""
        return len(self.rows)

    def add(self, done: Progress) -> None:
        """A step."""
        self.rows.append(LossRow(done.step, done.loss, done.rate, done.norm, None))

    def judge(self, validation: float) -> None:
        """The loss of held-out pictures behind the last step."""
        if self.rows:
            self.rows[-1] = self.rows[-1]._replace(validation=validation)

    @property
    def all(self) -> list[float]:
        """Of each step, 0 where it is not known."""
        return [row.loss or 0.0 for row in self.rows]

    @property
    def largest_rate(self) -> float:
        return max((row.rate or 0.0 for row in self.rows), default=0.0)

    @property
    def validated(self) -> dict[int, float]:
        """Of held-out pictures, by step."""
        return {row.step: row.validation for row in self.rows if row.validation is not None}

    def csv(self) -> str:
        """The table."""
        return loss_csv(self.rows)

    def chart(self, rates: Sequence[float], title: str) -> bytes:
        """A PNG. rates: of each step. ModuleNotFoundError without matplotlib."""
        return loss_chart(self.all, rates, self.validated, title)
