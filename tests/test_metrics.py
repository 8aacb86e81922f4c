"""Metrics: hand values, scikit-learn, the laws of a monoid, vmap."""

import math

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from puretrain import metrics
from puretrain.errors import ConfigurationError, StructureError
from puretrain.metrics import (
    Accuracy,
    Confusion,
    Count,
    Max,
    Mean,
    Min,
    Std,
    Sum,
    Variance,
    as_metric,
    compute_all,
    functional,
    merge_all,
    merge_trees,
)
from puretrain.metrics.monoids import accumulate
from puretrain.tree import FrozenDict, Record, tree_equal, tree_leaves, tree_map

CLASSES = 4
quick = settings(max_examples=40, deadline=None)


@st.composite
def labels(draw, at_least=0):
    count = draw(st.integers(at_least, 30))
    column = st.lists(st.integers(0, CLASSES - 1), min_size=count, max_size=count)
    return torch.tensor(draw(column), dtype=torch.int64), torch.tensor(
        draw(column), dtype=torch.int64
    )


whole_numbers = st.lists(st.integers(-1000, 1000), max_size=8).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
numbers = st.lists(st.floats(-1e6, 1e6), max_size=8).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
pairs = labels()

# metrics of whole numbers, whose sums are exact, so that the laws hold to the bit
EXACT = {
    "mean": (whole_numbers.map(lambda v: Mean.of(v, 3)), Mean.zero()),
    "sum": (whole_numbers.map(Sum.of), Sum.zero()),
    "min": (whole_numbers.map(Min.of), Min.zero()),
    "max": (whole_numbers.map(Max.of), Max.zero()),
    "count": (numbers.map(lambda v: Count.of(v > 0)), Count.zero()),
    "accuracy": (pairs.map(lambda p: Accuracy.of(*p)), Accuracy.zero()),
    "confusion": (
        pairs.map(lambda p: Confusion.of(*p, CLASSES, report="f1")),
        Confusion.zero(CLASSES, report="f1"),
    ),
}


def same_value(a, b, **tolerance):
    torch.testing.assert_close(a.compute(), b.compute(), equal_nan=True, **tolerance)


@pytest.mark.parametrize("name", EXACT)
def test_the_laws_of_a_monoid_hold_exactly(name):
    strategy, zero = EXACT[name]

    @given(strategy, strategy, strategy)
    @quick
    def check(a, b, c):
        assert tree_equal(a.merge(b).merge(c), a.merge(b.merge(c)))
        assert tree_equal(a.merge(b), b.merge(a))
        assert tree_equal(zero.merge(a), a.merge(zero))
        assert all(map(torch.equal, tree_leaves(zero.merge(a)), tree_leaves(a)))
        same_value(zero.merge(a), a)

    check()


@given(numbers, numbers, numbers)
@quick
def test_real_numbers_merge_up_to_rounding(x, y, z):
    for make in (Mean.of, Sum.of, Variance.of, lambda v: Std.of(v, correction=0)):
        a, b, c = make(x), make(y), make(z)
        whole = make(torch.cat([x, y, z]))
        for merged in (a.merge(b).merge(c), a.merge(b.merge(c)), merge_all([c, a, b])):
            same_value(merged, whole, rtol=1e-9, atol=1e-4)
    zero, a = Variance.zero(), Variance.of(x)
    assert all(map(torch.equal, tree_leaves(zero.merge(a)), tree_leaves(a)))
    assert all(map(torch.equal, tree_leaves(a.merge(zero)), tree_leaves(a)))


@given(labels(at_least=1))
@quick
def test_scikit_learn_agrees(pair):
    predicted, target = pair
    every = list(range(CLASSES))
    confusion = Confusion.of(predicted, target, CLASSES)
    half = len(target) // 2
    merged = Confusion.of(predicted[:half], target[:half], CLASSES).merge(
        Confusion.of(predicted[half:], target[half:], CLASSES)
    )
    assert tree_equal(merged, confusion)
    expected = sklearn.metrics.confusion_matrix(target, predicted, labels=every)
    assert np.array_equal(confusion.compute().numpy(), expected)
    right = sklearn.metrics.accuracy_score(target, predicted)
    assert float(functional.accuracy(predicted, target)) == pytest.approx(right, rel=1e-14)
    assert float(Accuracy.of(predicted, target).compute()) == pytest.approx(right, rel=1e-14)
    assert float(confusion.accuracy()) == pytest.approx(right, rel=1e-14)
    for ours, theirs in (
        ("precision", sklearn.metrics.precision_score),
        ("recall", sklearn.metrics.recall_score),
        ("f1", sklearn.metrics.f1_score),
    ):
        for average in ("micro", "macro", "none"):
            value = theirs(
                target,
                predicted,
                labels=every,
                average=None if average == "none" else average,
                zero_division=0,
            )
            got = getattr(functional, ours)(predicted, target, CLASSES, average=average)
            np.testing.assert_allclose(got.numpy(), value, rtol=1e-13)
            assert torch.equal(getattr(confusion, ours)(average), got)
            reported = Confusion.of(predicted, target, CLASSES, report=ours, average=average)
            assert torch.equal(reported.compute(), got)


