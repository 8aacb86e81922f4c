import collections
import contextlib
import json
import math
import os
import pathlib
import re
import signal
import stat
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import tracemalloc
import zipfile

import forking
import hypothesis
import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
import torch
import xxhash

import puretrain as pt
from puretrain.errors import CheckpointError, ConfigurationError, PatternError
from puretrain.tree import FrozenDict, tree_digest, tree_equal, tree_leaves, tree_map

ROOT = pathlib.Path(__file__).parents[1]
MAGIC = b"\x89PTC\r\n\x1a\n"

# The dtypes of docs/checkpoint-format.md and their sizes in bytes, once more.
NAMES = {
    1: "bool uint8 int8 float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu "
    "float4_e2m1fn_x2",
    2: "uint16 int16 float16 bfloat16",
    4: "uint32 int32 float32 complex32",
    8: "uint64 int64 float64 complex64",
    16: "complex128",
}
SIZES = {name: size for size, names in NAMES.items() for name in names.split()}


class Pair(pt.Record):
    left: object
    right: object
    name: str = pt.field(static=True, default="pair")


class Node(pt.Record):
    fixed: object
    free: object = pt.field(open=True)


Point = collections.namedtuple("Point", ["x", "y"])


def dissect(content):
    """The index and the data of a file, by the specification alone."""
    length, start = struct.unpack_from("<QQ", content, 16)
    return msgpack.unpackb(content[64 : 64 + length]), content[start:]


def assemble(index, data, *, file_length=None, start=None, index_length=None, version=1, zero=0):
    """A file with right checksums of an index (or its bytes) and data, whatever they say."""
    packed = index if isinstance(index, bytes) else msgpack.packb(index)
    begin = -(-(64 + len(packed)) // 64) * 64
    head = struct.pack(
        "<8sIIQQQ16s",
        MAGIC,
        version,
        zero,
        len(packed) if index_length is None else index_length,
        begin if start is None else start,
        begin + len(data) if file_length is None else file_length,
        xxhash.xxh3_128_digest(packed),
    )
    return (head + xxhash.xxh3_64_digest(head) + packed).ljust(begin, b"\0") + data


def saved(path, tree, **arguments):
    """The bytes of a saved tree."""
    pt.save(path, tree, **arguments)
    return path.read_bytes()


def same(a, b):
    """Whether two leaves are of one type and the same bits."""
    if isinstance(a, torch.Tensor):
        return type(b) is torch.Tensor and tree_equal([a], [b])
    if isinstance(a, float):
        return type(b) is float and struct.pack("d", a) == struct.pack("d", b)
    return type(a) is type(b) and a == b


def run_python(source, *arguments, **options):
    """Run a program of its own."""
    return forking.run("-c", textwrap.dedent(source), *arguments, **options)


# ── Trees ─────────────────────────────────────────────────────────────────────────────────────────


@st.composite
def tensors(draw):
    dtype = getattr(torch, draw(st.sampled_from(sorted(SIZES))))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    seed = draw(st.integers(0, 2**31))
    bits = np.random.default_rng(seed).integers(
        0, 2 if dtype is torch.bool else 256, math.prod(shape) * dtype.itemsize, dtype=np.uint8
    )
    # Any bits, so also NaNs with payloads and subnormal numbers.
    tensor = torch.empty(shape, dtype=dtype)
    tensor.untyped_storage().copy_(torch.from_numpy(bits).untyped_storage())
    form = draw(st.sampled_from(["plain", "transposed", "strided", "offset", "expanded"]))
    if tensor.dim() and dtype.itemsize > 1:  # the small floats have few operators
        if form == "transposed":
            tensor = tensor.mT if tensor.dim() > 1 else tensor
        elif form == "strided":
            tensor = tensor[::2]
        elif form == "offset":
            tensor = tensor[1:]
        elif form == "expanded":
            tensor = tensor[:1].expand(4, *tensor.shape[1:]) if len(tensor) else tensor
    return tensor


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
LEAVES = st.one_of(
    tensors(),
    st.booleans(),
    st.integers(),
    st.integers(-(2**200), 2**200),
    st.floats(allow_nan=True),
    TEXT,
    st.binary(max_size=80),
    st.none(),
)
TREES = st.recursive(
    LEAVES,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(TEXT, children, max_size=3),
        st.dictionaries(TEXT, children, max_size=3).map(FrozenDict),
        st.tuples(children, children).map(lambda both: Pair(*both)),
        st.tuples(children, children).map(lambda both: Point(*both)),
    ),
    max_leaves=8,
)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@hypothesis.given(tree=TREES)
@hypothesis.settings(
    max_examples=150, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_a_tree_comes_back(tmp_path, tree):
    path = tmp_path / "a.ckpt"
    pt.save(path, tree)
    pt.checkpoint.verify(path)
    for mmap in (False, True):
        plain = pt.load(path, mmap=mmap)
        assert all(map(same, tree_leaves(tree), tree_leaves(plain)))
        assert tree_digest(plain) == tree_digest(tree)
        assert_plain(plain)
        typed = pt.load(path, like=tree, mmap=mmap)
        assert tree_equal(tree, typed)  # types of nodes and static fields as well
        assert all(map(same, tree_leaves(tree), tree_leaves(typed)))


def assert_plain(node):
    if type(node) is FrozenDict:
        for child in node.values():
            assert_plain(child)
    elif type(node) is tuple:
        for child in node:
            assert_plain(child)
    else:
        assert type(node) in {torch.Tensor, bool, int, float, str, bytes, type(None)}


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", sorted(SIZES))
def test_every_dtype(tmp_path, name):
    dtype = getattr(torch, name)
    bits = torch.arange(256, dtype=torch.uint8).repeat_interleave(SIZES[name])
    if name == "bool":
        bits %= 2
    tensor = bits.view(dtype)
    content = saved(tmp_path / "a", {"x": tensor, "scalar": tensor[3]})
    index, data = dissect(content)
    (scalar, entry) = index["entries"]
    assert (entry["dtype"], entry["shape"], entry["size"]) == (name, [256], 256 * SIZES[name])
    assert data[entry["offset"] :] == bytes(bits.numpy())
    assert scalar["shape"] == []
    for mmap in (False, True):
        loaded = pt.load(tmp_path / "a", mmap=mmap)
        assert loaded["x"].dtype == dtype
        assert torch.equal(loaded["x"].view(torch.uint8), bits)
        assert loaded["scalar"].shape == ()


def test_the_table_of_dtypes_is_the_packages():
    text = (ROOT / "docs" / "checkpoint-format.md").read_text(encoding="utf-8")
    table = text.split("### Dtypes")[1].split("(writing)=")[0]
    documented = {}
    for line in table.splitlines():
        if line.startswith("| `"):
            names, sizes = line.split("|")[1:3]
            names = re.findall(r"`(\w+)`", names)
            sizes = [int(size) for size in sizes.split(",")]
            sizes = sizes * len(names) if len(sizes) == 1 else sizes
            documented.update(zip(names, sizes, strict=True))
    assert documented == SIZES
    assert set(pt.checkpoint.format.DTYPES) == set(SIZES)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(3, 4).T,
        lambda: torch.randn(8)[::3],
        lambda: torch.randn(4, 1).expand(4, 5),
        lambda: torch.randn(5, dtype=torch.complex64).conj(),
        lambda: torch.randn(5, dtype=torch.complex64).conj().imag,  # has the negative bit
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(700, 900).T,  # larger than the pieces that are copied
        lambda: torch.randn(2, 300_000, dtype=torch.complex64).conj(),
        lambda: torch.randn(3, 400_000)[:, ::2],
        lambda: torch.randn(4, 300_000, dtype=torch.complex64).mT.conj().imag,
        lambda: torch.randint(0, 2, (2000, 1500)).bool().mT,
        lambda: torch.randn(2, 600_001)[1:, 1:],
    ],
)
def test_values_are_kept_not_their_layout(tmp_path, make):
    tensor = make()
    content = saved(tmp_path / "a", tensor)
    expected = tensor.resolve_conj().resolve_neg().contiguous()
    assert dissect(content)[1] == expected.numpy().tobytes()
    assert torch.equal(pt.load(tmp_path / "a"), expected)
    assert pt.load(tmp_path / "a").is_contiguous()


