"""Schedules: against torch's own schedulers, and integers against tensors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.optim import lr_scheduler

from puretrain.errors import ConfigurationError
from puretrain.optim import schedules
from puretrain.optim.schedules import (
    constant,
    cosine,
    cosine_restarts,
    exponential,
    join,
    linear,
    multi_step,
    one_cycle,
    piecewise,
    polynomial,
    step,
    warmup,
    warmup_cosine,
)

LR = 0.3
STEPS = 400


def torch_values(make, count=STEPS):
    """The learning rates that a scheduler of torch sets, one for each update."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    scheduler = make(optimizer)
    values = []
    for _ in range(count):
        values.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return values


def torch_one_cycle(**arguments):
    return lambda optimizer: lr_scheduler.OneCycleLR(
        optimizer, LR, total_steps=STEPS, cycle_momentum=False, **arguments
    )


def torch_sequence(optimizer):
    parts = [
        lr_scheduler.LinearLR(optimizer, 0.25, 1.0, total_iters=30),
        lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.02),
        lr_scheduler.StepLR(optimizer, 50, gamma=0.5),
    ]
    return lr_scheduler.SequentialLR(optimizer, parts, milestones=[30, 130])


PAIRS = {
    "constant": (
        piecewise({0: LR * 0.4, 70: LR}),
        lambda o: lr_scheduler.ConstantLR(o, factor=0.4, total_iters=70),
    ),
    "linear": (
        linear(LR * 0.1, LR * 0.8, 150),
        lambda o: lr_scheduler.LinearLR(o, 0.1, 0.8, total_iters=150),
    ),
    "cosine": (cosine(LR, STEPS), lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS)),
    "cosine to a value": (
        cosine(LR, STEPS - 1, final=0.07),
        lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS - 1, eta_min=0.07),
    ),
    "restarts": (
        cosine_restarts(LR, 37, final=0.01),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 37, eta_min=0.01),
    ),
    "longer restarts": (
        cosine_restarts(LR, 7, multiplier=3),
        lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 7, T_mult=3),
    ),
    "step": (step(LR, 45, gamma=0.3), lambda o: lr_scheduler.StepLR(o, 45, gamma=0.3)),
    "multi_step": (
        multi_step(LR, [100, 20, 100, 333], gamma=0.6),
        lambda o: lr_scheduler.MultiStepLR(o, [100, 20, 100, 333], gamma=0.6),
    ),
    "exponential": (exponential(LR, 0.97), lambda o: lr_scheduler.ExponentialLR(o, 0.97)),
    "polynomial": (
        polynomial(LR, 300, power=1.7),
        lambda o: lr_scheduler.PolynomialLR(o, total_iters=300, power=1.7),
    ),
    "join": (
        join(
            [linear(LR / 4, LR, 30), cosine(LR, 100, final=0.02), step(LR, 50, gamma=0.5)],
            [30, 130],
        ),
        torch_sequence,
    ),
    "warmup": (
        warmup(exponential(LR, 0.99), 25, start=LR * 0.2),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, 0.2, total_iters=25),
                lr_scheduler.ExponentialLR(o, 0.99),
            ],
            [25],
        ),
    ),
    "warmup_cosine": (
        warmup_cosine(LR, 40, STEPS, start=LR / 10, final=0.001),
        lambda o: lr_scheduler.SequentialLR(
            o,
            [
                lr_scheduler.LinearLR(o, 0.1, total_iters=40),
                lr_scheduler.CosineAnnealingLR(o, STEPS - 40, eta_min=0.001),
            ],
            [40],
        ),
    ),
}
for _anneal, _name in (("cosine", "cos"), ("linear", "linear")):
    for _three in (False, True):
        for _start in (0.3, 0.123, 0.0, 0.5):
            PAIRS[f"one_cycle {_name} {_three} {_start}"] = (
                one_cycle(
                    LR,
                    STEPS,
                    pct_start=_start,
                    anneal=_anneal,
                    div_factor=10.0,
                    final_div_factor=50.0,
                    three_phase=_three,
                ),
                torch_one_cycle(
                    pct_start=_start,
                    anneal_strategy=_name,
                    div_factor=10.0,
                    final_div_factor=50.0,
                    three_phase=_three,
                ),
            )

