"""What a fitted map does in the long run, judged in plain language: the check after every fit.

Warnings name what a forecast error cannot show: free runs lost to a spurious fixed point or cycle, runs that leave the
range of the data, and attracting points that the search finds on or off the data. Notes state facts that may be fine.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from tsforge.dynamics.capture import KINDS, Capture, CaptureSettings, capture_test
from tsforge.dynamics.fixed_points import Cycle, SearchBudget, find_cycles, is_enumerable
from tsforge.dynamics.piecewise import Array, as_float64, checked_states, piecewise_linear
from tsforge.dynamics.regions import RegionVisits, visited_regions
from tsforge.ops.plrnn import Shallow

Expected = Literal["chaos", "oscillation", "rest"]
_TOLERATED = 0.01  # share of runs that may end elsewhere without a warning
_MARGIN = 0.1  # a cycle this share of the range outside still counts as on the data
_SLOW = 0.1  # of near_zero: all runs that count as neither growing nor shrinking do grow by more
_ARRIVED = 1e-2  # an end this near a cycle, in standard deviations of the data, has reached it


@dataclass(frozen=True, eq=False)
class CycleFinding:
    """A fixed point or cycle seen against the data.

    Attributes:
        cycle: where it is and how stable.
        on_data: all its points lie within the range of the data, widened by a tenth.
        distance: from its nearest point to the nearest data state, in standard deviations of the data.
        captured: share of free runs that end on it; None without a capture test.
        observed: (period, N) its points as the data have them; None where nobody said how to observe a state.
    """

    cycle: Cycle
    on_data: bool
    distance: float
    captured: float | None
    observed: Array | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the finding as plain numbers."""
        place = {"on_data": self.on_data, "distance": self.distance, "captured": self.captured}
        return {**self.cycle.to_dict(), **place}


