"""Placements: which leaves are cut, what each process gets, and the whole out of the parts."""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.distributed.tensor import Partial, Replicate, Shard

import puretrain as pt
from puretrain import sharding
from puretrain.errors import ConfigurationError, PatternError, StructureError
from puretrain.optim.shards import Shards, cut_leaves, sharded
from puretrain.sharding import Placements, local, place
from puretrain.tree import FrozenDict, freeze, tree_equal


@pytest.fixture
def tree():
    return freeze({"a": {"w": torch.randn(6, 4), "b": torch.randn(6)}, "n": 3})


def test_the_first_pattern_that_matches_counts(tree):
    placements = place(tree, {"a/b": Replicate(), "a/*": Shard(0)})
    assert dict(placements.dims) == {"a/w": 0}
    assert placements.of("a/w") == Shard(0)
    assert placements.of(("a", "b")) == Replicate()
    assert placements.of("elsewhere") == Replicate()
    assert repr(placements) == "Placements(dims={'a/w': 0})"
    reverse = place(tree, {"a/*": Shard(-1), "a/b": Replicate()})
    assert dict(reverse.dims) == {"a/w": 1, "a/b": 0}


def test_shapes_are_enough():
    with torch.device("meta"):
        tree = {"w": torch.empty(10**6, 10**6)}
    assert place(tree, {"w": Shard(1)}).dim("w") == 1


@pytest.mark.parametrize(
    ("rules", "error", "message"),
    [
        ({"c*": Shard(0)}, PatternError, r"'c\*' matches no leaf; there are: a/w, a/b, n"),
        ({"a/w": Shard(2)}, ConfigurationError, "a/w has 2 dimensions and can't be cut along 2"),
        ({"a/*": Shard(1)}, ConfigurationError, "a/b has 1 dimensions and can't be cut along 1"),
        ({"**": Shard(0)}, ConfigurationError, "n is no tensor and can't be cut along 0"),
        ({"a/w": 0}, ConfigurationError, r"the placement of 'a/w' is 0; it is Shard\(dim\)"),
        ({"a/w": Partial()}, ConfigurationError, r"is Partial\(sum\); it is Shard\(dim\)"),
    ],
)
def test_rules_that_do_not_fit_are_refused(tree, rules, error, message):
    with pytest.raises(error, match=message):
        place(tree, rules)


@hypothesis.given(
    shape=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    count=st.integers(1, 6),
    data=st.data(),
)
def test_parts_are_those_of_torch_chunk(shape, count, data):
    dim = data.draw(st.integers(0, len(shape) - 1))
    whole = torch.arange(torch.Size(shape).numel()).view(shape)
    placements = Placements(FrozenDict(x=dim))
    parts = [local({"x": whole}, placements, count, i)["x"] for i in range(count)]
    assert torch.equal(torch.cat(parts, dim), whole)
    chunks = torch.chunk(whole, count, dim)
    for part, chunk in zip(parts, chunks, strict=False):
        assert torch.equal(part, chunk)
    for part in parts[len(chunks) :]:
        assert part.shape[dim] == 0
    # They are copies: the whole need not be kept for them.
    assert all(part.untyped_storage().nbytes() == 8 * part.numel() for part in parts)


def test_a_tree_that_does_not_fit_the_placements_is_refused(tree):
    with pytest.raises(StructureError, match="the placements name x, which the tree does not have"):
        local(tree, Placements(FrozenDict(x=0)), 2, 0)
    with pytest.raises(ConfigurationError, match=r"a/b is placed as cut along dimension 1, but it"):
        local(tree, Placements(FrozenDict({"a/b": 1})), 2, 0)
    with pytest.raises(ConfigurationError, match="n is placed as cut along dimension 0, but it is"):
        local(tree, Placements(FrozenDict({"n": 0})), 2, 0)


def test_one_process_has_the_whole(tree):
    placements = place(tree, {"a/*": Shard(0)})
    with sharding.processes() as mesh:
        mine = sharding.shard(tree, mesh, placements)
        assert tree_equal(mine, tree)
        assert tree_equal(sharding.gather(mine, mesh, placements), tree)
        assert tree_equal(sharding.gather(mine, mesh, placements, to=0), tree)
        with pytest.raises(ConfigurationError, match="to=1 is no rank: there are 1 processes"):
            sharding.gather(mine, mesh, placements, to=1)
        lines = sharding.table(mine, mesh, placements).splitlines()
    assert [line.split() for line in lines] == [
        ["leaf", "shape", "placement", "bytes", "here"],
        ["a/w", "6,4", "Shard(0)", "96"],
        ["a/b", "6", "Shard(0)", "24"],
        ["total", "120", "of", "120"],
    ]


# ── Optimizers that are given parts ───────────────────────────────────────────────────────────────
#
# Two parts in one process, by turns: what the other one adds to a sum is worked out beforehand.


def halves(tree):
    placements = Placements(FrozenDict(w=0))
    return [local(tree, placements, 2, i) for i in range(2)]


def test_a_norm_is_one_over_all_parts():
    params = freeze({"w": torch.zeros(4), "b": torch.zeros(1)})
    grads = freeze({"w": torch.tensor([3.0, 4.0, 5.0, 6.0]), "b": torch.tensor([7.0])})
    clip = pt.optim.clip_by_global_norm(1.0)
    expected, _ = clip.update(grads, (), params)
    for i, (part, place_of) in enumerate(zip(halves(grads), halves(params), strict=True)):
        other = halves(grads)[1 - i]["w"].double().square().sum()
        with sharded(Shards([("w",)], lambda squares, other=other: squares + other)):
            found, _ = clip.update(part, (), place_of)
        torch.testing.assert_close(found["w"], halves(expected)[i]["w"], rtol=1e-6, atol=0)
        torch.testing.assert_close(found["b"], expected["b"], rtol=1e-6, atol=0)


def test_lamb_takes_the_norms_of_whole_leaves():
    torch.manual_seed(0)
    params = freeze({"w": torch.randn(6), "b": torch.randn(2)})
    grads = freeze({"w": torch.randn(6), "b": torch.randn(2)})
    lamb = pt.optim.lamb(0.1, weight_decay=0.01)
    expected, _ = lamb.update(grads, lamb.init(params), params)
    # First find out what each part adds to both norms, then let each have the other's.
    told = []
    for part, mine in zip(halves(grads), halves(params), strict=True):
        squares = []
        with sharded(Shards([("w",)], lambda x, squares=squares: squares.append(x) or x)):
            lamb.update(part, lamb.init(mine), mine)
        told.append(squares)
    for i, (part, mine) in enumerate(zip(halves(grads), halves(params), strict=True)):
        others = iter(told[1 - i])
        with sharded(Shards([("w",)], lambda x, others=others: x + next(others))):
            found, _ = lamb.update(part, lamb.init(mine), mine)
        torch.testing.assert_close(found["w"], halves(expected)[i]["w"], rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found["b"], expected["b"], rtol=0, atol=0)


def test_parts_are_spoken_of_only_inside():
    paths = [("w",), ("b",)]
    with sharded(Shards([("w",)], lambda x: x)):
        found = cut_leaves(paths)
        assert found is not None
        assert found[1] == [True, False]
        assert cut_leaves([("b",)]) is None
    assert cut_leaves(paths) is None
