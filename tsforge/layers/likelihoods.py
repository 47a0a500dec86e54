"""Likelihoods: raw model outputs [..., K] to distributions, in scaled units. ``raw[..., 0]`` is always the location.

Every other parameter passes through softplus, so raw values are unconstrained and quantiles cannot cross.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.functional import huber_loss, softplus

from tsforge.core.config import Config
from tsforge.core.errors import ModelError
from tsforge.layers import student_t

MIN_SCALE = 1e-4  # least standard deviation in scaled units: keeps the density of an exactly predictable series finite
MIN_STEP = 1e-6  # least distance of neighbouring quantiles in scaled units
MIN_DF = 2.0  # above it a Student-t has a mean and a variance
START_DF = 6.0  # degrees of freedom before training: tails clearly heavier than Normal, kurtosis still finite
_MANY_DF = 20.0  # from here on these six terms give every digit of double precision
_SERIES = (-1 / 4, 1 / 24, -1 / 20, 17 / 112, -31 / 36, 691 / 88)  # of the log gammas' difference, odd powers of 1 / df
DEFAULT_LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


class Point(Config):
    """Only a location, no distribution; intervals come from conformal calibration."""

    name: Literal["point"] = "point"
    loss: Literal["mse", "mae", "huber", "msle", "male"] = "mse"
    """``msle`` and ``male`` are squared and absolute differences of log(1 + y), y in data units: for values of at least
    0. Where a forecast is below 0 its logarithm goes on as the straight line y."""
    huber_delta: float = Field(default=1.0, gt=0)
    """Error, in scaled units, from which the Huber loss grows linearly."""


class Normal(Config):
    """Mean and standard deviation."""

    name: Literal["normal"] = "normal"


class StudentT(Config):
    """Location, scale and degrees of freedom (> 2); robust to outliers in training."""

    name: Literal["student_t"] = "student_t"


class Quantiles(Config):
    """Quantile function at fixed levels, fitted with the pinball loss, linear between levels, exponential tails."""

    name: Literal["quantiles"] = "quantiles"
    levels: tuple[float, ...] = DEFAULT_LEVELS

    @field_validator("levels")
    @classmethod
    def _check_levels(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        if len(levels) < 3 or any(not 0 < level < 1 for level in levels):
            raise ValueError("needs at least three levels strictly between 0 and 1")
        if any(low >= high for low, high in pairwise(levels)):
            raise ValueError("levels must ascend without repetition")
        if 0.5 not in levels or levels[0] == 0.5 or levels[-1] == 0.5:
            raise ValueError("levels must contain 0.5, the location, with others on both sides")
        return levels


LikelihoodConfig = Annotated[Point | Normal | StudentT | Quantiles, Field(discriminator="name")]


def inverse_softplus(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return x with softplus(x) = value, for value > 0."""
    return value + torch.log(-torch.expm1(-value))


