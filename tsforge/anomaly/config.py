"""Settings of a detector, nested by stage: score, calibration, threshold rule, events."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, field_validator, model_validator

from tsforge.anomaly.incidents import check_grouping
from tsforge.core.config import Config

JointName = Literal["mahalanobis", "mean_abs", "product", "balanced", "consensus", "max_abs", "top_k", "fisher"]
HorizonReduction = Literal["first", "last", "median", "max"]
ScoreKind = Literal[
    "normalised",
    "tail",
    "interval",
    "nll",
    "growth",
    "spectrum",
    "states",
    "regions",
    "reconstruction",
    "innovation",
    "masked",
    "latent",
    "free_energy",
]
FORECAST_KINDS = ("normalised", "tail", "interval", "nll", "growth")
ANSWERS = {
    "growth": "free run further off than its dynamics explain",
    "spectrum": "changed dynamics",
    "states": "changed dynamics",
    "regions": "changed dynamics",
    "reconstruction": "row at odds with its window",
    "innovation": "row at odds with a linear state-space model of all variates",
    "masked": "variate at odds with its past and with the other variates",
    "latent": "unfamiliar regime",
    "free_energy": "row that the model explains badly, or only by an unlikely state",
}
"""What a high score of a kind means, where it is not a bad forecast."""
DYNAMIC_KINDS = ("spectrum", "states", "regions")
DEFAULT_WINDOW = 400
RECONSTRUCTED_ROWS = 16


class ExponentialSmoothing(Config):
    """``S[t] = a s[t] + (1 - a) S[t-1]``; a plain number stands for it."""

    kind: Literal["exponential"] = "exponential"
    weight: float = Field(0.1, gt=0.0, le=1.0)
    gaps: Literal["reset", "decay"] = "reset"
    """After missing rows: start afresh, or let the old level fade with the rows missed."""


class MedianSmoothing(Config):
    """Median of the scores observed among the last ``window`` rows."""

    kind: Literal["median"] = "median"
    window: int = Field(ge=2, le=100_000)


class CusumSmoothing(Config):
    """One-sided cumulative sum: small shifts that last."""

    kind: Literal["cusum"] = "cusum"
    shift: float = Field(1.0, gt=0.0)
    """Shift worth finding, in robust standard deviations of the calibration scores; half of it is forgiven a row."""


class TwoSidedSmoothing(Config):
    """Weighted mean of the scores of the rows around a row, weights falling by ``1 - weight`` a row to both sides."""

    kind: Literal["two_sided"] = "two_sided"
    weight: float = Field(0.1, gt=0.0, lt=1.0)
    reach: int | None = Field(None, ge=1, le=10_000)
    """Rows to each side, so a score is known that much later; null: ``3 / weight``, beyond which a row weighs below
    5 % of the middle one."""

    @property
    def rows(self) -> int:
        """Rows to each side."""
        return math.ceil(round(3.0 / self.weight, 9)) if self.reach is None else self.reach


SmoothingConfig = Annotated[
    ExponentialSmoothing | MedianSmoothing | CusumSmoothing | TwoSidedSmoothing, Field(discriminator="kind")
]


def settling_rows(weight: float) -> int:
    """Return the normal rows that tell how far residuals add up: twice the ``1 / weight`` that are remembered."""
    return math.ceil(2.0 / weight)


class ScoreConfig(Config):
    """From residuals to one score a row."""

    kind: ScoreKind = "normalised"
    """Of forecasts: ``normalised``, residual of the mean; of a predictive distribution (probabilistic artifacts)
    ``tail``, how far out the value lies as a normal deviate, ``interval``, its distance from the middle of the central
    interval in half-widths, ``nll``, its negative log density; ``growth``, the error of a ``plrnn``'s free run against
    what its Jacobians expect. Of a trailing window: its power ``spectrum``, the ``states`` it visits, the linear
    ``regions`` a ``plrnn`` of kind ``almost_linear`` goes through, or its ``reconstruction`` from principal components.
    ``innovation``: the row against what a linear state-space model of the training rows says after the rows before.
    ``masked``: the row as a ``chimera`` tells it while its cells are hidden. ``latent``: how unfamiliar the state is
    that the model forecasts from; ``free_energy``: what it costs a ``pvrnn`` to explain the row. All of them then in
    robust standard deviations of step and variate."""
    joint: JointName = "mahalanobis"
    """``mahalanobis`` sees broken correlations, ``max_abs`` single sensors, ``mean_abs`` broad faults, ``product`` (the
    Mahalanobis distance times ``mean_abs``) both of the outer ones; ``balanced`` does so too with residuals in units
    between their own scale and the spread of the variate, so that a variate told almost exactly does not drown others;
    ``consensus`` asks three that err differently to agree: ``product`` and the residuals of a plain regression of each
    row on the one before, learnt from the training rows."""
    top_k: int | None = Field(None, ge=1)
    """Variates averaged by ``joint: top_k``."""
    steps: tuple[int, ...] | None = None
    """Forecast steps whose residuals are used (null: up to 8 spread over the first 24 of the artifact's horizon)."""
    horizon_reduction: HorizonReduction = "median"
    """Joins the normalised residuals of several steps: ``first`` reacts to jumps, ``last`` holds on to long events."""
    scale_floor: float = Field(0.01, gt=0.0)
    """Smallest scale of a variate, as a share of its training range; without it a near-constant channel screams."""
    winsor: float = Field(50.0, gt=1.0)
    """Normalised residuals are cut here before variates are joined: one broken sensor must not hide the rest."""
    constant_score: float = Field(10.0, gt=0.0)
    """Score given to a variate that was constant in training and now differs from that constant."""
    ewma: float | None = Field(None, gt=0.0, lt=1.0)
    """Weight of the newest row in an exponential mean of each variate's residual, sign and all, before variates are
    joined: pushes in one direction add up, noise cancels. Needs residuals with a sign; 0.1 suits faults that last."""
    smoothing: SmoothingConfig | None = None
    """A number is the weight of exponential smoothing: 0.1 suits sustained faults, null suits spikes. Other kinds:
    ``{kind: median, window: 9}``, ``{kind: cusum, shift: 1.0}``, and ``{kind: two_sided, weight: 0.1}``, which reads
    later rows too."""
    interval: float | None = Field(None, gt=0.0, lt=1.0)
    """Share of the predictive distribution inside the interval of ``interval`` (default 0.8)."""
    window: int | None = Field(None, ge=2)
    """Rows of the trailing window of ``spectrum``, ``states`` and ``regions`` (at least 16, default 400) and of
    ``reconstruction`` (default 16); fewest rows that tell a row of ``innovation`` (default 8 to 128, by how fast the
    fitted filter forgets)."""
    order: int | None = Field(None, ge=1, le=64)
    """States of ``innovation``, fewer where the training rows hold no more (default by Schwarz's criterion)."""
    overlap_reduction: Literal["last", "mean", "median"] | None = None
    """Which windows tell a row of ``reconstruction``: the one that ends with it (default), or all that hold it, whose
    errors are joined; these score a row only ``window - 1`` rows later."""
    explained: float | None = Field(None, gt=0.0, lt=1.0)
    """Share of the variance that the principal components of ``reconstruction`` and ``latent`` hold (default 0.95)."""
    part: Literal["both", "reconstruction", "divergence"] | None = None
    """Which part of ``free_energy``: what the model cannot explain, how unlikely its explanation is, or their sum
    (default)."""
    stride: int | None = Field(None, ge=1)
    """Rows between windows; their scores are held in between (default a fiftieth of the window)."""
    bins: int | None = Field(None, ge=2, le=100)
    """Cells an axis of ``states`` (default 12)."""
    lag: int | None = Field(None, ge=1)
    """Rows between the two coordinates of ``states`` (default from the autocorrelation of the training rows)."""

    @field_validator("smoothing", mode="before")
    @classmethod
    def _weight_alone(cls, value: Any) -> Any:
        """Let ``smoothing: 0.1`` stand for exponential smoothing with that weight."""
        return {"kind": "exponential", "weight": value} if isinstance(value, int | float | str) else value

    @model_validator(mode="after")
    def _consistent(self) -> ScoreConfig:
        if (self.joint == "top_k") != (self.top_k is not None):
            raise ValueError("top_k is needed by joint: top_k and has no effect without it")
        if self.steps is not None and (not self.steps or min(self.steps) < 1 or len(set(self.steps)) < len(self.steps)):
            raise ValueError(f"steps {self.steps} must be different whole numbers from 1 on")
        of_kind: dict[str, tuple[str, ...]] = {
            "window": (*DYNAMIC_KINDS, "reconstruction", "innovation"),
            "order": ("innovation",),
            "stride": DYNAMIC_KINDS,
            "bins": ("states",),
            "lag": ("states",),
            "interval": ("interval",),
            "overlap_reduction": ("reconstruction",),
            "explained": ("reconstruction", "latent"),
            "part": ("free_energy",),
        }
        for name, kinds in of_kind.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ValueError(f"{name} has no effect with kind '{self.kind}'")
        if self.ewma is not None and self.is_one_sided:
            raise ValueError(f"ewma adds up residuals with their sign, and kind '{self.kind}' has none; use smoothing")
        if self.joint == "balanced" and not self.has_data_units:
            raise ValueError(
                f"joint: balanced weighs residuals against the spread of the data, and kind '{self.kind}' has none in "
                "units of the data; take joint: product"
            )
        if self.joint == "consensus" and self.is_windowed:
            raise ValueError(
                f"joint: consensus sets forecasts beside what the row before says, and kind '{self.kind}' makes none; "
                "take joint: product"
            )
        if self.window is not None and self.window < 16 and self.kind in DYNAMIC_KINDS:
            raise ValueError(f"window {self.window} is too short for kind '{self.kind}'; give at least 16 rows")
        if self.is_windowed and (self.steps is not None or self.horizon_reduction != "median"):
            raise ValueError(f"steps and horizon_reduction are for forecasts; kind '{self.kind}' makes none")
        return self

    @property
    def is_windowed(self) -> bool:
        """True when a trailing window is judged, not a forecast made before the row."""
        return self.kind not in FORECAST_KINDS

    @property
    def is_one_sided(self) -> bool:
        """True when only large values are strange: distances and costs, not signed residuals."""
        return self.kind in (*DYNAMIC_KINDS, "nll", "latent", "free_energy")

    @property
    def has_data_units(self) -> bool:
        """True when deviations are in the units of the data."""
        return self.kind in ("normalised", "reconstruction", "innovation", "masked")

    @property
    def remembered_rows(self) -> int:
        """Rows that the memory of ``ewma`` needs to set its scale; 0 without it."""
        return 0 if self.ewma is None else settling_rows(self.ewma)

    @property
    def latency(self) -> int:
        """Rows after a row that its score reads: it is known that much later."""
        return self.window_latency + self.smoothing_latency

    @property
    def smoothing_latency(self) -> int:
        """Rows after a row whose scores its smoothed score reads."""
        return self.smoothing.rows if isinstance(self.smoothing, TwoSidedSmoothing) else 0

    @property
    def window_latency(self) -> int:
        """Rows after a row whose values its score before smoothing reads."""
        if self.kind != "reconstruction" or self.overlap_reduction in (None, "last"):
            return 0
        return (self.window or RECONSTRUCTED_ROWS) - 1


class CalibrationConfig(Config):
    """Which rows calibrate the score, and how a score becomes a p-value."""

    method: Literal["auto", "conformal", "gpd"] = "auto"
    """``auto``: generalised Pareto tail where it has enough excesses, else conformal; ``gpd`` refuses instead."""
    tail_level: float = Field(0.98, gt=0.5, lt=1.0)
    """Quantile above which the tail model takes over."""
    tail_shape: Literal["nonnegative", "free"] = "nonnegative"
    """``free`` lets the tail end at a finite score, which understates how often extremes occur."""
    scale_share: float = Field(0.5, gt=0.0, lt=1.0)
    """Share of the rows between training and scoring that set location, scale and covariance; the rest calibrates."""
    min_scale_rows: int = Field(50, ge=20)
    max_scale_rows: int = Field(2_000, ge=20)
    """The first rows after training, at most so many: scores of a row then do not depend on when scoring starts."""
    min_rows: int = Field(100, ge=20)
    """Fewest scores a calibration may rest on."""
    max_rows: int = Field(50_000, ge=100)
    """Only the most recent rows before scoring calibrate: a calibration should not be older than it must."""
    by: str | None = None
    """``hour_of_week``, or a column that names the operating mode: scores are compared with those of the same bucket
    where it holds at least 10 / alpha calibration rows, else with all (a notice says so)."""
    ties: Literal["conservative", "random"] = "conservative"
    """Scores equal to calibration scores count against the alarm, or are placed among them at random: p-values of
    scores with many ties are then exactly uniform on normal rows."""
    seed: int = 0
    """Of the random ties; the same row gets the same place in every run."""

    @model_validator(mode="after")
    def _consistent(self) -> CalibrationConfig:
        for low, high in (("min_rows", "max_rows"), ("min_scale_rows", "max_scale_rows")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} exceeds {high} {getattr(self, high)}")
        if self.seed and self.ties != "random":
            raise ValueError("seed has no effect without ties: random")
        return self


class BudgetRule(Config):
    """False alarms a user is ready to look at; becomes a rolling quantile."""

    kind: Literal["budget"] = "budget"
    alarms_per_day: float = Field(0.2, gt=0.0)
    """Alarm rows a day on normal data."""
    scope: Literal["series", "total"] = "series"
    """Whether every series has this budget or all of them share it."""
    points_per_day: float | None = Field(None, gt=0.0)
    """Rows a day; null takes it from the grid. Needed where time is a plain number."""
    window: int | None = Field(None, ge=100)


class RollingQuantileRule(Config):
    """The level that a share ``alpha`` of the last ``window`` scores exceeded."""

    kind: Literal["rolling_quantile"] = "rolling_quantile"
    alpha: float = Field(0.001, gt=0.0, le=0.2)
    window: int | None = Field(None, ge=100)
    """Null: the largest of 5,000 rows, 10 / alpha and two seasons."""
    exclude_flagged: int = Field(0, ge=0)
    """At most so many alarm rows in a row stay outside the window. Uncapped, alarms after a level shift never end."""


class QuantileRule(Config):
    """The level that a share ``alpha`` of the calibration scores exceeded; goes stale when data drift."""

    kind: Literal["quantile"] = "quantile"
    alpha: float = Field(0.001, gt=0.0, le=0.2)


class FixedRule(Config):
    """A level given by the user; bypasses calibration."""

    kind: Literal["fixed"] = "fixed"
    value: float


class _TailSettings(Config):
    risk: float = Field(1e-4, gt=0.0, lt=0.1)
    """Aimed at, not promised: it is extrapolated from the excesses, whose number the report states."""
    level: float = Field(0.98, gt=0.5, lt=1.0)
    """Quantile above which scores are excesses; at least 50 are needed."""
    tail_shape: Literal["nonnegative", "free"] = "nonnegative"
    """``free``, as published, lets the tail end at a finite score and alarms more often than ``risk`` says."""

    @model_validator(mode="after")
    def _beyond_level(self) -> Self:
        if self.risk >= 1.0 - self.level:
            raise ValueError(f"risk {self.risk:g} must be below 1 - level = {1.0 - self.level:g}")
        return self


class _LearningTailSettings(_TailSettings):
    exclude_flagged: int | None = Field(120, ge=0)
    """At most so many alarm rows in a row stay outside the tail (null: all of them, as published; alarms after a level
    shift then never end)."""
    max_excesses: int = Field(1_000, ge=50)
    """The most recent excesses that the tail is fitted to: bounds time and memory."""


class PotRule(_TailSettings):
    """The score that a generalised Pareto tail of the calibration scores exceeds with probability ``risk``; static."""

    kind: Literal["pot"] = "pot"


class SpotRule(_LearningTailSettings):
    """The same tail, fitted again whenever a score exceeds its start without being an alarm."""

    kind: Literal["spot"] = "spot"


class DspotRule(_LearningTailSettings):
    """The same on the distance of a score from the mean of the last ``depth`` scores that were no alarms."""

    kind: Literal["dspot"] = "dspot"
    depth: int = Field(100, ge=1)


class AdaptiveRule(Config):
    """A rolling quantile whose share moves by ``gain (alpha - alarm)`` a row, so that alarms keep to ``alpha``."""

    kind: Literal["adaptive"] = "adaptive"
    alpha: float = Field(0.001, gt=0.0, le=0.2)
    gain: float = Field(0.005, gt=0.0, le=0.5)
    window: int | None = Field(None, ge=100)
    """Null: the largest of 5,000 rows, 10 / alpha and two seasons."""


class EwNormalisedRule(Config):
    """A static level of log(score) standardised by its exponentially weighted mean and variance."""

    kind: Literal["ew_normalised"] = "ew_normalised"
    alpha: float = Field(0.001, gt=0.0, le=0.2)
    half_life: float = Field(720.0, ge=1.0)
    """Rows after which a score counts half."""


class FdrRule(Config):
    """Aims at a share of false ones among alarm rows, by p-values or e-values of the calibration."""

    kind: Literal["fdr"] = "fdr"
    level: float = Field(0.1, gt=0.0, le=0.5)
    """Share of alarm rows that may be false."""
    procedure: Literal["lord", "lord_decay", "e_lond", "bh", "e_bh"] = "lord_decay"
    """``lord`` (LORD++), ``lord_decay`` and ``e_lond`` spend a level row by row; ``bh`` and ``e_bh`` judge each row
    among the last ``block`` rows. ``e_`` procedures allow any dependence and find less."""
    decay: float | None = Field(None, gt=0.0, lt=1.0)
    """Of ``lord_decay``: how much of an alarm's reward is left after a row (default 0.99)."""
    eta: float | None = Field(None, gt=0.0, le=1.0)
    """Of ``lord_decay``: share of the level that is always spent (default 0.5)."""
    block: int | None = Field(None, ge=10, le=100_000)
    """Rows that ``bh`` and ``e_bh`` look at, this one and those before it (default 1,000)."""
    e_values: Literal["kappa", "direct"] | None = None
    """Of ``e_lond`` and ``e_bh``: ``kappa p^(kappa - 1)`` (default), or a score's share of all calibration scores."""
    kappa: float | None = Field(None, gt=0.0, lt=1.0)
    """Of ``e_values: kappa`` (default 0.5)."""
    power: float | None = Field(None, gt=0.0, le=100.0)
    """Of ``e_values: direct``: scores are raised to it first (default 1); the larger, the stronger single extremes."""

    @model_validator(mode="after")
    def _consistent(self) -> FdrRule:
        is_e = self.procedure.startswith("e_")
        applies = {
            "decay": self.procedure == "lord_decay",
            "eta": self.procedure == "lord_decay",
            "block": self.procedure in ("bh", "e_bh"),
            "e_values": is_e,
            "kappa": is_e and self.e_values != "direct",
            "power": is_e and self.e_values == "direct",
        }
        for name, has_effect in applies.items():
            if getattr(self, name) is not None and not has_effect:
                shown = f"procedure '{self.procedure}'" + (f", e_values '{self.e_values or 'kappa'}'" if is_e else "")
                raise ValueError(f"{name} has no effect with {shown}")
        return self


RuleConfig = Annotated[
    BudgetRule
    | RollingQuantileRule
    | QuantileRule
    | FixedRule
    | PotRule
    | SpotRule
    | DspotRule
    | AdaptiveRule
    | EwNormalisedRule
    | FdrRule,
    Field(discriminator="kind"),
]


class EventConfig(Config):
    """From alarm rows to events."""

    low_factor: float = Field(5.0, ge=1.0)
    """An event stays open while its score exceeds the level of ``low_factor * alpha`` (1: no hysteresis)."""
    patience: int = Field(1, ge=1)
    """Rows at or below the low level that close an event."""
    merge_gap: int = Field(0, ge=0)
    """Events with at most this many rows between them become one; the only thing that may bridge missing rows."""
    min_length: int = Field(1, ge=1)
    """Shorter events are dropped."""
    cooldown: int = Field(0, ge=0)
    """An event starting at most this many rows after the last one, on the same variates, is marked as continuing it."""
    ranked_variates: int = Field(20, ge=1)
    """Variates listed with an event, strongest first."""
    group_by: str | None = None
    """Which series share incidents: ``all``, ``static:COLUMN`` or ``id:PATTERN`` with one group (null: none do)."""
    group_gap: int = Field(0, ge=0)
    """Events of one group at most this many rows apart are one incident (0: they share a row)."""

    @model_validator(mode="after")
    def _grouped(self) -> EventConfig:
        if self.group_by is None and self.group_gap:
            raise ValueError("group_gap has no effect without group_by")
        if self.group_by is not None:
            check_grouping(self.group_by)
        return self


class GuardConfig(Config):
    """Values that raised an alarm are hidden from later forecasts behind their own forecasts.

    Long events then score high from one end to the other instead of at their edges.
    """

    max_rows: int | None = Field(None, ge=1)
    """Rows hidden one after another before the guard gives way to a change that stays (null: a season, which is
    ``season_length`` of the detector, else the shortest one that the grid implies)."""
    min_score: float = Field(3.0, gt=0.0)
    """Values of an alarm row whose own normal deviate is at least so large are hidden, the others are not."""


def _on_or_off(value: Any) -> Any:
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        raise ValueError("give true, false, or settings of its own (max_rows, min_score)")
    return ({} if value else None) if isinstance(value, bool) else value


GuardSetting = Annotated[GuardConfig | None, BeforeValidator(_on_or_off)]
"""``true`` stands for the defaults, ``false`` for none."""


def _settings_text(config: Config, *first: str) -> str:
    """Return the values of the fields ``first``, then ``name=value`` of all others that are not at their default."""
    parts = [str(getattr(config, name)) for name in first]
    for name, info in type(config).model_fields.items():
        value = getattr(config, name)
        if name in first or value == info.default:
            continue
        if isinstance(value, Config):
            named = ("kind",) if "kind" in type(value).model_fields else ()
            value = f"({_settings_text(value, *named)})"
        parts.append(f"{name}={value}")
    return ", ".join(parts)


class DetectConfig(Config):
    """Everything a detector needs besides an artifact and a frame."""

    score: ScoreConfig = ScoreConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    rule: RuleConfig = BudgetRule()
    events: EventConfig = EventConfig()
    guard: GuardSetting = None
    """Keep values that raised an alarm out of later contexts; for scores of forecasts."""
    season_length: int | None = Field(None, ge=2)
    """Rows of the longest season, for the rolling window (null: a week of the grid, none where time is a number)."""
    keep_variate_scores: bool = True
    """Store the score of every variate beside the joint one."""

    @field_validator("rule", mode="before")
    @classmethod
    def _default_kind(cls, value: Any) -> Any:
        """Let ``rule.alarms_per_day=1`` stand alone: a rule without a kind is a budget."""
        return {"kind": "budget", **value} if isinstance(value, dict) else value

    @model_validator(mode="after")
    def _guards_forecasts(self) -> Self:
        if self.guard is not None and self.score.is_windowed:
            raise ValueError(f"guard keeps alarms out of forecasts; kind '{self.score.kind}' makes none")
        if self.guard is not None and self.score.ewma is not None:
            raise ValueError("guard hides values by the residual of their own row, which score.ewma joins with others")
        if self.guard is not None and self.score.latency:
            raise ValueError(
                "guard hides a row before the next one is forecast, and score.smoothing.kind=two_sided judges it "
                f"{self.score.latency} rows later; use exponential smoothing"
            )
        return self

    @property
    def measure(self) -> str:
        """What the score is, in words: kind, joint, and every other setting that changes the number.

        Part of the ids of events; two detectors that differ in it find events of their own. A setting at its default
        is left out, so that settings to come change no id.
        """
        parts = [_settings_text(self.score, "kind", "joint")]
        if self.calibration.by is not None:
            parts.append(f"by={self.calibration.by}")
        if self.guard is not None:
            parts.append(f"guard=({_settings_text(self.guard)})")
        return ", ".join(parts)
