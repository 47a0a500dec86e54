"""The conformance suite of models: what every registered model must hold, importable by outside packages.

Each check takes a model class and the settings of one test configuration and raises ``AssertionError`` with what broke.
``CHECKS`` lists them in order; a model that is known to fail one states the reason beside itself, in a class attribute
``known_failures = {"check_skill": "reason"}``.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tsforge.artifact import create_artifact, load_artifact, save_artifact
from tsforge.contracts.model import Capabilities, ForecastModel, Recurrent
from tsforge.contracts.tensors import Batch, DataSpec, Observation
from tsforge.core.config import compose, to_yaml, validate
from tsforge.core.errors import ConfigError, TsforgeError
from tsforge.data.windows import WindowDataset, WindowSpec
from tsforge.forecasting.attribution_path import Output, path_integral, read_inputs
from tsforge.models.registry import MODELS
from tsforge.network import ForecastNetwork, NetworkConfig, build_network
from tsforge.testing.generators import (
    SEASON,
    declared_spec,
    make_batch,
    make_series,
    seasonal_panel,
    series_batch,
)
from tsforge.training.config import TrainConfig
from tsforge.training.hooks import StopTraining
from tsforge.training.loop import evaluate_windows, fit_network
from tsforge.training.module import parameter_groups

Model = type[ForecastModel[Any]]
Check = Callable[[Model, dict[str, Any]], None]
_USUAL_RATE = 1e-2  # learning rate that parameters without a cap bear
LONGEST_MINIMUM = 64  # context length by which every test configuration must build


def model_name(model_cls: Model) -> str:
    """Return the name in the model's config."""
    return str(model_cls.config_class.model_fields["name"].default)


@contextmanager
def installed(model_cls: Model) -> Iterator[str]:
    """Make a class known to the registry for the time of a check (outside models, saboteurs)."""
    with MODELS.borrowed(model_name(model_cls), model_cls):
        yield model_name(model_cls)


def capabilities_of(model_cls: Model, settings: dict[str, Any]) -> Capabilities:
    """Return what the model can do with these settings."""
    return model_cls.capabilities_of(model_cls.config_class.model_validate(settings))


def build_model(model_cls: Model, settings: dict[str, Any], spec: DataSpec, *, seed: int = 0) -> ForecastModel[Any]:
    """Return a model in evaluation mode whose weights depend on ``seed`` only."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return model_cls(model_cls.config_class.model_validate(settings), spec).eval()


def build_net(
    model_cls: Model, settings: dict[str, Any], spec: DataSpec, *, seed: int = 0, **parts: Any
) -> ForecastNetwork:
    """Return an untrained network around the model."""
    with installed(model_cls) as name:
        config = NetworkConfig.model_validate({"model": {"name": name, **settings}, **parts})
        return build_network(config, spec, seed=seed).eval()


def _shake(module: nn.Module, *, seed: int = 1, size: float = 0.3) -> None:
    """Add noise to every parameter, so that parts that start at zero take part in the check.

    Parameters whose learning rate is capped (``optim_rules``) are delicate and move in proportion to the cap.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for owner in module.modules():
            rules = getattr(owner, "optim_rules", {})
            for name, parameter in owner.named_parameters(recurse=False):
                cap = rules[name].max_learning_rate if name in rules else None
                part = size if cap is None else size * min(cap / _USUAL_RATE, 1.0)
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * part)


def _close(first: Tensor, second: Tensor, what: str, *, rtol: float = 1e-4, atol: float = 1e-4) -> None:
    assert first.shape == second.shape, f"{what}: shapes {tuple(first.shape)} and {tuple(second.shape)}"
    gap = (first - second).abs() - rtol * second.abs()
    assert bool((gap <= atol).all()), f"{what}: differs by up to {float((first - second).abs().max()):.3g}"


def _without_target(batch: Batch) -> Batch:
    return batch._replace(target=None, target_mask=None)


def _raw(model: ForecastModel[Any], batch: Batch) -> Tensor:
    with torch.no_grad():
        return model(_without_target(batch)).raw  # type: ignore[no-any-return]