def test_floats_keep_the_bits_of_nan(tmp_path):
    (nan,) = struct.unpack("<d", struct.pack("<Q", 0x7FF8_0000_DEAD_BEEF))
    values = [nan, -0.0, 5e-324, math.inf]
    pt.save(tmp_path / "a", values)
    loaded = pt.load(tmp_path / "a")
    assert [struct.pack("<d", x) for x in loaded] == [struct.pack("<d", x) for x in values]


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_large_tensors_come_back_to_the_byte(tmp_path, compression):
    # around the sizes of pages, of pieces that are read at once, and of what threads read
    generator = torch.Generator().manual_seed(0)
    sizes = [1 << 16, 1 << 18, 1 << 20, 3 << 20]
    tree = {
        f"{size + more}": torch.randint(4, (size + more,), dtype=torch.uint8, generator=generator)
        for size in sizes
        for more in (-4097, -1, 0, 1, 4096)
    }
    tree |= {"text": "é" * (1 << 20), "bytes": bytes(range(256)) * (1 << 13), "small": 1}
    pt.save(tmp_path / "a.ckpt", tree, compression=compression)
    for like in (tree, None):
        found = pt.load(tmp_path / "a.ckpt", like=like)
        assert found.keys() == tree.keys()
        for name, leaf in tree.items():
            assert torch.equal(found[name], leaf) if name.isdigit() else found[name] == leaf


def test_the_first_large_tensor_that_is_damaged_is_named_and_nothing_reads_on(tmp_path):
    path = tmp_path / "a.ckpt"
    pt.save(path, {f"t{i}": torch.full((3 << 18,), i) for i in range(8)})
    index = pt.read_index(path)
    content = bytearray(path.read_bytes())
    for number, first in ((6, 6), (3, 3), (4, 3)):
        leaf = index.leaves[number]
        content[index.data_offset + leaf.offset + leaf.nbytes - 1] ^= 1
        path.write_bytes(content)
        before = threading.active_count()
        with pytest.raises(CheckpointError, match=f"t{first} .*damaged"):
            pt.load(path)
        assert threading.active_count() == before
    assert pt.load(path, only="t5")["t5"].eq(5).all()


@pytest.mark.parametrize("power", [7, 31, 63, 64, 65, 4000, 8 * 1024 - 1])
def test_integers_of_any_size(tmp_path, power):
    values = [s * 2**power + d for s in (1, -1) for d in (-1, 0)] + [-(2**power)]
    if power == 8 * 1024 - 1:
        values = [2**power - 1, 1 - 2**power]
    pt.save(tmp_path / "a", values)
    assert pt.load(tmp_path / "a") == tuple(values)
    with pytest.raises(CheckpointError, match="2 is an integer of more than 1024 bytes"):
        pt.save(tmp_path / "b", [1, 2, 2 ** (8 * 1024)])


def test_numpy_arrays_come_back_as_tensors(tmp_path):
    backwards = np.arange(6.0)[::-1]
    tree = {
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "scalar": np.float32(1.5),
        "big": np.arange(3, dtype=">i4"),
        "backwards": backwards,
    }
    pt.save(tmp_path / "a", tree)
    loaded = pt.load(tmp_path / "a")
    assert same(loaded["array"], torch.arange(6, dtype=torch.int16).reshape(2, 3))
    assert same(loaded["scalar"], torch.tensor(1.5))
    assert same(loaded["big"], torch.arange(3, dtype=torch.int32))
    assert same(loaded["backwards"], torch.from_numpy(backwards.copy()))


def test_a_parameter_comes_back_as_its_values(tmp_path):
    pt.save(tmp_path / "a", torch.nn.Linear(2, 3).weight)
    loaded = pt.load(tmp_path / "a")
    assert (type(loaded), loaded.requires_grad) == (torch.Tensor, False)


# ── Ties ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mmap", [False, True])
def test_tied_tensors_are_written_once_and_come_back_tied(tmp_path, mmap):
    w = torch.randn(1000)
    tree = {"a": w, "b": {"c": w, "d": w.detach()}, "copy": w.clone()}
    content = saved(tmp_path / "a", tree)
    assert len(content) < 3 * w.nbytes
    loaded = pt.load(tmp_path / "a", like=tree, mmap=mmap)
    assert loaded["a"] is loaded["b"]["c"] is loaded["b"]["d"]
    assert loaded["copy"] is not loaded["a"]
    loaded["a"][0] = 7.0
    assert loaded["b"]["c"][0] == 7.0
    assert loaded["copy"][0] == w[0]
    # what holds the bytes needn't be among what is read
    assert torch.equal(pt.load(tmp_path / "a", only="b/d", mmap=mmap)["b"]["d"], w)


def test_views_that_overlap_otherwise_are_not_ties(tmp_path):
    w = torch.arange(6.0)
    tree = [w, w[:3], w[1:], w.view(2, 3), w.view(torch.int32), w[::2], w[:0], w[6:]]
    pt.save(tmp_path / "a", tree)
    loaded = pt.load(tmp_path / "a")
    assert all(map(same, loaded, tree))
    assert len({id(leaf) for leaf in loaded}) == len(tree)
    loaded[0][0] = 9.0
    assert loaded[1][0] == loaded[3][0, 0] == 0.0


def test_conjugate_views_are_other_values(tmp_path):
    z = torch.randn(3, dtype=torch.complex64)
    pt.save(tmp_path / "a", [z, z.conj()])
    a, b = pt.load(tmp_path / "a")
    assert torch.equal(a, z)
    assert torch.equal(b, z.conj())


# ── Templates and parts ───────────────────────────────────────────────────────────────────────────


def trained():
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    apply, params, buffers = pt.functional(model)

    def loss(params, buffers, batch, key):
        out, buffers = apply(params, buffers, batch)
        return out.square().mean(), pt.Aux(buffers, {"size": out.abs().mean()})

    optimizer = pt.optim.adamw(1e-2)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(1))
    step = pt.train_step(loss, optimizer, accumulate=2)
    return state, step, torch.randn(3, 5, 3)


def test_a_state_goes_on_from_its_file_to_the_bit(tmp_path):
    start, step, batches = trained()
    state = step(start, batches[0])  # in the middle of an accumulation, with metrics
    pt.save(tmp_path / "a", state)
    loaded = pt.load(tmp_path / "a", like=start)  # which has neither, in its open fields
    assert type(loaded) is pt.TrainState
    assert type(loaded.opt_state) is type(state.opt_state)
    assert tree_digest(loaded) == tree_digest(state)
    meta = tree_map(lambda leaf: leaf.to("meta"), state)
    assert tree_equal(pt.load(tmp_path / "a", like=meta), state)
    for batch in batches[1:]:
        state, loaded = step(state, batch), step(loaded, batch)
        assert tree_equal(loaded, state)
        pt.save(tmp_path / "a", state)
        loaded = pt.load(tmp_path / "a", like=start)