@given(
    st.lists(st.permutations(range(CLASSES)), min_size=2, max_size=20),
    st.integers(1, CLASSES - 1),
    st.data(),
)
@quick
def test_scikit_learn_agrees_on_top_k(rows, k, data):
    scores = torch.tensor(rows, dtype=torch.float32)  # no two scores of a row are equal
    column = st.lists(st.integers(0, CLASSES - 1), min_size=len(rows), max_size=len(rows))
    target = torch.tensor(data.draw(column))
    expected = sklearn.metrics.top_k_accuracy_score(
        target, scores.numpy(), k=k, labels=range(CLASSES)
    )
    assert float(functional.top_k_accuracy(scores, target, k)) == pytest.approx(expected)
    assert float(Accuracy.of(scores, target, top_k=k).compute()) == pytest.approx(expected)


def test_values_by_hand():
    mean = Mean.of(torch.tensor([1.0, 2.0, 6.0]))
    assert float(mean.compute()) == 3.0
    weights = torch.tensor([1.0, 0.0, 3.0])
    assert float(Mean.of(torch.tensor([1.0, float("nan"), 5.0]), weights).compute()) == 4.0
    assert float(Mean.of(torch.tensor([[1, 2], [3, 4]]), torch.tensor([1, 0])).compute()) == 2.0
    assert float(Sum.of(torch.tensor([True, True])).compute()) == 2.0
    assert int(Count.of(torch.tensor([3, 4])).compute()) == 7
    scores = torch.tensor([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]])
    ignored = Accuracy.of(scores, torch.tensor([1, -100, 0]), ignore_index=-100)
    assert (int(ignored.correct), int(ignored.count)) == (1, 2)
    matrix = Confusion.of(scores, torch.tensor([1, -100, 0]), 2, ignore_index=-100).compute()
    assert matrix.tolist() == [[0, 1], [0, 1]]
    # one byte would overflow: 200 * 201 + 200
    large = torch.tensor([200], dtype=torch.uint8)
    assert int(functional.confusion_matrix(large, large, 201)[200, 200]) == 1
    values = torch.tensor([1.0, 2.0, 4.0])
    assert float(Variance.of(values).compute()) == pytest.approx(7 / 3)
    assert float(Std.of(values, correction=0).compute()) == pytest.approx(math.sqrt(14 / 9))
    left, right = torch.tensor([1.0, 2.0]), torch.tensor([3.0, -2.0])
    assert float(functional.mean_squared_error(left, right)) == 10.0
    assert float(functional.mean_absolute_error(left, right)) == 3.0
    pixels = torch.tensor([[[0, 1], [1, 0]]])
    assert float(functional.accuracy(pixels, torch.tensor([[[0, 1], [0, 0]]]))) == 0.75


def test_variance_does_not_cancel():
    values = 1e9 + torch.arange(1000, dtype=torch.float64) % 7
    parts = merge_all(Variance.of(part) for part in values.split(13))
    assert float(parts.compute()) == pytest.approx(float((values - 1e9).var()), rel=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.int32])
def test_a_tensor_becomes_a_mean_in_float64(dtype):
    value = torch.tensor(3, dtype=dtype)
    for shape in ((), (2,)):
        for metric in (
            as_metric(value.expand(shape), 7),
            torch.func.vmap(lambda v: as_metric(v, 7))(value.expand(4, *shape)),
        ):
            assert metric.total.dtype == metric.weight.dtype == torch.float64
            assert (metric.compute() == 3).all()


def test_float32_batches_are_summed_in_float64():
    batches = [torch.full((), 0.1) for _ in range(10_000)]
    mean = merge_all(as_metric(batch, 1) for batch in batches)
    assert mean.total.dtype == torch.float64
    assert float(mean.compute()) == pytest.approx(float(batches[0]), rel=1e-12)
    assert Mean.of(torch.ones(4, dtype=torch.bfloat16)).total.dtype == torch.float64
    assert Count.of(torch.ones(3, dtype=torch.bool)).count.dtype == torch.int64


