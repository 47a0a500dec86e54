"""Random windows of trajectories, gathered by index on the device that trains.

Each group draws from a generator of its own, so a seed sees the same windows whoever is trained beside it.
Every admissible start is drawn, the last one too (the reference implementation never draws it).

Legend: R rows, N variates, K inputs, J series, G groups, S steps of an epoch, B batch, T predicted steps.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tsforge.core.errors import DataError, listing
from tsforge.core.seeding import derive_seed


class RandomWindows:
    """Windows of T + 1 rows that stay inside one trajectory.

    Args:
        trajectories: one or more series (R_i, N), standardised, NaN where missing.
        length: T.
        seeds: one a group.
        device: where rows lie and indices are drawn.
        inputs: external inputs (R_i, K) of each trajectory, complete; None for a system without.
        series: name of the series that each trajectory is of; None where it does not matter.

    Attributes:
        names: the J series in the order of their first trajectory.

    Raises:
        DataError: no trajectory holds a window, or none of a series.
    """

    def __init__(
        self,
        trajectories: Sequence[Tensor],
        length: int,
        seeds: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        inputs: Sequence[Tensor] | None = None,
        series: Sequence[str] | None = None,
    ) -> None:
        size = length + 1
        starts, first = [], 0
        for rows in trajectories:
            starts.append(torch.arange(first, first + max(len(rows) - size + 1, 0)))
            first += len(rows)
        admissible = torch.cat(starts)
        if not len(admissible):
            longest = max((len(rows) for rows in trajectories), default=0)
            raise DataError(
                f"no trajectory holds a window of sequence_length + 1 = {size} rows (the longest has {longest}); "
                "lower train.sequence_length, or data.every"
            )
        self.names = tuple(dict.fromkeys(series or ()))
        self._series: Tensor | None = None
        if series is not None:
            lengths = torch.tensor([len(rows) for rows in trajectories])
            owners = torch.tensor([self.names.index(name) for name in series]).repeat_interleave(lengths)
            held = set(owners[admissible].tolist())
            short = [name for index, name in enumerate(self.names) if index not in held]
            if short:
                raise DataError(
                    f"{len(short)} of {len(self.names)} series hold no window of sequence_length + 1 = {size} rows in "
                    f"one piece: {listing(short)}; lower train.sequence_length or data.every, or leave them out"
                )
            self._series = owners.to(device)
        self.rows = torch.cat(list(trajectories)).to(device).contiguous()
        self.inputs = None if inputs is None else torch.cat(list(inputs)).to(device).contiguous()
        self.is_complete = not bool(self.rows.isnan().any())
        self._starts = admissible.to(device)
        self._offsets = torch.arange(size, device=device)[:, None]
        self._generators = [torch.Generator(device).manual_seed(derive_seed(seed, "windows")) for seed in seeds]

    def draw(self, steps: int, batch_size: int) -> Tensor:
        """Return the starts (S, G, 1, B) of one epoch."""
        picks = [
            torch.randint(len(self._starts), (steps, 1, batch_size), generator=generator, device=self.rows.device)
            for generator in self._generators
        ]
        return self._starts[torch.stack(picks, dim=1)]

    def gather(self, starts: Tensor) -> Tensor:
        """Return windows (G, T + 1, B, N) of starts (G, 1, B)."""
        return _take(self.rows, starts + self._offsets)

    def gather_inputs(self, starts: Tensor) -> Tensor | None:
        """Return the inputs (G, T, B, K) of the predicted steps of the same windows, None without inputs."""
        return None if self.inputs is None else _take(self.inputs, starts + self._offsets[1:])

    def gather_series(self, starts: Tensor) -> Tensor | None:
        """Return the index of the series (G, B) of each window, None where it does not matter."""
        return None if self._series is None else self._series[starts.squeeze(1)]

    def noise(self, like: Tensor) -> Tensor:
        """Return standard normal numbers of the shape of windows (G, ...), each group from its own generator."""
        return torch.stack(
            [
                torch.randn(like.shape[1:], generator=generator, device=like.device, dtype=like.dtype)
                for generator in self._generators
            ]
        )


def _take(rows: Tensor, index: Tensor) -> Tensor:
    return rows.index_select(0, index.flatten()).view(*index.shape, -1)
