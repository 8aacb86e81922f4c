"""Replay and bisection of runs whose batches several processes have divided."""

import json

import forking
import pytest
import torch
from processes import shared

import puretrain as pt
from puretrain.errors import ConfigurationError

PROGRAM = """
import torch
from torch.nn.functional import cross_entropy
import puretrain as pt


def run(directory="runs/a", lr=1e-2, spoilt=-1):
    with pt.random.scope(pt.random.key(1)):
        model = torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Dropout(0.3))
        x, y = torch.randn(56, 6), torch.randint(3, (56,))
    if spoilt >= 0:
        x[spoilt] += 1
    apply, params, buffers = pt.functional(model)

    def loss(params, buffers, batch, key):
        logits, buffers = apply(params, buffers, batch[0])
        return cross_entropy(logits, batch[1]), pt.Aux(buffers)

    print("made")
    optimizer = pt.optim.adamw(lr)
    return pt.Run(
        state=pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(2)),
        step=pt.train_step(loss, optimizer),
        batches=pt.batches((x, y), 16, shuffle=True),
        steps=12,
        observers=[pt.journal(directory, every=4), pt.checkpoints(directory, every=4)],
        directory=directory,
    )


def by_hand(mesh, directory="runs/hand"):
    made = run(directory)
    recipe = made.step.recipe.replace(across=pt.sharding.elastic(mesh, 4))
    batches = pt.sharding.divide(made.batches, mesh, logical_shards=4)
    observers = [pt.journal(directory, every=4), pt.checkpoints(directory, every=4)]
    return made._replace(step=recipe.step(), batches=batches, observers=observers)
"""
RUNS = {
    "elastic-1": ["--logical-shards", "4"],
    "elastic-2": ["--logical-shards", "4", "--nproc", "2"],
    "other-2": ["--logical-shards", "4", "--nproc", "2", "--set", "lr=0.011"],
    "ddp-2": ["--nproc", "2"],
}


def command(place, *words, status=0):
    done = forking.run("-m", "puretrain", *words, cwd=place)
    assert done.returncode == status, done.stderr + done.stdout
    return done


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory with the runs, made once."""

    def make():
        place = tmp_path_factory.mktemp("divided")
        (place / "program.py").write_text(PROGRAM)
        for name, options in RUNS.items():
            command(place, "fit", "program.py", *options, "--directory", f"runs/{name}")
        command(place, "fit", "program.py:by_hand", "--nproc", "2", "--directory", "runs/hand")
        return str(place)

    return shared(tmp_path_factory, "replay-divided", make)


@pytest.mark.parametrize("name", ["elastic-1", "elastic-2", "ddp-2", "hand"])
def test_a_divided_run_is_replayed_to_the_bit(place, name):
    done = command(place, "replay", f"runs/{name}", "--json")
    found = json.loads(done.stdout)
    assert (found["difference"], found["compared"], found["states"]) == (None, 12, 3)
    assert found["facts"] == []
    assert ("starting 2 processes" in done.stderr) == (name in ("ddp-2", "hand"))
    assert done.stderr.count("made") == 1


@pytest.mark.parametrize("name", ["elastic-2", "ddp-2"])
def test_a_replay_that_differs_says_where_and_once(place, name):
    words = ["replay", f"runs/{name}", "--from", "4", "--file", "program.py", "--set"]
    done = command(place, *words, "lr=0.011", status=1)
    assert done.stdout.count("DIFFERS     at step 6") == 1  # the first loss after another update
    assert done.stdout.count("against the checkpoint of step 8") == 1
    assert "error" not in done.stderr


@pytest.mark.parametrize(("position", "seen"), [(0, True), (15, False)])
def test_the_journal_knows_what_the_first_process_had_of_a_batch(place, position, seen):
    recorded = pt.open_run(f"{place}/runs/elastic-2")
    assert recorded.division(12) == {"processes": 2, "logical_shards": 4}
    sample = next(iter(pt.batches(torch.arange(56), 16, shuffle=True)))[position]
    words = ["replay", "runs/elastic-2", "--file", "program.py", "--set", f"spoilt={sample}"]
    found = json.loads(command(place, *words, "--json", status=1).stdout)["difference"]
    assert (found["step"], found["batch"]) == (1, seen)
    assert found["metrics"][0][0] == "loss"


def test_bisect_finds_no_difference_between_numbers_of_processes(place):
    done = command(place, "bisect", "runs/elastic-1", "runs/elastic-2")
    assert "identical   for the 12 steps that both have" in done.stdout
    assert "division/processes" in done.stdout


def test_bisect_lives_divided_runs_again(place):
    done = command(place, "bisect", "runs/elastic-1", "runs/other-2", "--json", status=1)
    found = json.loads(done.stdout)
    assert (found["step"], found["exact"], found["notes"]) == (1, True, [])
    assert found["what"] in ("opt_state", "params")


def test_bisect_says_why_it_can_not_look_closer(place):
    done = command(place, "bisect", "runs/elastic-1", "runs/ddp-2", status=1)
    assert "is a run of 2 processes without logical shards" in done.stdout


def test_one_process_refuses_steps_that_would_come_out_differently(place):
    elastic, ddp = (pt.open_run(f"{place}/runs/{name}") for name in ("elastic-2", "ddp-2"))
    with pytest.raises(ConfigurationError, match=r"distribute\(run, mesh, logical_shards=4\)"):
        elastic.replay()
    with pytest.raises(ConfigurationError, match="2 processes .* here there are 1"):
        ddp.state_at(6)
    assert int(ddp.state_at(8).step) == 8  # a checkpoint needs no steps


def test_the_function_that_makes_a_divided_run_goes_back_in_time(place):
    plain = pt.open_run(f"{place}/runs/elastic-2")
    threads = torch.get_num_threads()
    with pt.sharding.processes() as mesh:
        again = pt.open_run(
            f"{place}/runs/elastic-2",
            lambda: pt.sharding.distribute(plain.make(), mesh, logical_shards=4),
        )
        assert again.replay().difference is None
        one = again.state_at(7)
    two = pt.open_run(f"{place}/runs/elastic-1").checkpoints()
    assert int(one.step) == 7
    assert [found.step for found in two] == [4, 8, 12]
    assert torch.get_num_threads() == threads
