"""Schedules: hyper-parameters, such as a learning rate, as functions of the number of updates.

A schedule is called with ``n``, the number of updates done so far (0 for the first one). Given an
integer it returns a float, computed with :mod:`math`; given a tensor (of any shape, also inside of
``vmap``, ``grad`` or ``torch.compile``) a float64 tensor of that shape. Both follow one formula and
agree up to the rounding of ``cos`` and ``pow``.

Where torch has a scheduler of the kind, the values are the same, except that every schedule here is
written in closed form: torch multiplies the last value by a ratio in many of its schedulers, which
drifts in the last digits.

The values of a schedule may themselves be tensors of shape ``()``, for example to differentiate
a loss by the peak of the learning rate, or to ``vmap`` over several; then the results are tensors.
"""

from __future__ import annotations

import math
import numbers
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from puretrain.errors import ConfigurationError, check_whole
from puretrain.optim.base import Schedule

__all__ = [
    "constant",
    "cosine",
    "cosine_restarts",
    "exponential",
    "join",
    "linear",
    "multi_step",
    "one_cycle",
    "piecewise",
    "polynomial",
    "step",
    "warmup",
    "warmup_cosine",
]

Anneal = Literal["linear", "cosine"]


# ── Schedules ─────────────────────────────────────────────────────────────────────────────────────


def constant(value: float | Tensor) -> Schedule:
    """The same value for ever.

    ``torch.optim.lr_scheduler.ConstantLR`` is :func:`piecewise` with two values.

    >>> constant(0.1)(1000)
    0.1
    """
    level = _real("value", value)
    return lambda count: level + 0 * _number(count)


def linear(start: float | Tensor, final: float | Tensor, steps: int) -> Schedule:
    """A straight line from ``start`` to ``final``, which stays there.

    ``start + (final - start) · min(n, steps) / steps``, as ``torch.optim.lr_scheduler.LinearLR``.

    Args:
        start: the value at ``n = 0``.
        final: the value from ``n = steps`` on.
        steps: the number of updates between the two, at least 1.

    Raises:
        ConfigurationError: an argument is out of its range.

    >>> schedule = linear(0.0, 1.0, 4)
    >>> [schedule(n) for n in range(6)]
    [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    """
    first, last = _real("start", start), _real("final", final)
    steps = check_whole("steps", steps)
    return lambda count: first + (last - first) * (_at_most(_number(count), steps) / steps)


def cosine(value: float | Tensor, steps: int, *, final: float | Tensor = 0.0) -> Schedule:
    """Half a period of a cosine from ``value`` down to ``final``, which stays there.

    ``final + (value - final) · (1 + cos(π · min(n, steps) / steps)) / 2``, from Loshchilov &
    Hutter, `SGDR <https://arxiv.org/abs/1608.03983>`_ (2017), without its restarts. The first
    ``steps`` values are those of ``torch.optim.lr_scheduler.CosineAnnealingLR``, which climbs back
    afterwards.

    Args:
        value: the value at ``n = 0``.
        steps: the number of updates until ``final`` is reached, at least 1.
        final: the value from ``n = steps`` on.

    Raises:
        ConfigurationError: an argument is out of its range.

    >>> schedule = cosine(1.0, 100)
    >>> schedule(0), round(schedule(50), 9), schedule(100), schedule(500)
    (1.0, 0.5, 0.0, 0.0)
    >>> schedule(torch.tensor([0, 100]))
    tensor([1., 0.], dtype=torch.float64)
    """
    first, last = _real("value", value), _real("final", final)
    steps = check_whole("steps", steps)
    return lambda count: _half_cosine(first, last, _at_most(_number(count), steps), steps)


