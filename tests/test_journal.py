"""The journal: what it holds, what it survives, and the digests in it."""

import functools
import math
import os
import signal
import struct
from pathlib import Path

import forking
import numpy as np
import pytest
import torch
import xxhash
from hypothesis import given
from hypothesis import strategies as st

import puretrain as pt
from puretrain.errors import ConfigurationError, JournalError, StructureError
from puretrain.replay import batch_digest, leaf_digests, read_journal, tensor_digest
from puretrain.replay.digests import _digest_on_device, _words

ROOT = Path(__file__).parents[1]


def make(directory, epochs=3, every=2, lr=0.1, seed=0):
    def loss(params, buffers, batch, key):
        noise = torch.rand(())
        return ((batch - params["w"]) ** 2).mean() + 0 * noise, pt.Aux(metrics={"noise": noise})

    optimizer = pt.optim.adam(lr)
    return pt.Run(
        state=pt.TrainState.create({"w": torch.zeros(3)}, None, optimizer, key=pt.random.key(seed)),
        step=pt.train_step(loss, optimizer),
        batches=pt.batches(torch.arange(24.0).reshape(8, 3), 2, shuffle=True, seed=seed),
        epochs=epochs,
        validation=pt.Validation(
            pt.eval_step(lambda params, buffers, batch, key: {"w": params["w"].sum()}),
            pt.batches(torch.ones(2, 3), 2),
        ),
        observers=[pt.journal(directory, every=every), pt.checkpoints(directory, every=5)],
        directory=directory,
    )


# ── Digests ───────────────────────────────────────────────────────────────────────────────────────


def splitmix(x):
    mask = (1 << 64) - 1
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def digest_by_hand(content):
    """The definition in docs/journal-format.md, with Python's integers."""
    golden, mask = 0x9E3779B97F4A7C15, (1 << 64) - 1
    padded = content + bytes(-len(content) % 4)
    words = [word for (word,) in struct.iter_unpack("<i", padded)]
    total = len(content)
    for block in range(0, len(words), 4096):
        part = words[block : block + 4096]
        weights = [splitmix((i + 1) * golden & mask) | 1 for i in range(len(part))]
        own = sum(w * x for w, x in zip(weights, part, strict=True)) & mask
        total += splitmix((own + (block // 4096 + 1) * golden) & mask)
    return splitmix(total & mask)


TENSORS = [
    torch.tensor(1.5),
    torch.empty(0, 3),
    torch.arange(7, dtype=torch.uint8),
    torch.arange(9, dtype=torch.uint8)[1:],
    torch.tensor([True, False, True]),
    torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).T,
    torch.randn(3, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16),
    torch.tensor([1 + 2j, 3 - 4j]).conj(),
    torch.arange(-4, 9000, dtype=torch.int64),
    torch.arange(4096.0),
]


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype}-{tuple(t.shape)}")
def test_the_digest_is_the_one_that_is_specified_on_every_route(tensor):
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    content = plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    expected = digest_by_hand(content)
    assert int(tensor_digest(tensor)) % 2**64 == expected
    # the operations that run on an accelerator, here on the CPU
    assert int(_digest_on_device(*_words(tensor))) % 2**64 == expected


@given(st.integers(0, 9999), st.integers(0, 31), st.integers(0, 9999), st.integers(0, 31))
def test_the_digest_sees_one_and_two_changed_bits(first, bit, second, other):
    words = torch.arange(10000, dtype=torch.int32)
    flip = lambda b: int(np.int32(np.uint32(1 << b)))  # noqa: E731
    changed = words.clone()
    changed[first] ^= flip(bit)
    assert tensor_digest(changed) != tensor_digest(words)
    changed[second] ^= flip(other)
    same = first == second and bit == other
    assert bool(tensor_digest(changed) == tensor_digest(words)) == same


def test_the_digest_sees_signs_order_and_length():
    x = torch.arange(1.0, 10001.0)
    variants = [x, -x, x.flip(0), x.roll(4096), torch.cat([x, torch.zeros(1)]), x.double()]
    assert len({int(tensor_digest(variant)) for variant in variants}) == len(variants)


def test_leaf_digests_refuse_what_they_cant_digest():
    with pytest.raises(StructureError, match="sparse"):
        leaf_digests({"w": torch.eye(2).to_sparse()})
    with pytest.raises(StructureError):
        leaf_digests({"w": object()})


def test_the_digest_of_a_batch_covers_content_dtype_and_shape():
    x = torch.arange(6.0)
    for kind in ("host", "device"):
        batches = [
            (x, torch.tensor(1)),
            (x.reshape(2, 3), torch.tensor(1)),
            (x.double(), torch.tensor(1)),
            (torch.tensor(1), x),
            (x, torch.tensor(2)),
            (x, "1"),
        ]
        found = {int(batch_digest(batch, kind).value) % 2**64 for batch in batches}
        assert len(found) == len(batches)
        copy = (x.clone(), torch.tensor(1))
        assert batch_digest(copy, kind) == batch_digest(batches[0], kind)
        strided = (torch.stack([x, x], 1)[:, 0], torch.tensor(1))
        assert batch_digest(strided, kind) == batch_digest(batches[0], kind)
    assert batch_digest({"x": object()}) is None


@pytest.mark.parametrize("tensor", TENSORS, ids=lambda t: f"{t.dtype}-{tuple(t.shape)}")
def test_the_digest_of_a_batch_is_the_one_that_is_specified(tensor):
    plain = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    content = plain.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    head = f"{str(tensor.dtype)[6:]}{list(tensor.shape)}".encode()
    for batch, count in ((tensor, 1), ((tensor, tensor), 2), ([tensor], 1), ({"x": tensor}, 1)):
        expected = xxhash.xxh3_64_intdigest((head + content) * count)
        assert batch_digest(batch) == ("host", expected)


DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8]


