"""ZeRO with real processes: the same training as plain data parallelism, with less memory held.

What runs in the processes is tests/sharding_programs/zero_program.py. Starting processes takes a
few seconds, so one start makes many checks, whose results are looked at here.
"""

import json
import time
from pathlib import Path

import pytest
import torch
from processes import shared, together
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import puretrain as pt
from puretrain import sharding
from puretrain.errors import ConfigurationError, LossError, PatternError, StructureError
from puretrain.sharding.zero import block_of
from puretrain.tree import tree_equal

PROGRAM = Path(__file__).parent / "sharding_programs" / "zero_program.py"
STAGES = [1, 2, 3]


def start(tmp_path_factory, name, count, shard, *checks):
    """Run the program; returns the facts that each process has found."""

    def facts():
        directory = tmp_path_factory.mktemp(name)
        together([PROGRAM, shard, directory, *checks], count)
        return json.loads((directory / "facts.json").read_text())

    return shared(tmp_path_factory, f"zero-{name}", facts)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    checks = ["placed", "pure", "held", "all_the_same", "evaluated", "refusals", "resumed"]
    checks += ["averaged", "agrees", "agrees_with_options", "agrees_where_vectors_fit"]
    return start(tmp_path_factory, "two", 2, 2, *checks)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    checks = ["placed", "held", "all_the_same", "refusals", "agrees_nearly"]
    return start(tmp_path_factory, "four", 4, 4, *checks)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    """Two shards, each in two copies."""
    checks = ["placed", "pure", "held", "all_the_same", "agrees_nearly"]
    return start(tmp_path_factory, "hybrid", 4, 2, *checks)


@pytest.fixture(params=["two", "four", "hybrid"])
def facts(request):
    return request.getfixturevalue(request.param)


def everywhere(facts, name):
    return [found[name] for found in facts]


# ── The same training ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(
    "case",
    [
        *("adamw", "torch sgd", "adafactor", "muon", "even"),
        *("accumulate", "bf16", "16", "raise"),
    ],
)
def test_two_processes_train_as_ddp_does_bit_for_bit(two, case, stage):
    """Also with the fused kernels ('even'), where shards are multiples of the vectors of a CPU."""
    assert everywhere(two, f"agrees {case} {stage}") == [0.0, 0.0]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", ["fused adamw", "clipped", "lamb"])
def test_rounding_is_all_that_fused_tails_and_norms_over_shards_change(two, case, stage):
    for difference in everywhere(two, f"agrees {case} {stage}"):
        assert difference <= 1e-6


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("case", ["sgd", "clipped"])
@pytest.mark.parametrize("processes", ["four", "hybrid"])
def test_more_processes_train_as_ddp_does(request, processes, case, stage):
    for difference in everywhere(request.getfixturevalue(processes), f"nearly {case} {stage}"):
        assert difference <= 1e-6


def test_stages_two_and_three_have_the_same_bits(hybrid):
    for case in ("sgd", "clipped"):
        digests = everywhere(hybrid, f"digest {case} 2") + everywhere(hybrid, f"digest {case} 3")
        assert len(set(digests)) == 1


