"""Checkpoints that real processes write and read together, through gloo.

The processes are forks of this very file, run as a program (``python FILE SCENARIO DIRECTORY``), so
that torch is imported once for all that a scenario does.
"""

import itertools
import json
import os
import re
import resource
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import forking
import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import puretrain as pt
from puretrain.checkpoint import store
from puretrain.errors import CheckpointError, ConfigurationError
from puretrain.sharding import checkpoint as sharded
from puretrain.tree import tree_digest, tree_equal, tree_leaves, tree_map

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
TIMEOUT = 20.0


# ── Processes ─────────────────────────────────────────────────────────────────────────────────────

_numbers = itertools.count()


def together(directory, data, shard, work, *, deadline=60):
    """Let ``data * shard`` processes do ``work(mesh)``.

    Returns, of each, what it returned; or the exception as text; or the signal that killed it.
    """
    size, pids, meeting = data * shard, [], f"file://{directory}/.meet-{next(_numbers)}"
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
                mesh = init_device_mesh("cpu", (data, shard), mesh_dim_names=("data", "shard"))
                Path(directory, f".said-{rank}").write_text(json.dumps(work(mesh)))
                code = 0
            except BaseException:  # noqa: BLE001 - it is told to the parent
                Path(directory, f".said-{rank}").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        pids.append(pid)
    said, end = [None] * size, time.monotonic() + deadline
    running = dict(enumerate(pids))
    while running and time.monotonic() < end:
        for rank, pid in list(running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del running[rank]
                place = Path(directory, f".said-{rank}")
                said[rank] = -status
                if not os.WIFSIGNALED(status):
                    text = place.read_text()
                    said[rank] = json.loads(text) if status == 0 else text
        time.sleep(0.005)
    for pid in running.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not running, f"the processes {list(running)} hang; the others said {said}"
    return said


def scenario(name, directory):
    """Run a function of this file in a process that has imported torch and does nothing else."""
    done = forking.run(__file__, name, directory, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ── States ────────────────────────────────────────────────────────────────────────────────────────

PLACEMENTS = {
    "rows": Shard(0),
    "columns": Shard(1),
    "last": Shard(-1),
    "few": Shard(0),
    "bits": Shard(1),
    "tied/a": Shard(0),
    "tied/b": Shard(0),
    "none": Shard(0),
    "plain": Replicate(),
}
OTHERS = {"rows": Shard(1), "columns": Shard(1), "large": Shard(0), "plain": Shard(0)}


def whole():
    """Leaves of every kind: larger and smaller than what gets a file of its own, and uneven."""
    draw = torch.Generator().manual_seed(0)
    tied = torch.randn(150, 150, generator=draw)
    return {
        "rows": torch.randn(1001, 100, generator=draw),
        "columns": torch.randn(64, 1003, generator=draw),
        "last": torch.randn(5, 70, 99, generator=draw).to(torch.bfloat16),
        "few": torch.randn(5, 3, generator=draw),  # fewer rows than twice the processes
        "bits": torch.arange(35, dtype=torch.uint8).view(5, 7).view(torch.float8_e4m3fn),
        "none": torch.empty(0, 4),
        "large": torch.randn(600, 200, generator=draw),
        "plain": torch.randn(33, generator=draw),
        "tied": {"a": tied, "b": tied},
        "step": torch.tensor(5),
        "n": 3,
        "nothing": None,
        "text": "é" * 10,
    }


def local(tree, placements, mesh):
    """The own shards, cut by torch itself."""
    count, number = mesh.get_group("shard").size(), mesh.get_local_rank("shard")
    made = {}

    def cut(path, leaf):
        placement = placements.get(pt.tree.path_string(path), Replicate())
        if not isinstance(placement, Shard):
            return leaf
        key = (id(leaf), placement.dim)
        if key not in made:
            raw = leaf.view(torch.uint8) if leaf.dtype.itemsize == 1 else leaf
            chunks = raw.chunk(count, placement.dim)
            empty = raw.narrow(placement.dim, 0, 0)
            chunk = chunks[number] if number < len(chunks) else empty
            made[key] = chunk.contiguous().view(leaf.dtype)
        return made[key]

    return pt.tree.tree_map_with_path(cut, tree)


def blank(tree):
    """A template."""
    return tree_map(lambda leaf: torch.empty_like(leaf) if torch.is_tensor(leaf) else leaf, tree)


def read_bytes():
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])


# ── Saving and loading ────────────────────────────────────────────────────────────────────────────


