"""BatchNorm over all processes, and sources that are each process's own and end at other times."""

import pytest
import torch
from processes import on_processes, shared
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt
from puretrain import sharding
from puretrain.errors import ConfigurationError, DataError
from puretrain.tree import tree_cast, tree_digest, tree_leaves

# ── In each process ───────────────────────────────────────────────────────────────────────────────


def data(count):
    """Samples far from zero, where a variance out of a mean of squares would be wrong."""
    with pt.random.scope(pt.random.key(3)):
        return torch.randn(count, 4, 5, dtype=torch.float64) + 1000, torch.randint(3, (count,))


def made(mesh, across, *, momentum=0.1, synchronized=True):
    with pt.random.scope(pt.random.key(1)):
        model = nn.Sequential(
            nn.Conv1d(4, 6, 3),
            nn.BatchNorm1d(6, momentum=momentum),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(18, 3),
        ).double()
    if synchronized:
        model = sharding.sync_batch_norm(model, mesh)
    apply, params, buffers = pt.functional(model)

    def loss(params, buffers, batch, key):
        x, y = batch
        logits, buffers = apply(params, buffers, x)
        return cross_entropy(logits, y), pt.Aux(buffers=buffers)

    optimizer = pt.optim.sgd(1e-3)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(2))
    return state, pt.train_step(loss, optimizer, across=across)


def fitted(mesh, source, across, *, epochs, **options):
    state, step = made(mesh, across, **options)
    return pt.fit(state, step, source, epochs=epochs)


def worst(a, b):
    pairs = zip(tree_leaves((a.params, a.buffers)), tree_leaves((b.params, b.buffers)), strict=True)
    return max(float((x.double() - y.double()).abs().max()) for x, y in pairs)


def normalized(mesh):
    batches = pt.batches(data(50), 14, drop_last=True)  # 14 samples for 3 processes: 4, 5, 5
    divided = sharding.divide(batches, mesh)
    found = []
    for momentum in (0.1, None):
        alone = fitted(mesh, batches, None, momentum=momentum, synchronized=False, epochs=2)
        together = fitted(mesh, divided, sharding.ddp(mesh), momentum=momentum, epochs=2)
        found.append([worst(alone, together), tree_digest(together)])
    apart = fitted(mesh, divided, sharding.ddp(mesh), synchronized=False, epochs=2)
    return found, worst(alone, apart)


def kept(mesh):
    """In evaluation mode, and without running statistics; narrower floats keep their dtype."""
    x, _ = data(6)
    plain = nn.BatchNorm1d(4)
    other = sharding.sync_batch_norm(plain, mesh)
    half = other(tree_cast(x, torch.bfloat16) - 1000)
    plain.train(False)
    other.load_state_dict(plain.state_dict())
    other.train(False)
    return [torch.equal(plain(x.float()), other(x.float())), str(half.dtype)]


def own(rank):
    """So many batches of so many samples that belong to one process."""
    sizes = {0: [3, 3], 1: [5, 1, 4, 2], 2: [2, 6, 1]}[rank]
    first = sum(sum(other) for other in ([3, 3], [5, 1, 4, 2], [2, 6, 1])[:rank])
    x, y = data(27)
    found = []
    for size in sizes:
        found.append((x[first : first + size], y[first : first + size]))
        first += size
    return found


def uneven(mesh):
    rank = mesh.get_rank()
    source = sharding.uneven(own(rank), mesh)
    across = sharding.ddp(mesh)
    whole = fitted(mesh, source, across, epochs=2)
    state, step = made(mesh, across)
    again = pt.fit(pt.fit(state, step, source, steps=3), step, source, epochs=2)
    rounds = [[own(r)[i] for r in range(3) if i < len(own(r))] for i in range(4)]
    common = [tuple(torch.cat(parts) for parts in zip(*r, strict=True)) for r in rounds]
    alone = fitted(mesh, common, None, synchronized=False, epochs=2)
    return {
        "steps": int(whole.step),
        "sizes": [read.size for read in source.read(pt.Cursor())],
        "digests": [tree_digest(whole), tree_digest(again)],
        "worst": worst(whole, alone),
    }


# ── Of one process and of three ───────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def norms(tmp_path_factory):
    return shared(tmp_path_factory, "norms", lambda: on_processes(3, in_three))


def in_three(mesh):
    return normalized(mesh), kept(mesh), uneven(mesh)


def test_batch_norm_over_all_processes_is_that_of_the_whole_batch(norms):
    for (found, apart), _, _ in norms:
        for difference, digest in found:
            assert difference < 1e-9
            assert digest in {other[1] for other in norms[0][0][0]}
        assert apart > 1e-6  # the parts' own statistics are others


def test_evaluation_and_dtypes_are_those_of_a_plain_layer(norms):
    assert all(entry[1] == [True, "torch.bfloat16"] for entry in norms)


def test_processes_with_unequal_data_read_all_of_it_and_none_twice(norms):
    for _, _, found in norms:
        assert found["sizes"] == [10, 10, 5, 2]
        assert found["steps"] == 8
        assert found["worst"] < 1e-9  # than one process with the same samples in each step
        assert len({*found["digests"], *norms[0][2]["digests"]}) == 1  # also after a resume


def test_a_process_without_data_says_so():
    with sharding.processes() as mesh, pytest.raises(DataError, match="yielded nothing in epoch 0"):
        list(sharding.uneven(lambda epoch: iter(()), mesh).read(pt.Cursor()))


def test_a_source_that_is_no_source_is_refused():
    with sharding.processes() as mesh, pytest.raises(ConfigurationError, match="not a Odd"):
        sharding.uneven(Odd(), mesh)


class Odd:
    def next_epoch(self, cursor):
        return cursor
