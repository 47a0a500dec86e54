"""Backward passes that have no derivative of their own say so whenever a second one is asked for."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch

from tsforge.core.errors import ModelError

R = TypeVar("R")


def first_derivative_only(backward: Callable[..., R]) -> Callable[..., R]:
    """Return the backward pass of an ``autograd.Function`` that refuses to be part of a graph (``create_graph``).

    torch's ``once_differentiable`` refuses only where the incoming gradient itself has a graph, and passes every other
    second derivative on as zero.

    Raises:
        ModelError: in the backward pass, when it is asked for a graph of its own.
    """

    @wraps(backward)
    def checked(ctx: Any, *grads: Any) -> R:
        if torch.is_grad_enabled():
            raise ModelError(
                "a compiled or hand-written gradient has no second derivative; choose a reference backend where "
                "create_graph is needed"
            )
        return backward(ctx, *grads)

    return checked