def check_config(model_cls: Model, settings: dict[str, Any]) -> None:
    """1: builds from its settings and from its YAML; the config round-trips, is frozen and refuses unknown keys."""
    config = model_cls.config_class.model_validate(settings)
    again = validate(model_cls.config_class, config.model_dump(mode="json"))
    assert again == config, "the config changes when it is written and read back"
    assert to_yaml(again) == to_yaml(config)
    assert model_cls.config_class.model_config.get("frozen"), "the config can be changed after it was made"
    try:
        model_cls.config_class.model_validate({**settings, "no_such_setting": 1})
    except ValueError:
        pass
    else:
        raise AssertionError("an unknown setting is accepted")
    build_model(model_cls, settings, declared_spec(capabilities_of(model_cls, settings)))
    if model_cls.__module__.startswith("tsforge.models."):
        name = model_name(model_cls)
        assert model_cls.__module__ == f"tsforge.models.{name}", f"model '{name}' lives in {model_cls.__module__}"
        validate(model_cls.config_class, compose(f"model/{name}"))


def shortest_context(model_cls: Model, settings: dict[str, Any], **sizes: int) -> int:
    """Return the least context length these settings build with; shorter ones must be refused with a tsforge error."""
    for length in range(1, LONGEST_MINIMUM + 1):
        try:
            build_model(
                model_cls, settings, declared_spec(capabilities_of(model_cls, settings), context_length=length, **sizes)
            )
        except TsforgeError:
            continue
        return length
    raise AssertionError(f"does not build with any context_length up to {LONGEST_MINIMUM}")


def check_shapes(model_cls: Model, settings: dict[str, Any]) -> None:
    """2: ``raw`` is [B, H, V, K] and finite, also for one variate, one step, the shortest and a blind context."""
    least = shortest_context(model_cls, settings)
    for length, horizon, variates, params in ((16, 4, 2, 1), (16, 1, 1, 3), (least, 3, 3, 2), (least, 1, 1, 1)):
        spec = declared_spec(
            capabilities_of(model_cls, settings),
            context_length=length,
            horizon=horizon,
            num_variates=variates,
            num_params=params,
        )
        model = build_model(model_cls, settings, spec)
        width = params if capabilities_of(model_cls, settings).probabilistic else 1
        for size, gaps in ((5, 0.3), (1, 0.0), (2, 1.1)):
            raw = _raw(model, make_batch(spec, size=size, gaps=gaps))
            expected = {(size, horizon, variates, width), (size, horizon, variates, params)}
            expected = expected if width == 1 else {(size, horizon, variates, params)}
            assert tuple(raw.shape) in expected, f"raw has shape {tuple(raw.shape)}, expected one of {sorted(expected)}"
            assert bool(torch.isfinite(raw).all()), f"raw is not finite with a share of {min(gaps, 1):.0%} unobserved"


def check_target_unused(model_cls: Model, settings: dict[str, Any]) -> None:
    """3: changing or removing the target changes nothing."""
    spec = declared_spec(capabilities_of(model_cls, settings))
    model = build_model(model_cls, settings, spec)
    _shake(model)
    batch = make_batch(spec)
    assert batch.target is not None
    with torch.no_grad():
        bare = model(_without_target(batch)).raw
        for target in (batch.target, batch.target * -3 + 1, torch.full_like(batch.target, torch.nan)):
            _close(model(batch._replace(target=target)).raw, bare, "the forecast reads the target", rtol=0, atol=0)


def check_rows(model_cls: Model, settings: dict[str, Any]) -> None:
    """4: rows of a batch are independent; where they are coupled, permuting rows permutes forecasts."""
    spec = declared_spec(capabilities_of(model_cls, settings))
    model = build_model(model_cls, settings, spec)
    _shake(model)
    batch = make_batch(spec, size=6)
    whole = _raw(model, batch)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = Batch._make(None if part is None else part[order] for part in batch)
    _close(_raw(model, shuffled), whole[order], "the order of rows changes forecasts")
    if not capabilities_of(model_cls, settings).rows_coupled:
        for row in range(6):
            alone = Batch._make(None if part is None else part[row : row + 1] for part in batch)
            _close(_raw(model, alone)[0], whole[row], "a row is forecast differently alone")


