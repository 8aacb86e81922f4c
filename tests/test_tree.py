import copy
import math
import pickle
import subprocess
import sys

import numpy as np
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from puretrain.errors import PatternError, StructureError
from puretrain.tree import (
    FrozenDict,
    Record,
    check_same_structure,
    field,
    freeze,
    match_paths,
    path_string,
    tree_cast,
    tree_diff,
    tree_digest,
    tree_equal,
    tree_flatten,
    tree_flatten_up_to,
    tree_index,
    tree_leaves,
    tree_like,
    tree_map,
    tree_paths,
    tree_size,
    tree_stack,
    tree_structure,
    tree_to,
    tree_unflatten,
    tree_unstack,
)


class Layer(Record):
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    name: str = field(static=True, default="layer")


class Wider(Layer):
    scale: torch.Tensor | None = None


leaves = st.one_of(
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=True),
    st.text(max_size=5),
    st.lists(st.floats(width=32, allow_nan=True), max_size=4).map(torch.tensor),
    st.lists(st.integers(-100, 100), max_size=4).map(
        lambda values: torch.tensor(values, dtype=torch.int16)
    ),
)
keys = st.text(alphabet="abcxyz/.", min_size=1, max_size=3)
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(keys, children, max_size=3),
        st.dictionaries(keys, children, max_size=3).map(FrozenDict),
        st.builds(Layer, children, st.none() | children),
    ),
    max_leaves=8,
)


@given(trees)
def test_flatten_and_unflatten_are_inverse(tree):
    found, structure = tree_flatten(tree)
    again = tree_unflatten(structure, found)
    assert tree_structure(again) == structure
    assert tree_equal(again, tree)
    assert len(tree_paths(tree)) == len(found)


@given(trees)
def test_torch_pytree_sees_the_same_leaves(tree):
    from torch.utils import _pytree

    ours = [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
    theirs, spec = _pytree.tree_flatten(tree)
    theirs_tensors = [leaf for leaf in theirs if isinstance(leaf, torch.Tensor)]
    assert {id(leaf) for leaf in ours} == {id(leaf) for leaf in theirs_tensors}
    assert None not in [leaf for leaf in theirs if leaf is None]
    assert tree_equal(_pytree.tree_unflatten(theirs, spec), tree)


@given(trees, trees)
def test_digest_agrees_with_content(a, b):
    contents = [
        {
            tuple(map(str, path)): leaf
            for path, leaf in zip(tree_paths(t), tree_leaves(t), strict=True)
        }
        for t in (a, b)
    ]
    same = contents[0].keys() == contents[1].keys() and all(
        tree_equal(contents[0][path], contents[1][path]) for path in contents[0]
    )
    assert (tree_digest(a) == tree_digest(b)) == same
    assert (not tree_diff(a, b)) == same


def test_digest_is_stable_over_processes_and_versions():
    tree = {
        "params": FrozenDict(w=torch.arange(6, dtype=torch.float32).reshape(2, 3)),
        "step": torch.tensor(3),
        "half": torch.ones(2, dtype=torch.bfloat16),
        "plain": (1, 2.5, "x", True),
    }
    expected = "bb79218611d76a6478c1d99c332ab941"
    program = (
        "import torch; from puretrain.tree import *; print(tree_digest({'half': torch.ones(2, "
        "dtype=torch.bfloat16), 'plain': (1, 2.5, 'x', True), 'step': torch.tensor(3), 'params': "
        "{'w': torch.arange(6.).reshape(3, 2).t().contiguous().t().reshape(2, 3)}}))"
    )
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert tree_digest(tree) == other.stdout.strip() == expected


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w.to(torch.float64),
        lambda w: w.reshape(3, 2),
        lambda w: torch.nextafter(w, w + 1),
        lambda w: -w,
    ],
)
def test_digest_covers_dtype_shape_and_every_bit(change):
    w = torch.zeros(2, 3)
    assert tree_digest({"w": w}) != tree_digest({"w": change(w)})
    assert tree_digest({"w": w}) != tree_digest({"v": w})


def test_digest_ignores_strides_and_reads_views():
    w = torch.arange(12.0).reshape(3, 4)
    assert tree_digest({"w": w.t()}) == tree_digest({"w": w.t().contiguous()})
    z = torch.tensor([1 + 2j, 3 - 4j])
    assert tree_digest(z.conj()) == tree_digest(torch.tensor([1 - 2j, 3 + 4j]))