def test_below_an_open_field_the_file_decides(tmp_path):
    tree = Node(torch.ones(2), {"a": torch.ones(3, dtype=torch.int64), "b": (1, None)})
    pt.save(tmp_path / "a", tree)
    # the same paths: the template's types, the file's dtypes and shapes
    loaded = pt.load(tmp_path / "a", like=Node(torch.zeros(2), {"a": 0, "b": (0, None)}))
    assert type(loaded.free) is dict
    assert same(loaded.free["a"], torch.ones(3, dtype=torch.int64))
    # other paths: plain nodes
    loaded = pt.load(tmp_path / "a", like=Node(torch.zeros(2), None))
    assert type(loaded.free) is FrozenDict
    assert loaded.free["b"] == (1, None)
    with pytest.raises(CheckpointError, match=r"fixed is float32\[2\] in the file, but float32"):
        pt.load(tmp_path / "a", like=Node(torch.zeros(3), None))


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ({"w": torch.ones(3), "n": 1}, r"w is float32\[2\] in the file, but float32\[3\] in the t"),
        ({"w": torch.ones(2).double(), "n": 1}, r"w is float32\[2\] .*but float64\[2\]"),
        ({"w": torch.ones(2), "n": 1.0}, "n is a plain int in the file, but a plain float"),
        ({"w": torch.ones(2), "n": torch.tensor(1)}, r"n is a plain int .*but int64\[\]"),
        ({"w": torch.ones(2)}, "n is only in the file"),
        ({"w": torch.ones(2), "n": 1, "m": {"x": 1}}, "m/x is missing in the file"),
        ({"w": {"a": torch.ones(2)}, "n": 1}, "w is only in the file; w/a is missing in the file"),
        ((torch.ones(2), 1), "0 is missing in the file"),
        (torch.ones(2), "does not fit the template"),
        ({f"x{i}": 0 for i in range(20)}, "and 14 more"),
    ],
)
def test_a_template_that_does_not_fit_is_refused(tmp_path, template, message):
    pt.save(tmp_path / "a", {"w": torch.zeros(2), "n": 3})
    with pytest.raises(CheckpointError, match=message) as caught:
        pt.load(tmp_path / "a", like=template)
    assert str(tmp_path / "a") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_in_a_tensor_may_be_more_or_fewer_another_time(tmp_path):
    pt.save(tmp_path / "a", torch.arange(5, dtype=torch.uint8))
    assert len(pt.load(tmp_path / "a", like=torch.empty(0, dtype=torch.uint8))) == 5


def test_order_in_the_template_counts_not_that_in_the_file(tmp_path):
    pt.save(tmp_path / "a", FrozenDict(b=1, a=2))
    assert list(pt.load(tmp_path / "a")) == ["b", "a"]
    assert list(pt.load(tmp_path / "a", like=FrozenDict(a=0, b=0)).items()) == [("a", 2), ("b", 1)]


def test_only_reads_what_matches(tmp_path):
    tree = {
        "params": {"e.w": torch.ones(2), "h.w": torch.zeros(3)},
        "many": [1, 2, 3],
        "none": None,
    }
    content = bytearray(saved(tmp_path / "a", tree))
    found = pt.load(tmp_path / "a", only="params/e.*")
    assert type(found) is FrozenDict
    assert same(found["params"]["e.w"], tree["params"]["e.w"])
    assert list(found["params"]) == ["e.w"]
    # of a sequence a part is a mapping
    assert dict(pt.load(tmp_path / "a", only="many/{0,2}")["many"]) == {"0": 1, "2": 3}
    with pytest.raises(PatternError, match="matches no leaf"):
        pt.load(tmp_path / "a", only="parms/*")
    with pytest.raises(ConfigurationError, match="not both"):
        pt.load(tmp_path / "a", like=tree, only="**")
    # a leaf that is not read may be damaged
    content[-1] ^= 1
    (tmp_path / "a").write_bytes(content)
    assert torch.equal(pt.load(tmp_path / "a", only="params/e.w")["params"]["e.w"], torch.ones(2))
    with pytest.raises(
        CheckpointError, match=r"params/h\.w .*its checksum is wrong; copy it again"
    ):
        pt.load(tmp_path / "a", only="params/h.w")


def test_only_on_a_tree_that_is_a_leaf(tmp_path):
    pt.save(tmp_path / "a", torch.ones(2))
    assert torch.equal(pt.load(tmp_path / "a", only="**"), torch.ones(2))


def test_writing_to_mapped_tensors_does_not_change_the_file(tmp_path):
    before = saved(tmp_path / "a", {"w": torch.ones(4096), "e": torch.empty(0, 3)})
    loaded = pt.load(tmp_path / "a", mmap=True)
    loaded["w"].fill_(5.0)
    assert loaded["w"].sum() == 5 * 4096
    assert loaded["e"].shape == (0, 3)
    assert (tmp_path / "a").read_bytes() == before
    assert torch.equal(pt.load(tmp_path / "a")["w"], torch.ones(4096))
    # replacing the file leaves the mapped one as it was
    again = pt.load(tmp_path / "a", mmap=True)
    pt.save(tmp_path / "a", {"w": torch.zeros(1)})
    assert torch.equal(again["w"], torch.ones(4096))


def test_mapped_tensors_are_aligned_and_are_no_views(tmp_path):
    pt.save(tmp_path / "a", [torch.ones(1), torch.ones(1, dtype=torch.complex128), torch.ones(3)])
    for tensor in pt.load(tmp_path / "a", mmap=True):
        assert tensor.data_ptr() % 64 == 0
        assert not tensor._is_view()


def test_device(tmp_path):
    tree = {"w": torch.ones(2), "n": 1}
    pt.save(tmp_path / "a", tree)
    loaded = pt.load(tmp_path / "a", device="meta")  # another device that every machine has
    assert (loaded["w"].device.type, loaded["w"].shape, loaded["n"]) == ("meta", (2,), 1)
    like = {"w": torch.ones(2, device="meta"), "n": 0}  # without values, and so without a place
    assert pt.load(tmp_path / "a", like=like)["w"].device.type == "cpu"
    assert pt.load(tmp_path / "a", like=tree, device="meta")["w"].device.type == "meta"


def test_without_checksums_the_data_are_not_compared(tmp_path):
    content = bytearray(saved(tmp_path / "a", {"w": torch.ones(2)}))
    content[-1] ^= 0x40
    (tmp_path / "a").write_bytes(content)
    for mmap in (False, True):
        with pytest.raises(CheckpointError, match="w .*its checksum is wrong; copy it again"):
            pt.load(tmp_path / "a", mmap=mmap)
        loaded = pt.load(tmp_path / "a", mmap=mmap, checksums=False)
        assert bytes(loaded["w"].numpy().tobytes()) == bytes(content[-8:])
    content[70] ^= 1  # but the index always is
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(CheckpointError, match="the index .*is damaged"):
        pt.load(tmp_path / "a", checksums=False)


# ── Metadata ──────────────────────────────────────────────────────────────────────────────────────


def test_metadata_and_writer(tmp_path):
    metadata = {"step": 3, "deep": {"list": [1, 2.5, None, True, "é", b"\0"]}, "tuple": (1,)}
    pt.save(tmp_path / "a", 1, metadata=metadata)
    index = pt.checkpoint.read_index(tmp_path / "a")
    assert dict(index.metadata) == {**metadata, "tuple": [1]}
    assert index.writer["puretrain"] == pt.__version__
    assert index.writer["torch"] == torch.__version__
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", index.writer["created"])
    assert index.file_length == (tmp_path / "a").stat().st_size


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"t": torch.ones(1)}, "metadata/t is a Tensor"),
        ({"a": {"b": [object()]}}, "metadata/a/b/0 is a object"),
        ({"a": {1: 2}}, "metadata/a has the key 1"),
        ({"n": 2**64}, "metadata/n is an integer of more than 64 bits"),
        ({"s": "\ud800"}, "metadata/s is .* no Unicode text"),
        ({"s": "x" * 2**20}, "metadata have 1,048,584 bytes"),
        ({"l": [0] * 70_000}, "more than 65,536 items"),
    ],
)
def test_metadata_that_cant_be_saved_is_refused(tmp_path, metadata, message):
    with pytest.raises(CheckpointError, match=message):
        pt.save(tmp_path / "a", 1, metadata=metadata)
    assert list(tmp_path.iterdir()) == []