def loads_as(path, tree, placements):
    """A piece of work: load, and compare with what should be there."""

    def work(mesh):
        expected = local(tree, placements, mesh)
        before = read_bytes()
        got = sharded.load(path, blank(expected), placements, mesh, timeout=TIMEOUT)
        assert tree_equal(got, expected)
        assert got["tied"]["a"] is got["tied"]["b"]
        return read_bytes() - before

    return work


def other_numbers(directory):
    path = f"{directory}/a.ckpt"
    tree = whole()

    def save(mesh):
        state = local(tree, PLACEMENTS, mesh)
        sharded.save(path, state, PLACEMENTS, mesh, metadata={"step": 5}, timeout=TIMEOUT)
        with pytest.raises(
            ConfigurationError if dist.get_rank() == 1 else pt.errors.PuretrainError
        ):
            placements = {"n": Shard(0)} if dist.get_rank() != 1 else {"rows": Shard(2)}
            sharded.save(path, state, placements, mesh, timeout=TIMEOUT)
        return sharded.latest(directory, mesh)

    def save_and_load(mesh):
        state = local(tree, PLACEMENTS, mesh)
        sharded.save(f"{directory}/four.ckpt", state, PLACEMENTS, mesh, timeout=TIMEOUT)
        return loads_as(f"{directory}/four.ckpt", tree, PLACEMENTS)(mesh)

    assert together(directory, 2, 2, save) == [None] * 4  # it has another name than an entry
    total = sum(leaf.nbytes for leaf in tree_leaves(tree) if torch.is_tensor(leaf))
    own = together(directory, 1, 4, save_and_load)
    print(json.dumps({"total": total, "own": own}))
    for data, shard, placements in (
        (1, 2, PLACEMENTS),
        (1, 3, OTHERS),
        (3, 1, PLACEMENTS),
        (1, 1, OTHERS),
    ):
        said = together(directory, data, shard, loads_as(path, tree, placements))
        assert all(isinstance(one, int) for one in said), said
    pt.save(f"{directory}/one.ckpt", tree)
    said = together(directory, 1, 2, loads_as(f"{directory}/one.ckpt", tree, OTHERS))
    assert all(isinstance(one, int) for one in said), said


def test_what_four_have_saved_any_number_loads_with_any_placements(tmp_path):
    found = json.loads(scenario("other_numbers", tmp_path))
    path, tree = tmp_path / "a.ckpt", whole()
    # one process reads it like any other file
    for mmap in (False, True):
        assert tree_equal(pt.load(path, like=tree, mmap=mmap), tree)
    pt.verify(path)
    index = pt.read_index(path)
    assert index.metadata["step"] == 5
    pieces = {entry.path[0]: len(entry.pieces) for entry in index.entries}
    assert pieces["large"] == 4  # what all have is divided among them
    assert pieces["rows"] >= 2
    assert pieces["columns"] == pieces["last"] == 2
    assert not pieces["few"]
    # nothing is written twice
    apart = [leaf for leaf in tree_leaves(tree) if torch.is_tensor(leaf) and leaf.nbytes >= 1 << 16]
    blocks = {b.shared_name: b.nbytes for e in index.entries for b in e.blocks if b.shared}
    assert sum(blocks.values()) == sum(leaf.nbytes for leaf in apart) - tree["tied"]["a"].nbytes
    # who loads what as many have saved reads its own shards, what is replicated, and little else
    replicated = tree["large"].nbytes
    sharded_bytes = found["total"] - replicated - tree["tied"]["a"].nbytes
    for own in found["own"]:
        assert own < replicated + sharded_bytes / 4 + 50_000
    # a slice reads the pieces that it needs
    assert torch.equal(pt.read_slice(path, "rows", 0, 250, 10), tree["rows"][250:260])


def at_a_url(directory):
    tree = whole()

    def work(mesh):
        # The memory of the process is its file system, and here one process is all there is.
        place, state = "memory://runs", local(tree, PLACEMENTS, mesh)
        observer = sharded.checkpoints(place, PLACEMENTS, mesh, every=1, keep=1, timeout=TIMEOUT)
        sharded.save(f"{place}/step_00000001.ckpt", state, PLACEMENTS, mesh, timeout=TIMEOUT)
        begun = initial()
        pt.fit(begun, pt.train_step(loss, OPTIMIZER), BATCHES, steps=2, observers=[observer])
        path = sharded.latest(place, mesh)
        assert path.endswith("step_00000002.ckpt")
        got = sharded.load(path, begun, RUN_PLACEMENTS, mesh, timeout=TIMEOUT)
        assert int(got.step) == 2
        sharded.save(f"{place}/other.ckpt", state, PLACEMENTS, mesh, timeout=TIMEOUT)
        expected = blank(state)
        got = sharded.load(f"{place}/other.ckpt", expected, PLACEMENTS, mesh, timeout=TIMEOUT)
        assert tree_equal(got, state)
        return "whole"

    assert together(directory, 1, 1, work) == ["whole"]


