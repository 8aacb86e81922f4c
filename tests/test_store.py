"""A directory of checkpoints: what it keeps, and what it is after every kind of failure."""

import builtins
import errno
import os
import resource
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import puretrain as pt
from puretrain.checkpoint import file as checkpoint_file
from puretrain.checkpoint import places, store
from puretrain.checkpoint.format import encode_head, encode_index
from puretrain.errors import CheckpointError
from puretrain.tree import tree_digest

KEEP_ALL = store.Retention(None)


def tree(step, size=20_000):
    """A frozen part that is large enough to be shared, and one that changes with every step."""
    return {
        "frozen": torch.arange(size, dtype=torch.float32),
        "w": torch.full((size,), float(step)),
        "step": step,
    }


def put(directory, step, *, share=True, retention=KEEP_ALL, best=(), **metadata):
    return store.add(
        directory,
        step,
        tree(step),
        metadata={"step": step, **metadata},
        share=share,
        retention=retention,
        best=best,
    )


def steps(directory):
    return [entry.step for entry in store.saved(directory)]


def hidden(directory):
    return [path.name for path in Path(directory).rglob(".puretrain-*")]


# ── What is kept ──────────────────────────────────────────────────────────────────────────────────


def test_an_entry_is_found_again_and_latest_names_it(tmp_path):
    for step in (3, 7):
        put(tmp_path, step)
    assert steps(tmp_path) == [3, 7]
    assert store.latest(tmp_path) == str(tmp_path / "step_00000007.ckpt")
    assert (tmp_path / "LATEST").read_text() == "step_00000007.ckpt\n"
    assert tree_digest(pt.load(store.latest(tmp_path))) == tree_digest(tree(7))
    assert store.check(tmp_path) == []


def test_retention_of_the_last_every_kth_and_the_best(tmp_path):
    for step in range(1, 13):
        put(tmp_path, step, retention=store.Retention(2, every=5), best={3})
    assert steps(tmp_path) == [3, 5, 10, 11, 12]


def test_retention_by_the_hour(tmp_path):
    for step in range(8):
        time_of = (
            f"2026-01-01T00:{10 * step:02}:00+00:00"
            if step < 6
            else (f"2026-01-01T01:{10 * (step - 6):02}:00+00:00")
        )
        put(tmp_path, step, retention=store.Retention(1, hours=0.5), time=time_of)
    assert steps(tmp_path) == [0, 3, 6, 7]  # at 0, 30 and 60 minutes, and the newest


@given(
    hours=st.lists(st.floats(0, 100, allow_nan=False), max_size=30),
    last=st.integers(1, 4),
    every=st.none() | st.integers(1, 7),
    gap=st.none() | st.floats(0.1, 30),
    best=st.sets(st.integers(0, 40), max_size=4),
)
def test_what_is_retained_does_not_depend_on_earlier_deletions(hours, last, every, gap, best):
    entries = [store.Saved(step, "", hour) for step, hour in enumerate(sorted(hours))]
    retention = store.Retention(last, every, gap)
    kept = store.retained(entries, retention, best)
    assert {entry.step for entry in entries[-last:]} <= kept
    there = []
    for entry in entries:  # deleting as the run goes on
        there.append(entry)
        chosen = store.retained(there, retention, best)
        there = [e for e in there if e.step in chosen]
    assert {entry.step for entry in there} == kept


def test_a_later_entry_is_set_aside_when_a_run_goes_back(tmp_path):
    for step in (1, 2, 3):
        put(tmp_path, step)
    later = store.begin(tmp_path, 1)
    assert [entry.step for entry in later] == [2, 3]
    assert steps(tmp_path) == [1]
    assert (tmp_path / "LATEST").read_text() == "step_00000001.ckpt\n"
    assert (tmp_path / "step_00000003.ckpt.old").is_file()
    assert tree_digest(pt.load(tmp_path / "step_00000003.ckpt.old")) == tree_digest(tree(3))


# ── What is shared ────────────────────────────────────────────────────────────────────────────────


def test_unchanged_leaves_are_written_once(tmp_path):
    sizes = [os.path.getsize(put(tmp_path, step)) for step in range(4)]
    assert sizes[0] > 160_000
    assert all(80_000 < size < 90_000 for size in sizes[1:])
    (block,) = os.listdir(tmp_path / "blocks")
    assert block.endswith("-80000.raw")
    for step in range(4):
        for mmap in (False, True):
            got = pt.load(tmp_path / f"step_{step:08}.ckpt", mmap=mmap)
            assert tree_digest(got) == tree_digest(tree(step))


