"""Batches: every sample once, in one order, whatever interrupts the reading."""

import itertools
import multiprocessing
import os
import random
import signal
import time
import warnings
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, get_worker_info

from puretrain.data import Batches, DataWarning, batches, collate
from puretrain.errors import ConfigurationError, DataError
from puretrain.state import Cursor
from puretrain.tree import FrozenDict, Record, tree_equal

# ── Sources ───────────────────────────────────────────────────────────────────────────────────────


class Numbers(Dataset):
    """Sample i is the number i."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        assert type(index) is int
        return torch.tensor(index)


class Noisy(Dataset):
    """Sample i is the number i with what the three global generators give."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return {
            "i": index,
            "torch": torch.rand(2),
            "numpy": np.random.rand(2),  # noqa: NPY002
            "python": random.random(),
        }


class Resumable:
    """A stream that resumes by torchdata's protocol; counts the items that it has produced."""

    def __init__(self, n):
        self.n = n
        self.position = 0
        self.produced = 0

    def __iter__(self):
        while self.position < self.n:
            self.position += 1
            self.produced += 1
            yield torch.tensor(self.position - 1)
        self.position = 0

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


class Sharded(IterableDataset):
    """A stream whose workers yield every num_workers-th number each."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        info = get_worker_info()
        start, step = (info.id, info.num_workers) if info else (0, 1)
        for number in range(start, self.n, step):
            yield torch.tensor(number), torch.rand(())


SOURCES = {
    "tensor": torch.arange,
    "array": np.arange,
    "list": lambda n: [torch.tensor(i) for i in range(n)],
    "range": range,
    "dataset": Numbers,
    "tensor dataset": lambda n: TensorDataset(torch.arange(n)),
    "iterable": lambda n: {i: torch.tensor(i) for i in range(n)}.values(),
    "function": lambda n: lambda epoch: (torch.tensor(i) for i in range(n)),
    "resumable": Resumable,
    "resumable iterator": lambda n: ResumableInPart(n),  # noqa: PLW0108 - defined below
}
STREAMS = {"iterable", "function", "resumable", "resumable iterator"}


class ResumingIterator:
    """An iterator that has the state itself."""

    def __init__(self, n):
        self.n, self.next = n, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.next == self.n:
            raise StopIteration
        self.next += 1
        return torch.tensor(self.next - 1)

    def state_dict(self):
        return {"next": self.next}

    def load_state_dict(self, state):
        self.next = state["next"]


def numbers(batch) -> list[int]:
    (leaf,) = batch if isinstance(batch, (tuple, list)) else (batch,)
    assert isinstance(leaf, Tensor)
    return leaf.tolist()


def read_all(data: Batches, cursor: Cursor) -> list[int]:
    return [number for read in data.read(cursor) for number in numbers(read.batch)]


def at(epoch: int, offset: int = 0) -> Cursor:
    return Cursor(torch.tensor(epoch), torch.tensor(offset))


def global_states():
    numpy_state = np.random.get_state()  # noqa: NPY002
    return (
        torch.default_generator.get_state().tolist(),
        [x.tolist() if isinstance(x, np.ndarray) else x for x in numpy_state],
        random.getstate(),
    )


@pytest.fixture
def untouched():
    """The test must leave the three global generators as they were."""
    before = global_states()
    yield
    assert global_states() == before


class ResumableInPart:
    """A stream whose iterators have the state."""

    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return ResumingIterator(self.n)


# ── Coverage and order ────────────────────────────────────────────────────────────────────────────


@pytest.mark.filterwarnings("ignore::puretrain.data.DataWarning")
@pytest.mark.parametrize("kind", SOURCES)
@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(1, 30),
    parts=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 4)), max_size=6),
    last=st.integers(1, 12),
    shuffle=st.booleans(),
    seed=st.integers(0, 2**63),
    epoch=st.integers(0, 3),
)
def test_interruptions_change_nothing(kind, n, parts, last, shuffle, seed, epoch):
    shuffle = shuffle and kind not in STREAMS

    def data(batch_size):  # a new process would make its source anew
        return batches(SOURCES[kind](n), batch_size, shuffle=shuffle, seed=seed)

    undisturbed = read_all(data(n), at(epoch))
    assert sorted(undisturbed) == list(range(n))
    if not shuffle:
        assert undisturbed == list(range(n))

    cursor, seen = at(epoch), []
    for batch_size, count in parts:
        for read in itertools.islice(data(batch_size).read(cursor), count):
            seen += numbers(read.batch)
            cursor = read.cursor
            assert read.size == len(numbers(read.batch))
            assert int(cursor.offset) == len(seen)
            assert int(cursor.epoch) == epoch
    seen += read_all(data(last), cursor)
    assert seen == undisturbed


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 30), size=st.integers(1, 12), drop=st.booleans(), data=st.data())
def test_length_and_exhausted_tell_what_reading_finds(n, size, drop, data):
    if drop and n < size:
        with pytest.raises(DataError, match="drop_last"):
            batches(torch.arange(n), size, drop_last=True)
        return
    cursor = at(1, data.draw(st.integers(0, n)))
    for source in (torch.arange(n), list(range(n))):
        made = batches(source, size, drop_last=drop)
        reads = list(made.read(cursor))
        assert made.length(cursor) == len(reads)
        assert made.exhausted(cursor) is (not reads)
        assert all(read.size == size for read in reads[: None if drop else -1])
        if reads:
            assert made.exhausted(reads[-1].cursor)
            assert int(reads[-1].cursor.epoch) == 1
        assert len(made) == (n // size if drop else -(-n // size)) == len(list(made))


def test_the_order_is_a_function_of_seed_and_epoch(untouched):
    def order(seed, epoch, source=range(100)):
        return read_all(batches(source, 8, shuffle=True, seed=seed), at(epoch))

    assert order(0, 0) == order(0, 0) == order(0, 0, torch.arange(100))
    orders = [order(seed, epoch) for seed in (0, 1, -1) for epoch in (0, 1, 2**40)]
    assert len({tuple(o) for o in orders}) == 9
    # Uniform: each number comes first in about 1 of 4 epochs.
    firsts = [order(5, epoch, range(4))[0] for epoch in range(400)]
    assert all(70 < firsts.count(number) < 130 for number in range(4))


def test_next_epoch():
    data = batches(torch.arange(3), 2)
    cursor = [read.cursor for read in data.read(Cursor())][-1]
    following = data.next_epoch(cursor)
    assert (int(following.epoch), int(following.offset), following.source.numel()) == (1, 0, 0)
    assert not data.exhausted(following)


# ── Arrays ────────────────────────────────────────────────────────────────────────────────────────


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


class Example(Record):
    x: Tensor
    y: Tensor


@pytest.mark.parametrize("node", [Pair, Example, lambda x, y: (x, y), lambda x, y: [x, y],
                                  lambda x, y: {"y": y, "x": {"z": x}},
                                  lambda x, y: FrozenDict(y=y, x=x)])  # fmt: skip
@pytest.mark.parametrize("shuffle", [False, True])
def test_trees_of_arrays(node, shuffle):
    x, y = torch.randn(7, 2, 3, dtype=torch.float64), np.arange(7, dtype=np.int32)
    source = node(x, y)
    if isinstance(source, list):
        source = (source,)
        wrap = lambda x, y: ([x, y],)  # noqa: E731
    else:
        wrap = node
    order = read_all(batches(torch.arange(7), 7, shuffle=shuffle), Cursor())
    got = list(batches(source, 3, shuffle=shuffle))
    for batch, rows in zip(got, (order[:3], order[3:6], order[6:]), strict=True):
        assert type(batch) is type(source)
        assert tree_equal(batch, wrap(x[rows], torch.from_numpy(y)[rows]))


def test_unshuffled_batches_are_views_and_share_an_arrays_memory():
    x, y = torch.zeros(4, 3), np.zeros((4, 3))
    got = list(batches((x, y), 2))
    x += 1
    y += 1
    assert all(float(leaf.sum()) == 6 for batch in got for leaf in batch)


def test_a_read_only_mapped_array(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(10))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_all(batches(mapped, 3, shuffle=True), Cursor()) != list(range(10))
        assert read_all(batches(mapped[::-1], 3), Cursor()) == list(range(10))[::-1]


def test_transform_and_device():
    data = batches({"x": torch.ones(4), "y": torch.ones(4)}, 2, device="meta",
                   transform=lambda batch: (batch["x"].device.type, batch))  # fmt: skip
    seen, batch = next(iter(data))
    assert seen == batch["y"].device.type == "meta"
    moved = batches([("a", torch.ones(1))] * 2, 2, device="meta")
    name, x = next(iter(moved))
    assert (name, x.device.type) == (["a", "a"], "meta")


# ── Randomness of samples ─────────────────────────────────────────────────────────────────────────


def test_samples_draw_the_same_whatever_reads_them(untouched):
    def read(num_workers, cursor, batch_size=3, **options):
        data = batches(
            Noisy(8), batch_size, shuffle=True, seed=3, num_workers=num_workers, **options
        )
        return list(data.read(cursor))

    whole = [read(workers, at(1)) for workers in (0, 1, 2)]
    for reads in whole[1:]:
        assert tree_equal([r.batch for r in reads], [r.batch for r in whole[0]])
    rest = read(2, whole[0][0].cursor, batch_size=5)
    assert tree_equal(rest[0].batch, collate_rows([r.batch for r in whole[0][1:]]))
    # The draws belong to the sample, not to its place: another order, the same draws.
    by_index = {}
    for batch in batches(Noisy(8), 1, seed=3).read(at(1)):
        by_index[int(batch.batch["i"])] = batch.batch["torch"][0].tolist()
    for batch in whole[0]:
        for index, drawn in zip(batch.batch["i"].tolist(), batch.batch["torch"], strict=True):
            assert by_index[index] == drawn.tolist()
    # And samples, epochs, seeds and generators all draw differently.
    drawn = [
        value
        for seed, epoch in ((3, 0), (3, 1), (4, 0))
        for r in batches(Noisy(8), 8, seed=seed).read(at(epoch))
        for name in ("torch", "numpy", "python")
        for value in r.batch[name].double().flatten().tolist()
    ]
    assert len({round(value, 5) for value in drawn}) == len(drawn)


def collate_rows(parts):
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def test_without_sample_seeds_the_global_generators_are_drawn_from():
    torch.manual_seed(0)
    expected = [torch.rand(2) for _ in range(4)]
    torch.manual_seed(0)
    (batch,) = batches(Noisy(4), 4, sample_seeds=False)
    assert torch.equal(batch["torch"], torch.stack(expected))


def test_getitems_is_used_without_sample_seeds():
    class Many(Numbers):
        def __getitems__(self, indices):
            return [torch.tensor(-index) for index in indices]

    assert read_all(batches(Many(4), 2, sample_seeds=False), Cursor()) == [0, -1, -2, -3]
    assert read_all(batches(Many(4), 2), Cursor()) == [0, 1, 2, 3]


def test_draws_of_streams_and_collations_survive_resuming(untouched):
    def stream(epoch):
        for number in torch.randperm(10):
            yield number, torch.rand(()), random.random()

    def mixing(samples):
        return torch.stack([x for x, *_ in samples]), torch.rand(1) + samples[0][1]

    whole = list(batches(stream, 2).read(at(2)))
    assert sorted(torch.cat([r.batch[0] for r in whole]).tolist()) == list(range(10))
    with pytest.warns(DataWarning, match="4 items of epoch 2 are read again"):
        rest = list(batches(stream, 2).read(whole[1].cursor))
    assert tree_equal([r.batch for r in rest], [r.batch for r in whole[2:]])
    first, second = (list(batches(stream, 2, collate=mixing).read(at(0))) for _ in range(2))
    assert tree_equal([r.batch for r in first], [r.batch for r in second])
    by_list = batches([(torch.tensor(i), 0.0) for i in range(4)], 2, collate=mixing)
    assert tree_equal(list(by_list), list(by_list))


# ── Workers ───────────────────────────────────────────────────────────────────────────────────────


def test_closing_ends_the_workers():
    reads = batches(Numbers(100), 2, num_workers=2).read(Cursor())
    next(reads)
    assert len(multiprocessing.active_children()) == 2
    reads.close()
    assert not multiprocessing.active_children()


def test_persistent_workers_stay_and_read_exactly():
    class Where(Numbers):
        def __getitem__(self, index):
            return index, os.getpid()

    data = batches(Where(12), 2, shuffle=True, num_workers=1, persistent_workers=True)
    early = data.read(at(0))
    first = next(early)
    early.close()
    rest = list(data.read(first.cursor))
    again = list(data.read(at(1)))
    plain = batches(range(12), 2, shuffle=True)
    got = [i for r in (first, *rest, *again) for i in r.batch[0].tolist()]
    assert got == read_all(plain, at(0)) + read_all(plain, at(1))
    pids = {pid for r in (first, *rest, *again) for pid in r.batch[1].tolist()}
    assert len(pids) == 1
    del data, early
    assert not multiprocessing.active_children()


def test_an_exception_keeps_its_type_and_place():
    class Broken(Numbers):
        def __getitem__(self, index):
            if index == 5:
                raise FileNotFoundError("no such picture")
            return index

    with pytest.raises(FileNotFoundError, match="no such picture") as info:
        list(batches(Broken(8), 2))
    assert "sample 5" in info.value.__notes__[0]
    with pytest.raises(FileNotFoundError, match=r"(?s)in __getitem__.*no such picture.*sample 5"):
        list(batches(Broken(8), 2, num_workers=1))
    assert not multiprocessing.active_children()


def test_a_dead_and_a_stuck_worker():
    class Deadly(Numbers):
        def __getitem__(self, index):
            os._exit(1)

    class Slow(Numbers):
        def __getitem__(self, index):
            time.sleep(60)

    with pytest.raises(DataError, match="worker that reads the source is gone"):
        list(batches(Deadly(4), 2, num_workers=1))
    with pytest.raises(DataError, match="timed out after 1 seconds"):
        list(batches(Slow(4), 2, num_workers=1, timeout=1))
    assert not multiprocessing.active_children()


class Fatal:
    """Kills the process that it comes from while it is unpickled."""

    def __init__(self):
        self.origin = os.getpid()

    def __reduce__(self):
        return os.kill, (self.origin, signal.SIGKILL)


@pytest.mark.parametrize("stream", [False, True])
def test_a_worker_killed_while_it_hands_over_a_tensor(stream):
    def sample():
        return Fatal(), torch.ones(1000)

    class Interrupted(Numbers):
        def __getitem__(self, index):
            return sample()

    class InterruptedStream(IterableDataset):
        def __iter__(self):
            return iter([sample()])

    source = InterruptedStream() if stream else Interrupted(8)
    # Torch's handler of signals tells of a lost worker in any line of any code, also in this one.
    errors, told = (
        (DataError, RuntimeError),
        "worker that reads the source is gone|is killed by signal",
    )
    for _ in range(5):  # what breaks first is a matter of luck
        with pytest.raises(errors, match=told):
            list(batches(source, 1, num_workers=1, collate=lambda items: items[0]))
    assert not multiprocessing.active_children()


def test_a_connection_that_breaks_in_the_dataset_is_its_own_error():
    class Remote(Numbers):
        def __getitem__(self, index):
            raise ConnectionResetError("the server is away")

    with pytest.raises(ConnectionResetError, match="the server is away"):
        list(batches(Remote(8), 2, num_workers=1))


def test_workers_of_a_stream_take_turns(untouched):
    def init(number):
        # The caller's dataset, to be changed before it is read.
        get_worker_info().dataset.n -= 1

    options = {"num_workers": 2, "worker_init_fn": init}
    whole = list(batches(Sharded(10), 2, **options).read(Cursor()))
    assert torch.cat([r.batch[0] for r in whole]).tolist() == list(range(9))
    with pytest.warns(DataWarning, match="4 items"):
        rest = list(batches(Sharded(10), 3, **options).read(whole[1].cursor))
    assert torch.cat([r.batch[0] for r in rest]).tolist() == list(range(4, 9))
    assert torch.equal(rest[0].batch[1][:2], whole[2].batch[1])
    draws = torch.cat([r.batch[1] for r in whole]).tolist()
    assert len(set(draws)) == 9
    for number in (0, 1, 3):
        with pytest.raises(DataError, match="num_workers"):
            list(batches(Sharded(10), 2, num_workers=number).read(whole[1].cursor))


# ── Streams ───────────────────────────────────────────────────────────────────────────────────────


def test_an_endless_stream():
    data = batches(lambda epoch: itertools.count(100 * epoch), 4, drop_last=True)
    first = list(itertools.islice(data.read(at(1)), 3))
    assert [r.batch.tolist()[0] for r in first] == [100, 104, 108]
    assert data.length(first[2].cursor) is None
    assert data.exhausted(first[2].cursor) is None
    with pytest.warns(DataWarning, match="12 items of epoch 1"):
        assert next(data.read(first[2].cursor)).batch.tolist() == [112, 113, 114, 115]
    with pytest.raises(TypeError, match="length"):
        len(data)


def test_a_stateful_source_reads_nothing_twice():
    whole = read_all(batches(Resumable(10), 3), Cursor())
    cursor = next(batches(Resumable(10), 3).read(Cursor())).cursor
    assert cursor.source.dtype == torch.uint8
    source = Resumable(10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest = read_all(batches(source, 4), cursor)
    assert rest == whole[3:]
    assert source.produced == 7


def test_a_stateful_source_begins_again_when_reading_was_broken_off():
    data = batches(Resumable(6), 2)
    assert numbers(next(data.read(Cursor())).batch) == [0, 1]
    assert read_all(data, Cursor()) == list(range(6))
    assert read_all(data, Cursor()) == list(range(6))


class StaysAtItsEnd(Resumable):
    def __iter__(self):
        for number in range(self.position, self.n):
            self.position = number + 1
            yield torch.tensor(number)


class CountsEpochs(Resumable):
    epoch = 0

    def __iter__(self):
        yield from (number + 100 * self.epoch for number in super().__iter__())
        self.epoch += 1

    def state_dict(self):
        return {"position": self.position, "epoch": self.epoch}

    def load_state_dict(self, state):
        self.position, self.epoch = state["position"], state["epoch"]


@pytest.mark.parametrize(
    ("kind", "step"), [(Resumable, 0), (StaysAtItsEnd, 0), (CountsEpochs, 100)]
)
@pytest.mark.parametrize("size", [2, 4, 5])
def test_epochs_of_stateful_sources(kind, step, size):
    data, cursor = batches(kind(6), size), Cursor()
    for epoch in range(3):
        if epoch == 2:
            data = batches(kind(6), size)  # resumed in a new process
        reads = list(data.read(cursor))
        got = [number for r in reads for number in numbers(r.batch)]
        assert got == [number + step * epoch for number in range(6)]
        end = reads[-1].cursor
        assert read_all(batches(kind(6), size), end) == []
        assert data.exhausted(end) is (True if size > 3 else None)  # seen to have ended, or not
        cursor = data.next_epoch(end)
        assert data.exhausted(cursor) is None
    middle = next(data.read(cursor)).cursor
    assert read_all(batches(kind(6), size), middle) == [3 * step + i for i in range(size, 6)]


@pytest.mark.parametrize("kind", [Resumable, StaysAtItsEnd, CountsEpochs])
def test_the_next_epoch_begins_at_its_beginning(kind):
    data = batches(kind(7), 3, drop_last=True)
    reads = list(data.read(Cursor()))
    assert [r.batch.tolist() for r in reads] == [[0, 1, 2], [3, 4, 5]]
    for read in reads:  # also when the rest of an epoch is not read
        (first, *_) = batches(kind(7), 3).read(data.next_epoch(read.cursor))
        assert [number % 100 for number in first.batch.tolist()] == [0, 1, 2]


def test_set_epoch_is_called():
    class Shuffled:
        def set_epoch(self, epoch):
            self.epoch = epoch

        def __iter__(self):
            return iter([10 * self.epoch, 10 * self.epoch + 1])

    assert read_all(batches(Shuffled(), 2), at(4)) == [40, 41]


def test_a_state_may_hold_what_generators_keep():
    class Drawing:
        def __init__(self):
            self.python = random.Random(1)
            self.numpy = np.random.default_rng(2)
            self.torch = torch.Generator().manual_seed(3)

        def __iter__(self):
            while True:
                yield (
                    self.python.random(),
                    self.numpy.random(),
                    torch.rand(2, generator=self.torch),
                )

        def state_dict(self):
            numpy_state = self.numpy.bit_generator.state
            return {"p": self.python.getstate(), "n": numpy_state, "t": self.torch.get_state(),
                    "a": np.arange(3), "s": np.float32(0.5), 7: [None, True, b"x"]}  # fmt: skip

        def load_state_dict(self, state):
            assert type(state["s"]) is np.float32
            assert state["a"].tolist() == [0, 1, 2]
            assert state[7] == [None, True, b"x"]
            self.python.setstate(state["p"])
            self.numpy.bit_generator.state = state["n"]
            self.torch.set_state(state["t"])

    whole = list(itertools.islice(batches(Drawing(), 2).read(Cursor()), 4))
    rest = list(itertools.islice(batches(Drawing(), 2).read(whole[1].cursor), 2))
    assert tree_equal([r.batch for r in rest], [r.batch for r in whole[2:]])


def test_a_state_that_is_not_plain():
    class Odd(Resumable):
        def state_dict(self):
            return {"reader": {"handles": [1, {2}]}}

    with pytest.raises(DataError, match="reader/handles/1 is a set"):
        batches(Odd(3), 2)


# ── Ready batches ─────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("wrap", [list, lambda items: lambda epoch: items])
def test_ready_batches(wrap):
    items = [{"x": torch.ones(n, 2), "n": n} for n in (4, 3, 1)]
    data = batches(wrap(items))
    reads = list(data.read(Cursor()))
    assert [r.size for r in reads] == [4, 3, 1]
    assert [int(r.cursor.offset) for r in reads] == [1, 2, 3]
    assert all(r.batch is item for r, item in zip(reads, items, strict=True))
    halved = batches(wrap(items), collate=lambda item: item["x"] / 2)
    assert [float(batch.sum()) for batch in halved] == [4.0, 3.0, 1.0]


def test_a_ready_batch_without_a_first_dimension_has_size_one():
    (read,) = batches([(torch.tensor(1.0), "a")]).read(Cursor())
    assert read.size == 1


# ── DataLoader ────────────────────────────────────────────────────────────────────────────────────


LOADER_OPTIONS = [
    {"batch_size": 3},
    {"batch_size": 3, "drop_last": True},
    {"batch_size": None},
    {"batch_size": 2, "collate_fn": lambda samples: [str(s) for s in samples]},
    {"batch_size": 3, "num_workers": 1, "prefetch_factor": 3, "persistent_workers": True},
]


class Counting(IterableDataset):
    def __init__(self, n):
        self.n = n

    def __iter__(self):
        return iter([(i, float(i)) for i in range(self.n)])


@pytest.mark.filterwarnings("ignore::puretrain.data.DataWarning")
@pytest.mark.parametrize("options", LOADER_OPTIONS)
@pytest.mark.parametrize(
    "dataset",
    [
        TensorDataset(torch.randn(7, 2), torch.arange(7)),
        [(1.5 * i, {"a": np.ones(2)}) for i in range(7)],
        Counting(7),
    ],
)
def test_a_sequential_loader_gives_what_it_gives_itself(dataset, options):
    loader = DataLoader(dataset, **options)
    expected = list(loader)
    before = global_states()
    reads = list(batches(loader).read(Cursor()))
    rest = list(batches(loader).read(reads[0].cursor))
    assert global_states() == before
    assert tree_equal([r.batch for r in reads], expected)
    assert tree_equal([r.batch for r in rest], expected[1:])


def test_batches_of_a_loader_do_not_alias_its_dataset():
    x = torch.zeros(4)
    for batch in batches(DataLoader(TensorDataset(x), batch_size=2)):
        batch[0].add_(1)
    assert not x.any()


def test_loaders_without_a_reproducible_order():
    data = TensorDataset(torch.arange(8))
    for loader, reason in [
        (DataLoader(data, 2, shuffle=True), "RandomSampler"),
        (DataLoader(data, batch_sampler=[[0, 1], [2]]), "comes? from a list"),
        (DataLoader(data, 2, in_order=False), "in_order"),
        (DataLoader(data, 2, sampler=[3, 2, 1]), "list"),
    ]:
        with pytest.raises(DataError, match=rf"(?s){reason}.*Write batches\(loader.dataset"):
            batches(loader)
    with pytest.raises(ConfigurationError, match="brings its own batch_size, shuffle"):
        batches(DataLoader(data, 2), 4, shuffle=True)


# ── Collation ─────────────────────────────────────────────────────────────────────────────────────


def test_collate_keeps_nodes_and_makes_tensors():
    def sample(i):
        return {
            "z": Pair(torch.full((2,), i), np.full(3, i, np.int16)),
            "a": [Example(x=i, y=float(i)), (bool(i), np.float32(i), None)],
            "m": FrozenDict(text=f"t{i}", raw=b"x", complex=1j * i),
        }

    batch = collate([sample(0), sample(1)])
    assert list(batch) == ["z", "a", "m"]
    assert type(batch["z"]) is Pair
    assert batch["z"].y.dtype == torch.int16
    assert batch["z"].y.shape == (2, 3)
    record, (flag, number, nothing) = batch["a"]
    assert type(record) is Example
    assert tree_equal((record.x, record.y), (torch.tensor([0, 1]), torch.tensor([0.0, 1.0])))
    assert tree_equal((flag, number), (torch.tensor([False, True]), torch.tensor([0.0, 1.0])))
    assert nothing is None
    assert type(batch["m"]) is FrozenDict
    assert batch["m"]["text"] == ["t0", "t1"]
    assert batch["m"]["raw"] == [b"x", b"x"]
    assert batch["m"]["complex"].dtype == torch.complex64
    frozen = np.arange(3)[::-1]
    frozen.flags.writeable = False
    assert collate([frozen, frozen]).tolist() == [[2, 1, 0]] * 2


@pytest.mark.parametrize(("other", "message"), [
    ({"x": (torch.ones(3), 1)}, r"x/0: sample 6 is float32\[3\], but sample 3 is float32\[2\]"),
    ({"x": (torch.ones(2).double(), 1)}, r"x/0: sample 6 is float64\[2\]"),
    ({"x": ([1.0, 2.0], 1)}, "x/0 is in sample 3, not in sample 6"),
    ({"x": ("no", 1)}, "x/0: sample 6 is of type str, but sample 3 an array"),
    ({"x": (np.array(["a"]), 1)}, "x/0: sample 6 is of type numpy array of dtype <U1"),
    ({"x": (torch.ones(2), 1.0)}, "x/1: sample 6 is of type float, but sample 3 of type int"),
    ({"x": (torch.ones(2), True)}, "x/1: sample 6 is of type bool"),
    ({"x": (torch.ones(2), None)}, "x/1 is in sample 3, not in sample 6"),
    ({"y": (torch.ones(2), 1)}, "x/0 is in sample 3, not in sample 6"),
])  # fmt: skip
def test_collate_says_which_sample_differs_where(other, message):
    first = {"x": (torch.ones(2), 1)}
    with pytest.raises(DataError, match=message):
        list(batches([first, first, first, first, first, first, other], 4).read(at(0, 3)))


def test_collate_refuses_what_it_does_not_know():
    with pytest.raises(DataError, match="o: sample 0 is of type object.*collate="):
        list(batches([{"o": object()}], 1))
    with pytest.raises(DataError, match="at least one"):
        collate([])


# ── Bad input ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("make", "error", "message"), [
    (lambda: batches([], 2), DataError, "source is empty"),
    (lambda: batches(torch.ones(0, 3), 2), DataError, "source is empty"),
    (lambda: list(batches(lambda epoch: [], 2)), DataError, "yielded nothing in epoch 0"),
    (lambda: list(batches(lambda epoch: [1], 2, drop_last=True)), DataError, "fewer than 2"),
    (lambda: batches([1], 0), ConfigurationError, "batch_size is a whole number from 1"),
    (lambda: batches([1], True), ConfigurationError, "batch_size"),
    (lambda: batches([1], 2.0), ConfigurationError, "batch_size"),
    (lambda: batches([1], 1, seed="x"), ConfigurationError, "seed"),
    (lambda: batches([1], 1, num_workers=-1), ConfigurationError, "num_workers"),
    (lambda: batches([1], drop_last=True), ConfigurationError, "drop_last needs a batch_size"),
    (lambda: batches([1], 1, timeout=3), ConfigurationError, "timeout needs num_workers"),
    (lambda: batches([1], 1, num_workers=1, multiprocessing_context="x"),
     ConfigurationError, "start method"),
    (lambda: batches([1], 1, device="nonsense"), ConfigurationError, "device"),
    (lambda: batches({"x": torch.ones(3), "y": torch.ones(4)}, 2), DataError,
     "y has 4 samples, but x has 3"),
    (lambda: batches({"x": [1, 2]}, 2), DataError, "x/0 is of type int"),
    (lambda: batches({"x": torch.tensor(1)}, 2), DataError, "x has no first dimension"),
    (lambda: batches({"x": torch.ones(2, 2).to_sparse()}, 2), DataError, "to_dense"),
    (lambda: batches(np.array(["a", "b"]), 2), DataError, "dtype <U1"),
    (lambda: batches({}, 2), DataError, "without a leaf"),
    (lambda: batches(torch.ones(3)), ConfigurationError, "batch_size is missing"),
    (lambda: batches(torch.ones(3), 1, collate=list), ConfigurationError, "use transform"),
    (lambda: batches({1, 2}, 1), DataError, "order changes"),
    (lambda: batches("data.csv", 1), DataError, "source is a str"),
    (lambda: batches(Numbers, 1), DataError, "the class Numbers"),
    (lambda: batches((i for i in range(3)), 1), DataError, r"only once.*batches\(lambda epoch"),
    (lambda: batches(iter([1]), 1), DataError, "only once"),
    (lambda: batches(os.environ, 1), DataError, r"dict\(source\)"),
    (lambda: batches(Dataset(), 1), DataError, "without __len__"),
    (lambda: batches(3, 1), DataError, "source is a int"),
    (lambda: batches(Sharded(3), 1, shuffle=True), ConfigurationError, "shuffle"),
    (lambda: batches(lambda epoch: [1], 1, num_workers=1), ConfigurationError, "num_workers"),
    (lambda: batches(Resumable(3), 1, num_workers=1), ConfigurationError, "keeps its own state"),
])  # fmt: skip
def test_bad_sources_and_arguments(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.filterwarnings("ignore::puretrain.data.DataWarning")
def test_cursors_of_other_sources():
    stateful = next(batches(Resumable(9), 2).read(Cursor())).cursor
    for source in (torch.arange(9), list(range(9)), lambda epoch: range(9)):
        with pytest.raises(DataError, match="another source"):
            list(batches(source, 2).read(stateful))
    for source in (torch.arange(3), [1, 2, 3], lambda epoch: range(3)):
        with pytest.raises(DataError, match="another source"):
            list(batches(source, 2).read(at(0, 4)))
        assert list(batches(source, 2).read(at(0, 3))) == []
    for method in ("length", "exhausted"):
        with pytest.raises(DataError, match="item 4 of epoch 0"):
            getattr(batches([1], 1), method)(at(0, 4))
    broken = Cursor(source=torch.tensor([0xC1], dtype=torch.uint8))
    with pytest.raises(DataError, match="no state of a source"):
        list(batches(Resumable(3), 1).read(broken))


def test_pinning_without_an_accelerator_is_said():
    if torch.accelerator.is_available():
        pytest.skip("there is one")
    with pytest.warns(DataWarning, match="pin_memory has no effect"):
        batches([1], 1, pin_memory=True)


def test_repr():
    assert repr(batches(torch.ones(3), 2, shuffle=True, seed=5)) == (
        "<Batches of 3 samples (Tensor), batch_size=2, shuffle=True, seed=5>"
    )


def test_ready_batches_are_cut_along_their_first_dimension():
    ready = [{"x": torch.arange(5.0), "y": np.arange(10).reshape(5, 2)}, {"x": torch.zeros(1)}]
    cursor = Cursor()
    whole = batches(ready)
    read = [[got.batch for got in whole.divided(2, part).read(cursor)] for part in (0, 1)]
    for number, batch in enumerate(ready):
        for name, leaf in batch.items():
            halves = [each[number] for each in read]
            rows = [half.parts[0][name][: int(half.sizes[0])] for half in halves]
            assert np.array_equal(np.concatenate(rows), leaf)
    assert [[int(size) for size in each[0].sizes] for each in read] == [[2], [3]]
    assert [[int(size) for size in each[1].sizes] for each in read] == [[0], [1]]  # of one sample
    assert int(read[0][0].total) == 5
    for wrong, said in (
        ({"a": torch.zeros(2), "deep": [torch.zeros(3)]}, "deep/0 is none with 2 rows"),
        ({"a": torch.zeros(2), "name": "b"}, "name is none with 2 rows"),
        (torch.zeros(0, 3), "without a sample"),
    ):
        with pytest.raises(DataError, match=said):
            next(batches([wrong]).divided(2, 0).read(cursor))