def test_one_process_alone_and_at_a_url(tmp_path):
    scenario("at_a_url", tmp_path)


# ── What fails ────────────────────────────────────────────────────────────────────────────────────


def failures(directory):
    path = f"{directory}/a.ckpt"
    tree = whole()

    def attempt(state, placements, mesh):
        try:
            sharded.save(path, state, placements, mesh, timeout=TIMEOUT)
        except pt.errors.PuretrainError as error:
            return f"{type(error).__name__} {error}"
        return "saved"

    def work(mesh):
        rank = dist.get_rank()
        state = local(tree, PLACEMENTS, mesh)
        said = [attempt(state, PLACEMENTS, mesh)]
        said.append(attempt({**state, "n": print if rank == 2 else 3}, PLACEMENTS, mesh))
        changed = tree_map(
            lambda leaf: leaf + 1 if torch.is_floating_point(leaf) else leaf,
            {k: v for k, v in state.items() if k in {"rows", "large"}},
        )
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 3:  # the kernel fails its writes, as a full disk does
            resource.setrlimit(resource.RLIMIT_FSIZE, (70_000, limits[1]))
        said.append(attempt(state | changed, PLACEMENTS, mesh))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        if rank == 0:  # the file that names the others, too
            resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
        said.append(attempt({"few": state["few"]}, PLACEMENTS, mesh))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said.append(attempt({"few": state["few"], f"own {rank > 1}": 1}, PLACEMENTS, mesh))
        said.append(attempt({"few": state["few"][: 1 + (rank == 0)]}, PLACEMENTS, mesh))
        said.append(attempt({**state, "n": 4}, PLACEMENTS, mesh))
        with pytest.raises(ConfigurationError, match="timeout is more than 0 seconds"):
            sharded.save(path, state, PLACEMENTS, mesh, timeout=0)
        with pytest.raises(ConfigurationError, match="is named"):
            sharded.save(f"{directory}/a", {}, {}, mesh, timeout=TIMEOUT)
        with pytest.raises(CheckpointError, match=r"few has the shape \[5, 3\] in the file"):
            like = {**state, "few": torch.empty(2 if rank else 1, 3)}
            sharded.load(path, like, PLACEMENTS, mesh, timeout=TIMEOUT)
        with pytest.raises(CheckpointError, match="save to a directory that all processes see"):
            own = f"{directory}/of {rank}/a.ckpt"
            sharded.save(own, state, PLACEMENTS, mesh, timeout=TIMEOUT)
        assert not os.path.exists(own)
        return said

    for said in zip(*together(directory, 1, 4, work), strict=True):
        print(json.dumps(said))


def test_what_fails_in_one_process_is_told_by_all(tmp_path):
    lines = [json.loads(line) for line in scenario("failures", tmp_path).splitlines()]
    good, leaf, own_file, manifest, tree, shards, again = lines
    assert good == again == ["saved"] * 4
    for said, rank, message in (
        (leaf, 2, "n is a builtins.builtin_function_or_method, which can't be saved"),
        (own_file, 3, "can't be written: File too large"),
        (manifest, 0, "can't be written: File too large"),
        (tree, 0, "process 2 has another leaf or placement than process 0, which has own False"),
        (shards, 0, "the lengths of the shards, [2, 1, 1, 0], are not those of torch.chunk"),
    ):
        for number, one in enumerate(said):
            assert one.startswith("CheckpointError")
            assert message in one
            assert (f"in process {rank}: " in one) == (number != rank)
    # the last one that succeeded is there, whole
    pt.verify(tmp_path / "a.ckpt")
    assert pt.load(tmp_path / "a.ckpt")["n"] == 4
    assert not list(tmp_path.rglob(".puretrain-*"))


