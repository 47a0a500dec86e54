"""Scores to p-values by a calibration sample: conformal ranks, a tail model where ranks end, what both rest on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tsforge.anomaly.gpd import ParetoTail, fit_tail
from tsforge.core.errors import DataError

FloatArray = NDArray[np.float64]


def ranked_p_values(sample: FloatArray, scores: ArrayLike, tie_break: ArrayLike | None = None) -> FloatArray:
    """Return the conformal ``p = (1 + #{c_i >= s}) / (n + 1)`` of every score; NaN stays NaN.

    Args:
        sample: [n] scores of normal rows, sorted, complete and not empty: never looked at whole.
        scores: scores to judge.
        tie_break: independent uniform numbers, one a score, that place it among the calibration scores equal to it;
            p is then exactly uniform for exchangeable scores. Without it ties count against the alarm.
    """
    s = np.asarray(scores, dtype=np.float64)
    at_least = sample.size - np.searchsorted(sample, s, side="left")
    if tie_break is None:
        p = (1.0 + at_least) / (sample.size + 1.0)
    else:
        above = sample.size - np.searchsorted(sample, s, side="right")
        p = (above + np.asarray(tie_break, dtype=np.float64) * (1.0 + at_least - above)) / (sample.size + 1.0)
    return np.where(np.isnan(s), np.nan, p)


def row_uniforms(seed: int, rows: ArrayLike) -> FloatArray:
    """Return a uniform number in (0, 1) for each row number; it depends on the seed and that row alone.

    So a tie falls the same way in a batch run, on a stream and after a restart. Source: the finaliser of SplitMix64
    (Steele, Lea, Flood 2014, Fast splittable pseudorandom number generators).
    """
    x = np.asarray(rows, dtype=np.int64).astype(np.uint64)
    with np.errstate(over="ignore"):
        x = (x + np.uint64(seed % 2**32) * np.uint64(2**32) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53


def effective_size(scores: ArrayLike) -> float:
    """Return the number of independent rows behind autocorrelated scores: ``n / (1 + 2 sum rho_k)``.

    Autocorrelations are summed in pairs of neighbouring lags until a pair is no longer positive; missing scores are
    left out of every product. Never more than n.

    Source: spec of the calibration sample; truncation after Geyer (1992), Practical Markov Chain Monte Carlo, Sec. 3.3.
    """
    s = np.asarray(scores, dtype=np.float64).ravel()
    seen = ~np.isnan(s)
    count = int(seen.sum())
    if count < 3:
        return float(count)
    x = np.where(seen, s - s[seen].mean(), 0.0)
    size = 1 << (2 * s.size - 1).bit_length()
    spectrum, presence = np.fft.rfft(x, size), np.fft.rfft(seen.astype(np.float64), size)
    products = np.fft.irfft(np.abs(spectrum) ** 2, size)[: s.size]
    pairs = np.rint(np.fft.irfft(np.abs(presence) ** 2, size)[: s.size])
    if products[0] <= 0.0:
        return 1.0
    # dividing by n, not by the pairs at this lag, keeps the estimate positive definite; gaps are corrected for
    expected = count * (1.0 - np.arange(s.size) / s.size)
    with np.errstate(divide="ignore", invalid="ignore"):
        correction = np.where(pairs > 0, expected / pairs, 0.0)
    rho = products / products[0] * correction
    rho = rho[: rho.size - rho.size % 2].reshape(-1, 2).sum(axis=1)
    positive = rho > 0.0
    stop = int(np.argmin(positive)) if not positive.all() else positive.size
    return float(min(count, count / max(2.0 * rho[:stop].sum() - 1.0, 1.0)))


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A calibration sample ready to judge scores.

    Attributes:
        sample: sorted calibration scores. tail: tail model above its ``u``, None = conformal everywhere.
        effective: independent rows behind the sample. note: why there is no tail model, else empty.
        seed: of random ties, None = ties count against the alarm.
    """

    sample: FloatArray
    tail: ParetoTail | None
    effective: float
    note: str = ""
    seed: int | None = None

    def p_values(self, scores: ArrayLike, rows: ArrayLike | None = None) -> FloatArray:
        """Return the p-value of every score: conformal up to ``tail.u``, by the tail model above; NaN stays NaN.

        Args:
            scores: [N]. rows: [N] their absolute grid rows, needed where ties are broken at random.

        Raises:
            DataError: random ties without row numbers.
        """
        s = np.asarray(scores, dtype=np.float64)
        if self.seed is None:
            p = ranked_p_values(self.sample, s)
        elif rows is None:
            raise DataError("calibration.ties=random: p-values need the row numbers of their scores")
        else:
            p = ranked_p_values(self.sample, s, row_uniforms(self.seed, rows))
        if self.tail is None:
            return p
        return np.where(s > self.tail.u, self.tail.survival(s), p)

    def to_dict(self) -> dict[str, Any]:
        """Return plain facts for a report."""
        return {
            "rows": int(self.sample.size),
            "effective_rows": round(self.effective, 1),
            "smallest_conformal_p": 1.0 / (self.sample.size + 1),
            "tail": None if self.tail is None else self.tail.to_dict(),
            "note": self.note,
        }


def fit_calibration(
    scores: ArrayLike,
    *,
    method: Literal["auto", "conformal", "gpd"] = "auto",
    level: float = 0.98,
    shape: Literal["free", "nonnegative"] = "nonnegative",
    seed: int | None = None,
) -> Calibration:
    """Return a calibration from scores of normal rows in time order (NaN is left out).

    Args:
        method: ``auto`` uses the tail model where it can be fitted, else conformal with a note; ``gpd`` refuses.
        level, shape: of the tail model, see ``fit_tail``.
        seed: break ties at random by row; None counts them against the alarm.

    Raises:
        DataError: no score, or ``gpd`` with fewer than 50 excesses.
    """
    s = np.asarray(scores, dtype=np.float64).ravel()
    recent = s[~np.isnan(s)]
    if not recent.size:
        raise DataError("no calibration score is a number; calibrate on rows whose forecasts and values exist")
    tail, note = None, ""
    if method != "conformal":
        try:
            tail = fit_tail(recent, level=level, shape=shape)
        except DataError as error:
            if method == "gpd":
                raise
            note = f"p-values are conformal: {error}"
    return Calibration(sample=np.sort(recent), tail=tail, effective=effective_size(s), note=note, seed=seed)