def log_or_line(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return log(1 + x) for x >= 0 and x itself below, its tangent at 0: finite and increasing everywhere."""
    return torch.where(values > 0, values.clamp(min=0).log1p(), values)


def student_t_norm(df: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return minus the log density at 0 of a Student-t with ``df`` degrees of freedom and scale 1.

    Log gammas grow like df log df and would take the digits of their difference along; many degrees of freedom take its
    series in 1 / df instead (DLMF 5.11.14), which approaches the Normal's norm.
    """
    few, inverse = df.clamp(max=_MANY_DF), 1.0 / df.clamp(min=_MANY_DF)
    series = torch.zeros_like(df)
    for term in reversed(_SERIES):
        series = series * inverse.square() + term
    exact = torch.lgamma(few / 2) - torch.lgamma((few + 1) / 2) + 0.5 * torch.log(math.pi * few)
    return torch.where(df < _MANY_DF, exact, 0.5 * math.log(2 * math.pi) - series * inverse)


def masked_mean(values: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"] | None) -> Float[Tensor, ""]:
    """Return the mean over observed cells; 0 with zero gradient where nothing is observed."""
    if mask is None:
        return values.mean()
    return torch.where(mask, values, 0.0).sum() / mask.sum().clamp(min=1)


class Likelihood(nn.Module):
    """Base: what a raw output means. All values are in scaled units; the network maps them to data units."""

    num_params: int
    has_distribution: bool = True
    in_data_units: bool = False  # ``loss`` takes locations and targets in data units, at least 0, and no ``unit``

    def initial_raw(self, residual_scale: Float[Tensor, "horizon variate"]) -> Float[Tensor, "horizon variate param"]:
        """Return the constant to add to raw outputs so that zeros mean "spread = residual_scale"; location part 0."""
        return torch.zeros(*residual_scale.shape, self.num_params, dtype=residual_scale.dtype)

    def loss(
        self, raw: Float[Tensor, "*shape param"], target: Float[Tensor, "*shape"], unit: Tensor | None
    ) -> Float[Tensor, "*shape"]:
        """Return the loss of every cell; ``unit`` [B, 1, V] rescales losses that are not scale-free."""
        raise NotImplementedError

    def nll(
        self,
        raw: Float[Tensor, "batch horizon variate param"],
        target: Float[Tensor, "batch horizon variate"],
        mask: Bool[Tensor, "batch horizon variate"] | None = None,
        unit: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Return the mean loss over observed cells; what the target holds elsewhere does not matter."""
        if mask is not None:
            target = torch.where(mask, target, 0.0)
        return masked_mean(self.loss(raw, target, unit), mask)

    def mean(self, raw: Float[Tensor, "*shape param"]) -> Float[Tensor, "*shape"]:
        """Return the expected value."""
        return raw[..., 0]

    def quantile(self, raw: Float[Tensor, "*shape param"], levels: Sequence[float]) -> Float[Tensor, "*shape level"]:
        """Return quantiles for levels strictly between 0 and 1; they ascend with the level."""
        raise ModelError(self._refusal("quantiles"))

    def cdf(self, raw: Float[Tensor, "*shape param"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return P(Y <= y)."""
        raise ModelError(self._refusal("probabilities"))

    def log_tail(self, raw: Float[Tensor, "*shape param"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return log(2 min(F(y), 1 - F(y))), which keeps ordering extremes where ``cdf`` is 0 or 1."""
        raise ModelError(self._refusal("tail probabilities"))

    def log_density(self, raw: Float[Tensor, "*shape param"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the log density at y."""
        raise ModelError(
            f"a {type(self).__name__} has no density; fit with likelihood normal or student_t, or use tail scores"
        )

    def _refusal(self, what: str) -> str:
        return (
            f"a {type(self).__name__} has no {what}; fit with likelihood normal, student_t or quantiles, "
            "or use the conformal calibration"
        )


class PointLikelihood(Likelihood):
    """A location and an error measure."""

    num_params = 1
    has_distribution = False

    def __init__(self, config: Point) -> None:
        super().__init__()
        self.config = config
        self.in_data_units = config.loss in ("msle", "male")

    def loss(
        self, raw: Float[Tensor, "*shape param"], target: Float[Tensor, "*shape"], unit: Tensor | None
    ) -> Float[Tensor, "*shape"]:
        """Return squared, absolute or Huber error, or the first two of logarithms."""
        error = log_or_line(raw[..., 0]) - log_or_line(target) if self.in_data_units else raw[..., 0] - target
        if unit is not None:
            error = error * unit
        if self.config.loss in ("mse", "msle"):
            return error.square()
        if self.config.loss in ("mae", "male"):
            return error.abs()
        return huber_loss(error, torch.zeros_like(error), reduction="none", delta=self.config.huber_delta)


class NormalLikelihood(Likelihood):
    """Normal(location, softplus(raw[1]) + MIN_SCALE)."""

    num_params = 2

    def initial_raw(self, residual_scale: Float[Tensor, "horizon variate"]) -> Float[Tensor, "horizon variate param"]:
        """Return the offset that makes the standard deviation ``residual_scale``."""
        raw = super().initial_raw(residual_scale)
        raw[..., 1] = inverse_softplus((residual_scale - MIN_SCALE).clamp(min=MIN_SCALE))
        return raw

    def scale(self, raw: Float[Tensor, "*shape param"]) -> Float[Tensor, "*shape"]:
        """Return the standard deviation."""
        return softplus(raw[..., 1]) + MIN_SCALE

    def loss(
        self, raw: Float[Tensor, "*shape param"], target: Float[Tensor, "*shape"], unit: Tensor | None
    ) -> Float[Tensor, "*shape"]:
        """Return the negative log density."""
        scale = self.scale(raw)
        return 0.5 * ((target - raw[..., 0]) / scale).square() + torch.log(scale) + 0.5 * math.log(2 * math.pi)

    def log_density(self, raw: Float[Tensor, "*shape param"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the negative loss."""
        return -self.loss(raw, y, None)

    def quantile(self, raw: Float[Tensor, "*shape param"], levels: Sequence[float]) -> Float[Tensor, "*shape level"]:
        """Return location + scale * Normal quantile."""
        p = torch.as_tensor(levels, dtype=torch.float64, device=raw.device)
        z: Tensor = torch.special.ndtri(p).to(raw.dtype)
        return raw[..., 0, None] + self.scale(raw).unsqueeze(-1) * z

    def cdf(self, raw: Float[Tensor, "*shape param"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return P(Y <= y)."""
        probability: Tensor = torch.special.ndtr((y - raw[..., 0]) / self.scale(raw))
        return probability

    def log_tail(self, raw: Float[Tensor, "*shape param"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return log P(|Z| > |z|)."""
        one_sided: Tensor = torch.special.log_ndtr(-((y - raw[..., 0]) / self.scale(raw)).abs())
        return math.log(2) + one_sided


class StudentTLikelihood(Likelihood):
    """Student-t with location, scale softplus(raw[1]) + MIN_SCALE and 2 + softplus(raw[2]) degrees of freedom."""

    num_params = 3

    def initial_raw(self, residual_scale: Float[Tensor, "horizon variate"]) -> Float[Tensor, "horizon variate param"]:
        """Return the offset that makes the standard deviation ``residual_scale`` with START_DF degrees of freedom."""
        raw = super().initial_raw(residual_scale)
        scale = residual_scale * math.sqrt((START_DF - 2) / START_DF)
        raw[..., 1] = inverse_softplus((scale - MIN_SCALE).clamp(min=MIN_SCALE))
        raw[..., 2] = inverse_softplus(torch.full_like(scale, START_DF - MIN_DF))
        return raw

    def scale(self, raw: Float[Tensor, "*shape param"]) -> Float[Tensor, "*shape"]:
        """Return the scale (not the standard deviation, which is larger by sqrt(df / (df - 2)))."""
        return softplus(raw[..., 1]) + MIN_SCALE

    def degrees(self, raw: Float[Tensor, "*shape param"]) -> Float[Tensor, "*shape"]:
        """Return the degrees of freedom."""
        return MIN_DF + softplus(raw[..., 2]) + MIN_SCALE

    def loss(
        self, raw: Float[Tensor, "*shape param"], target: Float[Tensor, "*shape"], unit: Tensor | None
    ) -> Float[Tensor, "*shape"]:
        """Return the negative log density."""
        scale, df = self.scale(raw), self.degrees(raw)
        z = (target - raw[..., 0]) / scale
        return student_t_norm(df) + torch.log(scale) + (df + 1) / 2 * torch.log1p(z.square() / df)

    def log_density(self, raw: Float[Tensor, "*shape param"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return the negative loss."""
        return -self.loss(raw, y, None)

    @torch.no_grad()
    def quantile(self, raw: Float[Tensor, "*shape param"], levels: Sequence[float]) -> Float[Tensor, "*shape level"]:
        """Return location + scale * Student-t quantile (not differentiable)."""
        p = torch.as_tensor(levels, dtype=torch.float64, device=raw.device)
        df = self.degrees(raw.double()).unsqueeze(-1)
        z = student_t.quantile(p.expand(*df.shape[:-1], len(p)), df.expand(*df.shape[:-1], len(p)))
        return (raw[..., 0, None].double() + self.scale(raw.double()).unsqueeze(-1) * z).to(raw.dtype)

    @torch.no_grad()
    def cdf(self, raw: Float[Tensor, "*shape param"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return P(Y <= y) (not differentiable)."""
        raw = raw.double()
        z = (y.double() - raw[..., 0]) / self.scale(raw)
        return student_t.cdf(z, self.degrees(raw)).to(y.dtype)

    @torch.no_grad()
    def log_tail(self, raw: Float[Tensor, "*shape param"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return log P(|T| > |t|) (not differentiable)."""
        raw = raw.double()
        z = (y.double() - raw[..., 0]) / self.scale(raw)
        return student_t.log_two_sided(z, self.degrees(raw)).to(y.dtype)


class QuantilesLikelihood(Likelihood):
    """Median plus softplus steps outwards; linear between levels, exponential tails beyond the outermost two.

    Raw layout: median, steps upwards from the level above 0.5 to the highest, steps downwards likewise. Beyond the
    outermost level the distribution function (or its complement) is exponential and passes through the two outermost
    levels, so a score never saturates.
    """

    levels: Tensor

    def __init__(self, config: Quantiles) -> None:
        super().__init__()
        self.num_params = len(config.levels)
        self.middle = config.levels.index(0.5)
        self.register_buffer("levels", torch.tensor(config.levels, dtype=torch.float64), persistent=False)

    def initial_raw(self, residual_scale: Float[Tensor, "horizon variate"]) -> Float[Tensor, "horizon variate param"]:
        """Return the offset that places the quantiles of a Normal with standard deviation ``residual_scale``."""
        raw = super().initial_raw(residual_scale)
        z = torch.special.ndtri(self.levels.cpu()).to(raw.dtype)
        steps = torch.cat([z[self.middle :].diff(), z[: self.middle + 1].diff().flip(0)])
        raw[..., 1:] = inverse_softplus((residual_scale.unsqueeze(-1) * steps - MIN_STEP).clamp(min=MIN_STEP))
        return raw

    def offsets(self, raw: Float[Tensor, "*shape param"]) -> Float[Tensor, "*shape param"]:
        """Return quantiles minus the median, ascending; exactly 0 at the median."""
        steps = softplus(raw[..., 1:]) + MIN_STEP
        above = self.num_params - 1 - self.middle
        up, down = steps[..., :above].cumsum(-1), steps[..., above:].cumsum(-1)
        return torch.cat([-down.flip(-1), torch.zeros_like(raw[..., :1]), up], dim=-1)

    def loss(
        self, raw: Float[Tensor, "*shape param"], target: Float[Tensor, "*shape"], unit: Tensor | None
    ) -> Float[Tensor, "*shape"]:
        """Return twice the mean pinball loss over the levels (it approaches the CRPS as levels fill (0, 1))."""
        error = (target - raw[..., 0]).unsqueeze(-1) - self.offsets(raw)
        if unit is not None:
            error = error * unit.unsqueeze(-1)
        return 2 * torch.maximum(self.levels.to(raw.dtype) * error, (self.levels.to(raw.dtype) - 1) * error).mean(-1)

    def _rates(self, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the exponential rates of the lower and the upper tail."""
        tau = self.levels.to(offsets.dtype)
        lower = torch.log(tau[1] / tau[0]) / (offsets[..., 1] - offsets[..., 0])
        upper = torch.log((1 - tau[-2]) / (1 - tau[-1])) / (offsets[..., -1] - offsets[..., -2])
        return lower, upper

    def mean(self, raw: Float[Tensor, "*shape param"]) -> Float[Tensor, "*shape"]:
        """Return the integral of the quantile function, tails included."""
        offsets = self.offsets(raw)
        tau = self.levels.to(raw.dtype)
        lower, upper = self._rates(offsets)
        body = ((offsets[..., 1:] + offsets[..., :-1]) / 2 * tau.diff()).sum(-1)
        left = tau[0] * (offsets[..., 0] - 1 / lower)
        right = (1 - tau[-1]) * (offsets[..., -1] + 1 / upper)
        return raw[..., 0] + body + left + right

    def quantile(self, raw: Float[Tensor, "*shape param"], levels: Sequence[float]) -> Float[Tensor, "*shape level"]:
        """Return quantiles at any level, interpolated or extrapolated."""
        offsets = self.offsets(raw)
        tau = self.levels.tolist()
        lower, upper = self._rates(offsets)
        columns = []
        for level in levels:
            if level < tau[0]:
                columns.append(offsets[..., 0] + math.log(level / tau[0]) / lower)
            elif level > tau[-1]:
                columns.append(offsets[..., -1] - math.log((1 - level) / (1 - tau[-1])) / upper)
            else:
                right = max(1, next(i for i, known in enumerate(tau) if level <= known))
                share = (level - tau[right - 1]) / (tau[right] - tau[right - 1])
                columns.append(torch.lerp(offsets[..., right - 1], offsets[..., right], share))
        return raw[..., 0, None] + torch.stack(columns, dim=-1)

    def _log_sides(self, raw: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Return log F(y) and log(1 - F(y)), each accurate in its own tail."""
        offsets = self.offsets(raw)
        tau = self.levels.to(raw.dtype)
        lower, upper = self._rates(offsets)
        z = y - raw[..., 0]
        right = (z.unsqueeze(-1) > offsets).sum(-1).clamp(1, self.num_params - 1)
        start = offsets.gather(-1, (right - 1).unsqueeze(-1)).squeeze(-1)
        stop = offsets.gather(-1, right.unsqueeze(-1)).squeeze(-1)
        share = ((z - start) / (stop - start)).clamp(0, 1)
        inside = torch.lerp(tau[right - 1], tau[right], share)
        below, above = z < offsets[..., 0], z > offsets[..., -1]
        left_tail = torch.log(tau[0]) + lower * (z - offsets[..., 0]).clamp(max=0)
        right_tail = torch.log(1 - tau[-1]) - upper * (z - offsets[..., -1]).clamp(min=0)
        log_cdf = torch.where(below, left_tail, torch.where(above, torch.log1p(-right_tail.exp()), inside.log()))
        log_rest = torch.where(above, right_tail, torch.where(below, torch.log1p(-left_tail.exp()), (1 - inside).log()))
        return log_cdf, log_rest

    def cdf(self, raw: Float[Tensor, "*shape param"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return P(Y <= y), the inverse of ``quantile``."""
        return self._log_sides(raw, y)[0].exp()

    def log_tail(self, raw: Float[Tensor, "*shape param"], y: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """Return log(2 min(F, 1 - F)), falling linearly beyond the outermost levels."""
        log_cdf, log_rest = self._log_sides(raw, y)
        return math.log(2) + torch.minimum(log_cdf, log_rest)


def build_likelihood(config: Point | Normal | StudentT | Quantiles) -> Likelihood:
    """Return the module a likelihood config asks for."""
    if isinstance(config, Point):
        return PointLikelihood(config)
    if isinstance(config, Normal):
        return NormalLikelihood()
    if isinstance(config, StudentT):
        return StudentTLikelihood()
    return QuantilesLikelihood(config)
