"""One fitted map as a piecewise-linear function of numpy float64: its kinks, regions and affine pieces.

Every variant but the deep PLRNN arrives in the shallow form F(z) = A*z + W1 relu(W2 z + h2) + h1 (or its clipped
version, which is a shallow map with 2H units). Here it is reduced once to the units that really bend it:

    F(z) = L z + c + W relu(V z + v)

Units that share a hyperplane are merged, and a pair w relu(x) + u relu(-x) becomes (w + u) relu(x) - u x. So the linear
units of an AL-RNN, written as relu(x) - relu(-x), leave no kink, and sign patterns are the regions of the map itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tsforge.core.errors import ModelError
from tsforge.ops.plrnn import Shallow

Array = NDArray[np.float64]
Pattern = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class PiecewiseLinear:
    """F(z) = linear z + constant + weight relu(normal z + offset), float64.

    Attributes:
        linear: (M, M); constant: (M,).
        weight: (M, H), normal: (H, M), offset: (H,): the H units that bend the map, each with a hyperplane of its own.
    """

    linear: Array
    constant: Array
    weight: Array
    normal: Array
    offset: Array

    @property
    def latent(self) -> int:
        """Number of latent units M."""
        return len(self.constant)

    @property
    def kinks(self) -> int:
        """Number of hyperplanes H at which the map bends."""
        return len(self.offset)

    def step(self, z: Array) -> Array:
        """Return F(z) for states z (..., M)."""
        active = np.maximum(z @ self.normal.T + self.offset, 0.0)
        return z @ self.linear.T + self.constant + active @ self.weight.T

    def pattern(self, z: Array) -> Pattern:
        """Return the region of each state (..., M): one boolean for each of the H units (..., H)."""
        return (z @ self.normal.T + self.offset) > 0.0

    def orbit(self, z: Array, steps: int) -> Array:
        """Return z, F(z), ..., F^steps(z) stacked in front: (steps + 1, ..., M)."""
        states = np.empty((steps + 1, *z.shape))
        states[0] = z
        for index in range(steps):
            states[index + 1] = self.step(states[index])
        return states

    def jacobian(self, pattern: Pattern) -> Array:
        """Return the Jacobian (..., M, M) inside the regions pattern (..., H)."""
        return self.linear + (pattern[..., None, :] * self.weight) @ self.normal

    def affine(self, patterns: Pattern) -> tuple[Array, Array]:
        """Compose the affine pieces of k consecutive regions: patterns (..., k, H) to P (..., M, M) and q (..., M).

        While the orbit of z visits these regions in turn, F^k(z) = P z + q.
        """
        shape = patterns.shape[:-2]
        product = np.broadcast_to(np.eye(self.latent), (*shape, self.latent, self.latent))
        shift = np.zeros((*shape, self.latent))
        for index in range(patterns.shape[-2]):
            mask = patterns[..., index, :]
            jacobian = self.jacobian(mask)
            shift = (jacobian @ shift[..., None])[..., 0] + (mask * self.offset) @ self.weight.T + self.constant
            product = jacobian @ product
        return product, shift


def piecewise_linear(params: Shallow, *, clipped: bool = False) -> PiecewiseLinear:
    """Reduce the shallow form of one group to its kinks.

    Args:
        params: numpy arrays or tensors A (M,), W1 (M, H), W2 (H, M), h1 (M,), h2 (H,).
        clipped: read them as the clipped map A*z + W1 [relu(W2 z + h2) - relu(W2 z)] + h1.

    Raises:
        ModelError: parameters of several groups, shapes that do not fit, or values that are not finite.
    """
    arrays = {name: as_float64(getattr(params, name)) for name in ("A", "W1", "W2", "h1", "h2")}
    if arrays["A"].ndim != 1:
        raise ModelError(
            f"the analysis of a map takes one group: A must be (M,), not {arrays['A'].shape}; "
            "pick one group of every parameter first"
        )
    latent, hidden = len(arrays["A"]), arrays["h2"].size
    expected = {"A": (latent,), "W1": (latent, hidden), "W2": (hidden, latent), "h1": (latent,), "h2": (hidden,)}
    for name, array in arrays.items():
        if array.shape != expected[name]:
            raise ModelError(f"parameter {name} of the map must be {expected[name]}, not {array.shape}")
        if not np.isfinite(array).all():
            raise ModelError(f"parameter {name} of the map is not finite: the training has diverged, train it again")
    weight, normal, offset = arrays["W1"], arrays["W2"], arrays["h2"]
    if clipped:  # 2H units: +W1 with threshold h2, -W1 with threshold 0
        weight = np.concatenate([weight, -weight], axis=1)
        normal = np.concatenate([normal, normal])
        offset = np.concatenate([offset, np.zeros(hidden)])
    return _merge(np.diag(arrays["A"]), arrays["h1"].copy(), weight, normal, offset)


def as_float64(values: Any) -> Array:
    """Return an array or a tensor on any device as numpy float64."""
    if hasattr(values, "detach"):
        values = values.detach().cpu().numpy()
    return np.asarray(values, dtype=np.float64)


def checked_states(states: Any, latent: int) -> Array:
    """Return states (T, M) as float64.

    Raises:
        ModelError: another shape, no row, or values that are not finite.
    """
    array = as_float64(states)
    if array.ndim != 2 or array.shape[1] != latent or not len(array):
        raise ModelError(f"states must be (T, {latent}) with at least one row, not {array.shape}")
    if not np.isfinite(array).all():
        raise ModelError("states contain values that are not finite; drop the rows with missing entries first")
    return array


def _merge(linear: Array, constant: Array, weight: Array, normal: Array, offset: Array) -> PiecewiseLinear:
    """Merge units on the same hyperplane row and drop those that no longer bend the map."""
    linear = linear.copy()
    rows = np.concatenate([normal, offset[:, None]], axis=1) + 0.0  # + 0.0 turns -0.0 into 0.0: keys are bytes
    kept: dict[bytes, int] = {}
    merged = np.zeros_like(weight)
    for index, row in enumerate(rows):
        if not normal[index].any():  # no hyperplane: a constant
            constant = constant + weight[:, index] * max(offset[index], 0.0)
            continue
        mirror = kept.get((-row + 0.0).tobytes())
        if mirror is None:
            merged[:, kept.setdefault(row.tobytes(), index)] += weight[:, index]
        else:  # u relu(-x) = u relu(x) - u x
            merged[:, mirror] += weight[:, index]
            linear -= np.outer(weight[:, index], normal[mirror])
            constant = constant - weight[:, index] * offset[mirror]
    bends = merged.any(axis=0)
    return PiecewiseLinear(linear, constant, merged[:, bends], normal[bends], offset[bends])
