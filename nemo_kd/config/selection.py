"""Selection of the positions that the KD term trains on."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction

SCORES = ("student_entropy", "teacher_entropy", "entropy_gap")
EXAMPLE = "top 25% by student_entropy"
_TEXT = re.compile(rf"top (\d+(?:\.\d+)?)% by ({'|'.join(SCORES)})", re.ASCII)


@dataclass(frozen=True)
class Selection:
    """A share of every example's loss tokens: those with the largest scores.

    Attributes:
        score: one of `SCORES`; entropy_gap is the student's entropy less the teacher's.
    """

    share: Fraction
    score: str

    @classmethod
    def of(cls, text: str) -> Selection:
        """Read a text as `EXAMPLE`.

        Raises:
            ValueError: it is none, or selects nothing or everything.
        """
        match = _TEXT.fullmatch(text.strip())
        share = Fraction(0) if match is None else Fraction(match[1]) / 100
        if match is None or not 0 < share < 1:
            raise ValueError(
                f"{text!r} is not a selection: top N% by {', '.join(SCORES[:-1])} or {SCORES[-1]}, "
                f"N above 0 and below 100, for example '{EXAMPLE}'"
            )
        return cls(share, match[2])

    @property
    def needs_student(self) -> bool:
        return self.score != "teacher_entropy"

    @property
    def needs_teacher(self) -> bool:
        return self.score != "student_entropy"

    def output_products(self, trains_on_labels: bool) -> float:
        """Return the number of products with the output layer per loss token.

        It is 3 without a selection: logits and two gradients. Positions without any loss have no
        gradient; the student's entropy takes logits beforehand.
        """
        num_gradients = 2.0 if trains_on_labels else 2 * float(self.share)
        return 1 + num_gradients + self.needs_student

    def count(self, num_loss_tokens: int) -> int:
        """Return the number of selected tokens of an example, rounded up."""
        return math.ceil(self.share * num_loss_tokens)