@dataclass(frozen=True, eq=False)
class Findings:
    """The long-run behaviour of one fitted map.

    Attributes:
        warnings: what makes the model untrustworthy, in sentences; empty for a healthy model.
        notes: facts worth knowing that need no action.
        cycles: fixed points and cycles found.
        complete: no fixed point or cycle of the periods looked at can be missing (all regions were enumerated).
        capture: how free runs from the data end.
        regions: linear regions that the data states visit.
    """

    warnings: tuple[str, ...]
    notes: tuple[str, ...]
    cycles: tuple[CycleFinding, ...]
    complete: bool
    capture: Capture
    regions: RegionVisits

    @property
    def healthy(self) -> bool:
        """Whether there is no warning."""
        return not self.warnings

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the arrays of single runs, ready for JSON."""
        return {
            "healthy": self.healthy,
            "warnings": list(self.warnings),
            "notes": list(self.notes),
            "complete": self.complete,
            "cycles": [finding.to_dict() for finding in self.cycles],
            "capture": self.capture.to_dict(),
            "regions": self.regions.to_dict(),
        }


def examine(
    params: Shallow,
    states: Any,
    *,
    clipped: bool = False,
    expected: Expected | None = None,
    periods: Sequence[int] = (1,),
    budget: SearchBudget | None = None,
    settings: CaptureSettings | None = None,
    seed: int = 0,
    observe: Callable[[Array], Array] | None = None,
) -> Findings:
    """Search fixed points and cycles, run the capture test, and say what is wrong.

    Args:
        params: shallow form of one group, see ``piecewise_linear``.
        states: (T, M) states of the data in latent coordinates.
        clipped: the map is the clipped one.
        expected: what the data do in the long run. Without it the most frequent end of the free runs that is not a
            rest is taken as right; a fit that comes to rest is warned of unless the data are said to.
        periods, budget: of the search, see ``find_cycles``.
        settings: of the capture test.
        seed: of the random starts.
        observe: states (P, M) to observations (P, N) in the units of the data, in which warnings then name places;
            else those are latent.

    Raises:
        ModelError: shapes that do not fit or values that are not finite.
    """
    data = checked_states(states, len(as_float64(params.h1)))
    mapping = piecewise_linear(params, clipped=clipped)
    cycles = find_cycles(params, data, periods=periods, clipped=clipped, budget=budget, seed=seed)
    capture = capture_test(params, data, clipped=clipped, settings=settings, seed=seed)
    findings = tuple(_place(cycle, data, capture) for cycle in cycles)
    if observe is not None:
        findings = tuple(replace(finding, observed=observe(finding.cycle.points)) for finding in findings)
    warnings, notes = judge(findings, capture, expected)
    return Findings(
        warnings=warnings,
        notes=notes,
        cycles=findings,
        complete=all(is_enumerable(mapping, period) for period in periods),
        capture=capture,
        regions=visited_regions(params, data, clipped=clipped),
    )


def examine_held(
    params: Shallow,
    states: Any,
    *,
    clipped: bool = False,
    periods: Sequence[int] = (1,),
    budget: SearchBudget | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Return what can be said of a driven map while its inputs are held, ready for JSON: no verdict.

    Fixed points and cycles of the held map are found and placed as by ``examine``. Where its free runs end says nothing
    about driven data, so there is no capture test, no warning, and ``healthy`` is None.

    Args:
        params: shallow form of one group with C s in h1.
        states: (T, M) states of the data in latent coordinates.
        clipped, periods, budget, seed: as for ``examine``.

    Raises:
        ModelError: shapes that do not fit or values that are not finite.
    """
    data = checked_states(states, len(as_float64(params.h1)))
    mapping = piecewise_linear(params, clipped=clipped)
    cycles = find_cycles(params, data, periods=periods, clipped=clipped, budget=budget, seed=seed)
    return {
        "healthy": None,
        "warnings": [],
        "notes": ["Fixed points are those of the map at the mean inputs; there is no capture test of a driven map."],
        "complete": all(is_enumerable(mapping, period) for period in periods),
        "cycles": [_place(cycle, data, None).to_dict() for cycle in cycles],
        "regions": visited_regions(params, data, clipped=clipped).to_dict(),
    }


