"""The heights and widths that a model takes."""

from typing import NamedTuple


class Sizes(NamedTuple):
    """Multiples of `unit` from `smallest` to `largest`, of height and width each; in pixels, or in tokens."""

    unit: int
    smallest: int
    largest: int

    def per(self, length: int) -> "Sizes":
        """The same in lengths of so many pixels."""
        return Sizes(*(side // length for side in self))

    def allow(self, *sides: int) -> bool:
        """Whether all sides are allowed."""
        return all(side % self.unit == 0 and self.smallest <= side <= self.largest for side in sides)

    def allowed(self, *sides: int) -> str:
        """What is allowed, and what of it is nearest to the sides that are not, for a message."""
        text = f"H and W multiples of {self.unit} from {self.smallest} to {self.largest}"
        for side in dict.fromkeys(side for side in sides if not self.allow(side)):
            below = min(max(side // self.unit * self.unit, self.smallest), self.largest)
            above = min(max(below, below + self.unit * (side > below)), self.largest)
            nearest = f"{below} and {above} are" if above > below else f"{below} is"
            text += f"; {nearest} nearest to {side}"
        return text