@given(st.data())
def test_any_changed_byte_changes_the_digest_of_a_batch(data):
    dtype = data.draw(st.sampled_from(DTYPES))
    count = data.draw(st.integers(1, 300))
    content = data.draw(st.binary(min_size=count * dtype.itemsize, max_size=count * dtype.itemsize))
    place = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.integers(1, 255))
    other = bytearray(content)
    other[place] ^= change  # may be the sign of a zero, or the payload of a NaN
    x, y = (torch.frombuffer(bytearray(b), dtype=dtype) for b in (content, other))
    label = torch.arange(3)
    for kind in ("host", "device"):
        digest = batch_digest((x, label), kind)
        assert digest == batch_digest((x.clone(), label.clone()), kind)
        assert digest != batch_digest((y, label), kind)
        assert digest != batch_digest((label, x), kind)
        assert digest != batch_digest((x.reshape(1, -1), label), kind)


@given(st.data())
def test_the_order_of_elements_changes_the_digest_of_a_batch(data):
    values = data.draw(st.lists(st.floats(width=32), min_size=2, max_size=50))
    order = data.draw(st.permutations(range(len(values))))
    x = torch.tensor(values)
    same = torch.equal(x.view(torch.int32), x[order].view(torch.int32))
    for kind in ("host", "device"):
        assert (batch_digest((x,), kind) == batch_digest((x[order],), kind)) == same


def test_signs_of_zeros_and_payloads_of_nans_change_the_digest_of_a_batch():
    bits = [0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001, 0xFFC00000, 0x7F800001]
    batches = [(torch.tensor(b, dtype=torch.uint32).view(torch.float32),) for b in bits]
    for kind in ("host", "device"):
        assert len({int(batch_digest(b, kind).value) % 2**64 for b in batches}) == len(bits)


def test_a_digest_leaves_its_batch_as_it_was():
    x = torch.arange(6.0, requires_grad=True)
    y = torch.arange(6.0)
    batch_digest((x, y))
    y.resize_(12)  # numpy would have forbidden that
    assert x.requires_grad
    assert y[:6].tolist() == x.tolist()
    assert batch_digest((torch.eye(2).to_sparse(), y)) is None


@pytest.mark.parametrize("whole", [True, False])
def test_a_journal_has_the_digests_of_the_batches_that_were_read(tmp_path, whole):
    run = make(tmp_path, epochs=2)
    journal = pt.journal(tmp_path)
    if not whole:
        journal = functools.partial(journal)  # hands on events only
    seen = []

    class Early:
        def before_step(self, batch):
            seen.append(batch)

        def __call__(self, state, event):
            if event.kind == "step":
                assert seen[-1] is event.batch
                assert len(seen) == event.step

    pt.fit(run.state, run.step, run.batches, epochs=2, observers=[journal, Early()])
    steps = read_journal(tmp_path).steps()
    assert [steps[i + 1].batch for i in range(8)] == [batch_digest(batch) for batch in seen]
    assert len({batch_digest(batch) for batch in seen}) == 8


# ── What is written ───────────────────────────────────────────────────────────────────────────────