def test_a_block_lives_as_long_as_an_entry_uses_it(tmp_path):
    put(tmp_path, 0)
    put(tmp_path, 1)
    put(tmp_path, 2)
    changed = tree(3)
    changed["frozen"] = changed["frozen"] + 1
    for step in (3, 4):
        changed = {**changed, "step": step}
        store.add(tmp_path, step, changed, metadata={}, share=True, retention=store.Retention(3))
        pt.verify(tmp_path / "step_00000002.ckpt")
    assert steps(tmp_path) == [2, 3, 4]
    store.collect(tmp_path, store.Retention(1))
    entries = pt.read_index(tmp_path / "step_00000004.ckpt").entries
    used = {entry.shared_name for entry in entries if entry.shared}
    assert len(used) == 2  # the frozen part, and what happens to be the same as in step 3
    assert set(os.listdir(tmp_path / "blocks")) == used
    assert tree_digest(pt.load(tmp_path / "step_00000004.ckpt")) == tree_digest(changed)


def test_no_block_is_deleted_while_an_entry_cannot_tell_what_it_uses(tmp_path):
    for step in range(3):
        put(tmp_path, step)
    path = tmp_path / "step_00000001.ckpt"
    path.write_bytes(path.read_bytes()[:100])
    os.rename(tmp_path / "step_00000002.ckpt", tmp_path / "elsewhere")
    assert store.collect(tmp_path, KEEP_ALL) == []
    assert len(os.listdir(tmp_path / "blocks")) == 1


def test_a_damaged_or_missing_block_is_found(tmp_path):
    for step in range(2):
        put(tmp_path, step)
    (block,) = (tmp_path / "blocks").iterdir()
    content = bytearray(block.read_bytes())
    content[12345] ^= 1
    block.write_bytes(content)
    for read in (pt.verify, pt.load, lambda path: pt.load(path, mmap=True)):
        with pytest.raises(CheckpointError, match=r"blocks.*frozen.*checksum is wrong"):
            read(tmp_path / "step_00000001.ckpt")
    block.write_bytes(content[:-1])
    with pytest.raises(CheckpointError, match="79,999 bytes"):
        pt.load(tmp_path / "step_00000001.ckpt")
    block.unlink()
    with pytest.raises(CheckpointError, match="stands on its own"):
        pt.load(tmp_path / "step_00000001.ckpt")
    assert tree_digest(pt.load(tmp_path / "step_00000000.ckpt")) == tree_digest(tree(0))


def test_compression_keeps_every_bit_and_every_damage_is_found(tmp_path):
    value = {
        "zeros": torch.zeros(600),
        "noise": torch.rand(60, generator=torch.Generator().manual_seed(0)),
        "text": "a",
        "after": torch.arange(5),
    }
    path = tmp_path / "a.ckpt"
    pt.save(path, value, compression="zstd")
    assert os.path.getsize(path) < 1800
    assert pt.read_index(path).requires == {"zstd"}
    for mmap in (False, True):
        assert tree_digest(pt.load(path, mmap=mmap)) == tree_digest(value)
    whole = path.read_bytes()
    for i in range(len(whole)):
        path.write_bytes(whole[:i] + bytes([whole[i] ^ 4]) + whole[i + 1 :])
        with pytest.raises(CheckpointError):
            pt.verify(path)


# ── Failures ──────────────────────────────────────────────────────────────────────────────────────


class Faults:
    """Counts what the writer asks of the operating system, and lets one of these calls fail."""

    def __init__(self, patch, fail_at, error=errno.EIO, *, then=None):
        self.count, self.fail_at, self.error, self.then = 0, fail_at, error, then
        for name in ("fsync", "replace", "unlink", "open", "mkdir"):
            patch.setattr(places.os, name, self.wrap(getattr(os, name)))
        patch.setattr(places, "open", self.open, raising=False)

    def step(self):
        self.count += 1
        if self.count == self.fail_at:
            if self.then:
                self.then()
            raise OSError(self.error, os.strerror(self.error))

    def wrap(self, function):
        def call(*arguments, **named):
            self.step()
            return function(*arguments, **named)

        return call

    def open(self, *arguments, **named):
        file = builtins.open(*arguments, **named)  # noqa: SIM115
        if file.writable():
            return FaultyFile(file, self)
        return file