def cosine_restarts(
    value: float | Tensor, period: int, *, multiplier: int = 1, final: float | Tensor = 0.0
) -> Schedule:
    """A cosine that starts again from ``value`` at the end of every period.

    ``final + (value - final) · (1 + cos(π · m / p)) / 2`` for update ``m`` of the current period,
    which is ``p`` updates long; from Loshchilov & Hutter,
    `SGDR <https://arxiv.org/abs/1608.03983>`_ (2017). As
    ``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts``.

    Args:
        value: the value at the start of a period.
        period: the number of updates in the first period (torch's ``T_0``), at least 1.
        multiplier: each period is so many times as long as the last (torch's ``T_mult``).
        final: the value that a period approaches; it restarts before reaching it.

    Raises:
        ConfigurationError: an argument is out of its range.

    >>> schedule = cosine_restarts(1.0, 2, multiplier=2)
    >>> [round(schedule(n), 3) for n in range(7)]
    [1.0, 0.5, 1.0, 0.854, 0.5, 0.146, 1.0]
    """
    first, last = _real("value", value), _real("final", final)
    period = check_whole("period", period)
    multiplier = check_whole("multiplier", multiplier)
    if multiplier == 1:
        return lambda count: _half_cosine(first, last, _number(count) % period, period)
    starts, lengths = [0], [period]
    while starts[-1] < 2**62:
        starts.append(starts[-1] + lengths[-1])
        lengths.append(lengths[-1] * multiplier)

    def schedule(count: int | Tensor) -> Any:
        n = _number(count)
        current = _position(starts[1:], n)
        return _half_cosine(first, last, n - _pick(starts, current), _pick(lengths, current))

    return schedule


def warmup_cosine(
    peak: float | Tensor,
    warmup_steps: int,
    steps: int,
    *,
    start: float | Tensor = 0.0,
    final: float | Tensor = 0.0,
) -> Schedule:
    """A straight line from ``start`` up to ``peak``, then half a cosine down to ``final``.

    The same as ``warmup(cosine(peak, steps - warmup_steps, final=final), warmup_steps,
    start=start)``.

    Args:
        peak: the value at ``n = warmup_steps``.
        warmup_steps: the number of updates before the peak; 0 for none.
        steps: the number of updates until ``final`` is reached, those of the warm-up included.
        start: the value at ``n = 0``.
        final: the value from ``n = steps`` on.

    Raises:
        ConfigurationError: an argument is out of its range.

    >>> schedule = warmup_cosine(1.0, 10, 110)
    >>> schedule(0), schedule(5), schedule(10), round(schedule(60), 9), schedule(110)
    (0.0, 0.5, 1.0, 0.5, 0.0)
    """
    warmup_steps = check_whole("warmup_steps", warmup_steps, 0)
    steps = check_whole("steps", steps)
    if warmup_steps >= steps:
        raise ConfigurationError(
            f"warmup_steps must be less than steps, which counts both parts; "
            f"they are {warmup_steps} and {steps}"
        )
    top = _real("peak", peak)
    return warmup(cosine(top, steps - warmup_steps, final=final), warmup_steps, start=start)


