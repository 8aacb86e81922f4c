"""One run on one, two and four processes: what must be the same, to the bit or within rounding."""

import functools
import math
import os
import signal

import pytest
import torch
from processes import on_processes, shared
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt
from puretrain import sharding
from puretrain.errors import ConfigurationError, DataError, StructureError
from puretrain.tree import tree_digest

SIZES = (4, 2, 1)  # in this order, for the smaller ones go on from the larger ones' checkpoints
MIDDLE = 5  # steps: in the middle of an epoch of three

# ── In each process ───────────────────────────────────────────────────────────────────────────────


def data(count=50):
    """Fifty samples in batches of 16: the last one has 2, too few for four processes."""
    with pt.random.scope(pt.random.key(3)):
        return torch.randn(count, 6), torch.randint(3, (count,))


def make(across=None, *, noisy=False, normalized=True, front=None, **options):
    """A state and a step; ``noisy``: with dropout and, ``normalized``, with batch normalization."""
    with pt.random.scope(pt.random.key(1)):
        norm = nn.BatchNorm1d(16) if normalized else nn.Identity()
        hidden = [norm, nn.ReLU(), nn.Dropout(0.3)] if noisy else [nn.ReLU()]
        model = nn.Sequential(nn.Linear(6, 16), *hidden, nn.Linear(16, 3))
    apply, params, buffers = pt.functional(model)

    def loss(params, buffers, batch, key):
        x, y = batch
        logits, buffers = apply(params, buffers, x.to(params["0.weight"].dtype))
        metrics = {"accuracy": pt.metrics.Accuracy.of(logits, y), "mean": x.double().mean()}
        return cross_entropy(logits, y), pt.Aux(buffers, metrics)

    optimizer = pt.optim.adamw(1e-2)
    if front is not None:
        optimizer = pt.optim.chain(front, optimizer)
    if not noisy:  # then only rounding differs, and in this precision it can't hide a bias
        params = pt.tree.tree_cast(params, torch.float64)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(2))
    return state, pt.train_step(loss, optimizer, across=across, **options)


def source(**options):
    return pt.batches(data(), 16, shuffle=True, seed=5, **options)


def even_source(**options):
    """Every part of four has samples enough for batch normalization, though not equally many."""
    return pt.batches(data(58), 24, shuffle=True, seed=5, **options)


def facts(state):
    return {
        "digest": tree_digest(state),
        "weight": state.params["0.weight"].double().tolist(),
        "loss": float(state.metrics["loss"]),
        "accuracy": state.metrics["accuracy"].compute().tolist(),
    }


def with_ddp(mesh):
    state, step = make(sharding.ddp(mesh))
    return facts(pt.fit(state, step, sharding.divide(source(), mesh), epochs=3))


def accumulated(mesh):
    state, step = make(sharding.ddp(mesh), accumulate=3)
    often = facts(pt.fit(state, step, sharding.divide(source(), mesh), epochs=3))
    across = sharding.ddp(mesh, reduce=False)
    state, step = make(across, accumulate=3, front=sharding.all_reduce(mesh))
    seldom = facts(pt.fit(state, step, sharding.divide(source(), mesh), epochs=3))
    return {"after every batch": often, "before every update": seldom}


def of_torch(mesh):
    """Torch's own DistributedDataParallel on the same parts of the same batches, and ours."""
    with pt.random.scope(pt.random.key(4)):
        model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3))
    apply, params, buffers = pt.functional(model)
    batches = sharding.divide(pt.batches(data(48), 16), mesh)

    def loss(params, buffers, batch, key):
        return cross_entropy(apply(params, buffers, batch[0])[0], batch[1])

    optimizer = pt.optim.adamw(1e-2)
    step = pt.train_step(loss, optimizer, across=sharding.ddp(mesh))
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    ours = pt.fit(state, step, batches, epochs=2).params

    parallel = nn.parallel.DistributedDataParallel(model)
    theirs = torch.optim.AdamW(parallel.parameters(), lr=1e-2, fused=True)
    for _ in range(2):
        for parts in batches:
            x, y = parts.parts[0]
            theirs.zero_grad()
            cross_entropy(parallel(x), y).backward()
            theirs.step()
    return {
        "equal": all(torch.equal(ours[name], p) for name, p in model.named_parameters()),
        "far": max(float((ours[name] - p).abs().max()) for name, p in model.named_parameters()),
    }


