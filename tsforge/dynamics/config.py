"""What to reconstruct: trajectories, map, forcing, training and how the result is judged."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from tsforge.core.config import MAX_SEED, Config, Seed
from tsforge.dynamics.capture import NEAR_ZERO, CaptureSettings
from tsforge.dynamics.findings import Expected
from tsforge.layers.plrnn import MapKind
from tsforge.layers.plrnn_observation import ObservationKind
from tsforge.layers.teacher_forcing import ForcingConfig
from tsforge.ops.plrnn import Backend

DEFAULT_SHARE = 0.8
SELF_LIMIT = 0.95
_MOST_SEEDS = 10_000
FEATURED = ("shallow", "clipped_shallow")  # kinds of map that features of series are for


def _differing(settings: Config, *names: str) -> list[str]:
    """Return those that have another value than their default: what a stored config repeats is no wish."""
    fields = type(settings).model_fields
    return [name for name in names if getattr(settings, name) != fields[name].default]


class SystemConfig(Config):
    """A known system to simulate: a noisy training trajectory, and a clean one from another start to judge by."""

    system: Literal["lorenz63", "lorenz96", "roessler"] = "lorenz63"
    steps: int = Field(20_000, ge=100)
    dt: float = Field(0.01, gt=0)
    noise: float = Field(0.05, ge=0)
    """Observation noise of the training trajectory, in standard deviations of each variate."""
    seed: Seed = 0


class TrajectoryConfig(Config):
    """Where the trajectories are, and what to judge by: a second file (``test``), the rest of the rows (``split``) or
    the training series itself (``in_sample``).
    """

    path: str | None = Field(None, min_length=1)
    """Parquet or CSV: one row a time step, one numeric column a variate."""
    system: SystemConfig | None = None
    """A simulated system instead of files."""
    test: str | None = None
    """A second file to judge by."""
    split: float | None = Field(None, gt=0, lt=1)
    """Share of the rows (after ``every``) that train; the rest, after ``gap``, is the test series. 0.8 if nothing else
    is said."""
    gap: int = Field(0, ge=0)
    """Rows left out between the two parts of a split, and before those that validate (after ``every``)."""
    valid: float | None = Field(None, gt=0, lt=1)
    """Share of the rows of the longest training trajectory, at its end, that validate (``train.validate_every``) and do
    not train."""
    in_sample: bool = False
    """Judge on the training series itself; the result says so."""
    columns: tuple[str, ...] | None = None
    """Variates; default every numeric column but ``step``, ``series`` and ``inputs``."""
    inputs: tuple[str, ...] = ()
    """Columns that drive the system and are not predicted: row t enters the step that predicts row t."""
    step: str | None = None
    """Column of times; a gap of more than 1.5 usual ones, or times that do not rise, end a trajectory. Default
    ``step``, ``time``, ``t``, then ``timestamp``, ``datetime``, ``date``, ``index`` or the index of pandas (in any case
    of letters), then the only column of dates."""
    series: str | None = None
    """Column that names the trajectory of each row; none means that the file holds one."""
    every: int = Field(1, ge=1)
    """Take each so many-th row of a training trajectory."""
    test_every: int = Field(1, ge=1)
    """The same for the test series of its own file."""
    rows: int | None = Field(None, ge=2)
    """Only the first so many rows of the training file (before ``every``)."""
    test_rows: int | None = Field(None, ge=2)
    """Only the first so many rows of the test file (before ``test_every``)."""
    standardise: bool = True
    """Each variate and input by the mean and standard deviation of the training rows, all parts alike."""

    @model_validator(mode="after")
    def _one_way_to_test(self) -> TrajectoryConfig:
        if (self.path is None) == (self.system is None):
            raise ValueError("give the file of the trajectories (path) or a system to simulate (system)")
        ways = (self.test is not None) + (self.split is not None) + self.in_sample
        if ways > 1:
            raise ValueError("test, split and in_sample exclude each other: give one way to judge")
        files = (self.rows, self.columns, self.inputs, self.step, self.series)
        if self.system is not None and (ways or any(files)):
            raise ValueError("a simulated system brings its own test series and columns; leave out what is for files")
        unsplit = self.test is not None or self.in_sample or self.system is not None
        if self.gap and self.valid is None and unsplit:
            raise ValueError("gap has no part without split or valid; leave it out")
        if self.test is None and (self.test_every != 1 or self.test_rows is not None):
            raise ValueError("test_every and test_rows belong to a test file; leave them out")
        return self

    @model_validator(mode="after")
    def _inputs_are_nothing_else(self) -> TrajectoryConfig:
        others = {*(self.columns or ()), self.step, self.series}
        wrong = sorted({name for name in self.inputs if name in others or self.inputs.count(name) > 1})
        twice = sorted({name for name in self.columns or () if (self.columns or ()).count(name) > 1})
        if twice:
            raise ValueError(f"columns names variates twice: {twice}")
        if wrong:
            raise ValueError(f"inputs names columns twice, or columns that are a variate, step or series: {wrong}")
        return self

    @property
    def share(self) -> float:
        """The share of the rows that train when the rest is to judge by."""
        return DEFAULT_SHARE if self.split is None else self.split


class PLRNNConfig(Config):
    """The map and its read-out; see ``tsforge.layers.plrnn`` and ``plrnn_observation``."""

    kind: MapKind = "clipped_shallow"
    latent: int | None = Field(None, ge=1)
    """Latent units M; default the number of variates."""
    hidden: int | tuple[int, ...] | None = None
    """Hidden units H of the shallow kinds (default 100) or widths of the deep one (default 100)."""
    bases: int | None = Field(None, ge=1)
    rectified: int | None = Field(None, ge=0)
    bounded: bool = False
    features: int = Field(0, ge=0)
    """Numbers V of each series (``data.series``) in which all weights of its map are linear, the rest shared; 0: one
    map for all series. See ``tsforge.layers.plrnn_hierarchical``."""
    observation: ObservationKind = "identity"
    bias: bool = False


class OptimConfig(Config):
    """How the weights are found: RAdam on random windows, the learning rate falling by a constant factor an epoch."""

    epochs: int = Field(2000, ge=1)
    batches_per_epoch: int = Field(50, ge=1)
    batch_size: int = Field(16, ge=1)
    sequence_length: int = Field(200, ge=1)
    """Predicted steps T of a window of T + 1 samples."""
    learning_rate: float = Field(1e-3, gt=0)
    learning_rate_end: float = Field(1e-6, gt=0)
    gradient_clip: float | None = Field(10.0, gt=0)
    """Largest gradient norm of a seed."""
    noise: float | None = Field(None, ge=0)
    """Standard deviation of Gaussian noise on a window, in standardised units; 0 for none. None tops up what the data
    hold to 0.05 standard deviations of each variate (``training_noise``)."""
    noise_on: Literal["window", "inputs"] = "window"
    """``inputs`` leaves the targets of the loss clean."""
    lambda_lat: float = Field(1e-5, ge=0)
    lambda_obs: float = Field(0.0, ge=0)
    """Weight of the condition number of an affine read-out."""
    lambda_mar: float = Field(0.0, ge=0)
    mar_ratio: float = Field(0.5, gt=0, le=1)
    """Share of the latent units under the manifold-attractor penalty ``lambda_mar``."""
    lambda_self: float = Field(0.0, ge=0)
    """Weight of the penalty on A + diag W above ``self_limit`` of an almost-linear map, against divergence."""
    self_limit: float = SELF_LIMIT
    validate_every: int | None = Field(None, ge=1)
    """Epochs between two free runs on the validation rows (``data.valid``); the best weights of each seed are kept.
    None keeps the last ones, as published."""
    estimate_every: int = Field(1, ge=1)
    """The estimate of alpha looks at each so many-th step of a window."""
    backend: Backend = "auto"
    accelerator: Literal["auto", "cpu", "gpu"] = "auto"


class EvaluationConfig(Config):
    """How a fit is judged."""

    prediction_steps: int = Field(20, ge=1)
    """n of PE(n)."""
    sigma: float = Field(20.0, gt=0)
    """Smoothing of the spectra of D_H in bins."""
    lyapunov_steps: int = Field(20_000, ge=100)
    lyapunov_transient: int = Field(1000, ge=0)
    findings: bool = True
    """Search fixed points and run the capture test."""
    capture_runs: int = Field(400, ge=1)
    capture_steps: int = Field(20_000, ge=500)
    capture_tangent_steps: int = Field(5000, ge=100)
    near_zero: float = Field(NEAR_ZERO, ge=0)
    """Growth rates of a small deviation up to this size, per step, are those of an oscillation. Data sampled finely
    need a smaller one: chaos that grows by less a step counts as oscillation."""
    periods: tuple[int, ...] = Field((1,), min_length=1)
    """Periods of the cycles searched for."""
    expected: Expected | None = None
    """What the data do in the long run; None takes what most free runs do."""

    def capture_settings(self) -> CaptureSettings:
        """Return the sizes of the capture test."""
        return CaptureSettings(
            runs=self.capture_runs,
            steps=self.capture_steps,
            tangent_steps=self.capture_tangent_steps,
            near_zero=self.near_zero,
        )

    @field_validator("periods")
    @classmethod
    def _cycles(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if min(value) < 1 or len(set(value)) < len(value):
            raise ValueError(f"periods are distinct numbers of steps from 1 on, given: {list(value)}")
        return value

    @model_validator(mode="after")
    def _search_is_on(self) -> EvaluationConfig:
        given = _differing(self, "periods", "expected", "near_zero")
        if given and not self.findings:
            raise ValueError(f"{', '.join(given)} have no part with findings=false; leave them out")
        return self


class ReconstructionConfig(Config):
    """Everything that decides a reconstruction."""

    data: TrajectoryConfig
    model: PLRNNConfig = PLRNNConfig()
    forcing: ForcingConfig = ForcingConfig()
    train: OptimConfig = OptimConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    seeds: tuple[int, ...] = Field((0, 1, 2, 3, 4), min_length=1)
    seeds_at_once: int = Field(5, ge=1)
    """Seeds that are trained side by side in one batched run."""
    dt: float = Field(1.0, gt=0)
    """Time between two training rows (after ``every``); Lyapunov exponents are per unit of it. Never taken from the
    file: a note says where its times are otherwise."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _count(cls, value: object) -> object:
        """Read a number as that many seeds: 5 means 0, 1, 2, 3, 4."""
        if value == 0:
            raise ValueError("give at least one seed")
        if isinstance(value, int) and value > _MOST_SEEDS:
            raise ValueError(f"{value} would be so many seeds; for a single one write seeds=[{value}]")
        return tuple(range(value)) if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _penalty_has_its_map(self) -> ReconstructionConfig:
        train, kind = self.train, self.model.kind
        if train.lambda_self and kind != "almost_linear":
            raise ValueError(f"train.lambda_self is for model.kind=almost_linear, not {kind}; leave it out")
        if not train.lambda_self and train.self_limit != SELF_LIMIT:
            raise ValueError("train.self_limit has no part without train.lambda_self; leave it out")
        if train.lambda_obs and self.model.observation == "identity":
            raise ValueError("train.lambda_obs is for model.observation=affine, not identity; leave it out")
        if not train.lambda_mar and _differing(train, "mar_ratio"):
            raise ValueError("train.mar_ratio has no part without train.lambda_mar; leave it out")
        if train.noise == 0 and _differing(train, "noise_on"):
            raise ValueError("train.noise_on has no part with train.noise=0; leave it out")
        return self

    @model_validator(mode="after")
    def _forcing_happens(self) -> ReconstructionConfig:
        train, forcing = self.train, self.forcing
        if forcing.method != "adaptive" and _differing(train, "estimate_every"):
            raise ValueError(f"train.estimate_every is for forcing.method=adaptive, not {forcing.method}; leave it out")
        steps = train.epochs * train.batches_per_epoch
        if _differing(forcing, "interval") and forcing.interval > steps:
            raise ValueError(f"forcing.interval={forcing.interval}, but the training has {steps} steps; lower it")
        if forcing.tau is not None and forcing.tau >= train.sequence_length:
            raise ValueError(
                f"forcing.tau={forcing.tau} is no shorter than windows of train.sequence_length="
                f"{train.sequence_length}, so nothing would be forced; lower it, or lengthen them"
            )
        return self

    @model_validator(mode="after")
    def _findings_are_made(self) -> ReconstructionConfig:
        if self.model.kind == "deep":
            given = _differing(self.evaluation, "periods", "expected", "near_zero")
            why = "a deep map has no fixed points, cycles or capture test"
        else:
            given = _differing(self.evaluation, "expected", "near_zero") if self.data.inputs else []
            why = "a map with data.inputs has no capture test"
        if given:
            raise ValueError(f"{why}, so evaluation.{', evaluation.'.join(given)} has no part; leave it out")
        return self

    @model_validator(mode="after")
    def _validation_is_whole(self) -> ReconstructionConfig:
        if (self.data.valid is None) != (self.train.validate_every is None):
            raise ValueError(
                "data.valid (the rows that validate) and train.validate_every (how often) belong together; "
                "set both or neither"
            )
        return self

    @model_validator(mode="after")
    def _features_have_series(self) -> ReconstructionConfig:
        model, data, train = self.model, self.data, self.train
        if not model.features:
            return self
        if data.series is None:
            raise ValueError("model.features belong to series: name their column with data.series")
        if model.kind not in FEATURED:
            raise ValueError(f"model.features are for model.kind={' or '.join(FEATURED)}, not {model.kind}")
        others = {
            "model.bounded": model.bounded,
            "model.bases": model.bases is not None,
            "model.rectified": model.rectified is not None,
            "several widths of model.hidden": isinstance(model.hidden, tuple),
            "data.inputs": bool(data.inputs),
            "data.valid": data.valid is not None,
            "train.lambda_mar": train.lambda_mar > 0,
        }
        wrong = [name for name, given in others.items() if given]
        if wrong:
            raise ValueError(f"maps with model.features cannot have {', '.join(wrong)}; leave it out, or features")
        return self

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(value)) != len(value) or min(value) < 0:
            raise ValueError(f"seeds must be distinct and not negative, given: {list(value)}")
        if max(value) > MAX_SEED:
            raise ValueError(f"a seed is at most {MAX_SEED}, given: {max(value)}")
        return value