# ── What can't be saved ───────────────────────────────────────────────────────────────────────────


def resized():
    tensor = torch.ones(8)
    tensor.untyped_storage().resize_(0)
    return tensor


def cycle():
    nodes = [torch.ones(1)]
    nodes.append(nodes)
    return nodes


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: print, "a/0/b is a builtins.builtin_function_or_method, which can't be saved"),
        (object, "a/0/b is a builtins.object"),
        (lambda: {1, 2}, "a/0/b is a builtins.set"),
        (lambda: 1j, "a/0/b is a builtins.complex"),
        (lambda: torch.float32, "a/0/b is a torch.dtype"),
        (lambda: np.array(["x"]), "a/0/b is a numpy array of <U1"),
        (lambda: np.array([object()]), "a/0/b is a numpy array of object"),
        (lambda: np.ma.masked_array([1.0]), "a/0/b is a numpy.*MaskedArray; save its plain array"),
        (lambda: "\udc80", "a/0/b is .*no Unicode text"),
        (lambda: {("x", 1): 2}, "a/0/b has the key"),
        (lambda: {1: 2, "1": 3}, "a/0/b has two keys that are written alike|has the key"),
        (lambda: torch.eye(2).to_sparse(), "a/0/b is a tensor of the layout torch.sparse_coo"),
        (lambda: torch.ones(1, device="meta"), "a/0/b is on the meta device"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8),
            "a/0/b has the dtype torch.qint8",
        ),
        (
            lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)]),
            "a/0/b is a nested tensor",
        ),
        (lambda: torch.ones(2).as_subclass(Odd), "a/0/b is a .*Odd, which can't be saved"),
        (lambda: torch.ones((1,) * 65), "a/0/b has 65 dimensions"),
        (resized, "a/0/b has lost its memory"),
        (cycle, "nested deeper than 100; is it a cycle"),
    ],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # torch, of nested and quantized tensors
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_what_cant_be_saved_is_refused_by_its_path(tmp_path, make, message):
    before = saved(tmp_path / "a", 1)
    with pytest.raises(CheckpointError, match=message) as caught:
        pt.save(tmp_path / "a", {"a": [{"b": make()}]})
    assert str(caught.value).startswith(str(tmp_path / "a"))
    assert (tmp_path / "a").read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


class Odd(torch.Tensor):
    pass


def test_inside_a_transform_there_is_nothing_to_save(tmp_path):
    with pytest.raises(CheckpointError, match="inside a transform of torch.func"):
        torch.func.vmap(lambda x: pt.save(tmp_path / "a", x))(torch.ones(2))


def test_a_path_that_is_too_long_and_a_tree_that_is_too_deep(tmp_path):
    with pytest.raises(CheckpointError, match="is too long"):
        pt.save(tmp_path / "a", {"x" * 70_000: 1})
    deep = 1
    for _ in range(100):
        deep = [deep]
    pt.save(tmp_path / "a", deep)
    assert pt.load(tmp_path / "a", like=deep) == deep
    with pytest.raises(CheckpointError, match="nested deeper than 100"):
        pt.save(tmp_path / "a", [deep])


# ── Damage ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A small file with every kind of entry and with gaps, and a place to write."""
    w = torch.arange(3, dtype=torch.int16)
    tree = {"w": w, "tied": w, "s": "text", "y": b"\xff", "big": 2**70, "f": 0.5, "b": True}
    tree |= {"i": -1, "n": None, "m": {}, "l": [], "seq": [torch.ones(1), 2]}
    tree |= {"e": torch.ones(0, 2)}
    path = tmp_path_factory.mktemp("small") / "a.ckpt"
    return saved(path, tree, metadata={"x": 1}), path, tree


def readings(path):
    """Every way to read a file whole."""
    yield lambda: pt.load(path)
    yield lambda: pt.load(path, mmap=True)
    yield lambda: pt.checkpoint.verify(path)


def test_any_byte_that_is_changed_is_found_out(small):
    content, path, _ = small
    for position in range(len(content)):
        for change in (0x01, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[position] ^= change
            path.write_bytes(damaged)
            for read in readings(path):
                with pytest.raises(CheckpointError) as caught:
                    read()
            assert str(path) in str(caught.value)
    path.write_bytes(content)
    for read in readings(path):
        read()


def test_any_truncation_is_found_out(small):
    content, path, _ = small
    for length in range(len(content)):
        path.write_bytes(content[:length])
        for read in (*readings(path), lambda: pt.checkpoint.read_index(path)):
            with pytest.raises(
                CheckpointError, match="(truncated|empty).*; copy it again, or load another"
            ):
                read()


@pytest.mark.parametrize("extra", [b"\0", b"x", bytes(64), bytes(1 << 17)])
def test_appended_bytes_are_found_out(small, extra):
    content, path, _ = small
    path.write_bytes(content + extra)
    for read in readings(path):
        with pytest.raises(CheckpointError, match=rf"has {len(extra):,} bytes? behind its end"):
            read()


def test_two_files_in_one(small):
    content, path, _ = small
    path.write_bytes(content + content)
    with pytest.raises(CheckpointError, match="behind its end"):
        pt.load(path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2 of the format.*install a newer puretrain"),
        ({"version": 0}, "version 0 of the format, this puretrain reads version 1$"),
        ({"zero": 1}, "header is invalid"),
        ({"start": 65}, "header is invalid"),
        ({"start": 1 << 40}, "header is invalid"),
        ({"start": 0}, "header is invalid"),
        ({"index_length": 1 << 63}, "header is invalid"),
        ({"index_length": 0}, "index .*damaged"),
        ({"file_length": (1 << 64) - 1}, "truncated"),
        ({"file_length": 0}, "behind its end"),
    ],
)
def test_a_header_that_lies(small, changes, message):
    content, path, _ = small
    path.write_bytes(assemble(*dissect(content), **changes))
    with pytest.raises(CheckpointError, match=message):
        pt.load(path)


def tensor_entry(path, **changes):
    empty = xxhash.xxh3_128_digest(b"")
    fields = {"path": path, "kind": "tensor", "dtype": "uint8", "shape": [0], "offset": 0}
    return fields | {"size": 0, "xxh3": empty} | changes


ZEROS = xxhash.xxh3_128_digest(bytes(64))