def step(value: float | Tensor, step_size: int, *, gamma: float | Tensor = 0.1) -> Schedule:
    """Multiply the value by ``gamma`` after every ``step_size`` updates.

    ``value · gamma ** (n // step_size)``, as ``torch.optim.lr_scheduler.StepLR``.

    >>> schedule = step(1.0, 30, gamma=0.5)
    >>> schedule(29), schedule(30), schedule(60)
    (1.0, 0.5, 0.25)
    """
    first, factor = _real("value", value), _real("gamma", gamma, at_least=0.0)
    step_size = check_whole("step_size", step_size)
    return lambda count: first * factor ** (_number(count) // step_size)


def multi_step(
    value: float | Tensor, milestones: Iterable[int], *, gamma: float | Tensor = 0.1
) -> Schedule:
    """Multiply the value by ``gamma`` at each milestone.

    ``value · gamma ** k`` where ``k`` is the number of milestones up to ``n``, as
    ``torch.optim.lr_scheduler.MultiStepLR``. A milestone named twice counts twice.

    >>> schedule = multi_step(1.0, [10, 30], gamma=0.5)
    >>> schedule(9), schedule(10), schedule(30)
    (1.0, 0.5, 0.25)
    """
    first, factor = _real("value", value), _real("gamma", gamma, at_least=0.0)
    bounds = sorted(check_whole("each of milestones", bound, 0) for bound in milestones)
    return lambda count: first * factor ** _position(bounds, _number(count))


def exponential(value: float | Tensor, gamma: float | Tensor) -> Schedule:
    """Multiply the value by ``gamma`` after every update.

    ``value · gamma ** n``, as ``torch.optim.lr_scheduler.ExponentialLR``.

    >>> schedule = exponential(1.0, 0.5)
    >>> [schedule(n) for n in range(4)]
    [1.0, 0.5, 0.25, 0.125]
    """
    first, factor = _real("value", value), _real("gamma", gamma, at_least=0.0)
    return lambda count: first * factor ** _number(count)


def polynomial(
    value: float | Tensor,
    steps: int,
    *,
    power: float | Tensor = 1.0,
    final: float | Tensor = 0.0,
) -> Schedule:
    """A power of the remaining fraction of the run, from ``value`` down to ``final``.

    ``final + (value - final) · (1 - min(n, steps) / steps) ** power``, as
    ``torch.optim.lr_scheduler.PolynomialLR``, whose ``final`` is 0.

    Args:
        value: the value at ``n = 0``.
        steps: the number of updates until ``final`` is reached, at least 1.
        power: the exponent, positive; 1 is a straight line.
        final: the value from ``n = steps`` on.

    Raises:
        ConfigurationError: an argument is out of its range.

    >>> schedule = polynomial(1.0, 10, power=2.0)
    >>> schedule(0), schedule(5), schedule(10)
    (1.0, 0.25, 0.0)
    """
    first, last = _real("value", value), _real("final", final)
    exponent = _real("power", power, above=0.0)
    steps = check_whole("steps", steps)

    def schedule(count: int | Tensor) -> Any:
        remaining = 1.0 - _at_most(_number(count), steps) / steps
        return last + (first - last) * remaining**exponent

    return schedule


def one_cycle(
    peak: float | Tensor,
    steps: int,
    *,
    pct_start: float = 0.3,
    anneal: Anneal = "cosine",
    div_factor: float | Tensor = 25.0,
    final_div_factor: float | Tensor = 1e4,
    three_phase: bool = False,
) -> Schedule:
    """One climb to ``peak`` and one descent far below the start.

    From ``peak / div_factor`` to ``peak`` during the first ``pct_start`` of the run, then down to
    ``peak / div_factor / final_div_factor`` at its end; from Smith & Topin,
    `Super-convergence <https://arxiv.org/abs/1708.07120>`_ (2018). As
    ``torch.optim.lr_scheduler.OneCycleLR``, which raises an error after the last step where this
    one stays at its last value. Torch changes the momentum as well; for that see :func:`piecewise`.

    Args:
        peak: the largest value (torch's ``max_lr``).
        steps: the number of updates in the run (torch's ``total_steps``), at least 1.
        pct_start: the fraction of the run spent climbing, between 0 and 1.
        anneal: the shape of the phases, ``"cosine"`` or ``"linear"``.
        div_factor: ``peak`` divided by the value at the start, positive.
        final_div_factor: the value at the start divided by the one at the end, positive.
        three_phase: descend to the value of the start as fast as it was climbed, and only then to
            the last value. ``pct_start`` is at most 0.5 then.

    Raises:
        ConfigurationError: an argument is out of its range.

    >>> schedule = one_cycle(1.0, 101, pct_start=0.5, anneal="linear")
    >>> schedule(0), round(schedule(50), 2), round(schedule(100), 9)
    (0.04, 0.99, 4e-06)
    """
    top = _real("peak", peak)
    low = top / _real("div_factor", div_factor, above=0.0)
    lowest = low / _real("final_div_factor", final_div_factor, above=0.0)
    steps = check_whole("steps", steps)
    limit = 0.5 if three_phase else 1.0
    if not isinstance(pct_start, numbers.Real) or not 0.0 <= pct_start <= limit:
        raise ConfigurationError(
            f"pct_start must be a number from 0 to {limit}"
            + (" with three_phase" if three_phase else "")
            + f", not {pct_start!r}"
        )
    summit = float(pct_start * steps) - 1
    if three_phase:
        edges: list[float] = [0.0, summit, float(2 * pct_start * steps) - 2, steps - 1]
        levels = [low, top, low, lowest]
    else:
        edges, levels = [0.0, summit, steps - 1], [low, top, lowest]
    return _curve(edges, levels, _anneal(anneal))


def piecewise(
    points: Mapping[int, float | Tensor] | Iterable[tuple[int, float | Tensor]],
    *,
    interpolate: Anneal | None = None,
) -> Schedule:
    """Values given at some updates; in between the last one, or interpolated.

    Args:
        points: for some ``n``, in increasing order, the value from there on. The first value holds
            before the first point as well.
        interpolate: how to go from one point to the next: None jumps, ``"linear"`` draws a straight
            line, ``"cosine"`` half a period of a cosine. After the last point its value stays.

    Raises:
        ConfigurationError: an argument is out of its range.

    ``torch.optim.lr_scheduler.ConstantLR`` is ``piecewise({0: lr * factor, total_iters: lr})``. The
    momentum of ``OneCycleLR`` is ``piecewise({0: high, top: low, steps - 1: high},
    interpolate="cosine")`` with ``top = pct_start * steps - 1``.

    >>> schedule = piecewise({0: 1.0, 10: 0.5, 20: 0.1})
    >>> schedule(9), schedule(10), schedule(1000)
    (1.0, 0.5, 0.1)
    >>> piecewise({0: 0.0, 10: 1.0, 20: 0.0}, interpolate="linear")(15)
    0.5
    """
    pairs = list(points.items() if isinstance(points, Mapping) else points)
    edges = [check_whole("each key of points", n, 0) for n, _ in pairs]
    levels = [_real("points", value) for _, value in pairs]
    if not pairs or any(b <= a for a, b in pairwise(edges)):
        raise ConfigurationError(
            f"points must be at least one, at increasing numbers of updates; they are at {edges}"
        )
    if interpolate is None:
        return lambda count: _pick(levels, _position(edges[1:], _number(count)))
    anneal = _anneal(interpolate, "interpolate")
    if len(pairs) == 1:
        return constant(levels[0])
    return _curve(edges, levels, anneal)


# ── Schedules out of schedules ────────────────────────────────────────────────────────────────────


def join(schedules: Sequence[Schedule], milestones: Sequence[int]) -> Schedule:
    """One schedule after another, each of which counts from its own start.

    As ``torch.optim.lr_scheduler.SequentialLR``.

    Args:
        schedules: at least one.
        milestones: the update at which the second, third, … schedule begins, in increasing order.

    Raises:
        ConfigurationError: an argument is out of its range.

    >>> schedule = join([linear(0.0, 1.0, 10), exponential(1.0, 0.5)], [10])
    >>> schedule(5), schedule(10), schedule(12)
    (0.5, 1.0, 0.25)
    """
    parts = list(schedules)
    for part in parts:
        if not callable(part):
            raise ConfigurationError(
                f"schedules must be functions of the number of updates, not {part!r}; "
                "for a number use constant(…)"
            )
    bounds = [check_whole("each of milestones", bound) for bound in milestones]
    if len(bounds) != len(parts) - 1 or any(b <= a for a, b in pairwise(bounds)):
        raise ConfigurationError(
            f"milestones must be increasing and one fewer than the schedules, of which there are "
            f"{len(parts)}; they are {bounds}"
        )
    starts = [0, *bounds]

    def schedule(count: int | Tensor) -> Any:
        if not isinstance(count, Tensor):
            current = bisect_right(bounds, count)
            return parts[current](count - starts[current])
        value = _double(parts[0](count.clamp(max=bounds[0]) if bounds else count))
        for index in range(1, len(parts)):
            # A schedule need not be finite, nor differentiable, outside of its own part.
            end = bounds[index] if index < len(bounds) else None
            inside = count.clamp(min=starts[index], max=end) - starts[index]
            value = torch.where(count < starts[index], value, _double(parts[index](inside)))
        return value

    return schedule


def warmup(schedule: Schedule, steps: int, *, start: float | Tensor = 0.0) -> Schedule:
    """A straight line up to the first value of a schedule, then that schedule.

    ``start + (schedule(0) - start) · n / steps`` while ``n < steps``, then ``schedule(n - steps)``.
    As ``SequentialLR([LinearLR(start_factor=f), …], [steps])`` of torch, with
    ``start = f * schedule(0)``.

    Args:
        schedule: any schedule.
        steps: the number of updates in front of it; 0 for none.
        start: the value at ``n = 0``.

    Raises:
        ConfigurationError: an argument is out of its range.

    >>> warm = warmup(step(1.0, 30), 10)
    >>> warm(0), warm(5), warm(10), warm(39), warm(40)
    (0.0, 0.5, 1.0, 1.0, 0.1)
    """
    if not callable(schedule):
        raise ConfigurationError(
            f"schedule must be a function of the number of updates, not {schedule!r}; "
            "for a number use constant(…)"
        )
    first = _real("start", start)
    steps = check_whole("steps", steps, 0)
    if steps == 0:
        return schedule

    def rise(count: int | Tensor) -> Any:
        return first + (schedule(0) - first) * (_number(count) / steps)

    return join([rise, schedule], [steps])


# ── Arithmetic that is the same for numbers and tensors ───────────────────────────────────────────


def _number(count: int | Tensor) -> Any:
    # Any: what follows is written once, for ints and for float64 tensors
    return count.to(torch.float64) if isinstance(count, Tensor) else count


def _double(value: float | Tensor) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float64)


