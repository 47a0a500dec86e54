"""Models that stream, artifacts of them and rows to take: shared by the tests of streams."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any, Literal

import polars as pl
import torch
from torch import Tensor

from tsforge.artifact import Artifact, collect_provenance, create_artifact
from tsforge.contracts.model import Capabilities, ForecastModel, ModelConfig
from tsforge.contracts.tensors import Batch, DataSpec, Observation, Prediction
from tsforge.core.config import validate
from tsforge.data.frame import SeriesFrame
from tsforge.data.panel import Panel
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.conformal_calibration import Choices, Method, calibrate
from tsforge.models.registry import MODELS
from tsforge.network import NetworkConfig, build_network

START = datetime(2024, 1, 1, tzinfo=UTC)
BEGIN = 180  # hours seen before streaming starts


def hours(count: int) -> datetime:
    return START + timedelta(hours=count)


def rows(frame: SeriesFrame, start: int, stop: int) -> pl.DataFrame:
    """Return the rows of hours [start, stop)."""
    return frame.table.filter(pl.col("time").is_between(hours(start), hours(stop - 1)))


def calibrated(
    artifact: Artifact,
    frame: SeriesFrame,
    levels: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95),
    method: Method = "auto",
) -> Any:
    panel = Panel.from_frame(frame, grid=artifact.grid)
    held_out = WindowDataset(panel, artifact.window, 100, 240)
    return replace(artifact, calibration=calibrate(artifact.network, held_out, levels, choices=Choices(method=method)))


def untrained(frame: SeriesFrame, settings: dict[str, Any], **parts: Any) -> Artifact:
    """Return the artifact of a network with random weights."""
    window = WindowSpec(context_length=parts.pop("context_length", 48), horizon=6)
    config = validate(NetworkConfig, {"model": settings, **parts})
    schema, panel = frame.schema, Panel.from_frame(frame)
    spec = DataSpec(
        context_length=window.context_length,
        horizon=window.horizon,
        num_variates=len(schema.targets),
        num_known=len(schema.known),
        num_past=len(schema.past),
        num_static=len(schema.static),
    )
    network = build_network(config, spec)
    network.fit_scaler(panel.training_series(None, 200))
    with torch.no_grad():
        for parameter in network.model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return create_artifact(
        network,
        config={},
        schema=schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=window,
        provenance=collect_provenance(data_fingerprint="", seeds={}),
    )


class SmootherConfig(ModelConfig):
    name: Literal["smoother"] = "smoother"
    weight: float = 0.3
    fade: float = 0.97
    elapsed: bool = False


class Smoother(ForecastModel[SmootherConfig]):
    """level <- fade * level, then towards y - 2 known where observed; h steps ahead: fade^h level + 2 known."""

    config_class = SmootherConfig
    capabilities = Capabilities(known_covariates=True, past_covariates=True, trainable=False, probabilistic=False)

    @property
    def recurrent(self) -> bool:
        return self.config.fade < 1.0

    @property
    def takes_elapsed(self) -> bool:
        return self.config.elapsed

    def _add(self, known: Tensor | None) -> Tensor | float:
        return 0.0 if known is None else 2.0 * known[..., :1]

    def initial_state(self, batch_size: int) -> dict[str, Tensor]:
        return {"level": torch.zeros(batch_size, self.spec.num_variates)}

    def step(self, state: dict[str, Tensor], row: Observation) -> dict[str, Tensor]:
        elapsed = 1.0 if row.elapsed is None else row.elapsed.unsqueeze(1).float()
        level = self.config.fade**elapsed * state["level"]
        error = row.values - self._add(row.known) - level
        return {"level": level + self.config.weight * torch.where(row.mask, error, 0.0)}

    def warm_up(self, batch: Batch) -> dict[str, Tensor]:
        state = self.initial_state(len(batch.context))
        for t in range(batch.context.shape[1]):
            known = None if batch.known is None else batch.known[:, t]
            state = self.step(state, Observation(batch.context[:, t], batch.context_mask[:, t], known=known))
        return state

    def free_run(self, state: dict[str, Tensor], known: Tensor | None = None) -> Prediction:
        steps = torch.arange(1, self.spec.horizon + 1).view(1, -1, 1)
        mean = self.config.fade**steps * state["level"].unsqueeze(1) + self._add(known)
        return Prediction(mean.unsqueeze(-1))

    def forward(self, batch: Batch) -> Prediction:
        known = None if batch.known is None else batch.known[:, self.spec.context_length :]
        return self.free_run(self.warm_up(batch), known)


class CoupledConfig(ModelConfig):
    name: Literal["coupled"] = "coupled"


class Coupled(ForecastModel[CoupledConfig]):
    """Forecasts the mean of the last rows of all series."""

    config_class = CoupledConfig
    capabilities = Capabilities(rows_coupled=True, trainable=False, probabilistic=False, scaling=("none",))

    def forward(self, batch: Batch) -> Prediction:
        mean = batch.context[:, -3:].mean(dim=(0, 1)) + batch.context[:, -1]
        return Prediction(mean[:, None, :, None].expand(-1, self.spec.horizon, -1, 1))


class CoupledSmootherConfig(SmootherConfig):
    name: Literal["coupled_smoother"] = "coupled_smoother"


class CoupledSmoother(Smoother):
    """Adds the mean of all series to each."""

    config_class = CoupledSmootherConfig
    capabilities = Capabilities(rows_coupled=True, trainable=False, probabilistic=False, scaling=("none",))

    def free_run(self, state: dict[str, Tensor], known: Tensor | None = None) -> Prediction:
        return Prediction(super().free_run(state).raw + state["level"].mean())


@contextmanager
def streaming_models() -> Iterator[None]:
    """Register the models of this module for a while."""
    with (
        MODELS.borrowed("smoother", Smoother),
        MODELS.borrowed("coupled", Coupled),
        MODELS.borrowed("coupled_smoother", CoupledSmoother),
    ):
        yield
