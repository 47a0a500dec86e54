"""Training rows that hold too little to compare later rows with: what is lacking, and what would help."""

from __future__ import annotations

from collections.abc import Callable

from tsforge.core.errors import DataError

_BRING_ROWS = "give the detector all rows that trained the artifact, or fit on more rows"


class Uncomparable(DataError):
    """Later rows of one series have nothing in training that they can be compared with.

    Attributes:
        lack: what the training rows of the series hold, and what is needed.
        advice: what would help.
        observed: training rows of the series that hold anything; where they are most, advice is worth most.
    """

    def __init__(self, lack: str, *, observed: int, advice: str = _BRING_ROWS) -> None:
        super().__init__(f"{lack}; {advice}")
        self.lack, self.advice, self.observed = lack, advice, observed


def window_advice(window: int, smallest: int, suffices: Callable[[int], bool]) -> str:
    """Return what helps where a window is too long for the training rows.

    Args:
        window: that is too long.
        smallest: that a kind of score takes.
        suffices: says whether the training rows hold enough windows of a size.
    """
    while window > smallest:
        window = max(window // 2, smallest)
        if suffices(window):
            return f"lower score.window, to {window} for example"
    return f"no score.window helps: {_BRING_ROWS}"