def _at_most(n: Any, limit: int) -> Any:
    return n.clamp(max=limit) if isinstance(n, Tensor) else min(n, limit)


def _cos(x: Any) -> Any:
    return torch.cos(x) if isinstance(x, Tensor) else math.cos(x)


def _half_cosine(start: Any, end: Any, n: Any, steps: Any) -> Any:
    return end + (start - end) * (1 + _cos(math.pi * n / steps)) / 2


def _position(bounds: Sequence[float], n: Any) -> Any:
    """How many of the increasing bounds are at most ``n``: an int, or a float64 tensor."""
    if not isinstance(n, Tensor):
        return bisect_right(bounds, n)
    edges = torch.tensor(bounds, dtype=torch.float64, device=n.device)
    return (n.unsqueeze(-1) >= edges).sum(-1).to(torch.float64)


def _pick(values: Sequence[Any], index: Any) -> Any:
    """``values[index]`` for what :func:`_position` returns."""
    if not isinstance(index, Tensor):
        return values[index]
    if any(isinstance(value, Tensor) for value in values):
        table = torch.stack([_double(value).to(index.device) for value in values])
    else:
        table = torch.tensor(values, dtype=torch.float64, device=index.device)
    # indexing with a tensor of shape () would read its value, which a transform can't
    return table.index_select(0, index.to(torch.int64).reshape(-1)).reshape(index.shape)