MORE = {
    "constant value": constant(0.25),
    "points, linear": piecewise({3: 0.1, 10: 0.9, 11: 0.2, 90: 0.4}, interpolate="linear"),
    "points, cosine": piecewise([(0, 0.1), (100, 0.9)], interpolate="cosine"),
    "one point": piecewise({5: 0.1}, interpolate="linear"),
    "polynomial to a value": polynomial(0.4, 90, power=0.5, final=0.1),
    "late start": join([constant(0.0), warmup_cosine(1.0, 0, 20), step(0.5, 3)], [7, 60]),
}
ALL = {name: schedule for name, (schedule, _) in PAIRS.items()} | MORE


@pytest.mark.filterwarnings("ignore:The epoch parameter")  # torch's SequentialLR warns of itself
@pytest.mark.parametrize("name", PAIRS)
def test_the_values_are_those_of_torch(name):
    schedule, make = PAIRS[name]
    count = STEPS - 1 if name.startswith("one_cycle") else STEPS  # torch's ends there
    expected = torch_values(make, count)
    got = [schedule(n) for n in range(count)]
    assert len(set(got)) > 1
    assert all(type(value) is float for value in got)
    assert got == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", ["restarts", "longer restarts", "one_cycle cos False 0.3"])
def test_closed_forms_of_torch_are_met_to_the_bit(name):
    schedule, make = PAIRS[name]
    assert [schedule(n) for n in range(STEPS - 1)] == torch_values(make, STEPS - 1)