def kills(directory):
    tree = whole()

    def save(step, at=None, victim=None):
        def work(mesh):
            state = local(tree_of(step), PLACEMENTS, mesh)
            calls, fsync = 0, os.fsync

            def counted(descriptor):
                nonlocal calls
                calls += 1
                if calls == at and dist.get_rank() == victim:
                    os.kill(os.getpid(), signal.SIGKILL)
                fsync(descriptor)

            os.fsync = counted
            path = store.entry_path(directory, step)
            try:
                sharded.save(
                    path, state, PLACEMENTS, mesh, metadata={"step": step}, timeout=TIMEOUT
                )
            except CheckpointError as error:
                return str(error)
            return calls

        return together(directory, 2, 2, work)

    def tree_of(step):
        return tree | {name: tree[name] + step for name in ("rows", "large")} | {"n": step}

    save(1)
    sizes = save(2)  # what is the same in the one before is there already
    assert all(isinstance(calls, int) for calls in sizes), sizes
    assert min(sizes) >= 2, sizes  # there is something to be interrupted in each of them
    step = 2
    for victim in (0, 3):
        for at in range(1, sizes[victim] + 1):
            step += 1
            said = save(step, at, victim)
            assert said[victim] == -signal.SIGKILL, said
            newest = store.latest(directory)
            # where the first process dies after its last file is in place, that is the newest
            late = newest == store.entry_path(directory, step)
            assert late == (victim == 0 and at == sizes[0])
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # nothing damaged is passed over
                got = pt.load(newest)
            assert tree_digest(got) == tree_digest(tree_of(got["n"]))
            for rank, one in enumerate(said):
                assert rank == victim or re.search(f"process {victim} is gone", one), said
            if late:
                os.unlink(newest)
    assert all(isinstance(calls, int) for calls in save(step + 1))
    hangs(directory, step + 2)
    store.collect(directory, store.Retention(1))
    pt.verify(store.latest(directory))
    used = {
        block.shared_name
        for entry in pt.read_index(store.latest(directory)).entries
        for block in entry.blocks
        if block.shared
    }
    store.begin(directory, step + 2)
    assert set(os.listdir(f"{directory}/blocks")) == used


def hangs(directory, step):
    """One process stops in the middle, for ever."""

    def work(mesh):
        rank, pid = dist.get_rank(), Path(directory, ".pid")
        if rank == 3:
            pid.write_text(str(os.getpid()))
            os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGSTOP)
        state = local(whole() | {"large": whole()["large"] + step}, PLACEMENTS, mesh)
        path = store.entry_path(directory, step)
        try:
            sharded.save(path, state, PLACEMENTS, mesh, timeout=5.0)
        except CheckpointError as error:
            if rank == 0:
                os.kill(int(pid.read_text()), signal.SIGKILL)
            return str(error)

    *others, stopped = together(directory, 2, 2, work)
    assert stopped == -signal.SIGKILL, stopped
    for one in others:
        assert re.search(r"process \d is gone, or has not answered in 5 seconds", one), others
    assert not os.path.exists(store.entry_path(directory, step))


def test_a_process_killed_at_any_sync_leaves_the_last_checkpoint_whole(tmp_path):
    scenario("kills", tmp_path)


# ── In a run ──────────────────────────────────────────────────────────────────────────────────────

OPTIMIZER = pt.optim.adam(0.1)
BATCHES = pt.batches(torch.arange(64.0), 4, shuffle=True, seed=0)
RUN_PLACEMENTS = {
    "params/w": Shard(0),
    "opt_state/exp_avg/w": Shard(0),
    "opt_state/exp_avg_sq/w": Shard(0),
}


def loss(params, buffers, batch, key):
    # Each element of w has its own gradient, so that no shard needs another one.
    return ((params["w"] - batch.mean()) ** 2).sum() + (params["b"] * batch).sum()


def initial():
    params = {"w": torch.arange(41_000.0).reshape(1025, 40), "b": torch.zeros(4)}
    return pt.TrainState.create(params, None, OPTIMIZER, key=pt.random.key(0))


def fitted(state, steps, observers=()):
    step = pt.train_step(loss, OPTIMIZER)
    return pt.fit(state, step, BATCHES, steps=steps, observers=observers)


class Placed(NamedTuple):
    """Placements in another form than a dict."""

    found: dict

    def of(self, path):
        return self.found.get(path, Replicate())


