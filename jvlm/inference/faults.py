"""What fails in a step of the engine, and whose answers that ends."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from jvlm.errors import UserError
from jvlm.inference.requests import StepFailed
from jvlm.inference.scheduling.plans import Decode, Encode, Plan, Prefill

if TYPE_CHECKING:
    from jvlm.inference.device_state import DeviceState

# Of the host, before a program runs: what the device keeps is as it was.
HOST_ERRORS = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, UserError)


def request_ids(plans: Mapping[int, Plan]) -> list[str]:
    """Return the requests that plans compute something for."""
    names = [name for plan in plans.values() for name, _ in _parts(plan)]
    return list(dict.fromkeys(names))


def faulty_requests(device: DeviceState, plans: Mapping[int, Plan], active: Mapping[str, Any]) -> dict[str, Exception]:
    """Return the requests whose part of a plan cannot be made into arrays even alone, each with its error."""
    found: dict[str, Exception] = {}
    for group, plan in plans.items():
        for name, part in _parts(plan):
            try:
                device.pack(group, part, active)
            except HOST_ERRORS as error:
                found[name] = error
    return found


def without(plans: Mapping[int, Plan], names: Collection[str]) -> dict[int, Plan]:
    """Return the plans without some requests; none that is empty then."""
    left: dict[int, Plan] = {}
    for group, plan in plans.items():
        parts = [part for name, part in _parts(plan) if name not in names]
        if parts and isinstance(plan, Encode):
            left[group] = Encode(tuple(picture for part in parts for picture in part.pictures))
        elif parts and isinstance(plan, Prefill):
            left[group] = Prefill(tuple(chunk for part in parts for chunk in part.chunks))
    return left


def error_of(problem: Exception) -> Exception:
    """Return what a request is told: its own mistake, or that the step failed."""
    if isinstance(problem, UserError | StepFailed):
        return problem
    error = StepFailed(f"the request could not be computed: {type(problem).__name__}: {problem}")
    error.__cause__ = problem
    return error


def lasting_failure(leaves: Collection[Any]) -> str | None:
    """Return why nothing can be computed any more after an error of the device; None if it works."""
    if any(leaf.is_deleted() for leaf in leaves):
        return "the parameters are lost"
    try:
        for device in sorted({d for leaf in leaves for d in leaf.devices()}, key=lambda d: d.id):
            np.asarray(jax.device_put(np.ones(8, np.float32), device))
    except jax.errors.JaxRuntimeError as error:
        return f"the device does not answer: {error}"
    return None


def _parts(plan: Plan) -> Iterator[tuple[str, Plan]]:
    """Yield (request, its part of a plan); a decoding plan has one part for each request and cannot be taken apart."""
    if isinstance(plan, Encode):
        yield from ((picture.request_id, Encode((picture,))) for picture in plan.pictures)
    elif isinstance(plan, Prefill):
        yield from ((chunk.row.request_id, Prefill((chunk,))) for chunk in plan.chunks)
    elif isinstance(plan, Decode):
        yield from ((row.request_id, plan) for row in plan.rows)