@pytest.mark.parametrize("stage", STAGES)
def test_all_processes_have_the_same_whole_state(facts, stage):
    assert set(everywhere(facts, f"same {stage}")) == {1}


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_is_pure_and_donation_keeps_the_bits(two, hybrid, stage):
    for found in (*two, *hybrid):
        assert found[f"pure {stage}"]
        assert found[f"donated {stage}"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_on_at_any_stage_from_a_whole_or_a_sharded_checkpoint(two, stage):
    """The first half is stage 3; the second equals a run of ddp that was not interrupted."""
    assert everywhere(two, f"resumed {stage}") == [0.0, 0.0]
    assert everywhere(two, f"resumed from shards {stage}") == [0.0, 0.0]


@pytest.mark.parametrize("stage", STAGES)
def test_evaluation_with_whole_parameters(two, stage):
    assert everywhere(two, f"evaluated {stage}") == [True, True]


@pytest.mark.parametrize("stage", STAGES)
def test_averages_of_the_weights_are_cut_as_they_are(two, stage):
    assert everywhere(two, f"averaged {stage}") == [0.0, 0.0]


# ── What each process holds ───────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("processes", "count"), [("two", 2), ("four", 4), ("hybrid", 2)])
def test_each_process_holds_its_shards(request, processes, count, stage):
    facts = request.getfixturevalue(processes)
    params, opt_state = facts[0][f"held {stage}"]["whole"]
    for found in facts:
        mine = found[f"held {stage}"]["state"]
        # The shards of the first process are the largest; leaves whose size 4 does not divide are
        # cut into pieces of up to a quarter more.
        assert mine[1] <= opt_state / count * 1.25
        assert mine[0] == params if stage == 1 else mine[0] <= params / count * 1.25
    # What every process has: two counters for all leaves, and both moments of the one scalar.
    uncut = 8 + 4 * 28 + 2 * 4
    held = sum(found[f"held {stage}"]["state"][1] for found in facts)
    assert held == (opt_state + (count - 1) * uncut) * (len(facts) // count)


@pytest.mark.parametrize("stage", STAGES)
def test_shard_is_the_inverse_of_gather(facts, stage):
    for found in facts:
        assert found[f"shard of gathered {stage}"]
        assert found[f"gathered to one {stage}"]
        assert found[f"placements of whole {stage}"]


def test_the_table_has_the_whole_shapes(facts):
    for found in facts:
        lines = {line.split()[0]: line.split()[1:] for line in found["table 3"][1:]}
        assert lines["params/blocks.0.linear2.weight"][:2] == ["6,19", "Shard(0)"] or lines[
            "params/blocks.0.linear2.weight"
        ][:2] == ["6,19", "Shard(1)"]
        assert lines["params/scale"] == ["Replicate()", "4"]
        here = sum(
            int(cells[-1].replace(",", "")) for name, cells in lines.items() if name != "total"
        )
        assert f"{here:,}" == lines["total"][0]
        first = {line.split()[0]: line.split()[1:] for line in found["table 1"][1:]}
        assert first["params/idle.weight"] == ["6,6", "Replicate()", "144"]


def test_uneven_and_empty_shards(facts):
    for found in facts:
        assert found["chunks"]
        assert found["gathered"]
        assert "w is placed as cut along 0, but its lengths in the processes" in found["no whole"]


# ── What is refused ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("stage", [1, 3])
def test_an_optimizer_that_needs_whole_leaves_refuses_shards(two, stage):
    for found in two:
        assert found[f"refuses muon {stage}"].startswith(
            "OptimizerError: muon: its update of a leaf needs the whole of it, but of blocks.0."
        )
        assert found[f"refuses adafactor {stage}"].startswith(
            "OptimizerError: torch.optim.Adafactor: each process has only a part of embedding."
        )


def test_a_whole_state_is_refused_where_shards_are_expected(two, four):
    for found in (*two, *four):
        assert "but the shard of this process has" in found["refuses a whole state"]


def test_all_processes_notice_a_gradient_that_is_not_finite_in_one(two, four):
    for facts in (two, four):
        raised = facts[0]["raised everywhere"]
        assert all(text.startswith("NonFiniteError: step 0: the gradient of") for text in raised)
        assert facts[0]["skipped everywhere"] == [1] * len(facts)


def test_parameters_used_in_another_order_are_refused(two, four):
    for found in (*two, *four):
        assert "used the parameters in different orders" in found["refuses disorder"]


# ── In one process ────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def mesh():
    with sharding.processes() as mesh:
        yield mesh


@pytest.mark.parametrize("stage", STAGES)
def test_one_process_trains_as_without_it(mesh, stage):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.Linear(16, 1))
    apply, params, buffers = pt.functional(module)

    def loss(params, buffers, batch, key):
        value, buffers = apply(params, buffers, batch)
        return value.square().mean(), pt.Aux(buffers=buffers)

    optimizer, data = pt.optim.adamw(1e-2), torch.randn(12, 8)
    expected = pt.fit(
        pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(1)),
        pt.train_step(loss, optimizer),
        pt.batches(data, 4),
        epochs=2,
    )
    run = sharding.zero(mesh, params, optimizer, stage=stage, smallest=1)
    state = pt.fit(
        pt.TrainState.create(run.params, buffers, run.optimizer, key=pt.random.key(1)),
        pt.train_step(loss, run.optimizer, across=run.across),
        sharding.divide(pt.batches(data, 4), mesh),
        epochs=2,
    )
    assert tree_equal(state, expected)