def test_each_step_is_in_the_journal(tmp_path):
    seen = []

    def look(state, event):
        if event.kind == "step":
            metrics = {name: value.item() for name, value in state.metrics.items()}
            place = (event.epoch, int(state.cursor.offset))
            seen.append(
                (event.step, place, metrics, batch_digest(event.batch), leaf_digests(state))
            )

    run = make(tmp_path)
    run.replace(observers=[*run.observers, look]).fit()
    journal = read_journal(tmp_path)
    steps = journal.steps()
    assert [*steps] == [*range(1, 13)]
    assert not journal.damage
    for number, place, metrics, batch, leaves in seen:
        record = steps[number]
        assert (record.epoch, record.offset) == place
        assert record.metrics == metrics
        assert record.batch == batch
        assert (record.state is not None) == (number % 2 == 0)
        if record.state is not None:
            assert record.state == leaves._replace(values=leaves.read())
    kinds = [event.kind for event in journal.events()]
    assert kinds == ["fit_start", *["validation", "epoch_end"] * 3, "fit_end"]
    validation = journal.events()[1]
    assert validation.metrics.keys() == {"val/w"}


def test_the_facts_of_the_process_and_what_made_the_run(tmp_path):
    make(str(tmp_path), lr=0.25).fit()
    (segment,) = read_journal(tmp_path).segments
    assert segment.facts["environment"]["torch"] == torch.__version__
    assert segment.facts["settings"]["threads"] == torch.get_num_threads()
    assert segment.facts["process"]["pid"] == os.getpid()
    assert segment.facts["code"].keys() >= {"file"}
    program = segment.program
    assert (program.file, program.name) == (str(Path(__file__).resolve()), "make")
    assert program.arguments == {
        "directory": str(tmp_path), "epochs": 3, "every": 2, "lr": 0.25, "seed": 0,
    }  # fmt: skip
    assert program.left_out == ()


def test_values_that_are_not_plain_are_named_as_left_out(tmp_path):
    make(tmp_path, lr=pt.optim.constant(0.1)).fit()
    (segment,) = read_journal(tmp_path).segments
    assert segment.program.left_out == ("lr",)
    assert "lr" not in segment.program.arguments


def test_a_restart_is_a_new_segment_that_takes_back_what_came_after(tmp_path):
    make(tmp_path, epochs=3).fit()
    for path in tmp_path.glob("*.ckpt"):
        if "00000005" not in path.name:
            path.unlink()
    run = make(tmp_path, epochs=2)
    run.fit(resume=True)
    journal = read_journal(tmp_path)
    assert [(s.start, len(s.steps)) for s in journal.segments] == [(0, 12), (5, 3)]
    assert [*journal.steps()] == [*range(1, 9)]
    assert [e.step for e in journal.events() if e.kind == "epoch_end"] == [4, 8]
    # taken again, the steps are the same
    first, second = ({r.step: r for r in s.steps} for s in journal.segments)
    for step, record in second.items():
        assert record._replace(time=0) == first[step]._replace(time=0)


def test_the_journal_does_not_change_the_run(tmp_path):
    with_journal = make(tmp_path).fit()
    without = make(tmp_path).replace(observers=[], directory=None).fit()
    assert pt.tree.tree_digest(with_journal) == pt.tree.tree_digest(without)


def test_metrics_that_are_not_finite_come_back_as_they_were(tmp_path):
    optimizer = pt.optim.sgd(0.0)
    values = [math.nan, math.inf, -math.inf, 1.0]
    step = pt.train_step(lambda p, b, x, key: p["w"].sum() * 0 + x, optimizer)
    state = pt.TrainState.create({"w": torch.ones(1)}, None, optimizer, key=pt.random.key(0))
    pt.fit(
        state, step, [torch.tensor(v) for v in values], epochs=1, observers=[pt.journal(tmp_path)]
    )
    found = pt.open_run(tmp_path).metrics()["loss"]
    assert np.array_equal(found, np.array(values), equal_nan=True)


def test_bad_arguments_and_places():
    with pytest.raises(ConfigurationError, match="every"):
        pt.journal("x", every=0)
    with pytest.raises(JournalError, match="puretrain.journal"):
        read_journal("/nowhere/at/all")


def test_a_place_that_cant_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "run.journal").mkdir()
    with pytest.raises(JournalError, match="run.journal can't be written: Is a directory"):
        make(tmp_path).fit()