def _curve(edges: Sequence[float], levels: Sequence[Any], anneal: Callable[..., Any]) -> Schedule:
    # Torch takes the earlier of two segments at the point where they meet, so the later one begins
    # at the next whole number. The edges themselves need not be whole.
    bounds = [math.floor(edge) + 1 for edge in edges[1:-1]]

    def schedule(count: int | Tensor) -> Any:
        n = _number(count)
        current = _position(bounds, n)
        left, right = _pick(edges[:-1], current), _pick(edges[1:], current)
        start, end = _pick(levels[:-1], current), _pick(levels[1:], current)
        if isinstance(n, Tensor):
            width = right - left
            share = torch.where(width > 0, (n - left) / torch.where(width > 0, width, 1.0), 1.0)
            return anneal(start, end, share.clamp(0.0, 1.0))
        fraction = (n - left) / (right - left) if right > left else 1.0
        return anneal(start, end, min(max(fraction, 0.0), 1.0))

    return schedule


def _anneal(name: str, argument: str = "anneal") -> Callable[..., Any]:
    if name == "linear":
        return lambda start, end, fraction: (end - start) * fraction + start
    if name == "cosine":
        return lambda start, end, f: end + (start - end) / 2.0 * (_cos(math.pi * f) + 1)
    raise ConfigurationError(f"{argument} must be 'linear' or 'cosine', not {name!r}")


# ── Arguments ─────────────────────────────────────────────────────────────────────────────────────


def _real(
    name: str, value: Any, *, at_least: float | None = None, above: float | None = None
) -> Any:
    """A float, or a float64 tensor, whose values can't be looked at (it may be traced)."""
    if isinstance(value, Tensor):
        return value.to(torch.float64)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ConfigurationError(f"{name} must be a finite number or a tensor, not {value!r}")
    if at_least is not None and value < at_least:
        raise ConfigurationError(f"{name} must be at least {at_least:g}, not {value!r}")
    if above is not None and value <= above:
        raise ConfigurationError(f"{name} must be greater than {above:g}, not {value!r}")
    return float(value)