def test_a_checkpointed_block_is_gathered_again_when_it_is_computed_again(mesh):
    def loss(params, buffers, batch, key):
        x = checkpoint(lambda x: (x @ params["a.w"]).tanh(), batch, use_reentrant=False)
        return (x @ params["b.w"]).sum()

    torch.manual_seed(0)
    params = {"a.w": torch.randn(8, 8), "b.w": torch.randn(8, 8)}
    run = sharding.zero(mesh, params, pt.optim.sgd(0.1), stage=3, smallest=1)
    state = pt.TrainState.create(run.params, None, run.optimizer, key=pt.random.key(0))
    batch = next(iter(sharding.divide(pt.batches(torch.randn(4, 8), 4), mesh)))
    after = pt.train_step(loss, run.optimizer, across=run.across)(state, batch)
    plain = pt.train_step(loss, pt.optim.sgd(0.1))(state, batch.parts[0])
    assert tree_equal(after.params, plain.params)


def test_the_memory_of_a_block_is_gone_when_the_next_one_is_used(mesh):
    size = 64 * 64 * 4
    storages = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.untyped_storage().nbytes() >= size:
                storages.append(StorageWeakRef(result.untyped_storage()))
            return result

    def whole_blocks():
        """How many tensors of the size of a parameter there are, beyond the six shards."""
        alive = 0
        for _ in range(20):  # gloo lets go of a tensor a moment after its call has returned
            alive = len({ref.cdata for ref in storages if not ref.expired()}) - 6
            if alive <= 1:
                break
            time.sleep(0.005)
        return alive

    held = []

    class Look(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            held.append(whole_blocks())
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            held.append(whole_blocks())
            return grad

    def loss(params, buffers, batch, key):
        x = batch
        for name in params:
            x = Look.apply((x @ params[name]).relu())
        return x.sum()

    params = {f"{i}.w": torch.randn(64, 64) for i in range(6)}
    run = sharding.zero(mesh, params, pt.optim.sgd(0.1), stage=3)
    state = pt.TrainState.create(run.params, None, run.optimizer, key=pt.random.key(0))
    batch = next(iter(sharding.divide(pt.batches(torch.randn(2, 64), 2), mesh)))
    with Watch():
        pt.train_step(loss, run.optimizer, across=run.across)(state, batch)
    assert held[:6] == [1] * 6  # in the forward pass
    # In the backward pass there are besides the sums of gradients so far (which for one process are
    # whole), and one whole gradient that is under way.
    assert held[6:] == [1, 3, 4, 5, 6, 7]


def test_arguments_are_checked(mesh):
    params, optimizer = {"w": torch.ones(2)}, pt.optim.sgd(0.1)
    with pytest.raises(ConfigurationError, match="stage is 1, 2 or 3, not 4"):
        sharding.zero(mesh, params, optimizer, stage=4)
    with pytest.raises(PatternError, match=r"'b\*' matches no leaf"):
        sharding.zero(mesh, params, optimizer, stage=1, whole=["b*"])
    with pytest.raises(ConfigurationError, match="params/n is 3, not a tensor"):
        sharding.zero(mesh, params | {"n": 3}, optimizer, stage=1)
    run = sharding.zero(mesh, params, optimizer, stage=2)
    with pytest.raises(StructureError, match="the run was made for 1"):
        state = pt.TrainState.create(
            {"w": torch.ones(2), "v": torch.ones(2)}, None, run.optimizer, key=pt.random.key(0)
        )
        batch = next(iter(sharding.divide(pt.batches(torch.ones(2), 2), mesh)))
        pt.train_step(lambda p, b, x, k: (p["w"] * x).sum(), optimizer, across=run.across)(
            state, batch
        )


def test_a_loss_without_parameters_is_refused_at_each_stage(mesh):
    for stage in STAGES:
        run = sharding.zero(mesh, {"w": torch.ones(4)}, pt.optim.sgd(0.1), stage=stage, smallest=1)
        state = pt.TrainState.create(run.params, None, run.optimizer, key=pt.random.key(0))
        batch = next(iter(sharding.divide(pt.batches(torch.ones(2), 2), mesh)))
        step = pt.train_step(lambda p, b, x, k: x.sum(), run.optimizer, across=run.across)
        with pytest.raises(LossError, match="does not depend on any parameter"):
            step(state, batch)


@pytest.mark.parametrize(
    ("path", "block"),
    [
        ("layers.0.attention.0.weight", "layers.0"),
        ("0.weight", "0"),
        ("head.weight", "head"),
        ("model/layers/12/w", "model/layers/12"),
        ("block10.weight", "block10"),
        ("w1", "w1"),
    ],
)
def test_blocks_are_modules(path, block):
    assert block_of(path) == block