@pytest.mark.parametrize(
    ("entries", "data", "message"),
    [
        ([], b"", "no entries"),
        ([tensor_entry(["a"], shape=[2**62], size=2**62)], b"", "a ends at byte"),
        ([tensor_entry(["a"], shape=[2**40, 2**40], size=2**63)], b"", "a: uint8 of shape"),
        ([tensor_entry(["a"], shape=[2**62, 0, 2**62])], b"", "a: uint8 of shape"),
        ([tensor_entry(["a"], shape=[64], size=63)], bytes(64), "in 63 bytes"),
        ([tensor_entry(["a"], shape=[-1, -64], size=64)], bytes(64), "has the shape"),
        ([tensor_entry(["a"], shape=[1.0], size=1)], b"x", "has the shape"),
        ([tensor_entry(["a"], shape=[True], size=1)], b"x", "has the shape"),
        ([tensor_entry(["a"], shape=[1] * 65, size=1)], b"x", "has the shape"),
        ([tensor_entry(["a"], shape=[-(2**63)])], b"", "has the shape"),
        ([tensor_entry(["a"], offset=-64)], b"", "from byte -64"),
        ([tensor_entry(["a"], offset=1)], b"x", "from byte 1"),
        ([tensor_entry(["a"], offset=2**63)], b"", "from byte"),
        ([tensor_entry(["a"], offset=1 << 16)], bytes(1 << 16), "from byte 65,536"),
        ([tensor_entry(["a"])], b"x", "1 bytes of data, and the last block ends at 0"),
        ([tensor_entry(["a"], xxh3=b"")], b"", "a has a checksum of another length"),
        ([tensor_entry(["a"], xxh3="x" * 16)], b"", "'xxh3' is"),
        ([tensor_entry(["a"], dtype="float1024")], b"", "unknown dtype"),
        ([tensor_entry(["a"], dtype="nn")], b"", "unknown dtype"),
        ([tensor_entry(["a"], dtype=7)], b"", "'dtype' is 7"),
        (
            [tensor_entry([k], shape=[64], size=64, xxh3=ZEROS) for k in "ab"],
            bytes(64),
            "b has 64 bytes from byte 0",
        ),
        ([tensor_entry(["a"]), tensor_entry(["a"])], b"", "entry 1: a is not in its place"),
        ([tensor_entry(["a"]), tensor_entry(["a", "b"])], b"", "entry 1: a/b is not in its place"),
        ([tensor_entry(["a", "b"]), tensor_entry(["a"])], b"", "entry 1: a is not in its place"),
        (
            [tensor_entry(["a", "b"]), tensor_entry(["c"]), tensor_entry(["a", "d"])],
            b"",
            "entry 2: a/d is not in its place",
        ),
        ([tensor_entry([1])], b"", "entry 0: 1 is not in its place"),
        ([tensor_entry([0]), tensor_entry([2])], b"", "entry 1: 2 is not in its place"),
        ([tensor_entry([0]), tensor_entry(["a"])], b"", "entry 1: a is not in its place"),
        ([tensor_entry([-1])], b"", "its path has the key -1"),
        ([tensor_entry([[]])], b"", "its path has the key"),
        ([tensor_entry([2**63])], b"", "not in its place"),
        ([tensor_entry([True])], b"", "its path has the key True"),
        ([tensor_entry([b"a"])], b"", "its path has the key"),
        ([tensor_entry("a")], b"", "'path' is 'a', not list"),
        ([tensor_entry([]), tensor_entry([])], b"", "not in its place"),
        ([tensor_entry(["a"] * 101)], b"", "101 keys, of at most 100"),
        ([{"path": ["a"]}], b"", "'kind' is None, not str"),
        ([{"path": ["a"], "kind": "pickle"}], b"", "kind 'pickle', which is not known"),
        ([{"path": ["a"], "kind": "int", "value": True}], b"", "'value' is True, not int"),
        ([{"path": ["a"], "kind": "int", "value": b""}], b"", "its value has 0 bytes"),
        ([{"path": ["a"], "kind": "int", "value": b"1" * 1025}], b"", "its value has 1025 bytes"),
        ([{"path": ["a"], "kind": "bool", "value": 1}], b"", "'value' is 1, not bool"),
        ([{"path": ["a"], "kind": "float", "value": 1}], b"", "'value' is 1, not float"),
        ([{"path": ["a"], "kind": "tied", "to": 0}], b"", "a is tied to entry 0, no tensor"),
        ([tensor_entry(["a"]), {"path": ["b"], "kind": "tied", "to": -1}], b"", "tied to entry -1"),
        ([tensor_entry(["a"]), {"path": ["b"], "kind": "tied", "to": 2**63}], b"", "tied to entry"),
        (
            [{"path": ["a"], "kind": "none"}, {"path": ["b"], "kind": "tied", "to": 0}],
            b"",
            "b is tied to entry 0, no tensor",
        ),
        ([{"path": ["x" * 70_000], "kind": "none"}], b"", "entry 0 has 70,022 bytes, of at most"),
        ([7], b"", "entry 0 is a int, not a dict"),
        ([{"path": ["a"], "kind": "none", 1: 2}], b"", "key"),
        (
            [tensor_entry(["a"], kind="str", size=1, xxh3=xxhash.xxh3_128_digest(b"\xff"))],
            b"\xff",
            "a is no UTF-8 text",
        ),
    ],
)
def test_an_index_that_lies(small, entries, data, message):
    content, path, _ = small
    index = dissect(content)[0] | {"entries": entries}
    path.write_bytes(assemble(index, data))
    tracemalloc.start()
    try:
        for read in readings(path):
            with pytest.raises(CheckpointError, match=message):
                read()
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def replaced(key, value):
    return lambda index: index | {key: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replaced("requires", ["later", 7]), "requires later, 7, which .*install a newer"),
        (replaced("requires", ["shared"]), "what it requires is not what its entries use"),
        (replaced("requires", None), "requires is a NoneType, not a list"),
        (replaced("requires", {}), "requires is a dict"),
        (replaced("metadata", []), "metadata is a list, not a dict"),
        (replaced("metadata", {"x": "y" * (1 << 20)}), "metadata has 1,048,58. bytes, of at most"),
        (replaced("metadata", {"l": [0] * 65_537}), "65537 exceeds max_array_len"),
        (replaced("metadata", {f"{i}": 0 for i in range(65_537)}), "65537 exceeds max_map_len"),
        (replaced("metadata", {1: 2}), "key"),
        (replaced("metadata", {"t": msgpack.ExtType(5, b"x")}), "an extension of msgpack"),
        (replaced("metadata", {"t": [1, msgpack.Timestamp(1)]}), "an extension of msgpack"),
        (replaced("writer", msgpack.Timestamp(1)), "writer is a Timestamp, not a dict"),
        (replaced("writer", 1), "writer is a int, not a dict"),
        (replaced("entries", {}), "index .*invalid"),
        (lambda index: {k: v for k, v in index.items() if k != "metadata"}, "has no 'metadata'"),
        (lambda index: {k: v for k, v in index.items() if k != "requires"}, "must be its first"),
        (lambda index: dict(reversed(index.items())), "'requires' must be its first key"),
        (list, "index .*invalid"),
        (lambda index: 1, "index .*invalid"),
        (lambda index: b"", "index .*it is empty"),
        (lambda index: msgpack.packb(index) + b"\0", "1 bytes too many"),
        (lambda index: msgpack.packb(index)[:-1], "it ends in the middle|invalid"),
        (lambda index: b"\xdf\xff\xff\xff\xff", "index .*invalid"),
        (lambda index: b"\x81\xa8requires\xdd\xff\xff\xff\xff", "index .*invalid"),
        (lambda index: b"\x82\xa8requires\x90\xa7entries\xdd\xff\xff\xff\xff", "index .*invalid"),
        (lambda index: b"\x82\xa8requires\x90\xa1x" + b"\x91" * 100_000, "index .*invalid"),
        (lambda index: b"\x81\xa8requires" + b"\x91" * 60_000, "index .*invalid"),
        (lambda index: b"\x82\xa8requires\x90\xa8metadata" + b"\x81\xa0" * 60_000, "invalid"),
        (lambda index: b"\x82\xa8requires\x90\xa8requires\x90", "occurs twice|first key"),
        (lambda index: b"\x82\xa8requires\x90\xa8metadata\x82\xa1a\x01\xa1a\x02", "key twice"),
        (lambda index: b"\x82\xa8requires\x90\xa8metadata\x81\xa1a\xa1\xff", "invalid"),
        (lambda index: b"\x82\xa8requires\x90\xa1\xff\x90", "invalid"),
        (lambda index: b"\x81\xa8requires\xc1", "invalid"),
    ],
)
def test_an_index_that_is_malformed(small, change, message):
    content, path, _ = small
    index, data = dissect(content)
    path.write_bytes(assemble(change(index), data))
    tracemalloc.start()
    try:
        for read in readings(path):
            with pytest.raises(CheckpointError, match=message):
                read()
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