def check_mask(model_cls: Model, settings: dict[str, Any]) -> None:
    """5: through the network, values under a False mask change nothing, neither in training spans nor in windows."""
    spec = declared_spec(capabilities_of(model_cls, settings))
    data = make_series(spec, gaps=0.15)
    outputs = []
    for poison in (0.0, 1e6, float("nan")):
        dirty = data._replace(values=torch.where(data.mask, data.values, poison))
        network = build_net(model_cls, settings, spec)
        network.fit_scaler(dirty)
        network.prepare(dirty)
        network.solve(dirty)
        batch = series_batch(spec, dirty)
        assert not bool(batch.context_mask.all())
        outputs.append((network.predict(batch).mean, network.loss(batch)["loss"]))
    for mean, loss in outputs[1:]:
        _close(mean, outputs[0][0], "hidden values change the forecast", rtol=0, atol=0)
        _close(loss, outputs[0][1], "hidden values change the loss", rtol=0, atol=0)


def check_covariates(model_cls: Model, settings: dict[str, Any]) -> None:
    """6: an undeclared covariate is refused; the forecast depends on every declared kind."""
    capabilities = capabilities_of(model_cls, settings)
    bare = declared_spec(capabilities, num_known=0, num_past=0, num_static=0)
    for kind in ("known", "past", "static"):
        if getattr(capabilities, f"{kind}_covariates"):
            continue
        refusal = ""
        try:
            build_net(model_cls, settings, replace(bare, **{f"num_{kind}": 1}))
        except ConfigError as error:
            refusal = str(error)
        assert kind in refusal, (
            f"an undeclared {kind} covariate is accepted, or its refusal does not say so: '{refusal}'"
        )
    spec = declared_spec(capabilities)
    model = build_model(model_cls, settings, spec)
    _shake(model)
    batch = _without_target(make_batch(spec))
    for kind in ("known", "past", "static"):
        values = getattr(batch, kind)
        if values is None:
            continue
        values = values.clone().requires_grad_()
        raw = model(batch._replace(**{kind: values})).raw
        (gradient,) = torch.autograd.grad(raw.square().sum(), values, allow_unused=True)
        assert gradient is not None, f"the declared {kind} covariates are ignored"
        per_column = gradient.abs().flatten(0, -2).sum(0)
        assert bool((per_column > 0).all()), f"some declared {kind} covariates are ignored"


def check_gradients(model_cls: Model, settings: dict[str, Any]) -> None:
    """7: every trainable parameter receives a finite gradient; untrainable models have none."""
    for params in (1, 3):
        spec = declared_spec(capabilities_of(model_cls, settings), num_params=params)
        model = build_model(model_cls, settings, spec).train()
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert capabilities_of(model_cls, settings).trainable or not names, (
            f"declared untrainable, but has parameters {names}"
        )
        if not names:
            assert not capabilities_of(model_cls, settings).trainable, "declared trainable, but has no parameters"
            return
        _shake(model)
        prediction = model(_without_target(make_batch(spec)))
        total = prediction.raw.square().sum()
        for loss in (prediction.aux_losses or {}).values():
            total = total + loss
        if prediction.context_raw is not None:
            total = total + prediction.context_raw.square().sum()
        total.backward()
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert parameter.grad is not None, f"parameter {name} receives no gradient"
                assert bool(torch.isfinite(parameter.grad).all()), f"the gradient of {name} is not finite"


def check_overfit(model_cls: Model, settings: dict[str, Any]) -> None:
    """8: gradient steps overfit one small batch of noiseless seasons: a twentieth of the variance is left after 300.

    Fewer steps do where ten in a row leave less than a hundredth: a dip on the way to another place is not enough.
    """
    if not capabilities_of(model_cls, settings).trainable:
        return
    spec = declared_spec(capabilities_of(model_cls, settings))
    length = spec.context_length
    batch = make_batch(spec, size=4, gaps=0.0)
    steps = torch.arange(length + spec.horizon) + torch.arange(4).unsqueeze(1) * 3
    wave = torch.sin(2 * torch.pi * steps / SEASON).unsqueeze(-1).expand(-1, -1, spec.num_variates) * 1.4142
    batch = batch._replace(context=wave[:, :length].contiguous(), target=wave[:, length:].contiguous())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build_model(model_cls, settings, spec).train()
        optimizer = torch.optim.Adam(parameter_groups(model, learning_rate=0.02, weight_decay=0.0))
        assert batch.target is not None
        steady = 0
        for _ in range(300):
            optimizer.zero_grad()
            loss = (model(_without_target(batch)).raw[..., 0] - batch.target).square().mean()
            steady = steady + 1 if loss.item() < 0.01 else 0
            if steady == 10:
                return
            loss.backward()
            optimizer.step()
    assert loss.item() < 0.05, f"300 steps leave {loss.item():.1%} of the variance of one batch"


