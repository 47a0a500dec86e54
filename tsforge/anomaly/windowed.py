"""Scores that judge the window or context ending with a row, behind one face; for stored rows and for a stream.

A *trace* is what is kept of a row: its values (``spectrum``, ``states``, ``reconstruction``, ``innovation``) without
impossible ones, which say nothing of other rows, or what the network makes of the context that ends with it
(``masked``, ``latent``, ``regions``, ``free_energy``). A score reads the traces of ``reach`` rows before its row and
of ``latency`` rows after it, nothing else, and each row by itself: however rows are cut into calls, the bits are the
same.

Legend: N scored rows, T rows, C size or shape of a trace, V variates.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from tsforge.anomaly.config import DEFAULT_WINDOW, RECONSTRUCTED_ROWS, ScoreConfig
from tsforge.anomaly.contexts import ContextFunction, context_traces
from tsforge.anomaly.free_energy import RowEnergies, energy_function
from tsforge.anomaly.latent import MOST_STATES, LatentScale, fit_latent, hidden_function
from tsforge.anomaly.masked import masked_function
from tsforge.anomaly.reconstruction import EXPLAINED, ReconstructionScore, WindowPca, fit_window_pca
from tsforge.anomaly.regions import region_function
from tsforge.anomaly.state_space import StateSpace
from tsforge.anomaly.state_space_fit import fit_state_space
from tsforge.anomaly.window_scores import (
    RegionsScore,
    SpectrumScore,
    StatesScore,
    Windows,
    fit_regions,
    fit_spectrum,
    fit_states,
)
from tsforge.artifact import Artifact
from tsforge.data.frame import SeriesFrame

FloatArray = NDArray[np.float64]
Fitted: TypeAlias = SpectrumScore | StatesScore | RegionsScore | ReconstructionScore | StateSpace | LatentScale | None
UNCOMPARED = ("masked", "free_energy")  # kinds that judge a row against nothing seen in training
FAR_OUT = 50.0  # normal deviate of a value that the declared range calls impossible
_FUNCTIONS = {
    "masked": masked_function,
    "latent": hidden_function,
    "regions": region_function,
    "free_energy": energy_function,
}


class Found(NamedTuple):
    """Deviations of rows, [N, V] or [N, 1] where variates share them, and what was expected [N, V] (else NaN)."""

    deviations: FloatArray
    expected: FloatArray


@dataclass(frozen=True)
class WindowJudge:
    """The score of one series.

    Attributes:
        config: kind of score.
        fitted: what training rows were like; None of ``masked`` and ``free_energy``, which compare with nothing.
    """

    config: ScoreConfig
    fitted: Fitted

    @property
    def reach(self) -> int:
        """Rows before a row whose traces its score reads."""
        return 0 if self.fitted is None or isinstance(self.fitted, LatentScale) else self.fitted.reach

    @property
    def latency(self) -> int:
        """Rows after a row whose traces its score reads."""
        return self.config.window_latency

    def judge(self, traces: FloatArray, values: FloatArray, first: int) -> Found:
        """Return what is found in consecutive rows.

        Args:
            traces: [reach + N + latency, C], NaN where there is none.
            values: [N, V] judged values of the rows, impossible ones too: they deviate by what they are, or as far as
                a window can, whatever surrounds them.
            first: absolute row of the first of them.
        """
        nothing = np.full(values.shape, np.nan)
        match self.fitted:
            case ReconstructionScore():
                expected = self.fitted.expected(traces)
                return Found(values - expected, expected)
            case StateSpace():
                told = self.fitted.told(traces, first)
                own = np.isnan(traces[self.reach :])
                return Found(np.where(own, values - told.expected, told.deviations), told.expected)
            case LatentScale():
                return Found(self.fitted.distances(traces), nothing)
            case SpectrumScore() | StatesScore():
                impossible = np.isnan(traces[self.reach :]) & ~np.isnan(values)
                return Found(np.where(impossible, self.fitted.largest, self.fitted.scores(traces, first)), nothing)
            case RegionsScore():
                return Found(self.fitted.scores(traces, first), nothing)
        if self.config.kind == "masked":
            return Found(values - traces, np.broadcast_to(traces, values.shape))
        energies = RowEnergies.of(traces)
        costs = energies.costs(values, self.config.part or "both", impossible=0.5 * FAR_OUT**2)
        return Found(costs, np.broadcast_to(energies.expected, values.shape))

    def state(self) -> dict[str, Any] | None:
        """Return what was fitted as arrays and plain facts; ``restored`` reads it back."""
        match self.fitted:
            case ReconstructionScore(pca=pca):
                return asdict(pca)
            case LatentScale(mean=mean, whitening=whitening):
                return {"mean": mean, "whitening": list(whitening)}
        return None if self.fitted is None else asdict(self.fitted)

    @classmethod
    def restored(cls, config: ScoreConfig, state: dict[str, Any] | None) -> WindowJudge:
        """Return the score whose ``state`` this is."""
        if state is None:
            return cls(config, None)
        if config.kind == "reconstruction":
            return cls(config, ReconstructionScore(WindowPca(**state), config.overlap_reduction or "last"))
        if config.kind == "innovation":
            return cls(config, StateSpace(**state))
        if config.kind == "latent":
            return cls(config, LatentScale(state["mean"], tuple(state["whitening"])))
        kinds: dict[str, type[SpectrumScore | StatesScore | RegionsScore]]
        kinds = {"spectrum": SpectrumScore, "states": StatesScore, "regions": RegionsScore}
        return cls(config, kinds[config.kind](**state | {"windows": Windows(**state["windows"])}))


def fit_window_judge(config: ScoreConfig, training: FloatArray) -> WindowJudge:
    """Return the score of one series.

    Args:
        config: kind of score.
        training: [T, C] traces of the training rows.

    Raises:
        DataError: a window that is too large, whatever the training rows.
        Uncomparable: too few training rows.
    """
    if config.kind in UNCOMPARED:
        return WindowJudge(config, None)
    if config.kind == "latent":
        return WindowJudge(config, fit_latent(training, config.explained or EXPLAINED))
    if config.kind == "reconstruction":
        pca = fit_window_pca(training, config.window or RECONSTRUCTED_ROWS, config.explained or EXPLAINED)
        return WindowJudge(config, ReconstructionScore(pca, config.overlap_reduction or "last"))
    if config.kind == "innovation":
        return WindowJudge(config, fit_state_space(training, config.window, config.order))
    window = config.window or DEFAULT_WINDOW
    sizes = {"window": window, "stride": config.stride or max(window // 50, 1)}
    if config.kind == "spectrum":
        return WindowJudge(config, fit_spectrum(training, **sizes))
    if config.kind == "states":
        return WindowJudge(config, fit_states(training, **sizes, bins=config.bins or 12, lag=config.lag))
    return WindowJudge(config, fit_regions(training, **sizes))


def trace_function(artifact: Artifact, config: ScoreConfig) -> ContextFunction | None:
    """Return what a network computes of a context for a kind of score; None where the trace of a row is its values.

    Raises:
        ModelError: the model has nothing of the kind.
    """
    return _FUNCTIONS[config.kind](artifact) if config.kind in _FUNCTIONS else None


def training_traces(
    artifact: Artifact, frame: SeriesFrame, config: ScoreConfig, rows: tuple[int, int], function: ContextFunction
) -> dict[str, FloatArray]:
    """Return the traces of training rows by series, at most some 5,000 of them where their order does not matter.

    Raises:
        ModelError: a model whose series influence each other.
    """
    stride = max((rows[1] - rows[0]) // MOST_STATES, 1) if config.kind == "latent" else 1
    return context_traces(artifact, frame, rows, function, stride=stride)