class FaultyFile:
    """A file whose writes count as well; half of a write that fails has gone to the disk."""

    def __init__(self, file, faults):
        self.file, self.faults = file, faults

    def write(self, data):
        try:
            self.faults.step()
        except OSError:
            self.file.write(bytes(data)[: len(data) // 2])
            self.file.flush()
            raise
        return self.file.write(data)

    def __enter__(self):
        return self

    def __exit__(self, *details):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    directory = tmp_path_factory.mktemp("three")
    for step in (1, 2, 3):
        put(directory, step)
    return directory


def operations(three, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        shutil.copytree(three, tmp_path / "counted")
        faults = Faults(patch, -1)
        put(tmp_path / "counted", 4, retention=store.Retention(2))
    return faults.count


@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC])
def test_whatever_call_fails_the_newest_complete_state_is_there(
    three, tmp_path, monkeypatch, error
):
    total = operations(three, tmp_path, monkeypatch)
    assert total > 10
    outcomes = set()
    for number in range(1, total + 1):
        directory = tmp_path / f"{number}"
        shutil.copytree(three, directory)
        with monkeypatch.context() as patch:
            Faults(patch, number, error)
            try:
                put(directory, 4, retention=store.Retention(2))
                failed = False
            except CheckpointError as caught:
                failed = os.strerror(error) in str(caught)
        newest = pt.load(store.latest(directory))
        # Only where an older entry can't be looked at, to share with it, the save goes through.
        assert failed or newest["step"] == 4
        outcomes.add((failed, newest["step"]))
        assert newest["step"] in {3, 4}
        assert tree_digest(newest) == tree_digest(tree(newest["step"]))
        assert hidden(directory) == []
        # and the next save goes through, and leaves nothing behind
        put(directory, 5, retention=store.Retention(1))
        assert steps(directory) == [5]
        assert store.check(directory) == []
    assert outcomes >= {(True, 3), (True, 4)}


def test_killed_at_any_call_the_newest_complete_state_is_there(three, tmp_path, monkeypatch):
    total = operations(three, tmp_path, monkeypatch)
    for number in range(1, total + 1):
        directory = tmp_path / f"{number}"
        shutil.copytree(three, directory)
        child = os.fork()
        if not child:
            try:
                with pytest.MonkeyPatch.context() as patch:
                    Faults(patch, number, then=lambda: os.kill(os.getpid(), signal.SIGKILL))
                    put(directory, 4, retention=store.Retention(2))
            finally:
                os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        newest = pt.load(store.latest(directory))
        assert newest["step"] in {3, 4}
        assert tree_digest(newest) == tree_digest(tree(newest["step"]))
        store.begin(directory, newest["step"])
        assert hidden(directory) == []
        put(directory, 5, retention=store.Retention(1))
        assert store.check(directory) == []


def test_a_file_that_is_being_written_is_not_swept_away(tmp_path):
    with places.replacing(tmp_path / "a.ckpt") as file:
        file.write(b"half")
        assert places.sweep(tmp_path) == []
        assert len(hidden(tmp_path)) == 1
    assert (tmp_path / "a.ckpt").read_bytes() == b"half"


def test_check_reports_and_repair_cures(tmp_path):
    for step in (1, 2, 3):
        put(tmp_path, step)
    broken = tmp_path / "step_00000003.ckpt"
    content = bytearray(broken.read_bytes())
    content[-1] ^= 255
    broken.write_bytes(content)
    (tmp_path / ".puretrain-0123456789abcdef.tmp").write_bytes(b"half")
    (tmp_path / "blocks" / ("0" * 32 + "-80000.raw")).write_bytes(b"nobody's")
    found = {problem.name: problem.cure for problem in store.check(tmp_path)}
    assert found == {
        "step_00000003.ckpt": "set aside",
        "LATEST": "rewrite",
        ".puretrain-0123456789abcdef.tmp": "delete",
        "blocks/" + "0" * 32 + "-80000.raw": "delete",
    }
    assert len(store.repair(tmp_path)) == 4
    assert store.check(tmp_path) == []
    assert (tmp_path / "step_00000003.ckpt.damaged").read_bytes() == content
    assert pt.load(store.latest(tmp_path))["step"] == 2


def test_the_newest_damaged_entry_is_passed_over_with_a_warning(tmp_path):
    for step in (1, 2):
        put(tmp_path, step)
    path = tmp_path / "step_00000002.ckpt"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.warns(UserWarning, match=r"step_00000002.ckpt.*truncated"):
        assert store.latest(tmp_path) == str(tmp_path / "step_00000001.ckpt")


# ── Runs ──────────────────────────────────────────────────────────────────────────────────────────


def run(directory, steps, state=None, observers=(), **options):
    optimizer = pt.optim.adamw(0.1)
    fresh = pt.TrainState.create({"w": torch.zeros(3)}, None, optimizer, key=pt.random.key(0))
    return pt.fit(
        state or fresh,
        pt.train_step(lambda p, b, x, key: ((p["w"] - x) ** 2).sum(), optimizer),
        [torch.ones(3)] * 100,
        steps=steps,
        observers=[*observers, pt.checkpoints(directory, **options)],
    )


def in_a_fork(function):
    """What a function returns or raises (as text) when it runs in another process."""
    receive, send = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(send, repr(function()).encode())
        except BaseException as error:  # noqa: BLE001 - told to the parent
            os.write(send, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(send)
    with os.fdopen(receive) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return text


def test_a_read_only_directory_is_a_clear_error():
    with tempfile.TemporaryDirectory() as directory:  # not below pytest's, which is its user's own
        put(directory, 2)
        os.chmod(directory, 0o555)

        def save():
            if os.geteuid() == 0:  # root may write anywhere
                os.setgid(65534)
                os.setuid(65534)
            return put(directory, 4)

        text = in_a_fork(save)
        os.chmod(directory, 0o755)
        assert text.startswith("CheckpointError: ")
        assert "step_00000004.ckpt can't be written: Permission denied" in text
        assert steps(directory) == [2]
        assert store.check(directory) == []


def test_a_limit_of_the_kernel_on_the_size_of_files(tmp_path):
    put(tmp_path, 2)

    def save():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        return put(tmp_path, 4, share=False)

    text = in_a_fork(save)
    assert text.startswith("CheckpointError: ")
    assert "step_00000004.ckpt can't be written: File too large" in text
    assert hidden(tmp_path) == []
    assert store.check(tmp_path) == []


def test_an_index_that_claims_too_much_of_a_compressed_block(tmp_path):
    path = tmp_path / "a.ckpt"
    pt.save(path, {"w": torch.zeros(100_000)}, compression="zstd")
    index = pt.read_index(path)
    (entry,) = index.entries
    for lie in (
        {"shape": (2**40,), "nbytes": 2**42},
        {"shape": (100_001,), "nbytes": 400_004},
        {"shape": (99_999,), "nbytes": 399_996},
        {"coded_nbytes": entry.coded_nbytes - 1},
        {"coding": "lzma"},
    ):
        lying = entry.replace(**lie)
        length = lying.coded_nbytes
        head = encode_head(encode_index([lying], {}, {}, "x"), length)
        content = path.read_bytes()[index.data_offset :][:length]
        (tmp_path / "b.ckpt").write_bytes(head + content)
        with pytest.raises(CheckpointError, match="b.ckpt"):
            pt.load(tmp_path / "b.ckpt")


def test_a_directory_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(CheckpointError, match="runs.*Not a directory"):
        run(tmp_path / "runs", 2)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_directory_that_vanishes_is_made_again(tmp_path, asynchronous):
    def vanish(state, event):
        if event.kind == "step" and event.step == 3:
            shutil.rmtree(tmp_path / "runs", ignore_errors=True)

    final = run(
        tmp_path / "runs",
        6,
        observers=[vanish],
        every=2,
        asynchronous=asynchronous,
        on_error="warn",
    )
    assert tree_digest(pt.load(store.latest(tmp_path / "runs"))) == tree_digest(final)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_ends_the_run_or_not_as_the_policy_says(tmp_path, monkeypatch, asynchronous):
    real, active, seen = os.fsync, [], []

    def fsync(descriptor):
        if active:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)

    def watch(state, event):
        seen.append(event.step)
        if event.kind == "step" and event.step == 3:
            active.append(True)

    monkeypatch.setattr(places.os, "fsync", fsync)
    options = {"every": 1, "asynchronous": asynchronous}
    with pytest.raises(CheckpointError, match="No space left on device"):
        run(tmp_path, 50, None, [watch], **options)
    assert max(seen) < 50
    newest = store.latest(tmp_path)
    assert int(pt.load(newest)["step"]) in {
        1,
        2,
        3,
    }  # 3: it is in its place, only not known to stay there
    with pytest.warns(UserWarning, match="No space left on device"):
        final = run(tmp_path / "b", 5, None, [watch], on_error="warn", **options)
    assert int(final.step) == 5
    assert hidden(tmp_path) == []


def test_more_than_one_write_of_a_step_leaves_the_last(tmp_path):
    put(tmp_path, 1)
    store.add(tmp_path, 1, {"other": torch.ones(2)}, metadata={})
    assert list(pt.load(tmp_path / "step_00000001.ckpt")) == ["other"]


def test_a_change_during_a_save_is_found_out_where_it_is_looked_at(tmp_path):
    value = tree(0)
    put(tmp_path, 0)
    entries, contents = checkpoint_file.flatten(value, "x")
    shared = {(e.checksum, e.nbytes) for e in pt.read_index(store.latest(tmp_path)).entries}
    original = checkpoint_file.digest

    def digest_then_change(content):
        found = original(content)
        if content is contents[0]:
            content.add_(1)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_file, "digest", digest_then_change)
        patch.setattr(checkpoint_file, "flatten", lambda tree, name: (entries, contents))
        with pytest.raises(CheckpointError, match="changed while it was being saved"):
            checkpoint_file.write(tmp_path / "b.ckpt", value, {}, unchanged=shared)