def test_what_a_later_writer_adds_is_ignored(small):
    content, path, tree = small
    index, data = dissect(content)
    index["future"] = {"deep": [[[1]]]}
    for entry in index["entries"]:
        entry["note"] = [1, {"a": b"b"}]
    path.write_bytes(assemble(index, data))
    assert tree_equal(pt.load(path, like=tree), tree)


NUMBERS = st.one_of(
    st.integers(-(2**63), 2**64 - 1), st.integers(-3, 300), st.sampled_from([0, 1, 63, 64, 128])
)
PLAIN = st.recursive(
    st.one_of(
        st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=5), st.binary(max_size=20)
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=6,
)


@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=400, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_a_fuzzed_index_gives_an_error_or_what_it_says(small, data):
    content, path, _ = small
    index, blocks = dissect(content)
    for _ in range(data.draw(st.integers(1, 3))):
        entries = index["entries"]
        number = data.draw(st.integers(0, len(entries) - 1))
        action = data.draw(st.sampled_from(["set", "set", "drop", "swap", "repeat", "remove"]))
        entry = entries[number]
        if action == "set":
            key = data.draw(st.sampled_from(sorted(entry)))
            kinds = [
                "tensor",
                "tied",
                "bool",
                "int",
                "float",
                "str",
                "bytes",
                "none",
                "map",
                "list",
            ]
            likely = {
                "path": st.lists(st.one_of(st.sampled_from(["w", "x"]), st.integers(0, 2))),
                "kind": st.sampled_from(kinds),
                "dtype": st.sampled_from(sorted(SIZES)),
                "shape": st.lists(NUMBERS, max_size=4),
            }.get(key, NUMBERS)
            entry[key] = data.draw(st.one_of(likely, PLAIN))
        elif action == "drop":
            del entry[data.draw(st.sampled_from(sorted(entry)))]
            if not entry:
                del entries[number]
        elif action == "swap":
            other = data.draw(st.integers(0, len(entries) - 1))
            entries[number], entries[other] = entries[other], entries[number]
        elif action == "repeat":
            entries.append(dict(entry))
        elif len(entries) > 1:
            del entries[number]
    path.write_bytes(assemble(index, blocks))
    outcomes = set()
    for read in (lambda: pt.load(path), lambda: pt.load(path, mmap=True)):
        try:
            outcomes.add(tree_digest(read()))
        except CheckpointError:
            outcomes.add("refused")
    # Either both refuse it, or the change made another tree, and both read the same.
    assert len(outcomes) == 1
    with contextlib.suppress(CheckpointError):
        pt.checkpoint.verify(path)
        assert outcomes != {"refused"}


@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=300, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_fuzzed_bytes_of_an_index_give_an_error_or_what_they_say(small, data):
    content, path, _ = small
    index, blocks = dissect(content)
    packed = bytearray(msgpack.packb(index))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(packed) - 1))
        packed[position : position + data.draw(st.integers(0, 2))] = data.draw(
            st.binary(max_size=3)
        )
    path.write_bytes(assemble(bytes(packed), blocks))
    outcomes = set()
    for read in (lambda: pt.load(path), lambda: pt.load(path, mmap=True)):
        try:
            outcomes.add(tree_digest(read()))
        except CheckpointError:
            outcomes.add("refused")
    assert len(outcomes) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="measures with RLIMIT_AS and /proc")
def test_a_hostile_index_costs_memory_by_the_size_of_its_file(tmp_path):
    requires = b"\x84\xa8requires\x90\xa6writer\x80"
    small_entry = msgpack.packb({"path": [], "kind": "none"})
    size = 1 << 20
    bombs = {
        # one byte each becomes an object
        "empty maps": requires + b"\xa8metadata\x81\xa0" + b"\xdd\x00\x0f\xff\xff" + b"\x80" * size,
        "nested arrays": b"\x81\xa8requires\x90\xa1x"
        + (b"\xdc\xff\xff" + b"\x90" * 65535) * (size >> 16),
        "many entries": requires
        + b"\xa8metadata\x80\xa7entries\xdd"
        + struct.pack(">I", size // len(small_entry))
        + small_entry * (size // len(small_entry)),
        "list of entries": requires
        + b"\xa8metadata\x80\xa7entries\xdd"
        + struct.pack(">I", 40_000)
        + b"".join(msgpack.packb({"path": [i], "kind": "none"}) for i in range(40_000)),
        "empty tensors": msgpack.packb(
            {
                "requires": [],
                "writer": {},
                "metadata": {},
                "entries": [tensor_entry([i], shape=[0, 2**40]) for i in range(10_000)],
            }
        ),
    }
    for name, index in bombs.items():
        (tmp_path / name).write_bytes(assemble(index, b""))
        assert (tmp_path / name).stat().st_size < 2 * size
    done = run_python(
        """
        import re, resource, sys, tempfile, torch, puretrain as pt
        def peak():
            return int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
        pt.save(tempfile.mkdtemp() + "/a", 1)  # everything is imported now
        mapped = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + (96 << 20),) * 2)
        for path in sys.argv[1:]:
            before = peak()
            try:
                pt.load(path)
                print("loaded", peak() - before)
            except pt.errors.CheckpointError:
                print("refused", peak() - before)
        """,
        *(tmp_path / name for name in bombs),
    )
    assert done.stderr == ""
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["refused", "refused", "refused", "loaded", "loaded"]
    assert max(int(line[1]) for line in lines) < 64 << 20


# ── Foreign files ─────────────────────────────────────────────────────────────────────────────────


def foreign(kind, path):
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "pickle":
        import pickle

        path.write_bytes(pickle.dumps({"w": 1}))
    elif kind == "torch":
        torch.save({"w": torch.ones(1)}, path)
    elif kind == "old torch":
        torch.save({"w": torch.ones(1)}, path, _use_new_zipfile_serialization=False)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a", "b")
    elif kind == "npz":
        np.savez(path.open("wb"), a=np.ones(1))
    elif kind == "safetensors":
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    elif kind == "text":
        path.write_text("learning rate: 0.1\n")
    elif kind == "short":
        path.write_bytes(b"a")
    elif kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "line ends":
        pt.save(path, 1)
        path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n"))
    elif kind == "seven bits":
        pt.save(path, 1)
        path.write_bytes(bytes(byte & 0x7F for byte in path.read_bytes()))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("missing", "can't be read: No such file or directory"),
        ("empty", "the file is empty"),
        ("pickle", "no puretrain checkpoint but a pickle"),
        ("old torch", "no puretrain checkpoint but a pickle"),
        ("torch", "a zip archive, as torch.save"),
        ("zip", "a zip archive"),
        ("npz", "numpy.savez and Lightning write it; `puretrain convert` makes one of it"),
        ("safetensors", "a safetensors file"),
        ("text", "something else, which begins with b'learning'"),
        ("short", "something else, which begins with b'a'"),
        ("directory", "Is a directory"),
        ("fifo", "no regular file"),
        ("line ends", "copy the file in binary mode"),
        ("seven bits", "copy the file in binary mode"),
    ],
)
def test_foreign_files_are_named(tmp_path, kind, message):
    path = tmp_path / "file"
    foreign(kind, path)
    for read in (*readings(path), lambda: pt.checkpoint.read_index(path)):
        with pytest.raises(CheckpointError, match=message) as caught:
            read()
        assert str(path) in str(caught.value)