def with_elastic(mesh, directory):
    """To the end at once, and from a checkpoint that a larger number of processes has left."""
    state, step = make(sharding.elastic(mesh, 4), noisy=True)
    batches = sharding.divide(even_source(), mesh, logical_shards=4)
    middle = pt.fit(state, step, batches, steps=MIDDLE)
    path = f"{directory}/{mesh.size()}.ckpt"
    if mesh.get_rank() == 0:
        pt.save(path, middle)
    found = {"whole": facts(pt.fit(middle, step, batches, epochs=3))}
    for size in SIZES:
        if size > mesh.size():
            there = pt.load(f"{directory}/{size}.ckpt", like=state)
            found[f"from {size}"] = facts(pt.fit(there, step, batches, epochs=3))
    return found


def with_twelve_shards(mesh):
    """Parts that make no powers of two, and more of them than some batch has samples."""
    state, step = make(sharding.elastic(mesh, 12), noisy=True, normalized=False)
    batches = sharding.divide(source(), mesh, logical_shards=12)
    return tree_digest(pt.fit(state, step, batches, epochs=2))


def used_somewhere(mesh):
    """Each part of the batch uses another parameter, and one is used by none."""

    def loss(params, buffers, batch, key):
        name = "even" if int(batch[0, 0]) % 2 == 0 else "odd"
        return (params[name] * batch[:, 1:]).sum(1).mean()

    optimizer = pt.optim.adamw(0.1, weight_decay=0.1)
    params = {name: torch.ones(2) for name in ("even", "odd", "unused")}
    state = pt.TrainState.create(params, None, optimizer, key=pt.random.key(0))
    rows = torch.tensor([[float(i * mesh.size() // 8), i, -i] for i in range(8)])
    batches = sharding.divide(pt.batches(rows, 8), mesh)
    step = pt.train_step(loss, pt.optim.sgd(1.0), across=sharding.ddp(mesh))
    plain = pt.TrainState.create(params, None, pt.optim.sgd(1.0), key=pt.random.key(0))
    after = pt.fit(plain, step, batches, steps=1)
    decayed = pt.fit(
        state, pt.train_step(loss, optimizer, across=sharding.ddp(mesh)), batches, steps=1
    )
    return {
        "params": {name: leaf.tolist() for name, leaf in after.params.items()},
        "unused": decayed.params["unused"].tolist(),
    }


def evaluated(mesh):
    state, _ = make()

    def function(params, buffers, batch, key):
        x, y = batch
        logits = x.double() @ params["0.weight"].T[:, :3]
        return {
            "accuracy": pt.metrics.Accuracy.of(logits, y),
            "confusion": pt.metrics.Confusion.of(logits.argmax(1), y, 3),
            "loss": cross_entropy(logits, y),
        }

    step = pt.eval_step(function)
    divided = sharding.divide(source(), mesh)
    found = pt.evaluate(state, sharding.eval_across(step, mesh), divided)
    whole = pt.evaluate(state, step, source())
    return {name: [value.tolist(), whole[name].tolist()] for name, value in found.items()}


def signalled(mesh):
    """SIGTERM comes to the last process only, in its third step."""

    def observer(state, event):
        if event.kind == "step" and event.step == 3 and mesh.get_rank() == mesh.size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    state, step = make(sharding.ddp(mesh))
    batches = sharding.divide(source(), mesh)
    try:
        pt.fit(state, step, batches, epochs=3, observers=[observer], agree=sharding.agreement(mesh))
    except pt.loop.Interrupted as interrupted:
        return [int(interrupted.state.step), interrupted.code, tree_digest(interrupted.state)]
    return None


def make_run(directory=None, observer=None, **options):
    state, step = make(noisy=True)
    evaluate = pt.eval_step(lambda params, buffers, batch, key: {"x": batch[0].mean()})
    return pt.Run(
        state=state,
        step=step,
        batches=even_source(),
        epochs=3,
        observers=[] if observer is None else [observer],
        validation=pt.Validation(evaluate, source()),
        directory=directory,
    ).replace(**options)


def distributed(mesh, directory):
    events = []
    run = make_run(observer=lambda state, event: events.append(event.kind))
    run = sharding.distribute(run, mesh, logical_shards=4)
    found = {"whole": facts(run.fit()), "events": len(events), "x": None}
    # Only the first process sees the directory with the checkpoints.
    place = f"{directory}/run-{mesh.size()}"
    mine = place if mesh.get_rank() == 0 else f"{place}-of-another"
    first = make_run(mine, pt.checkpoints(place), steps=MIDDLE, epochs=None)
    found["middle"] = int(sharding.distribute(first, mesh, logical_shards=4).fit().step)
    again = sharding.distribute(make_run(mine), mesh, logical_shards=4)
    found["resumed at"] = int(again.resumed().state.step)
    found["resumed"] = facts(again.fit(resume=True))
    found["refused"] = message(ConfigurationError, again.fit)
    # An observer that works in all processes together stays in all of them.
    place = f"{directory}/together-{mesh.size()}"
    together = make_run(place, sharding.checkpoints(place, {}, mesh), steps=MIDDLE, epochs=None)
    last = sharding.distribute(together, mesh, logical_shards=4).fit()
    found["together"] = tree_digest(pt.load(pt.latest(place))) == tree_digest(last)
    found["twice"] = sharding.distribute(again, mesh) is again
    return found


def message(kind, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except kind as error:
        return str(error)
    return None


def refused(mesh):
    rank = mesh.get_rank()
    run = make_run()
    wrapped = run.replace(step=functools.wraps(run.step)(lambda *a, **k: run.step(*a)))
    bare = run.replace(step=lambda state, batch: state)
    state, step = make(sharding.ddp(mesh))
    divided = sharding.divide(source(), mesh, logical_shards=2 * mesh.size())

    def odd_loss(params, buffers, batch, key):
        return params["w"].sum(), pt.Aux(metrics={f"m{rank}": torch.tensor(1.0)})

    odd = pt.TrainState.create({"w": torch.ones(1)}, None, pt.optim.sgd(1.0), key=pt.random.key(0))
    odd_step = pt.train_step(odd_loss, pt.optim.sgd(1.0), across=sharding.ddp(mesh))
    biased = {**run.state.params, "1.bias": torch.full((16,), float(rank))}
    return {
        "wrapped": message(ConfigurationError, sharding.distribute, wrapped, mesh),
        "no recipe": message(ConfigurationError, sharding.distribute, bare, mesh),
        "shards": message(
            ConfigurationError, sharding.divide, source(), mesh, logical_shards=mesh.size() + 1
        ),
        "parts": message(DataError, pt.fit, state, step, divided, steps=1),
        "steps": message(ConfigurationError, sharding.distribute, run.replace(steps=rank), mesh),
        "seeds": message(
            ConfigurationError,
            sharding.distribute,
            run.replace(state=run.state.replace(params=pt.FrozenDict(biased))),
            mesh,
        ),
        "metrics": message(
            StructureError, pt.fit, odd, odd_step, sharding.divide(source(), mesh), steps=1
        ),
    }


def checks(mesh, directory):
    return {
        "ddp": with_ddp(mesh),
        "accumulated": accumulated(mesh),
        "torch": of_torch(mesh),
        "elastic": with_elastic(mesh, directory),
        "twelve": with_twelve_shards(mesh),
        "used": used_somewhere(mesh),
        "evaluated": evaluated(mesh),
        "signalled": signalled(mesh),
        "distributed": distributed(mesh, directory),
        "refused": refused(mesh),
    }


# ── The tests ─────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What every process of every size has found: ``found[size][rank][check]``."""

    def run_all():
        directory = str(tmp_path_factory.mktemp("sharding"))
        return {str(size): on_processes(size, checks, directory) for size in SIZES}

    every = shared(tmp_path_factory, "sharding", run_all)
    return {size: every[str(size)] for size in SIZES}


def alone(batches=None, **options):
    """The run of one process that knows nothing of others."""
    state, step = make(**options)
    return facts(pt.fit(state, step, batches or source(), epochs=3))


def assert_close(found, expected):
    torch.testing.assert_close(
        torch.tensor(found["weight"]), torch.tensor(expected["weight"]), rtol=1e-5, atol=1e-7
    )
    assert math.isclose(found["loss"], expected["loss"], rel_tol=1e-10)
    assert found["accuracy"] == expected["accuracy"]


@pytest.mark.parametrize("size", SIZES)
def test_ddp_does_what_one_process_does(found, size):
    every = [rank["ddp"] for rank in found[size]]
    assert every == [every[0]] * size
    assert_close(every[0], alone())
    if size == 1:
        assert every[0]["digest"] == alone()["digest"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("when", ["after every batch", "before every update"])
def test_gradients_accumulate_with_fewer_messages_too(found, size, when):
    every = [rank["accumulated"][when] for rank in found[size]]
    assert [one["weight"] for one in every] == [every[0]["weight"]] * size
    assert_close(every[0], alone(accumulate=3))


def test_ddp_on_two_processes_is_that_of_torch_to_the_bit(found):
    assert [rank["torch"]["equal"] for rank in found[2]] == [True, True]
    assert [rank["torch"]["equal"] for rank in found[1]] == [True]
    assert max(rank["torch"]["far"] for rank in found[4]) < 1e-6  # another order of additions


def test_elastic_gives_the_same_bits_on_any_number_of_processes(found):
    every = [rank["elastic"] for size in SIZES for rank in found[size]]
    expected = every[0]["whole"]
    assert all(one["whole"] == expected for one in every)
    # Not what one process does without: each part has its own batch statistics and draws.
    assert expected["digest"] != alone(even_source(), noisy=True)["digest"]
    twelve = {rank["twelve"] for size in SIZES for rank in found[size]}
    assert len(twelve) == 1


@pytest.mark.parametrize(("size", "before"), [(2, 4), (1, 4), (1, 2)])
def test_elastic_goes_on_with_another_number_in_the_middle_of_an_epoch(found, size, before):
    expected = found[4][0]["elastic"]["whole"]
    assert [rank["elastic"][f"from {before}"] for rank in found[size]] == [expected] * size


def test_dp_over_four_devices_is_elastic_with_four_shards(found):
    state, step = make(sharding.dp(["cpu"] * 4), noisy=True)
    after = pt.fit(state, step, even_source().divided(4, 0, 4), epochs=3)
    assert facts(after) == found[4][0]["elastic"]["whole"]


@pytest.mark.parametrize(("size", "even", "odd"), [(1, 3.5, 0.0), (2, 0.75, 2.75), (4, 1.25, 2.25)])
def test_a_parameter_that_only_some_processes_use(found, size, even, odd):
    for rank in found[size]:
        assert rank["used"]["params"] == {
            "even": [1 - even, 1 + even],
            "odd": [1 - odd, 1 + odd],
            "unused": [1.0, 1.0],
        }
        assert rank["used"]["unused"] == [1.0, 1.0]  # has no gradient, and so does not decay


@pytest.mark.parametrize("size", SIZES)
def test_the_metrics_of_an_evaluation_are_those_of_whole_batches(found, size):
    for rank in found[size]:
        for name, (merged, whole) in rank["evaluated"].items():
            if name == "loss":
                assert math.isclose(merged, whole, rel_tol=1e-12)
            else:
                assert merged == whole


@pytest.mark.parametrize("size", SIZES)
def test_a_signal_to_one_process_ends_all_after_the_same_step(found, size):
    every = [rank["signalled"] for rank in found[size]]
    assert every == [every[0]] * size
    step, code, _ = every[0]
    assert code == 143
    assert step == 3 if size == 1 else step in (3, 4)  # the others hear of it one step later


@pytest.mark.parametrize("size", SIZES)
def test_a_run_is_distributed_as_a_value(found, size):
    expected = found[4][0]["elastic"]["whole"]
    for number, rank in enumerate(found[size]):
        one = rank["distributed"]
        assert one["whole"]["digest"] == found[4][0]["distributed"]["whole"]["digest"]
        assert one["whole"]["weight"] == expected["weight"]
        assert (one["events"] > 0) == (number == 0)
        assert one["together"]
        assert one["twice"]


@pytest.mark.parametrize("size", SIZES)
def test_all_resume_from_what_the_first_process_finds(found, size):
    for rank in found[size]:
        one = rank["distributed"]
        assert one["middle"] == one["resumed at"] == MIDDLE
        assert one["resumed"] == one["whole"]
        assert "has the checkpoints of an earlier run" in one["refused"]


@pytest.mark.parametrize("size", SIZES)
def test_what_cant_be_done_is_said(found, size):
    for number, rank in enumerate(found[size]):
        said = rank["refused"]
        assert "is wrapped" in said["wrapped"]
        assert "parameter `mesh`" in said["wrapped"]
        assert "not made by puretrain.train_step" in said["no recipe"]
        assert "the batch comes in 2 parts for this process" in said["parts"]
        if size == 1:
            continue
        assert f"logical_shards={size + 1}" in said["shards"]
        assert "steps is 0 in the process of rank 0, and 1 in 1's" in said["steps"]
        assert "params/1.bias in the process of rank 1 is not that in rank 0's" in said["seeds"]
        assert "m0" in said["metrics"]
        assert "m1" in said["metrics"], number
