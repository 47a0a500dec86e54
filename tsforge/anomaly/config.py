"""Settings of a detector, nested by stage: score, calibration, threshold rule, events."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from tsforge.core.config import Config

JointName = Literal["mahalanobis", "mean_abs", "max_abs", "top_k", "fisher"]
HorizonReduction = Literal["first", "last", "median", "max"]
WINDOW_KINDS = ("spectrum", "states", "regions")
DEFAULT_WINDOW = 400


class ScoreConfig(Config):
    """From residuals to one score a row."""

    kind: Literal["normalised", "tail", "spectrum", "states", "regions"] = "normalised"
    """``normalised``: residual of the mean. ``tail``: how far out the value lies in the predictive distribution, as a
    normal deviate (needs a probabilistic artifact). The others judge what a trailing window does, not single values:
    its power spectrum, the states it visits, or the linear regions that a ``plrnn`` of kind ``almost_linear`` goes
    through. All of them then in robust standard deviations of step and variate."""
    joint: JointName = "mahalanobis"
    """``mahalanobis`` sees broken correlations, ``max_abs`` single sensors, ``mean_abs`` broad faults."""
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
    smoothing: float | None = Field(None, gt=0.0, le=1.0)
    """Weight a of ``S[t] = a s[t] + (1 - a) S[t-1]``; 0.1 suits sustained faults, null suits spikes."""
    window: int | None = Field(None, ge=16)
    """Rows of the trailing window of ``spectrum``, ``states`` and ``regions`` (default 400)."""
    stride: int | None = Field(None, ge=1)
    """Rows between windows; their scores are held in between (default a fiftieth of the window)."""
    bins: int | None = Field(None, ge=2, le=100)
    """Cells an axis of ``states`` (default 12)."""
    lag: int | None = Field(None, ge=1)
    """Rows between the two coordinates of ``states`` (default from the autocorrelation of the training rows)."""

    @model_validator(mode="after")
    def _consistent(self) -> ScoreConfig:
        if (self.joint == "top_k") != (self.top_k is not None):
            raise ValueError("top_k is needed by joint: top_k and has no effect without it")
        if self.steps is not None and (not self.steps or min(self.steps) < 1 or len(set(self.steps)) < len(self.steps)):
            raise ValueError(f"steps {self.steps} must be different whole numbers from 1 on")
        of_kind = {"window": WINDOW_KINDS, "stride": WINDOW_KINDS, "bins": ("states",), "lag": ("states",)}
        for name, kinds in of_kind.items():
            if getattr(self, name) is not None and self.kind not in kinds:
                raise ValueError(f"{name} has no effect with kind '{self.kind}'")
        if self.is_windowed and (self.steps is not None or self.horizon_reduction != "median"):
            raise ValueError(f"steps and horizon_reduction are for forecasts; kind '{self.kind}' makes none")
        return self

    @property
    def is_windowed(self) -> bool:
        """True when trailing windows are judged, not forecasts."""
        return self.kind in WINDOW_KINDS


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

    @model_validator(mode="after")
    def _consistent(self) -> CalibrationConfig:
        for low, high in (("min_rows", "max_rows"), ("min_scale_rows", "max_scale_rows")):
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} {getattr(self, low)} exceeds {high} {getattr(self, high)}")
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


class QuantileRule(Config):
    """The level that a share ``alpha`` of the calibration scores exceeded; goes stale when data drift."""

    kind: Literal["quantile"] = "quantile"
    alpha: float = Field(0.001, gt=0.0, le=0.2)


class FixedRule(Config):
    """A level given by the user; bypasses calibration."""

    kind: Literal["fixed"] = "fixed"
    value: float


RuleConfig = Annotated[BudgetRule | RollingQuantileRule | QuantileRule | FixedRule, Field(discriminator="kind")]


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


class DetectConfig(Config):
    """Everything a detector needs besides an artifact and a frame."""

    score: ScoreConfig = ScoreConfig()
    calibration: CalibrationConfig = CalibrationConfig()
    rule: RuleConfig = BudgetRule()
    events: EventConfig = EventConfig()
    season_length: int | None = Field(None, ge=2)
    """Rows of the longest season, for the rolling window (null: a week of the grid, none where time is a number)."""
    keep_variate_scores: bool = True
    """Store the score of every variate beside the joint one."""

    @field_validator("rule", mode="before")
    @classmethod
    def _default_kind(cls, value: Any) -> Any:
        """Let ``rule.alarms_per_day=1`` stand alone: a rule without a kind is a budget."""
        return {"kind": "budget", **value} if isinstance(value, dict) else value