def test_nothing_named_in_a_file_is_imported(tmp_path):
    names = ["antigravity", "os.system", "torch.hub", "__reduce__"]
    pt.save(tmp_path / "a", {name: name for name in names}, metadata={"class": "antigravity"})
    assert dict(pt.load(tmp_path / "a")) == {name: name for name in names}
    assert "antigravity" not in sys.modules


# ── Writing ───────────────────────────────────────────────────────────────────────────────────────


def test_directories_are_made_and_nothing_else_is_left(tmp_path):
    pt.save(tmp_path / "a" / "b" / "c.ckpt", 1)
    pt.save(str(tmp_path / "a" / "b" / "c.ckpt"), 2)
    assert [path.name for path in (tmp_path / "a" / "b").iterdir()] == ["c.ckpt"]
    assert pt.load(tmp_path / "a" / "b" / "c.ckpt") == 2


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        pt.save(tmp_path / "a", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("name", ["directory", "file/inside", "x" * 300])
def test_where_no_file_can_be(tmp_path, name):
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="can't be written: "):
        pt.save(tmp_path / name, 1)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["directory", "file"]


def test_a_read_only_directory():
    with tempfile.TemporaryDirectory() as place:
        os.chmod(place, 0o755)
        path = pathlib.Path(place, "locked", "a")
        before = saved(path, 1)
        path.parent.chmod(0o555)
        done = run_python(
            """
            import os, sys, puretrain as pt
            is_root = os.getuid() == 0  # who may write anywhere
            if is_root:
                os.seteuid(65534)
            try:
                pt.save(sys.argv[1], 2)
            except pt.errors.CheckpointError as error:
                print(error)
            finally:
                if is_root:
                    os.seteuid(0)
            """,
            path,
        )
        assert done.stderr == ""
        assert f"{path} can't be written: Permission denied" in done.stdout
        assert path.read_bytes() == before
        assert list(path.parent.iterdir()) == [path]
        path.parent.chmod(0o755)


def states():
    """Two states of some hundred kilobytes, of which one replaces the other."""
    old = {"n": 1, "w": torch.full((60_000,), 1.0), "v": torch.full((40_000,), 1.0)}
    return old, tree_map(lambda leaf: leaf * 2, old)


@pytest.mark.skipif(sys.platform != "linux", reason="sets RLIMIT_FSIZE")
def test_a_disk_that_ends_at_any_place_leaves_the_old_file(tmp_path):
    # The limit on a file's size makes a real write fail, first of all in the middle.
    old, _ = states()
    before = saved(tmp_path / "a", old)
    done = run_python(
        """
        import resource, signal, sys, torch, puretrain as pt
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        new = {"n": 2, "w": torch.full((60_000,), 2.0), "v": torch.full((40_000,), 2.0)}
        endless = resource.RLIM_INFINITY
        for limit in map(int, sys.argv[2:]):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, endless))
            try:
                pt.save(sys.argv[1], new)
                said = "saved"
            except pt.errors.CheckpointError as error:
                said = str(error)
            resource.setrlimit(resource.RLIMIT_FSIZE, (endless, endless))
            print(said, flush=True)  # also into a file
        """,
        tmp_path / "a",
        *(0, 1, 63, 64, 500, 70_000, 262_144, 300_000, len(before) - 1, len(before)),
    )
    lines = done.stdout.splitlines()
    assert done.stderr == ""
    assert all("can't be written: File too large" in line for line in lines[:-1])
    assert lines[-1] == "saved"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert pt.load(tmp_path / "a")["n"] == 2


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a small file system")
def test_a_full_disk_leaves_the_old_file(tmp_path):
    place = tmp_path / "full"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=768k", "none", str(place)]
    with contextlib.suppress(FileNotFoundError):
        if subprocess.run(mount, capture_output=True, check=False).returncode == 0:
            try:
                old, new = states()
                before = saved(place / "a", old)
                with pytest.raises(CheckpointError, match="can't be written: No space left"):
                    pt.save(place / "a", new)
                assert (place / "a").read_bytes() == before
                assert len(list(place.iterdir())) == 1
            finally:
                subprocess.run(["umount", str(place)], check=True)
            return
    pytest.skip("this user can't mount")