def test_equality_is_of_bits():
    nan, other_nan = torch.tensor([0x7FC00000, 0x7FC00001], dtype=torch.int32).view(torch.float32)
    assert tree_equal(nan, nan.clone())
    assert not tree_equal(nan, other_nan)
    assert not tree_equal(torch.tensor(0.0), torch.tensor(-0.0))
    assert not tree_equal({"a": 1}, {"a": 1.0})
    assert not tree_equal({"a": True}, {"a": 1})
    assert not tree_equal({"a": 1}, FrozenDict(a=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_diff_counts_ulps(dtype):
    one = torch.ones(3, dtype=dtype)
    above = one.clone()
    above[1] = 1 + 5 * torch.finfo(dtype).eps
    (found,) = tree_diff({"w": one}, {"w": above})
    assert (found.path, found.kind, found.max_ulps, found.count) == ("w", "value", 5, 1)
    assert found.max_abs == 5 * torch.finfo(dtype).eps
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least subnormal
    (found,) = tree_diff(torch.tensor(tiny, dtype=dtype), torch.tensor(-tiny, dtype=dtype))
    assert found.max_ulps == 2


def test_diff_of_the_farthest_float64_does_not_overflow():
    high = torch.finfo(torch.float64).max
    (found,) = tree_diff(
        torch.tensor(high, dtype=torch.float64), torch.tensor(-high, dtype=torch.float64)
    )
    bits = int(np.array(high).view(np.int64))
    assert found.max_ulps == 2 * bits


def test_diff_names_kinds():
    a = {"x": torch.zeros(2), "d": torch.zeros(2), "t": 1, "n": torch.tensor(1.0), "i": 1}
    b = {"x": torch.zeros(3), "d": torch.zeros(2).double(), "t": "1", "n": torch.tensor(math.nan)}
    kinds = {d.path: (d.kind, d.max_abs) for d in tree_diff(a, b)}
    assert kinds["x"] == ("shape", None)
    assert kinds["d"] == ("dtype", None)
    assert kinds["t"] == ("type", None)
    assert kinds["i"] == ("only in a", None)
    assert kinds["n"][0] == "value"
    assert math.isnan(kinds["n"][1])
    (infinite,) = tree_diff(torch.tensor([math.inf, 1.0]), torch.tensor([math.inf, 2.0]))
    assert infinite.max_abs == 1.0


def test_digest_refuses_what_is_no_leaf_and_says_where():
    with pytest.raises(StructureError, match="a/1: a object is no leaf"):
        tree_digest({"a": [1, object()]})
    with pytest.raises(StructureError, match="s: a torch.sparse_coo tensor"):
        tree_digest({"s": torch.eye(2).to_sparse()})


def test_records_do_not_change():
    layer = Layer(torch.ones(2))
    with pytest.raises(AttributeError):
        layer.weight = torch.zeros(2)
    with pytest.raises(AttributeError, match="no attribute 'wieght'"):
        _ = layer.wieght
    assert layer.replace(name="b").name == "b"
    assert layer.name == "layer"
    with pytest.raises(
        StructureError, match="no field 'wieght'; its fields are weight, bias, name"
    ):
        layer.replace(wieght=1)


def test_subclass_of_a_record_is_a_node_with_all_fields():
    wider = Wider(torch.ones(2), scale=torch.ones(()))
    assert [path_string(path) for path in tree_paths(wider)] == ["weight", "scale"]
    assert isinstance(tree_map(lambda leaf: leaf + 1, wider), Wider)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_nodes_copy_and_pickle(clone):
    tree = FrozenDict(layer=Layer(torch.ones(2), name="x"))
    again = clone(tree)
    assert tree_equal(tree, again)
    assert again["layer"].weight.data_ptr() != tree["layer"].weight.data_ptr()


def test_frozen_dict_keeps_order_and_never_changes():
    params = FrozenDict(b=torch.ones(1), a=torch.zeros(1))
    assert list(params) == ["b", "a"]
    assert [path_string(path) for path in tree_paths(params)] == ["b", "a"]
    merged = params | {"c": torch.ones(1), "b": torch.zeros(1)}
    assert list(merged) == ["b", "a", "c"]
    assert float(params["b"]) == 1
    with pytest.raises(TypeError):
        params["a"] = 1
    with pytest.raises(TypeError):
        params.a = 1
    with pytest.raises(TypeError):
        del params._items
    with pytest.raises(StructureError, match="string keys, not 3"):
        FrozenDict({3: 1})


def test_freeze_reaches_every_level():
    frozen = freeze({"a": [{"b": 1}], "c": Layer(torch.ones(1))})
    assert isinstance(frozen, FrozenDict)
    assert isinstance(frozen["a"], tuple)
    assert isinstance(frozen["a"][0], FrozenDict)


def test_optree_itself_sees_the_nodes():
    assert optree.tree_leaves(FrozenDict(x=1, y=Layer(2))) == [1, 2]


def test_flatten_up_to_keeps_none():
    params = FrozenDict(a=torch.ones(1), layer=Layer(torch.ones(1), torch.ones(1)))
    grads = FrozenDict(a=None, layer=Layer(torch.ones(1), None))
    found = tree_flatten_up_to(tree_structure(params), grads)
    assert [leaf is None for leaf in found] == [True, False, True]
    with pytest.raises(StructureError):
        tree_flatten_up_to(tree_structure(params), FrozenDict(a=1))


def test_vmap_grad_and_compile_see_through_nodes():
    tree = FrozenDict(layer=Layer(torch.arange(3.0), None))
    doubled = torch.func.vmap(lambda t: tree_map(lambda leaf: leaf * 2, t))(tree)
    assert torch.equal(doubled["layer"].weight, torch.tensor([0.0, 2.0, 4.0]))
    grads = torch.func.grad(lambda t: (t["layer"].weight ** 2).sum())(tree)
    assert torch.equal(grads["layer"].weight, 2 * torch.arange(3.0))
    compiled = torch.compile(
        lambda t: t["layer"].replace(weight=t["layer"].weight + 1), fullgraph=True, backend="eager"
    )
    assert torch.equal(compiled(tree).weight, torch.arange(3.0) + 1)


def test_map_over_different_structures_says_where():
    with pytest.raises(StructureError, match="b/1 is in the first tree, not in another one"):
        tree_map(lambda a, b: a, {"b": [1, 2]}, {"b": [1]})
    with pytest.raises(StructureError, match=r"w is f32\[2\] in mine, but f32\[3\] in yours"):
        check_same_structure(
            {"w": torch.ones(2)}, {"w": torch.ones(3)}, "mine", "yours", leaves=True
        )


def test_stack_index_and_unstack():
    states = [FrozenDict(w=torch.full((2,), float(i)), n=torch.tensor(i)) for i in range(3)]
    stacked = tree_stack(states)
    assert stacked["w"].shape == (3, 2)
    assert all(tree_equal(a, b) for a, b in zip(tree_unstack(stacked), states, strict=True))
    assert tree_equal(tree_index(stacked, torch.tensor([2, 2]))["n"], torch.tensor([2, 2]))
    with pytest.raises(StructureError, match="at least one"):
        tree_stack([])
    with pytest.raises(StructureError, match="tree 1"):
        tree_stack([{"w": torch.ones(1)}, {"w": torch.ones(2)}])
    with pytest.raises(StructureError, match="first dimension"):
        tree_unstack({"w": torch.ones(2), "b": torch.ones(3)})


def test_cast_and_size():
    tree = {"w": torch.ones(3), "i": torch.ones(2, dtype=torch.int32), "n": 3}
    cast = tree_cast(tree, torch.float64)
    assert (cast["w"].dtype, cast["i"].dtype, cast["n"]) == (torch.float64, torch.int32, 3)
    assert tree_size([tree["w"], tree["w"], tree["i"]]) == (5, 20)
    assert tree_to(tree, "meta")["w"].device.type == "meta"


def test_like_gives_types_back_and_names_what_differs():
    layer = Layer(torch.ones(2), torch.zeros(1), name="template")
    plain = FrozenDict(bias=torch.zeros(1), weight=torch.full((2,), 5.0))
    again = tree_like(layer, plain)
    assert isinstance(again, Layer)
    assert again.name == "template"
    assert float(again.weight[0]) == 5
    with pytest.raises(StructureError, match="it lacks x/bias; it has besides x/bais"):
        tree_like(layer, FrozenDict(weight=1, bais=2), "the memory", ("x",))


PATHS = [("params", "encoder.0.weight"), ("params", "encoder.10.bias"), ("head",)]


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("params/encoder.*.weight", [0]),
        ("params/**", [0, 1]),
        ("**.bias", [1]),
        ("head", [2]),
        ("params/encoder.?.*", [0]),
        ("{head,**.weight}", [0, 2]),
        ("**", [0, 1, 2]),
    ],
)
def test_patterns(pattern, expected):
    assert match_paths(pattern, PATHS) == [PATHS[i] for i in expected]


def test_patterns_that_match_nothing_or_are_broken():
    with pytest.raises(PatternError, match=r"'\*' matches no leaf; there are: params/encoder"):
        match_paths("*", PATHS[:2])
    with pytest.raises(PatternError, match="without its '}'"):
        match_paths("{a", PATHS)