def runs(directory):
    template = initial()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def observer(mesh, name, **options):
        options = {"every": 5, "asynchronous": True, "timeout": TIMEOUT} | options
        return sharded.checkpoints(f"{directory}/{name}", RUN_PLACEMENTS, mesh, **options)

    def begin(mesh):
        begun = local(template, RUN_PLACEMENTS, mesh)
        fitted(begun, 22, [observer(mesh, "a", keep=2, keep_every=10)])
        fitted(begun, 9, [observer(mesh, "minutes", every=None, every_minutes=1e-9)])
        fitted(begun, 9, [observer(mesh, "skip", every=1, when_busy="skip", keep=None)])
        return [store.latest(f"{directory}/a"), len(store.saved(f"{directory}/skip"))]

    def go_on(mesh):
        path = sharded.latest(f"{directory}/a", mesh)
        like = local(template, RUN_PLACEMENTS, mesh)
        state = sharded.load(path, like, Placed(RUN_PLACEMENTS), mesh, timeout=TIMEOUT)
        fitted(state, 33, [observer(mesh, "a", keep=2, keep_every=10, asynchronous=False)])
        return path

    def fail(mesh):
        """One process can't write for a while; what do the others say, and when?"""

        def full(state, event):
            if dist.get_rank() == 1 and event.kind == "step":
                limit = 20_000 if 10 <= event.step < 14 else limits[0]
                resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))

        def late(state, event):
            time.sleep(0.02 * dist.get_rank() if event.kind == "step" else 0)
            while event.step in {9, 13} and any(
                thread.name == "puretrain-checkpoints" for thread in threading.enumerate()
            ):
                time.sleep(0.01)

        begun = local(template, RUN_PLACEMENTS, mesh)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fitted(begun, 20, [full, late, observer(mesh, "warned", on_error="warn")])
        told = [str(one.message) for one in caught if "not saved" in str(one.message)]
        seen = []
        try:
            look = lambda state, event: seen.append(event.step)  # noqa: E731
            fitted(begun, 20, [look, full, late, observer(mesh, "raised")])
        except CheckpointError as error:
            told.append(str(error))
        return [seen[-1], *told]

    def die(mesh):
        def kill(state, event):
            if dist.get_rank() == 1 and event.step == 12:
                os.kill(os.getpid(), signal.SIGKILL)

        begun = local(template, RUN_PLACEMENTS, mesh)
        with pytest.raises(CheckpointError, match="process 1 is gone"):
            fitted(begun, 30, [kill, observer(mesh, "killed")])
        return "raised"

    print(json.dumps(together(directory, 2, 2, begin)))
    print(json.dumps(together(directory, 1, 3, go_on)))
    print(json.dumps(together(directory, 1, 3, fail)))
    print(json.dumps(together(directory, 1, 3, die)))


def test_a_run_saves_in_the_background_and_goes_on_in_other_numbers(tmp_path):
    begun, gone_on, failed, killed = map(json.loads, scenario("runs", tmp_path).splitlines())
    newest = str(tmp_path / "a" / "step_00000022.ckpt")
    # how many were left out, as the loop does not wait, depends on the disk; but not on who asks
    assert begun == [[newest, begun[0][1]]] * 4
    assert 1 <= begun[0][1] <= 9
    assert gone_on == [newest] * 3
    assert [entry.step for entry in store.saved(tmp_path / "a")] == [10, 20, 30, 33]
    for step in (10, 20, 33):  # of one process that holds all, without saving
        expected = fitted(initial(), step)
        got = pt.load(tmp_path / "a" / f"step_{step:08}.ckpt", like=expected)
        # the loss of the first process is that of its own shards
        different = {difference.path for difference in pt.tree.tree_diff(got, expected)}
        assert different == {"metrics/loss", "epoch_metrics/loss/total"}
    pt.verify(tmp_path / "a" / "step_00000030.ckpt")
    assert [entry.step for entry in store.saved(tmp_path / "minutes")] == [7, 8, 9]
    last = store.latest(tmp_path / "skip")
    assert last.endswith("step_00000009.ckpt")
    # no block is left that nobody needs
    for name in ("a", "minutes", "skip"):
        used = {
            block.shared_name
            for entry in store.saved(tmp_path / name)
            for leaf in pt.read_index(entry.path).entries
            for block in leaf.blocks
            if block.shared
        }
        assert set(os.listdir(tmp_path / name / "blocks")) == used
    # what failed at step 10 in process 1 is told by all, at the next save
    for rank, (last_seen, *told) in enumerate(failed):
        assert last_seen == 15
        assert len(told) == 2
        for message in told:
            assert "can't be written: File too large" in message
            assert ("in process 1: " in message) == (rank != 1)
    assert [entry.step for entry in store.saved(tmp_path / "warned")] == [5, 15, 20]
    assert [entry.step for entry in store.saved(tmp_path / "raised")] == [5]
    assert killed == ["raised", -signal.SIGKILL, "raised"]
    # it was killed while step 10 was being saved, or after; the one before is whole in any case
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Path(store.latest(tmp_path / "killed")).stem in {"step_00000005", "step_00000010"}


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](sys.argv[2])