# Runs `save` in a process that fails, or is killed, at the n-th call of the system that changes the
# disk. Only that call is replaced, in `os` or the raw file; all others are the real ones.
FAILING = """
import io, os, signal, sys
import torch, puretrain as pt
path, number, how = sys.argv[1], int(sys.argv[2]), sys.argv[3]
count = 0

def failing(name, function, when=lambda *arguments: True):
    def call(*arguments, **keywords):
        global count
        if when(*arguments, **keywords):
            count += 1
            if count == number and how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            if count == number and how == "error":
                raise OSError(5, "Input/output error of " + name)
        return function(*arguments, **keywords)
    return call

for name in ("fsync", "replace", "rename", "write", "pwrite", "writev", "pwritev"):
    setattr(os, name, failing(name, getattr(os, name)))
os.open = failing("open", os.open, lambda path, flags, *rest, **keywords: flags & os.O_CREAT)

class Raw(io.FileIO):
    write = failing("write", io.FileIO.write)

def opened(file, mode="r", buffering=-1, **keywords):
    if "w" not in mode:
        return io.open(file, mode, buffering, **keywords)
    raw = Raw(file, mode, **keywords)
    return raw if buffering == 0 else io.BufferedWriter(raw, max(buffering, 8192))

import builtins
builtins.open = opened
new = {"n": 2, "w": torch.full((60_000,), 2.0), "v": torch.full((40_000,), 2.0)}
try:
    pt.save(path, new)
    print("saved", count)
except pt.errors.CheckpointError as error:
    print(error)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks at every step")
def test_a_failure_or_a_crash_at_any_call_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a"
    old, new = states()
    digests = {tree_digest(tree): name for name, tree in (("old", old), ("new", new))}
    # One process imports torch; its children save.
    server = run_python(
        f"""
        import os, sys
        import torch, puretrain as pt
        source = {FAILING!r}
        path = sys.argv[1]
        old = {{"n": 1, "w": torch.full((60_000,), 1.0), "v": torch.full((40_000,), 1.0)}}
        for how in ("error", "kill"):
            survived = 0
            for number in range(1, 100):
                for name in os.listdir(os.path.dirname(path)):
                    os.unlink(os.path.join(os.path.dirname(path), name))
                pt.save(path, old)
                sys.stdout.flush()
                child = os.fork()
                if not child:
                    sys.argv = ["", path, str(number), how]
                    exec(compile(source, "failing", "exec"), {{}})
                    sys.stdout.flush()
                    os._exit(0)
                status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
                pt.checkpoint.verify(path)
                tree = pt.load(path)
                left = len(os.listdir(os.path.dirname(path))) - 1
                print("after", how, number, status, pt.tree.tree_digest(tree), left, flush=True)
                survived += tree["n"] == 2
                if survived == 2:  # once the last call failed, and then there was none to fail
                    break
        """,
        path,
        timeout=120,
    )
    assert server.stderr == ""
    lines = [line for line in server.stdout.splitlines() if line.startswith("after ")]
    results = {"error": [], "kill": []}
    for line in lines:
        _, how, _, status, digest, left = line.split()
        results[how].append((int(status), digests[digest], int(left)))
    names = re.findall("can't be written: Input/output error of (.*)", server.stdout)
    writes = names.count("write")
    assert writes > 2
    assert names == ["open", *["write"] * writes, "fsync", "replace", "fsync"]
    # All of them failed once, with the old file left; the last, the fsync of the directory, when
    # the new one was in its place. Then there was none to fail.
    expected = ["old"] * (len(names) - 1) + ["new", "new"]
    assert results["error"] == [(0, name, 0) for name in expected]
    # A killed process may leave its temporary file, but no other trace.
    killed = [result for result in results["kill"] if result[0] == -signal.SIGKILL]
    assert [name for _, name, _ in killed] == expected[:-1]
    assert all(left <= 1 for _, _, left in killed)
    assert results["kill"][-1] == (0, "new", 0)


def test_readers_see_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "a"
    trees = [{"n": n, "w": torch.full((20_000,), float(n))} for n in range(2)]
    pt.save(path, trees[0])
    failures, seen, done = [], set(), threading.Event()

    def read(mmap):
        while not done.is_set():
            try:
                loaded = pt.load(path, mmap=mmap)
                assert bool((loaded["w"] == loaded["n"]).all())
                seen.add(loaded["n"])
            except Exception as error:  # noqa: BLE001  # it is looked at below
                failures.append(error)
                return

    readers = [threading.Thread(target=read, args=(mmap,)) for mmap in (False, True)]
    for reader in readers:
        reader.start()
    end = time.monotonic() + 30
    count = 0
    while (count < 100 or len(seen) < 2) and not failures and time.monotonic() < end:
        count += 1
        pt.save(path, trees[count % 2])
    done.set()
    for reader in readers:
        reader.join()
    assert failures == []
    assert seen == {0, 1}


def test_two_writers_of_one_file(tmp_path):
    path = tmp_path / "a"
    trees = [torch.full((50_000,), float(n)) for n in range(2)]

    def write(tree):
        for _ in range(20):
            pt.save(path, tree)

    writers = [threading.Thread(target=write, args=(tree,)) for tree in trees]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert tree_digest(pt.load(path)) in map(tree_digest, trees)
    assert [found.name for found in tmp_path.iterdir()] == ["a"]


@pytest.mark.skipif(sys.platform != "linux", reason="measures with /proc")
def test_saving_and_verifying_need_next_to_no_memory(tmp_path):
    done = run_python(
        """
        import re, sys, torch, puretrain as pt
        def memory(what):
            return int(re.search(what + r":\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10
        def make(n):
            return {
                "one": torch.ones(12 * n),
                "transposed": torch.ones(4 * n // 1024, 2048).mT,
                "conjugate": torch.ones(2 * n, dtype=torch.complex64).conj(),
                "strided": torch.ones(2, 8 * n)[:, ::2],
            }
        pt.save(sys.argv[1], make(1 << 18))  # loads what of torch's code is needed
        pt.checkpoint.verify(sys.argv[1])
        state = make(1 << 20)
        size = sum(leaf.nbytes for leaf in state.values())
        save = lambda: pt.save(sys.argv[1], state)
        verify = lambda: pt.checkpoint.verify(sys.argv[1])
        for call in (save, verify):
            open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
            before = memory("VmRSS")
            call()
            print(size, memory("VmHWM") - before)
        """,
        tmp_path / "a",
    )
    assert done.stderr == ""
    for line in done.stdout.splitlines():
        size, extra = map(int, line.split())
        assert size > 100 << 20
        assert extra < 0.02 * size + (8 << 20)  # pages of code that load on the way count too


# ── The newest ────────────────────────────────────────────────────────────────────────────────────


def test_newest_is_the_largest_step_that_is_whole(tmp_path):
    assert pt.latest(tmp_path / "nowhere") is None
    assert pt.latest(tmp_path) is None
    pt.save(tmp_path / "z.ckpt", {"step": 3})
    pt.save(tmp_path / "b.ckpt", {"step": torch.tensor(20)})
    pt.save(tmp_path / "c.ckpt", 0, metadata={"step": 10})
    pt.save(tmp_path / "d.ckpt", {"other": 99})
    pt.save(tmp_path / "e.other", {"step": 100})
    assert pt.latest(tmp_path) == tmp_path / "b.ckpt"
    content = bytearray((tmp_path / "b.ckpt").read_bytes())
    content[-1] ^= 1
    (tmp_path / "b.ckpt").write_bytes(content)
    with pytest.warns(UserWarning, match=r"damaged checkpoint is passed over: .*b\.ckpt"):
        assert pt.latest(tmp_path) == tmp_path / "c.ckpt"
    (tmp_path / "c.ckpt").write_bytes(b"")
    with (
        pytest.warns(UserWarning, match=r"c\.ckpt: the file is empty"),
        pytest.warns(UserWarning, match=r"b\.ckpt"),
    ):
        assert pt.latest(tmp_path) == tmp_path / "z.ckpt"


# ── The specification ─────────────────────────────────────────────────────────────────────────────


def specification():
    return (ROOT / "docs" / "checkpoint-format.md").read_text(encoding="utf-8")


def test_the_example_of_the_specification(tmp_path):
    tree = {"step": 7, "w": torch.tensor([1.0, -2.0])}
    index, data = dissect(saved(tmp_path / "a", tree, metadata={"note": "first"}))
    index["writer"] = {
        "puretrain": "0.1.0",
        "torch": "2.13.0",
        "created": "2026-01-01T00:00:00+00:00",
    }
    content = assemble(index, data)
    dump = "\n".join(
        f"{at:04x}  {content[at : at + 16].hex(' '):<47}  "
        + "".join(chr(b) if 32 <= b < 127 else "." for b in content[at : at + 16])
        for at in range(0, len(content), 16)
    )
    assert f"```text\n{dump}\n```" in specification()


def test_the_reader_of_the_specification(tmp_path, small):
    (source,) = re.findall(r"```python\n(.*?)```", specification(), flags=re.DOTALL)
    reader = {}
    exec(source, reader)
    assert {name for name in reader if name in ("torch", "puretrain", "pt")} == set()

    def check(found, tree):
        if isinstance(tree, torch.Tensor):
            assert list(found.shape) == list(tree.shape)
            assert (
                found.tobytes() == tree.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            )
        elif isinstance(tree, (FrozenDict, dict)):
            assert list(found) == list(tree)
            for key in tree:
                check(found[key], tree[key])
        elif isinstance(tree, (tuple, list)):
            assert len(found) == len(tree)
            for inner, child in zip(found, tree, strict=True):
                check(inner, child)
        else:
            assert same(tree, found)

    start, step, batches = trained()
    dtypes = {
        name: torch.arange(16, dtype=torch.uint8).view(getattr(torch, name)) for name in SIZES
    }
    dtypes["bool"] = dtypes["bool"].view(torch.uint8).remainder(2).bool()
    for tree in (
        small[2],
        step(start, batches[0]),
        dtypes,
        torch.ones(2, 3),
        [[], {}, [[1]], None],
    ):
        pt.save(tmp_path / "a", tree)
        check(reader["read"](tmp_path / "a"), pt.load(tmp_path / "a"))
    content = (tmp_path / "a").read_bytes()
    for position in range(len(content)):
        (tmp_path / "a").write_bytes(
            content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        )
        with pytest.raises(ValueError, match="."):
            reader["read"](tmp_path / "a")


def test_files_of_version_1_stay_readable(tmp_path):
    # The file of the specification, from its digits: it was not written by this very code.
    (dump,) = re.findall(r"```text\n(0000  .*?)```", specification(), flags=re.DOTALL)
    path = tmp_path / "a"
    path.write_bytes(b"".join(bytes.fromhex(line[6:53]) for line in dump.splitlines()))
    loaded = pt.load(path)
    assert loaded["step"] == 7
    assert same(loaded["w"], torch.tensor([1.0, -2.0]))
    assert dict(pt.checkpoint.read_index(path).metadata) == {"note": "first"}