def judge(
    cycles: Sequence[CycleFinding], capture: Capture, expected: Expected | None = None
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the warnings and the notes on what was found; up to 1 % of the runs may end elsewhere.

    Of runs that are lost nothing else is said: how they move far from the data is not how the data move.
    """
    kept = ~capture.beyond
    of_kept = replace(capture, kinds=capture.kinds[kept], periods=capture.periods[kept], growth=capture.growth[kept])
    share = of_kept.share if kept.any() else lambda kind: 0.0
    ends = {
        "rest": share("fixed"),
        "oscillation": share("contracting") + share("near_zero"),
        "chaos": share("expanding"),
    }
    whose = "of the free runs from the data" if kept.all() else "of the free runs that are not lost"
    right: str = expected or max(("oscillation", "chaos"), key=lambda kind: ends[kind])
    rule = f"the data show {right}" if expected else f"{_percent(ends[right])} show {right}"
    warnings = _lost(capture)
    if ends["rest"] > _TOLERATED and right != "rest":
        warnings.append(
            f"{_percent(ends['rest'])} {whose} come to rest at a fixed point: "
            "the model does not keep the dynamics alive."
        )
    if ends["oscillation"] > _TOLERATED and right != "oscillation":
        warnings.append(
            f"{_percent(ends['oscillation'])} {whose} end in a regular motion"
            f"{_lengths(of_kept)}, while {rule}: a spurious attractor, or one not yet reached."
        )
    if ends["chaos"] > _TOLERATED and right != "chaos":
        warnings.append(f"{_percent(ends['chaos'])} {whose} are chaotic, while {rule}.")
    runs = "free runs" if kept.all() else "free runs that are not lost"
    notes = [f"The {runs} show {right}: {_percent(ends[right])} of them."] if ends[right] > 0.0 else []
    notes += _slow(of_kept)
    for finding in cycles:
        if finding.cycle.kind != "stable":
            continue
        wanted = finding.on_data and right == ("rest" if finding.cycle.period == 1 else "oscillation")
        if wanted and (finding.captured or 0.0) > _TOLERATED:
            notes.append(f"{_describe(finding)}.")
        elif finding.on_data:
            warnings.append(f"{_describe(finding)}: a free run that comes near it never leaves.")
        else:
            warnings.append(f"{_describe(finding)}: a spurious attractor; runs pushed that far never return.")
    strange = [finding for finding in cycles if finding.cycle.kind != "stable" and not finding.on_data]
    if strange:
        notes.append(
            f"{len(strange)} fixed point(s) or cycle(s) outside the range of the data do not attract: "
            "harmless unless a run starts there."
        )
    return tuple(warnings), tuple(notes)


def _lost(capture: Capture) -> list[str]:
    diverged = capture.share("diverged")
    beyond = float(capture.beyond.mean()) - diverged
    warnings = []
    if diverged > 0.0:
        warnings.append(f"{_percent(diverged)} of the free runs from the data grow without bound.")
    if beyond > _TOLERATED:
        warnings.append(f"{_percent(beyond)} of the free runs from the data are lost: they end far outside its range.")
    return warnings


def _slow(capture: Capture) -> list[str]:
    """Return a note if the runs that count as closed curves all grow a little: chaos may be slow for their step."""
    rates = capture.growth[capture.kinds == KINDS.index("near_zero")]
    if len(rates) <= _TOLERATED * len(capture.kinds) or not rates.min() > _SLOW * capture.near_zero:
        return []
    return [
        f"Deviations of the {len(rates)} runs that count as a closed curve all grow, by {np.median(rates):.2g} a step, "
        f"below the rate that counts as none ({capture.near_zero:g}): this may be slow chaos, which a smaller "
        "evaluation.near_zero tells."
    ]


def _lengths(capture: Capture) -> str:
    found = np.unique(capture.periods[capture.periods > 1])
    return f" (cycles of {', '.join(str(period) for period in found[:5])} steps)" if len(found) else ""


def _describe(finding: CycleFinding) -> str:
    cycle = finding.cycle
    name = "fixed point" if cycle.period == 1 else f"cycle of {cycle.period} steps"
    place = "within" if finding.on_data else "outside"
    points = cycle.points if finding.observed is None else finding.observed
    point = ", ".join(f"{value:.3g}" for value in points[0][:6]) + (", ..." if points.shape[1] > 6 else "")
    return (
        f"An attracting {name} at ({point}) {place} the range of the data, largest multiplier {cycle.modulus:.4g}, "
        f"takes {_percent(finding.captured) if finding.captured else 'none'} of the free runs"
    )


def _place(cycle: Cycle, data: Array, capture: Capture | None) -> CycleFinding:
    low, high = data.min(axis=0), data.max(axis=0)
    spread = np.where(data.std(axis=0) > 0.0, data.std(axis=0), 1.0)
    margin = _MARGIN * (high - low) + 1e-9
    inside = bool(((cycle.points >= low - margin) & (cycle.points <= high + margin)).all())
    distance = min(float(np.linalg.norm((data - point) / spread, axis=1).min()) for point in cycle.points)
    if capture is None:
        return CycleFinding(cycle, inside, distance, None)
    ended = capture.ends[np.isfinite(capture.ends).all(axis=1)]
    near = [(np.abs(ended - point) / spread).max(axis=1) < _ARRIVED for point in cycle.points]
    # Chaos may pass an unstable point at the very moment a run ends: only attractors keep what reaches them.
    arrived = float(np.any(near, axis=0).sum()) / len(capture.ends) if cycle.kind == "stable" else 0.0
    return CycleFinding(cycle, inside, distance, arrived)


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