def test_without_data():
    nothing, none = torch.empty(0), torch.empty(0, dtype=torch.int64)
    for empty in (
        Mean.zero(),
        Mean.of(nothing),
        Accuracy.zero(),
        Accuracy.of(none, none),
        Variance.zero(),
        Variance.of(torch.ones(1)),
        Std.of(nothing),
        Confusion.zero(3, report="precision"),
        Confusion.zero(3, report="accuracy"),
    ):
        assert math.isnan(float(empty.compute()))
    assert Confusion.zero(3).f1("none").isnan().all()
    assert Confusion.zero(3).compute().sum() == 0
    assert float(Min.of(nothing).compute()) == math.inf
    assert float(Max.zero().compute()) == -math.inf
    assert float(Sum.zero().compute()) == float(Count.zero().compute()) == 0.0
    # a class that never occurs nor is predicted counts as 0 in the mean over the classes
    assert float(functional.f1(none.new_zeros(3), none.new_zeros(3), 2)) == 0.5


def test_nan_is_not_lost():
    values = torch.tensor([1.0, float("nan")])
    for metric in (Mean, Sum, Min, Max, Variance):
        assert math.isnan(float(metric.of(torch.ones(2)).merge(metric.of(values)).compute()))


MAKERS = {
    "mean": lambda scores, target: Mean.of(scores, 2.0),
    "masked mean": lambda scores, target: Mean.of(scores.sum(-1), target > 1),
    "sum": lambda scores, target: Sum.of(scores),
    "count": lambda scores, target: Count.of(target > 1),
    "min": lambda scores, target: Min.of(scores),
    "max": lambda scores, target: Max.of(scores),
    "accuracy": Accuracy.of,
    "top 2": lambda scores, target: Accuracy.of(scores, target, top_k=2),
    "confusion": lambda scores, target: Confusion.of(scores, target, CLASSES, report="f1"),
    "ignoring": lambda s, t: Confusion.of(s, t, CLASSES, ignore_index=1, report="recall"),
    "variance": lambda scores, target: Variance.of(scores),
    "std": lambda scores, target: Std.of(scores),
    "accuracy function": lambda s, t: as_metric(functional.accuracy(s, t), 5),
    "precision": lambda s, t: as_metric(functional.precision(s, t, CLASSES), 5),
    "squares": lambda s, t: as_metric(functional.mean_squared_error(s[..., 0], t.float()), 5),
}


@pytest.mark.parametrize("name", MAKERS)
def test_vmap(name):
    make = MAKERS[name]
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 2, 5, CLASSES, generator=generator)
    target = torch.randint(0, CLASSES, (3, 2, 5), generator=generator)
    one_by_one = [
        [make(s, t) for s, t in zip(*pair, strict=True)]
        for pair in zip(scores, target, strict=True)
    ]
    expected = torch.stack([a.merge(b).compute() for a, b in one_by_one])

    def measure(scores, target):
        return make(scores[0], target[0]).merge(make(scores[1], target[1]))

    stacked = torch.func.vmap(measure)(scores, target)
    inside = torch.func.vmap(lambda s, t: measure(s, t).compute())(scores, target)
    torch.testing.assert_close(inside, expected, rtol=1e-12, atol=1e-12)
    # a record of an ensemble computes for each of its members, also outside of vmap
    torch.testing.assert_close(stacked.compute(), expected, rtol=1e-12, atol=1e-12)


def test_a_tensor_of_an_ensemble_keeps_its_members():
    mean = as_metric(torch.tensor([1.0, 2.0]), 3).merge(as_metric(torch.tensor([4.0, 5.0]), 1))
    assert mean.compute().tolist() == [1.75, 2.75]


class Longest(Record):
    length: torch.Tensor

    def merge(self, other):
        return Longest(torch.maximum(self.length, other.length))

    def compute(self):
        return self.length


def test_mappings_of_metrics():
    one = FrozenDict(
        loss=as_metric(torch.tensor(1.0), 30),
        more=FrozenDict(seen=Count.of(30), own=Longest(torch.tensor(3))),
        early=as_metric(2, 1),
    )
    two = FrozenDict(
        loss=as_metric(torch.tensor(4.0), 10),
        more=FrozenDict(seen=Count.of(10), own=Longest(torch.tensor(8))),
        late=Sum.of(torch.ones(2)),
    )
    values = compute_all(merge_trees(one, two) | {"plain": torch.tensor(5.0)})
    assert {name: float(value) for name, value in values.items()} == {
        "loss": 1.75,
        "more/seen": 40.0,
        "more/own": 8.0,
        "early": 2.0,
        "late": 2.0,
        "plain": 5.0,
    }
    assert as_metric(one["more"]["own"], 9) is one["more"]["own"]