def test_a_file_that_can_grow_no_more_is_a_clear_error_and_stays_whole(tmp_path):
    code = f"""
import resource, signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_journal import make
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
run = make({str(tmp_path)!r}, epochs=100)
resource.setrlimit(resource.RLIMIT_FSIZE, (6000, resource.RLIM_INFINITY))
try:
    run.replace(observers=run.observers[:1]).fit()
finally:  # so that the traceback can be written, wherever to
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
"""
    done = forking.run("-c", code)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("puretrain.errors.JournalError: ")
    assert "run.journal can't be written: File too large" in last
    journal = read_journal(tmp_path)
    assert len(journal.steps()) > 10
    assert all(damage.tail for damage in journal.damage)


# ── Damage ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bytes of a journal, and what it says."""
    place = tmp_path_factory.mktemp("journal")
    make(place, epochs=2, every=4).fit()
    return (place / "run.journal").read_bytes(), read_journal(place)


def facts_of(journal):
    """Everything that a journal says of steps and events."""
    steps = {record for segment in journal.segments for record in map(frozen, segment.steps)}
    events = {record for segment in journal.segments for record in map(frozen, segment.events)}
    return steps, events


def frozen(record):
    return record._replace(metrics=tuple(sorted(record.metrics.items())))


def is_said(record, known):
    """Whether a record says nothing else than one of the known does, perhaps less."""
    for other in known:
        same = record._replace(metrics=other.metrics, state=other.state) == other
        if same and record.metrics in ((), other.metrics) and record.state in (None, other.state):
            return True
    return False


def test_cut_at_every_length_it_gives_the_whole_records_before(tmp_path, written):
    data, journal = written
    steps, events = facts_of(journal)
    path = tmp_path / "run.journal"
    count = -1
    for length in range(len(data)):
        path.write_bytes(data[:length])
        found = read_journal(path)
        mine = facts_of(found)
        assert mine[0] <= steps
        assert mine[1] <= events
        assert len(mine[0]) + len(mine[1]) >= count  # never fewer than a shorter one gave
        count = len(mine[0]) + len(mine[1])
        assert all(damage.tail for damage in found.damage)


@pytest.mark.parametrize("flip", [0x01, 0xFF])
def test_no_damaged_byte_is_misread(tmp_path, written, flip):
    data, journal = written
    steps, events = facts_of(journal)
    path = tmp_path / "run.journal"
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= flip
        path.write_bytes(damaged)
        if place < 16:
            with pytest.raises(JournalError, match="run.journal"):
                read_journal(path)
            continue
        found = read_journal(path)
        assert found.damage
        mine = facts_of(found)
        assert len(mine[0]) + len(mine[1]) >= len(steps) + len(events) - 1
        assert all(is_said(record, steps) for record in mine[0])
        assert all(is_said(record, events) for record in mine[1])


@given(st.binary(max_size=200))
def test_what_is_no_journal_is_refused_or_empty(data):
    from puretrain.replay.format import HEADER, scan

    if data and not HEADER.startswith(data):
        with pytest.raises(JournalError):
            scan(data, "x")
    found = scan(HEADER + data, "x")
    assert not found.records
    assert sum(damage.length for damage in found.damage) == len(data)


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_going_on_cuts_a_torn_tail_and_keeps_the_rest(tmp_path, cut):
    make(tmp_path, epochs=1).fit()
    path = tmp_path / "run.journal"
    path.write_bytes(path.read_bytes()[:-cut])
    before = read_journal(path)
    assert before.damage[-1].tail
    make(tmp_path, epochs=2).fit(resume=True)
    after = read_journal(path)
    assert not after.damage
    assert after.segments[0] == before.segments[0]
    assert [*after.steps()] == [*range(1, 9)]


def test_going_on_keeps_what_comes_after_a_damaged_record(tmp_path):
    make(tmp_path, epochs=1).fit()
    path = tmp_path / "run.journal"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    make(tmp_path, epochs=2).fit(resume=True)
    after = read_journal(path)
    assert len(after.damage) == 1
    assert not after.damage[0].tail
    assert len(after.segments) == 2


def test_a_killed_run_leaves_whole_records(tmp_path):
    code = f"""
import os, signal, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_journal import make
run = make({str(tmp_path)!r}, epochs=100)
def kill(state, event):
    if event.kind == "step" and event.step == 7:
        os.kill(os.getpid(), signal.SIGKILL)
run.replace(observers=[*run.observers, kill]).fit()
"""
    done = forking.run("-c", code)
    assert done.returncode == -signal.SIGKILL
    journal = read_journal(tmp_path)
    assert not journal.damage
    assert [*journal.steps()] == [*range(1, 8)]
