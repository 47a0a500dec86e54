"""State-space divergence D_stsp: how far the states a model visits are from the states the data visit.

Kullback-Leibler divergence of the true from the generated distribution of states, in nats: 0 is best, it is not
symmetric. Few variates: histograms over a box around the true data. Many: every time point is a Gaussian, the
divergence of the two mixtures is sampled. Published numbers differ by how they do this; ``PRESETS`` names each
definition and every result carries all of its settings.

Source: Koppe et al. 2019 (mixture), Hess et al. 2023 (arXiv 2306.04406; ``gtf``). Deviations: histograms list occupied
cells only, the cells empty in both enter in closed form (equal to the dense sum up to rounding); the mixture is summed
in logarithms, where the reference exponentiates in float32 and drops the samples that underflow
(``compat="reference"`` repeats that).
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import logsumexp

from tsforge.core.errors import ConfigError, DataError, nearest

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]
Integers: TypeAlias = np.ndarray[Any, np.dtype[np.int64]]
Method = Literal["binned", "mixture"]
Compat = Literal["exact", "reference"]

_CHUNK_CELLS = 500_000  # samples x points held at once: 4 MB, and some copies of it
_CODES = 2**62
_ROUNDING = 4.0 * float(np.finfo(np.float64).eps)  # of the largest value: a range below is none
# exp of anything below is 0 in float32, subnormal numbers included
_UNDERFLOW = math.log(float(np.finfo(np.float32).smallest_subnormal) / 2.0)


@dataclass(frozen=True, kw_only=True)
class DivergencePreset:
    """One definition of D_stsp.

    Attributes:
        name: what results call it.
        range_rule: box of the histogram per variate, from the true data (sd with n - 1): ``padded``
            [min - 0.1 sd, max + 0.1 sd], ``two_sd`` [-2 sd, 2 sd], ``min_max`` [min, max].
        bins: bins per variate.
        pseudo_count: added to every cell.
        drops_first_bin: also drop points in bin 0 of any variate, as the Python implementations do.
        standardise: z-score the two series first, each with its own mean and sd.
        mixture_from: number of variates from which ``method="auto"`` takes the mixture.
        variance: of each Gaussian of the mixture, in squared units of the data.
        max_points: first points of each series that the mixture uses.
        samples: drawn from the true mixture.
    """

    name: str
    range_rule: Literal["padded", "two_sd", "min_max"] = "padded"
    bins: int = 30
    pseudo_count: float = 1e-5
    drops_first_bin: bool = False
    standardise: bool = False
    mixture_from: int = 6
    variance: float = 1.0
    max_points: int = 10_000
    samples: int = 1000

    def __post_init__(self) -> None:
        positive = {key: getattr(self, key) for key in ("pseudo_count", "variance", "max_points", "samples")}
        wrong = {key: value for key, value in positive.items() if not value > 0}
        if wrong or self.bins < 2:
            raise ConfigError(f"D_stsp needs bins >= 2 and positive settings; got bins={self.bins}, {wrong}")


PRESETS: dict[str, DivergencePreset] = {
    preset.name: preset
    for preset in (
        DivergencePreset(name="gtf"),
        DivergencePreset(name="dend", range_rule="two_sd", drops_first_bin=True),
        DivergencePreset(name="python", range_rule="min_max", drops_first_bin=True),
        # the range after standardising is not documented; [min, max] as in the other Python versions
        DivergencePreset(name="hierarchical", range_rule="min_max", drops_first_bin=True, standardise=True),
        DivergencePreset(name="al", mixture_from=11),
    )
}


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """D_stsp and everything it depends on.

    Attributes:
        value: nats; NaN when the generated series holds a NaN or no point of it is in reach (a diverged model).
        method: what was used.
        preset: all settings, overrides included.
        num_variates: N.
        true_length, generated_length: time points that entered.
        true_dropped, generated_dropped: share of these outside the box (binned), or not finite (mixture).
        samples_dropped: share of samples whose density underflows in float32; they are left out of ``value`` only with
            ``compat="reference"``. 0 for histograms.
        compat: "exact" or "reference".
        seed: of the samples; None for histograms.
    """

    value: float
    method: Method
    preset: DivergencePreset
    num_variates: int
    true_length: int
    generated_length: int
    true_dropped: float
    generated_dropped: float
    samples_dropped: float
    compat: Compat
    seed: int | None

    def __float__(self) -> float:
        return self.value

    def to_dict(self) -> dict[str, Any]:
        """Return value and configuration as plain nested values, for a report or a tracking store."""
        return dataclasses.asdict(self)


def d_stsp(
    true: ArrayLike,
    generated: ArrayLike,
    preset: str | DivergencePreset = "gtf",
    *,
    method: Method | Literal["auto"] = "auto",
    compat: Compat = "exact",
    bins: int | None = None,
    variance: float | None = None,
    seed: int = 0,
) -> Divergence:
    """Return the divergence of generated [T', N] from true [T, N].

    Args:
        true: the data; finite.
        generated: a free run of the model, in the same units; points at infinity or beyond the box count as outside.
        preset: a name of ``PRESETS`` or an own definition.
        method: "auto" takes histograms below ``preset.mixture_from`` variates, else the mixture.
        compat: "reference" drops mixture samples that underflow in float32, to compare with published numbers.
        bins: overrides the preset's (k = 8 was published for the ECG); for histograms.
        variance: overrides the preset's; for the mixture.
        seed: of the mixture's samples.

    Raises:
        DataError: true is not finite, has a constant variate (histograms), or the variates differ.
        ConfigError: an unknown preset, or a setting that the method has no use for.
    """
    reference = StateSpaceReference(true, preset, method=method, compat=compat, bins=bins, variance=variance, seed=seed)
    return reference.compare(generated)


class StateSpaceReference:
    """The true series prepared once, to compare many generated ones (validation, sliding windows).

    Arguments and errors as in ``d_stsp``.
    """

    def __init__(
        self,
        true: ArrayLike,
        preset: str | DivergencePreset = "gtf",
        *,
        method: Method | Literal["auto"] = "auto",
        compat: Compat = "exact",
        bins: int | None = None,
        variance: float | None = None,
        seed: int = 0,
    ) -> None:
        states = _states(true, "true")
        if not np.isfinite(states).all():
            raise DataError(f"{_count_bad(states)} values of the true series are not finite; leave these rows out")
        chosen = find_preset(preset)
        self.num_variates = states.shape[1]
        self.method: Method = _choose(method, chosen, self.num_variates)
        self.compat: Compat = compat
        self.seed = seed
        self.preset = _override(chosen, self.method, bins, variance)
        if compat not in ("exact", "reference"):
            raise ConfigError(f"compat must be 'exact' or 'reference', got {compat!r}")
        if compat == "reference" and self.method == "binned":
            raise ConfigError("compat='reference' concerns the mixture; histograms equal the reference already")
        if self.preset.standardise:
            states = _standardised(states)
        if self.method == "binned":
            self._grid = _Grid(states, self.preset)
            self.true_length = len(states)
        else:
            self._mixture = _Mixture(states, self.preset, seed)
            self.true_length = len(self._mixture.points)

    def compare(self, generated: ArrayLike) -> Divergence:
        """Return the divergence of generated [T', N].

        Raises:
            DataError: other variates than the true series.
        """
        states = _states(generated, "generated")
        if states.shape[1] != self.num_variates:
            raise DataError(f"generated has {states.shape[1]} variates, the true series {self.num_variates}")
        value, true_dropped, generated_dropped, samples_dropped = float("nan"), 0.0, 0.0, 0.0
        if self.method == "mixture":
            states = states[: self.preset.max_points]
        if np.isnan(states).any():
            generated_dropped = float(np.isnan(states).any(axis=1).mean())
        elif self.method == "binned":
            value, generated_dropped = self._grid.divergence(self._prepared(states))
        else:
            finite = np.isfinite(states).all(axis=1)
            generated_dropped = float(1.0 - finite.mean())
            value, samples_dropped = self._mixture.divergence(self._prepared(states), self.compat)
        if self.method == "binned":
            true_dropped = self._grid.dropped
        return Divergence(
            value=value,
            method=self.method,
            preset=self.preset,
            num_variates=self.num_variates,
            true_length=self.true_length,
            generated_length=len(states),
            true_dropped=true_dropped,
            generated_dropped=generated_dropped,
            samples_dropped=samples_dropped,
            compat=self.compat,
            seed=self.seed if self.method == "mixture" else None,
        )

    def _prepared(self, states: Floats) -> Floats:
        return _standardised(states) if self.preset.standardise else states


def find_preset(preset: str | DivergencePreset) -> DivergencePreset:
    """Return the definition of a name.

    Raises:
        ConfigError: no such name.
    """
    if isinstance(preset, DivergencePreset):
        return preset
    if preset not in PRESETS:
        raise ConfigError(f"no D_stsp preset '{preset}'{nearest(preset, PRESETS)}; known: {', '.join(PRESETS)}")
    return PRESETS[preset]


class _Grid:
    """Histogram of the true states over occupied cells."""

    def __init__(self, states: Floats, preset: DivergencePreset) -> None:
        self.preset = preset
        spread = states.std(axis=0, ddof=1) if len(states) > 1 else np.zeros(states.shape[1])
        if preset.range_rule == "padded":
            self.low, high = states.min(axis=0) - 0.1 * spread, states.max(axis=0) + 0.1 * spread
        elif preset.range_rule == "two_sd":
            self.low, high = -2.0 * spread, 2.0 * spread
        else:
            self.low, high = states.min(axis=0), states.max(axis=0)
        self.width = high - self.low
        rounding = _ROUNDING * np.abs(states).max(axis=0)
        constant = np.flatnonzero(~(np.ptp(states, axis=0) > rounding) | ~(self.width > 0))
        if constant.size:
            raise DataError(
                f"variate {constant[0]} of the true series is constant: it has no bins; leave it out (the mixture, "
                "method='mixture' of d_stsp, can compare it)"
            )
        if preset.bins ** states.shape[1] > _CODES:
            raise ConfigError(
                f"{preset.bins} bins in each of {states.shape[1]} variates are too many cells; use method='mixture'"
            )
        self.num_cells = float(preset.bins) ** states.shape[1]
        self.cells, self.counts, self.inside = self._histogram(states)
        if not self.inside:
            raise DataError(f"no true state is inside the box of preset '{preset.name}'; are the series standardised?")
        self.dropped = 1.0 - self.inside / len(states)

    def divergence(self, states: Floats) -> tuple[float, float]:
        """Return D and the share of states outside the box; D is NaN when that is all of them."""
        cells, counts, inside = self._histogram(states)
        if not inside:
            return float("nan"), 1.0
        union = np.union1d(self.cells, cells)
        p_counts, q_counts = np.zeros(union.size), np.zeros(union.size)
        p_counts[np.searchsorted(union, self.cells)] = self.counts
        q_counts[np.searchsorted(union, cells)] = counts
        a = self.preset.pseudo_count
        p_total, q_total = self.inside + a * self.num_cells, inside + a * self.num_cells
        p, q = (p_counts + a) / p_total, (q_counts + a) / q_total
        empty = (self.num_cells - union.size) * (a / p_total) * math.log(q_total / p_total)
        return float(np.sum(p * np.log(p / q))) + empty, 1.0 - inside / len(states)

    def _histogram(self, states: Floats) -> tuple[Integers, Integers, int]:
        """Return occupied cells (ascending codes), their counts and the number of states inside."""
        with np.errstate(over="ignore"):
            place = (states - self.low) / self.width * self.preset.bins
        first = 1.0 if self.preset.drops_first_bin else 0.0
        kept = place[np.all((place >= first) & (place < self.preset.bins), axis=1)].astype(np.int64)
        codes = np.zeros(len(kept), dtype=np.int64)
        for column in kept.T:
            codes = codes * self.preset.bins + column
        cells, counts = np.unique(codes, return_counts=True)
        return cells, counts, len(kept)


class _Mixture:
    """Samples of the true mixture and their density under it."""

    def __init__(self, states: Floats, preset: DivergencePreset, seed: int) -> None:
        self.preset = preset
        self.points = states[: preset.max_points]
        self.centre = self.points.mean(axis=0)  # keeps |s|^2 - 2 s x + |x|^2 from cancelling
        rng = np.random.default_rng(seed)
        drawn = rng.integers(len(self.points), size=preset.samples)
        noise = rng.standard_normal((preset.samples, states.shape[1]))
        self.samples = self.points[drawn] + math.sqrt(preset.variance) * noise
        self.log_p = self._log_density(self.points)

    def divergence(self, states: Floats, compat: Compat) -> tuple[float, float]:
        """Return D and the share of samples with a density that float32 rounds to 0; D is NaN without finite states."""
        log_q = self._log_density(states)
        lost = np.minimum(self.log_p, log_q) < _UNDERFLOW
        kept = ~lost if compat == "reference" else np.ones_like(lost)
        value = float("nan")
        if kept.any() and np.isfinite(log_q).all():
            value = float(np.mean(self.log_p[kept] - log_q[kept]))
        return value, float(lost.mean())

    def _log_density(self, states: Floats) -> Floats:
        """Return ln of the mean of exp(-d^2 / 2 variance) over states for each sample.

        The normalisation of the Gaussians cancels in D. Points at infinity have density 0 and keep their weight.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            points = states - self.centre
            norms = np.einsum("tn,tn->t", points, points)
        points, norms = points[np.isfinite(norms)], norms[np.isfinite(norms)]
        density = np.full(len(self.samples), -np.inf)
        if not len(points):
            return density
        rows = max(1, _CHUNK_CELLS // len(points))
        for start in range(0, len(self.samples), rows):
            part = self.samples[start : start + rows] - self.centre
            exponents = part @ points.T
            exponents *= 2.0
            exponents -= norms
            exponents -= np.einsum("sn,sn->s", part, part)[:, None]
            exponents /= 2.0 * self.preset.variance
            density[start : start + rows] = logsumexp(exponents, axis=1) - math.log(len(states))
        return density


def _states(series: ArrayLike, name: str) -> Floats:
    states = np.asarray(series, dtype=np.float64)
    if states.ndim != 2 or not states.size:
        raise DataError(f"the {name} series must be an array [T, N] with rows, got shape {states.shape}")
    return states


def _count_bad(states: Floats) -> int:
    return int(np.count_nonzero(~np.isfinite(states)))


def _standardised(states: Floats) -> Floats:
    """Return z-scores per variate; a constant variate becomes 0 and points at infinity stay outside."""
    finite = states[np.isfinite(states).all(axis=1)]
    if len(finite) < 2:
        return np.full_like(states, np.inf)
    spread = finite.std(axis=0, ddof=1)
    scaled: Floats = (states - finite.mean(axis=0)) / np.where(spread > 0.0, spread, 1.0)
    return scaled


def _choose(method: Method | Literal["auto"], preset: DivergencePreset, num_variates: int) -> Method:
    if method == "auto":
        return "binned" if num_variates < preset.mixture_from else "mixture"
    if method not in ("binned", "mixture"):
        raise ConfigError(f"method must be 'auto', 'binned' or 'mixture', got {method!r}")
    return method


def _override(preset: DivergencePreset, method: Method, bins: int | None, variance: float | None) -> DivergencePreset:
    if bins is not None and method == "mixture":
        raise ConfigError("bins has no effect on the mixture; set method='binned' or leave bins out")
    if variance is not None and method == "binned":
        raise ConfigError("variance has no effect on histograms; set method='mixture' or leave variance out")
    changes = {key: value for key, value in (("bins", bins), ("variance", variance)) if value is not None}
    return dataclasses.replace(preset, **changes)  # type: ignore[arg-type]