@pytest.mark.parametrize("name", ALL)
def test_integers_and_tensors_agree(name):
    schedule = ALL[name]
    counts = [*range(STEPS + 20), 10_000, 2**40]
    numbers = torch.tensor([schedule(n) for n in counts], dtype=torch.float64)
    together = schedule(torch.tensor(counts))
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, numbers, rtol=1e-14, atol=1e-16)

    one = schedule(torch.tensor(counts[50]))
    assert one.dtype == torch.float64
    assert one.shape == ()
    torch.testing.assert_close(one, numbers[50], rtol=1e-14, atol=1e-16)
    assert schedule(torch.tensor(counts).reshape(2, -1)).shape == (2, len(counts) // 2)
    batched = torch.func.vmap(schedule)(torch.tensor(counts))
    torch.testing.assert_close(batched, together, rtol=1e-15, atol=1e-16)


def test_a_long_run_stays_where_it_ends():
    assert cosine(1.0, 10, final=0.25)(10**9) == 0.25
    assert one_cycle(1.0, 10, div_factor=2.0, final_div_factor=4.0)(10**9) == 0.125
    assert piecewise({1: 3.0, 2: 4.0}, interpolate="cosine")(10**9) == 4.0
    assert piecewise({4: 3.0, 9: 4.0})(0) == 3.0


@given(st.integers(1, 50), st.integers(2, 4), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_restarts_agree_with_a_count_by_hand(period, multiplier, n):
    start, length = 0, period
    while n >= start + length:
        start, length = start + length, length * multiplier
    schedule = cosine_restarts(2.0, period, multiplier=multiplier, final=0.5)
    expected = 0.5 + 1.5 * (1 + math.cos(math.pi * (n - start) / length)) / 2
    assert schedule(n) == pytest.approx(expected, rel=1e-13)
    assert float(schedule(torch.tensor(n))) == pytest.approx(expected, rel=1e-13)


FAMILIES = {
    "constant": constant,
    "linear": lambda v: linear(0.1 * v, v, 20),
    "cosine": lambda v: cosine(v, 50, final=0.1 * v),
    "cosine_restarts": lambda v: cosine_restarts(v, 4, multiplier=2),
    "warmup_cosine": lambda v: warmup_cosine(v, 10, 40, start=v * 0.01),
    "step": lambda v: step(v, 7, gamma=0.5),
    "multi_step": lambda v: multi_step(v, [3, 9]),
    "exponential": lambda v: exponential(v, 0.9),
    "polynomial": lambda v: polynomial(v, 12, power=0.5),
    "one_cycle": lambda v: one_cycle(v, 60),
    "piecewise": lambda v: piecewise({0: v, 10: 2 * v}),
    "piecewise linear": lambda v: piecewise({0: v, 10: 2 * v}, interpolate="linear"),
    "join": lambda v: join([polynomial(v, 12, power=0.5), constant(0.5 * v)], [12]),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_value_may_be_a_tensor(name):
    # every family is linear in its value, so its derivative is the schedule of 1
    family = FAMILIES[name]
    unit = family(1.0)
    for n in (0, 5, 11, 12, 30, 1000):
        for count in (n, torch.tensor(n)):
            slope = torch.func.grad(lambda v, count=count: family(v)(count))(torch.tensor(0.3))
            assert float(slope) == pytest.approx(unit(n), rel=1e-6)
    rates = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    counts = torch.tensor([0, 5, 30])
    swept = torch.func.vmap(lambda v, count: family(v)(count))(rates, counts)
    expected = [family(float(v))(int(n)) for v, n in zip(rates, counts, strict=True)]
    assert swept.tolist() == pytest.approx(expected, rel=1e-13)
    assert torch.func.vmap(lambda v: family(v)(5))(rates).tolist() == pytest.approx(
        [family(float(v))(5) for v in rates], rel=1e-13
    )


def test_compiled():
    names = ["warmup_cosine", "longer restarts", "one_cycle cos True 0.3", "points, linear", "join"]

    def rates(count):
        return torch.stack([ALL[name](count) for name in names])

    compiled = torch.compile(rates, backend="eager", fullgraph=True)
    for n in (0, 31, 200):
        count = torch.tensor(n)
        torch.testing.assert_close(compiled(count), rates(count), rtol=0, atol=0)


def test_a_schedule_of_ones_own_joins():
    own = join([lambda count: 0.5, lambda count: 2.0 / (count + 1)], [3])
    assert [own(n) for n in range(5)] == [0.5, 0.5, 0.5, 2.0, 1.0]
    values = own(torch.arange(5))
    assert values.dtype == torch.float64
    torch.testing.assert_close(values, torch.tensor([0.5, 0.5, 0.5, 2.0, 1.0]).double())


def test_a_part_need_not_be_finite_outside_of_its_own_range():
    def rate(v, count):
        parts = [constant(v), lambda n: v * torch.log1p(n.double()) + 1, constant(1.0)]
        return join(parts, [3, 6])(count)

    for n, slope in ((2, 1.0), (3, 0.0), (5, math.log(3)), (6, 0.0)):
        gradient = torch.func.grad(rate)(torch.tensor(0.5), torch.tensor(n))
        assert float(gradient) == pytest.approx(slope, rel=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: constant("0.1"), "value must be a finite number or a tensor, not '0.1'"),
        (lambda: constant(float("nan")), "value must be a finite number"),
        (lambda: constant(True), "value must be a finite number"),
        (lambda: linear(0.0, 1.0, 0), "steps is a whole number from 1, not 0"),
        (lambda: linear(0.0, None, 5), "final must be a finite number"),
        (lambda: cosine(1.0, 10.0), r"steps is a whole number from 1, not 10\.0"),
        (lambda: cosine(1.0, 10, final="x"), "final must be"),
        (lambda: cosine_restarts(1.0, 0), "period is a whole number from 1"),
        (lambda: cosine_restarts(1.0, 5, multiplier=0), "multiplier is a whole number from 1"),
        (lambda: warmup_cosine(1.0, 10, 10), "warmup_steps must be less than steps"),
        (lambda: warmup_cosine(1.0, -1, 10), "warmup_steps is a whole number from 0"),
        (lambda: step(1.0, 0), "step_size is a whole number from 1"),
        (lambda: step(1.0, 5, gamma=-0.1), "gamma must be at least 0"),
        (lambda: multi_step(1.0, [3, -1]), "each of milestones is a whole number from 0"),
        (lambda: exponential(1.0, float("inf")), "gamma must be a finite number"),
        (lambda: polynomial(1.0, 5, power=0.0), "power must be greater than 0"),
        (lambda: one_cycle(1.0, 10, pct_start=1.5), r"pct_start must be a number from 0 to 1\.0"),
        (lambda: one_cycle(1.0, 10, pct_start=0.6, three_phase=True), "0.5 with three_phase"),
        (lambda: one_cycle(1.0, 10, anneal="cos"), "anneal must be 'linear' or 'cosine'"),
        (lambda: one_cycle(1.0, 10, div_factor=0.0), "div_factor must be greater than 0"),
        (lambda: piecewise({}), "points must be at least one"),
        (lambda: piecewise([(5, 1.0), (5, 2.0)]), "points must be .* at increasing"),
        (lambda: piecewise({0: 1.0}, interpolate="cubic"), "interpolate must be"),
        (lambda: join([constant(1.0)], [5]), "milestones must be increasing and one fewer"),
        (lambda: join([constant(1.0), 0.1], [5]), r"schedules must be functions .*constant\("),
        (lambda: join([], []), "milestones must be increasing and one fewer"),
        (lambda: warmup(0.1, 5), r"schedule must be a function .*constant\("),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ConfigurationError, match=message):
        make()


def test_everything_public_is_tested_here():
    assert set(schedules.__all__) <= set(globals())
