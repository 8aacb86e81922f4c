"""Tensors that are stored in pieces: the format, and all that reads it, in one process."""

import itertools
import json
import os
import re
import struct
import sys
import tracemalloc
from pathlib import Path

import fsspec
import hypothesis
import hypothesis.strategies as st
import msgpack
import numpy as np
import pytest
import torch
import xxhash

import puretrain as pt
from puretrain.checkpoint import read_slice, store
from puretrain.cli import main
from puretrain.errors import CheckpointError, ConfigurationError
from puretrain.tree import tree_digest, tree_equal

ROOT = Path(__file__).parents[1]


# ── A writer, by docs/checkpoint-format.md alone ──────────────────────────────────────────────────


def assemble(index):
    """A file without data."""
    packed = msgpack.packb(index)
    begin = -(-(64 + len(packed)) // 64) * 64
    head = struct.pack(
        "<8sIIQQQ16s",
        b"\x89PTC\r\n\x1a\n",
        *(1, 0, len(packed), begin, begin),
        xxhash.xxh3_128_digest(packed),
    )
    return (head + xxhash.xxh3_64_digest(head) + packed).ljust(begin, b"\0")


def put_block(directory, content):
    digest = xxhash.xxh3_128_digest(content)
    (directory / "blocks").mkdir(exist_ok=True)
    (directory / "blocks" / f"{digest.hex()}-{len(content)}.raw").write_bytes(content)
    return digest


def in_pieces(directory, path, array, dim, cuts):
    """An entry of an array, cut at some places of a dimension; writes its blocks."""
    places, pieces = [0, *sorted(cuts), array.shape[dim]], []
    for start, end in itertools.pairwise(places):
        content = np.take(array, range(start, end), dim).tobytes()
        pieces.append([start, end - start, len(content), put_block(directory, content)])
    fields = {"path": path, "kind": "tensor", "dtype": array.dtype.name, "shape": array.shape}
    return fields | {"size": array.nbytes, "dim": dim, "pieces": pieces}


def put_file(path, entries, requires=("pieces",), **fields):
    index = {"requires": list(requires), "writer": {}, "metadata": {}, "entries": entries}
    path.write_bytes(assemble(index | fields))
    return path


@pytest.fixture
def cut(tmp_path):
    """A file with two tensors in pieces, a name for one of them, and what it should give."""
    rows = np.arange(60, dtype=np.int32).reshape(10, 6)
    columns = np.linspace(0, 1, 24).reshape(2, 3, 4)
    entries = [
        in_pieces(tmp_path, ["p", "columns"], columns, 1, [1]),
        in_pieces(tmp_path, ["p", "rows"], rows, 0, [4, 5]),
        {"path": ["p", "tied"], "kind": "tied", "to": 1},
        {"path": ["step"], "kind": "int", "value": 7},
    ]
    tree = {"columns": torch.from_numpy(columns), "rows": torch.from_numpy(rows)}
    tree = {"p": tree | {"tied": tree["rows"]}, "step": 7}
    return put_file(tmp_path / "step_00000007.ckpt", entries), tree, entries


def blocks_of(path):
    return sorted((path.parent / "blocks").iterdir())


# ── Reading ───────────────────────────────────────────────────────────────────────────────────────


def test_everything_that_reads_a_checkpoint_reads_pieces(cut, tmp_path):
    path, tree, _ = cut
    pt.verify(path)
    for mmap in (False, True):
        got = pt.load(path, like=tree, mmap=mmap)
        assert tree_equal(got, tree)
        assert got["p"]["tied"] is got["p"]["rows"]
        assert got["p"]["rows"].is_contiguous()
    assert torch.equal(pt.load(path, only="p/tied")["p"]["tied"], tree["p"]["rows"])
    with pt.open_checkpoint(path) as leaves:
        assert torch.equal(leaves["p/columns"], tree["p"]["columns"])
        assert torch.equal(leaves.slice("p/tied", 0, 3, 4), tree["p"]["rows"][3:7])
    into = {"w": torch.zeros(10, 6, dtype=torch.int32)}
    got = pt.load_part(path, into, rename={"p/rows": "w"}, only="w")
    assert torch.equal(got["w"], tree["p"]["rows"])
    index = pt.read_index(path)
    assert index.requires == {"pieces"}
    assert [(e.dim, [p[:3] for p in e.pieces]) for e in index.leaves[:2]] == [
        (1, [(0, 1, 64), (1, 2, 128)]),
        (0, [(0, 4, 96), (4, 1, 24), (5, 5, 120)]),
    ]
    assert str(pt.latest(tmp_path)) == str(path)
    pt.convert(path, tmp_path / "alone.ckpt")
    assert pt.read_index(tmp_path / "alone.ckpt").requires == set()
    assert tree_digest(pt.load(tmp_path / "alone.ckpt")) == tree_digest(tree)


def test_the_commands_know_pieces(cut, tmp_path, capsys):
    path, tree, _ = cut

    def command(*arguments):
        return main([*map(str, arguments)]), capsys.readouterr().out

    shown = command("inspect", path, "--stats")[1]
    assert re.search(r"p/rows +int32 +10,6 +240 B in 3 pieces of dim 0 +0 +59", shown)
    told = json.loads(command("inspect", path, "--json")[1])
    (leaf,) = [leaf for leaf in told["leaves"] if leaf["path"] == "p/columns"]
    assert (leaf["dim"], [piece["length"] for piece in leaf["pieces"]]) == (1, [1, 2])
    assert {piece["file"] for piece in leaf["pieces"]} <= set(os.listdir(tmp_path / "blocks"))
    pt.save(tmp_path / "same", tree)
    assert command("diff", path, tmp_path / "same") == (0, "identical\n")
    tree["p"]["columns"][0, 0, 0] += 1
    pt.save(tmp_path / "other", tree)
    status, changed = command("diff", path, tmp_path / "other")
    assert status == 1
    assert "p/columns" in changed
    blocks_of(path)[0].unlink()
    status, damaged = command("verify", path)
    assert status == 1
    assert "is in a file that is not there" in damaged


@st.composite
def cuts_and_slices(draw):
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    dim = draw(st.integers(0, len(shape) - 1))
    cuts = draw(
        st.sets(
            st.integers(1, max(shape[dim] - 1, 1)).filter(lambda n: n < shape[dim])
            if shape[dim] > 1
            else st.nothing()
        )
    )
    of = draw(st.integers(0, len(shape) - 1))
    start = draw(st.integers(0, shape[of]))
    return shape, dim, cuts, of, start, draw(st.integers(0, shape[of] - start))


@hypothesis.given(drawn=cuts_and_slices(), dtype=st.sampled_from(["uint8", "int16", "float64"]))
@hypothesis.settings(
    max_examples=200, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_any_slice_of_any_cut(tmp_path, drawn, dtype):
    shape, dim, cuts, of, start, length = drawn
    array = np.arange(np.prod(shape)).reshape(shape).astype(dtype)
    path = put_file(tmp_path / "a.ckpt", [in_pieces(tmp_path, ["w"], array, dim, cuts)])
    tensor = torch.from_numpy(array)
    assert torch.equal(pt.load(path)["w"], tensor)
    pt.save(tmp_path / "plain.ckpt", {"w": tensor})
    for where in (path, tmp_path / "plain.ckpt"):
        for checksums in (True, False):
            got = read_slice(where, "w", of, start, length, checksums=checksums)
            assert torch.equal(got, tensor.narrow(of, start, length))
            assert got.dtype == tensor.dtype
            assert got.is_contiguous()


def test_a_slice_reads_the_pieces_that_it_needs_and_no_more(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (64, 1 << 16), dtype=np.uint8)
    path = put_file(tmp_path / "a.ckpt", [in_pieces(tmp_path, ["w"], array, 0, [16, 32, 48])])
    tensor = torch.from_numpy(array)

    def read(**options):
        count = lambda: int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # noqa: E731
        before = count()
        assert torch.equal(read_slice(path, "w", 0, 20, 4, **options), tensor[20:24])
        return (count() - before) >> 16

    if sys.platform == "linux":
        assert read() == 16  # the piece, to check it
        assert read(checksums=False) == 4
    names = {f"{p.checksum.hex()}-{p.nbytes}.raw": p for p in pt.read_index(path).entries[0].pieces}
    for block in blocks_of(path):  # the others need not even be there
        if names[block.name].start != 16:
            block.unlink()
    assert torch.equal(read_slice(path, "w", 0, 16, 16), tensor[16:32])
    with pytest.raises(CheckpointError, match="the piece of w from 32 to 48 along dimension 0 is "):
        read_slice(path, "w", 0, 31, 2)
    with pytest.raises(CheckpointError, match="the piece of w from 0 to 16 along dimension 0 is "):
        read_slice(path, "w", 1, 0, 1)


def test_slices_that_are_not_there(cut):
    path, _, _ = cut
    for arguments in (
        ("p/rows", 2, 0, 1),
        ("p/rows", 0, 9, 2),
        ("p/rows", 0, -1, 1),
        ("p/rows", 0, 3, -1),
        ("p/rows", -1, 0, 1),
    ):
        with pytest.raises(ConfigurationError, match=r"p/rows has the shape \[10, 6\]"):
            read_slice(path, *arguments)
    with pytest.raises(CheckpointError, match="has no leaf rows; it has p/columns, p/rows"):
        read_slice(path, "rows", 0, 0, 1)
    with pytest.raises(CheckpointError, match="step is a int; only a tensor has slices"):
        read_slice(path, "step", 0, 0, 1)


def test_the_reader_of_the_specification_reads_pieces(cut):
    path, tree, _ = cut
    text = (ROOT / "docs" / "checkpoint-format.md").read_text(encoding="utf-8")
    (source,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    reader = {}
    exec(source, reader)
    got = reader["read"](path)
    assert got["p"]["rows"].tolist() == tree["p"]["rows"].tolist()
    assert got["p"]["columns"].tolist() == tree["p"]["columns"].tolist()
    assert got["step"] == 7
    block = blocks_of(path)[0]
    content = bytearray(block.read_bytes())
    content[3] ^= 1
    block.write_bytes(content)
    with pytest.raises(ValueError, match="damaged"):
        reader["read"](path)


def test_pieces_at_a_url(cut):
    path, tree, _ = cut
    files = fsspec.filesystem("memory")
    files.put(f"{path.parent}/", "/pieces/", recursive=True)
    url = f"memory://pieces/{path.name}"
    assert tree_digest(pt.load(url)) == tree_digest(tree)
    pt.verify(url)
    for checksums in (True, False):
        got = read_slice(url, "p/rows", 0, 3, 3, checksums=checksums)
        assert torch.equal(got, tree["p"]["rows"][3:6])
    assert store.check("memory://pieces")[0].name == "LATEST"  # nothing else is wrong


# ── Damage ────────────────────────────────────────────────────────────────────────────────────────


def readings(path):
    yield lambda: pt.load(path)
    yield lambda: pt.load(path, mmap=True)
    yield lambda: pt.verify(path)


def test_any_byte_of_a_piece_that_is_changed_is_found_out(cut):
    path, _, _ = cut
    leaves = {}
    for entry in pt.read_index(path).entries[:2]:
        for piece in entry.pieces:
            end = piece.start + piece.length
            leaves[f"{piece.checksum.hex()}-{piece.nbytes}.raw"] = (
                f"the piece of {'/'.join(entry.path)} from {piece.start} to {end} along dimension "
                f"{entry.dim}"
            )
    for block in blocks_of(path):
        content = block.read_bytes()
        for position in range(len(content)):
            damaged = bytearray(content)
            damaged[position] ^= 0x80
            block.write_bytes(damaged)
            for read in readings(path):
                with pytest.raises(CheckpointError, match="its checksum is wrong") as caught:
                    read()
                assert leaves[block.name] in str(caught.value)
                assert str(block) in str(caught.value)
        for other in (content[:-1], content + b"x", b""):
            block.write_bytes(other)
            for read in readings(path):
                with pytest.raises(CheckpointError, match=f"it has {len(other)} bytes") as caught:
                    read()
                assert leaves[block.name] in str(caught.value)
        block.write_bytes(content)


def test_any_byte_of_the_file_that_is_changed_is_found_out(cut):
    path, _, _ = cut
    content = path.read_bytes()
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 0x01
        path.write_bytes(damaged)
        for read in readings(path):
            with pytest.raises(CheckpointError):
                read()


DIGEST = xxhash.xxh3_128_digest(bytes(4))


def lying(pieces, *, shape=(4, 2), dim=0, **changes):
    fields = {"path": ["w"], "kind": "tensor", "dtype": "uint8", "shape": list(shape)}
    return (
        fields | {"size": int(np.prod(shape, dtype=object)), "dim": dim, "pieces": pieces} | changes
    )


HALVES = [[0, 2, 4, DIGEST], [2, 2, 4, DIGEST]]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (lying(HALVES[:1]), "its pieces end at 2 of 4"),
        (lying([]), "its pieces end at 0 of 4"),
        (lying([HALVES[0], [3, 1, 2, DIGEST]]), "its piece 1 .* from 3 on, .* ends at 2 of 4"),
        (lying([HALVES[0], HALVES[0]]), "its piece 1 .* from 0 on, .* ends at 2"),
        (lying([HALVES[0], [2, 3, 6, DIGEST]]), "its piece 1 has 6 bytes and is 3 long"),
        (lying([*HALVES, [4, 0, 0, DIGEST]]), "its piece 2 has 0 bytes and is 0 long"),
        (lying([[0, 4, 9, DIGEST]]), "its piece 0 has 9 bytes"),
        (lying([[0, 2**63, 2**63, DIGEST]]), "its piece 0 has 9,223,"),
        (lying([[-1, 5, 10, DIGEST]]), "its piece 0 .* from -1 on"),
        (lying([[0, 4, 8, DIGEST[:15]]]), "its piece 0 is"),
        (lying([[0, 4, 8, "x" * 16]]), "its piece 0 is"),
        (lying([[0, True, 8, DIGEST]]), "its piece 0 is"),
        (lying([[0, 4, 8]]), "its piece 0 is"),
        (lying([7]), "its piece 0 is 7"),
        (lying({}), "its 'pieces' is {}, not list"),
        (lying(HALVES, dim=2), r"shape \(4, 2\) can't be cut along dimension 2"),
        (lying(HALVES, dim=-1), "can't be cut along dimension -1"),
        (lying(HALVES, dim=None), "its 'dim' is None"),
        (lying([[0, 1, 1, DIGEST]], shape=()), "can't be cut"),
        (lying([], shape=(0, 2)), "can't be cut"),
        (lying(HALVES, size=9), r"uint8 of shape \(4, 2\) in 9 bytes"),
        (lying(HALVES, shared=True), "is in pieces and has shared as well"),
        (lying(HALVES, offset=0, xxh3=DIGEST), "is in pieces and has offset, xxh3 as well"),
        (lying(HALVES, coding="zstd", coded_size=1), "is in pieces and has coding as well"),
        (lying([[0, 2**40, 2**40, DIGEST]], shape=(2**40,)), "in a file that is not there"),
        (
            lying([[0, 2, 4, DIGEST], [2, 2**40 - 2, 2**40 - 2, DIGEST]], shape=(2**40,)),
            "its piece 0",
        ),
        (lying([HALVES[0], [2, 2, 4, bytes(16)]]), "from 2 to 4 along dimension 0 is in a file"),
    ],
)
def test_pieces_that_lie(tmp_path, entry, message):
    put_block(tmp_path, bytes(4))
    path = put_file(tmp_path / "a.ckpt", [entry])
    tracemalloc.start()
    try:
        for read in readings(path):
            with pytest.raises(CheckpointError, match=message):
                read()
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()


def test_what_a_reader_must_know_is_said(tmp_path):
    entry = in_pieces(tmp_path, ["w"], np.arange(4), 0, [2])
    for requires in ([], ["shared"], ["pieces", "shared"]):
        put_file(tmp_path / "a.ckpt", [entry], requires)
        with pytest.raises(CheckpointError, match="what it requires is not what its entries use"):
            pt.load(tmp_path / "a.ckpt")
    put_file(tmp_path / "a.ckpt", [{"path": [], "kind": "none"}], ["pieces"])
    with pytest.raises(CheckpointError, match="what it requires is not what its entries use"):
        pt.load(tmp_path / "a.ckpt")


# ── In a directory ────────────────────────────────────────────────────────────────────────────────


def test_blocks_that_pieces_need_are_kept_and_others_deleted(cut):
    path, tree, _ = cut
    unused = put_block(path.parent, b"nobody needs this").hex()
    assert store.collect(path.parent, store.Retention(1)) == [f"blocks/{unused}-17.raw"]
    assert tree_digest(pt.load(path)) == tree_digest(tree)
    # sharing by content goes on beside them, and an old entry takes its pieces along
    for step in (8, 9):
        store.add(
            path.parent,
            step,
            {"x": torch.arange(20_000)},
            metadata={},
            share=True,
            retention=store.Retention(2),
        )
    assert [saved.step for saved in store.saved(path.parent)] == [8, 9]
    assert [block.name[-10:] for block in blocks_of(path)] == ["160000.raw"]


def test_repair_sets_an_entry_with_a_damaged_piece_aside(cut):
    path, _, _ = cut
    (path.parent / "step_00000003.ckpt").write_bytes(path.read_bytes())
    changed = torch.arange(3)
    pt.save(path.parent / "step_00000002.ckpt", {"w": changed})
    before = blocks_of(path)
    before[0].write_bytes(before[0].read_bytes()[:-1])
    problems = store.repair(path.parent)
    assert [p.name for p in problems if p.cure == "set aside"] == [
        "step_00000003.ckpt",
        "step_00000007.ckpt",
    ]
    assert blocks_of(path) == before  # they belong to what was set aside
    assert store.latest(path.parent).endswith("step_00000002.ckpt")