def check_seeds(model_cls: Model, settings: dict[str, Any]) -> None:
    """9: one seed, one fit, bit by bit; another seed, other initial weights (unless solved in closed form)."""
    spec = declared_spec(capabilities_of(model_cls, settings))
    states = [build_model(model_cls, settings, spec, seed=seed).state_dict() for seed in (0, 0, 1)]
    assert _equal(states[0], states[1]), "the same seed gives other weights"
    capabilities = capabilities_of(model_cls, settings)
    if capabilities.trainable and not capabilities.closed_form:
        assert not _equal(states[0], states[2]), "another seed gives the same weights"
    fits = []
    for noise in (1, 2):
        torch.manual_seed(noise)  # the state of the caller must not matter
        fits.append(_quick_fit(model_cls, settings, max_epochs=2)[0].state_dict())
    assert _equal(fits[0], fits[1]), "two fits with the same seed differ"


def _equal(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return list(first) == list(second) and all(
        torch.equal(first[name].nan_to_num(), second[name].nan_to_num()) for name in first
    )


def _quick_fit(
    model_cls: Model, settings: dict[str, Any], *, max_epochs: int, share: float | None = None
) -> tuple[ForecastNetwork, WindowDataset, WindowDataset]:
    """Fit on the seasonal set; return the network with its training and its test windows.

    With ``share`` training ends once the validation error is below that share of the seasonal naive's.
    """
    panel = seasonal_panel()
    window = WindowSpec(context_length=3 * SEASON, horizon=4)
    spec = DataSpec(context_length=3 * SEASON, horizon=4, num_variates=2, train_length=400)
    coupled = capabilities_of(model_cls, settings).rows_coupled
    parts = [WindowDataset(panel, window, *span, aligned=coupled) for span in ((None, 400), (400, 500), (500, None))]
    train, valid, test = parts
    network = build_net(model_cls, settings, spec)
    config = TrainConfig(
        max_epochs=max_epochs, batch_size=32, learning_rate=0.01, schedule="one_cycle", seed=0, accelerator="cpu"
    )

    def enough(_: int, metrics: dict[str, float]) -> None:
        if share is not None and metrics["valid_mse"] < share * _naive_error(network, valid):
            raise StopTraining

    series = panel.training_series(None, 400)
    fit_network(network, train, valid, config, series=series, on_epoch=enough, progress=False)
    return network, train, test


def _naive_error(network: ForecastNetwork, windows: WindowDataset) -> float:
    """Return the mean squared error of the seasonal naive in scaled units."""
    total, count = 0.0, 0
    for batch in windows.batches(256):
        scaled = network.scaler.scale(batch)
        assert scaled.target is not None
        again = scaled.context[:, -SEASON:][:, : scaled.target.shape[1]]
        total += float((again - scaled.target).square().sum())
        count += scaled.target.numel()
    return total / count


def check_artifact(model_cls: Model, settings: dict[str, Any]) -> None:
    """10: a saved and loaded network forecasts bit by bit the same."""
    network, train, _ = _quick_fit(model_cls, settings, max_epochs=1)
    panel = train.panel
    artifact = create_artifact(
        network,
        config={},
        schema=panel.schema,
        grid=panel.grid,
        series_ids=panel.series_ids,
        window=train.spec,
        provenance={},
    )
    with TemporaryDirectory() as folder, installed(model_cls):
        path = save_artifact(artifact, Path(folder)).path
        assert path is not None
        loaded = load_artifact(path)
    assert _equal(network.state_dict(), loaded.network.state_dict()), "weights or buffers change on the way"
    batch = train.__getitems__([0, 7, 100])
    _close(loaded.network.predict(batch).mean, network.predict(batch).mean, "the loaded model", rtol=0, atol=0)
    assert list(loaded.network.components(batch)) == list(network.components(batch))


def check_dtypes(model_cls: Model, settings: dict[str, Any]) -> None:
    """11: float64 agrees with float32 (1e-3 of the size) and is kept as such."""
    spec = declared_spec(capabilities_of(model_cls, settings))
    model = build_model(model_cls, settings, spec)
    _shake(model)
    batch = make_batch(spec)
    single = _raw(model, batch)
    wide = Batch._make(part.double() if part is not None and part.is_floating_point() else part for part in batch)
    double = _raw(model.double(), wide)
    assert double.dtype == torch.float64, f"float64 in, {double.dtype} out"
    _close(single.double(), double, "float32 and float64", rtol=1e-3, atol=1e-3)


def check_recurrent(model_cls: Model, settings: dict[str, Any]) -> None:
    """13: where declared recurrent, carrying the state row by row, warming up and ``forward`` forecast the same."""
    spec = declared_spec(capabilities_of(model_cls, settings))
    model = build_model(model_cls, settings, spec)
    if not model.recurrent:
        return
    assert isinstance(model, Recurrent), "declared recurrent, but lacks initial_state, warm_up, step or free_run"
    _shake(model)
    batch = _without_target(make_batch(spec))
    length = spec.context_length
    ahead = None if batch.known is None else batch.known[:, length:]
    whole = _raw(model, batch)
    with torch.no_grad():
        state = model.warm_up(batch)
        _close(model.free_run(state, ahead).raw, whole, "warmed up and all at once", rtol=1e-3, atol=1e-4)
        for name, part in state.items():
            assert part.shape[0] == len(batch.context), f"state '{name}' does not hold one entry a series"
        if not _normalises(model):
            state = model.initial_state(len(batch.context), batch.static)
            for row in _rows(batch, length):
                state = model.step(state, row)
            _close(model.free_run(state, ahead).raw, whole, "step by step and all at once", rtol=1e-3, atol=1e-4)


def _normalises(model: nn.Module) -> bool:
    """Return whether the model takes its own statistics of a context, so that only ``warm_up`` equals ``forward``."""
    return bool(getattr(model, "normalises", False))


def _rows(batch: Batch, length: int) -> Iterator[Observation]:
    for step in range(length):
        yield Observation(
            values=batch.context[:, step],
            mask=batch.context_mask[:, step],
            past=None if batch.past is None else batch.past[:, step],
            known=None if batch.known is None else batch.known[:, step],
        )


def check_units(model_cls: Model, settings: dict[str, Any]) -> None:
    """14: through the network, y -> a y + b with a > 0 maps forecasts and components alike.

    With scaling ``series_max``, which moves nothing, b is 0; ``none`` promises nothing.
    """
    a = 5.0
    spec = declared_spec(capabilities_of(model_cls, settings))
    data = make_series(spec)
    for kind in capabilities_of(model_cls, settings).scaling:
        if kind == "none":
            continue
        b = 0.0 if kind == "series_max" else -70.0
        other = data._replace(values=torch.where(data.mask, a * data.values + b, 0.0))
        results = []
        for span in (data, other):
            network = build_net(model_cls, settings, spec, scaling={"kind": kind})
            network.fit_scaler(span)
            network.prepare(span)
            network.solve(span)
            batch = series_batch(spec, span)
            results.append((network.predict(batch).mean, network.components(batch)))
        (mean, parts), (mapped, mapped_parts) = results
        _close(a * mean + b, mapped, f"scaling {kind}: another unit", rtol=2e-3, atol=0.05)
        if parts:
            total = torch.stack(list(parts.values())).sum(0)
            location = network.predict(series_batch(spec, other)).mean
            _close(
                torch.stack(list(mapped_parts.values())).sum(0),
                location,
                "components do not sum to the forecast",
                rtol=1e-3,
                atol=0.01,
            )
            _close(a * total + b, location, f"scaling {kind}: components in another unit", rtol=2e-3, atol=0.05)


def check_hooks(model_cls: Model, settings: dict[str, Any]) -> None:
    """15: ``prepare`` twice equals once, ``anneal`` touches no weights, hooks leave forecasts usable."""
    spec = declared_spec(capabilities_of(model_cls, settings))
    model = build_model(model_cls, settings, spec)
    data, batch = make_series(spec), make_batch(spec)
    model.prepare(data)
    once = {name: value.clone() for name, value in model.state_dict().items()}
    model.prepare(data)
    assert _equal(once, model.state_dict()), "preparing twice differs from preparing once"
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for progress in (0.0, 0.37, 1.0):
        model.anneal(progress)
        now = {name: parameter.detach() for name, parameter in model.named_parameters()}
        assert _equal(weights, now), f"anneal({progress}) changes weights"
    assert bool(torch.isfinite(_raw(model, batch)).all())


def check_explained(model_cls: Model, settings: dict[str, Any]) -> None:
    """18: contributions of the inputs to a forecast add up to its difference from that of the baseline."""
    spec = declared_spec(capabilities_of(model_cls, settings))
    network = build_net(model_cls, settings, spec)
    data = make_series(spec)
    network.fit_scaler(data)
    network.prepare(data)
    network.solve(data)
    _shake(network.model)
    batch = series_batch(spec, data)
    if not network.capabilities.rows_coupled:
        batch = Batch(**{name: part[:1] for name, part in batch._asdict().items() if part is not None})
    inputs = read_inputs(network, batch, "mean")
    output = Output(row=0, steps=np.arange(spec.horizon), variate=1)
    points, weights = np.polynomial.legendre.leggauss(48)
    cells = path_integral(network, inputs, output, (points + 1) / 2, weights / 2, chunk=48)
    with torch.no_grad():
        ends = [
            output.of(network, inputs.batch_of(inputs.at(torch.tensor([alpha]))), inputs.rows)[0].double()
            for alpha in (1.0, 0.0)
        ]
    moved = sum(np.abs(part).sum(axis=tuple(range(1, part.ndim))) for part in cells.values())
    total = sum(part.sum(axis=tuple(range(1, part.ndim))) for part in cells.values())
    left = np.abs((ends[0] - ends[1]).numpy() - total)
    allowed = 0.03 * moved + 1e-3 * float(network.scaler.global_scale.mean())
    assert (left <= allowed).all(), f"contributions miss the forecast by {left.max():.3g}, they move {moved.max():.3g}"
    for kind, part in cells.items():
        assert not part[:, ~inputs.seen[kind].numpy()].any(), f"{kind}: a cell that was not observed contributes"


def check_context_outputs(model_cls: Model, settings: dict[str, Any]) -> None:
    """19: ``context_raw``, where there is one, was declared, is finite and covers the last steps of the context."""
    spec = declared_spec(capabilities_of(model_cls, settings))
    batch = make_batch(spec)
    model = build_model(model_cls, settings, spec)
    for found in (model(_without_target(batch)).context_raw, model.train()(batch).context_raw):
        if found is None:
            continue
        assert capabilities_of(model_cls, settings).context_outputs, "context_raw is filled, context_outputs undeclared"
        size, steps, *rest = found.shape
        expected = (len(batch.context), spec.num_variates, spec.num_params)
        assert (size, *rest) == expected, f"context_raw has shape {tuple(found.shape)}"
        assert 0 < steps <= spec.context_length, f"context_raw covers {steps} of {spec.context_length} steps"
        assert bool(torch.isfinite(found).all()), "context_raw is not finite"


def check_skill(model_cls: Model, settings: dict[str, Any]) -> None:
    """16: a trainable model beats the seasonal naive on the generated seasonal set after at most 20 small epochs."""
    if not capabilities_of(model_cls, settings).trainable:
        return
    network, _, test = _quick_fit(model_cls, settings, max_epochs=20, share=0.75)
    error, naive = evaluate_windows(network, test, 256)["valid_mse"], _naive_error(network, test)
    assert error < 0.9 * naive, f"mean squared error {error:.4f}, seasonal naive {naive:.4f}"


def check_source(model_cls: Model, settings: dict[str, Any]) -> None:
    """17: names its paper with a year (or says it is a definition); class, module and config are documented."""
    source = model_cls.source
    assert source.startswith("Definition") or re.search(r"\((19|20)\d\d\)", source), f"source '{source}' names no paper"
    assert model_cls.__doc__ not in (None, "", ForecastModel.__doc__), "the class says nothing"
    module = sys.modules[model_cls.__module__]
    assert (module.__doc__ or "").strip(), f"module {module.__name__} says nothing"
    tree = ast.parse(inspect.getsource(module))
    names = [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]
    assert "print" not in names, f"{module.__name__} prints"


CHECKS: tuple[Check, ...] = (
    check_config,
    check_shapes,
    check_target_unused,
    check_rows,
    check_mask,
    check_covariates,
    check_gradients,
    check_overfit,
    check_seeds,
    check_artifact,
    check_dtypes,
    check_recurrent,
    check_units,
    check_hooks,
    check_context_outputs,
    check_skill,
    check_source,
    check_explained,
)