def test_a_mean_merges_in_two_operations():
    class Counter(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.calls = []

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls.append(str(function))
            return function(*args, **(kwargs or {}))

    a, b = as_metric(torch.tensor(1.0), 2), as_metric(torch.tensor(2.0), 2)
    with Counter() as counter:
        a.merge(b)
    assert len(counter.calls) <= 3


def test_records_survive_a_change_of_leaves():
    confusion = Confusion.of(torch.tensor([1]), torch.tensor([1]), 2, report="recall")
    same = tree_map(torch.clone, confusion)
    assert (same.report, same.average) == ("recall", "macro")
    assert isinstance(tree_map(torch.clone, Std.of(torch.ones(3))), Std)


ones = torch.ones(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Mean.zero().merge(Sum.zero()),
            StructureError,
            "a Mean can't be merged with a Sum",
        ),
        (lambda: Variance.zero().merge(Std.zero()), StructureError, "Variance .* with a Std"),
        (
            lambda: Variance.zero().merge(Variance.zero(correction=0)),
            StructureError,
            "different corrections",
        ),
        (lambda: Confusion.zero(2).merge(Confusion.zero(3)), StructureError, "numbers of classes"),
        (
            lambda: merge_trees({"a": Mean.zero()}, {"a": Sum.zero()}),
            StructureError,
            "the metric 'a': a Mean",
        ),
        (
            lambda: merge_trees({"a": {"b": Mean.zero()}}, {"a": {"b": torch.ones(())}}),
            StructureError,
            "'a': the metric 'b': a Mean can't be merged with a Tensor",
        ),
        (lambda: merge_all([]), ConfigurationError, "at least one metric"),
        (
            lambda: as_metric("0.5", 1),
            StructureError,
            "a metric is a tensor, a number, or a record",
        ),
        (lambda: compute_all({"a": object()}), StructureError, "a metric is"),
        (lambda: Count.of(torch.ones(2)), StructureError, "bool or integers, not torch.float32"),
        (lambda: Accuracy.of(ones, ones[:2]), StructureError, r"shape \(3,\) do not fit .*\(2,\)"),
        (lambda: Accuracy.of(ones.float(), ones), StructureError, "no dimension of classes"),
        (lambda: Accuracy.of(ones, ones, top_k=2), StructureError, "needs one more dimension"),
        (
            lambda: Accuracy.of(torch.ones(3, 2), ones, top_k=3),
            ConfigurationError,
            "k must be from 1 to the number of classes, 2, not 3",
        ),
        (lambda: Confusion.of(ones, ones, 1), StructureError, "not one of 0 … 0"),
        (lambda: Confusion.of(ones, -ones, 2), StructureError, "not one of 0 … 1"),
        (lambda: Confusion.of(3 * ones, 0 * ones, 2), StructureError, "not one of 0 … 1"),
        (lambda: Confusion.of(ones, ones, 0), ConfigurationError, "num_classes is a whole"),
        (lambda: Confusion.of(ones, ones, 2, report="auc"), ConfigurationError, "report is one of"),
        (lambda: Confusion.zero(2, average="all"), ConfigurationError, "average is one of"),
        (
            lambda: functional.f1(ones, ones, 2, average="weighted"),
            ConfigurationError,
            "average is one of 'micro', 'macro', 'none', not 'weighted'",
        ),
        (
            lambda: functional.mean_squared_error(torch.ones(3, 1), torch.ones(3)),
            StructureError,
            "must be the same",
        ),
        (
            lambda: functional.mean_absolute_error(torch.ones(3, 1), torch.ones(3)),
            StructureError,
            "must be the same",
        ),
    ],
)
def test_bad_input_is_named(make, error, message):
    with pytest.raises(error, match=message):
        make()


@quick
@given(
    st.lists(st.tuples(st.floats(width=16), st.integers(1, 300)), min_size=1, max_size=6),
    st.sampled_from([torch.float16, torch.float32, torch.float64, torch.bfloat16]),
    st.sampled_from([(), (2,)]),
)
def test_accumulate_is_a_merge_bit_for_bit(batches, dtype, shape):
    slow, fast = as_metric(torch.zeros(shape, dtype=dtype)), as_metric(torch.zeros(shape))
    for value, weight in batches:
        value = torch.full(shape, value, dtype=dtype)
        slow = slow.merge(as_metric(value, weight))
        fast = accumulate(fast, value, torch.tensor(float(weight), dtype=torch.float64))
        assert tree_equal(fast, slow)
    largest = accumulate(Max.zero(), Max.of(torch.tensor(3.0)), torch.tensor(1.0))
    assert largest.compute() == 3.0


def test_everything_public_is_tested_here():
    assert set(metrics.__all__) - {"Metric"} <= set(globals())
