"""Training in two real processes, against the same computed in one by hand."""

import math
import pathlib
import sys

import forking
import pytest
import torch
from torch.utils.data import DistributedSampler

PROGRAMS = pathlib.Path(__file__).parent / "distributed_programs"
sys.path.insert(0, str(PROGRAMS))
import together  # noqa: E402


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What the two processes have seen; the script is started plainly, and once."""
    folder = tmp_path_factory.mktemp("together")
    done = forking.run(PROGRAMS / "together.py", folder, timeout=250)
    assert done.returncode == 0, done.stdout + done.stderr
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in (0, 1)]


def batches(rank, epoch, dataset, size, *, seed=3):
    """What a process reads of a shuffled loader in an epoch."""
    sampler = DistributedSampler(dataset, 2, rank, shuffle=True, seed=seed)
    sampler.set_epoch(epoch)
    order = list(sampler)
    rows = [order[i : i + size] for i in range(0, len(order), size)]
    return [tuple(torch.stack(column) for column in zip(*(dataset[i] for i in row), strict=True))
            for row in rows]  # fmt: skip


def average_into(parameters, grads):
    """Set gradients to the mean of those of two processes; None counts as zero."""
    for parameter, one, other in zip(parameters, *grads, strict=True):
        if one is None and other is None:
            parameter.grad = None
        else:
            zero = torch.zeros_like(parameter)
            halves = [(zero if grad is None else grad) * 0.5 for grad in (one, other)]
            parameter.grad = halves[0] + halves[1]


def trained(results, part):
    """The parameters of a part: without the running statistics, which differ between processes."""
    states = [result[part]["weights"] for result in results]
    names = [name for name in states[0] if "running" not in name]
    for name in names:
        assert torch.equal(states[0][name], states[1][name]), name
    return {name: states[0][name] for name in names}


def test_gradients_are_averaged_once_per_update_and_clipped_after_that(seen):
    net = together.network()
    parameters = list(net.parameters())
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9)
    losses = []
    for epoch in (0, 1):
        read = [batches(rank, epoch, together.samples(22), 3) for rank in (0, 1)]
        for rank in (0, 1):
            mine = [x[:, 0].tolist() for x, _ in read[rank]]
            assert seen[rank]["logging"]["order"][epoch * 4 : epoch * 4 + 4] == mine
        losses = [[], []]
        for first in (0, 2):
            grads = []
            for rank in (0, 1):
                optimizer.zero_grad()
                for x, y in read[rank][first : first + 2]:
                    loss = torch.nn.functional.cross_entropy(net(x), y)
                    losses[rank].append((loss.item(), len(x)))
                    (loss / 2).backward()
                grads.append([p.grad.clone() for p in parameters])
            average_into(parameters, grads)
            torch.nn.utils.clip_grad_norm_(parameters, 0.5)
            optimizer.step()
    found = trained(seen, "logging")
    for name, parameter in net.named_parameters():
        assert torch.equal(found[f"net.{name}"], parameter), name

    means = [sum(v * n for v, n in rows) / sum(n for _, n in rows) for rows in losses]
    for rank in (0, 1):
        metrics = seen[rank]["logging"]["metrics"]
        assert math.isclose(metrics["mean_epoch"], sum(means) / 2, rel_tol=1e-5)
        assert math.isclose(metrics["own"], means[rank], rel_tol=1e-5)
        last = sum(rows[-1][0] for rows in losses) / 2
        assert math.isclose(metrics["mean_step"], last, rel_tol=1e-5)
        assert metrics["summed"] == 3.0
        assert ("only_first" in metrics) is (rank == 0)


def test_metrics_and_decisions_are_those_of_all_processes(seen):
    first, second = (result["logging"] for result in seen)
    model = together.Logging()
    model.load_state_dict(first["weights"], strict=False)
    model.eval()
    data = together.samples(14, 1)
    x, y = (torch.stack(column) for column in zip(*data, strict=True))
    with torch.no_grad():
        right = float((model(batch := (x, y)).argmax(1) == batch[1]).float().mean())
    assert math.isclose(first["validated"]["accuracy"], right, rel_tol=1e-6)
    assert first["validated"]["accuracy"] == second["validated"]["accuracy"]
    assert first["validated"]["largest"] == second["validated"]["largest"] == float(x.max())
    # by the values of the first process, where both have others
    assert first["best"] == second["best"] == "epoch=0-val_rank=0.0.ckpt"
    assert first["files"] == ["epoch=0-val_rank=0.0.ckpt", "epoch=1-val_rank=0.0.ckpt"]
    assert first["log_dir"] == second["log_dir"]
    assert first["log_dir"].endswith("version_0")


def test_who_is_who(seen):
    first, second = (result["logging"] for result in seen)
    assert first["ranks"] == (0, 0, 0, 2)
    assert second["ranks"] == (1, 1, 0, 2)
    assert (first["zero"], second["zero"]) == ("first", None)
    assert first["prepared"] > 0
    assert second["prepared"] == 0


def test_what_takes_no_part_waits_for_nothing_and_stays(seen):
    torch.manual_seed(1)
    model = together.Adversaries()
    start = together.weights(model)
    first, second = model.configure_optimizers()
    read = [batches(rank, 0, together.samples(22), 3) for rank in (0, 1)]
    groups = [list(model.maker.parameters()),
              [*model.judge.parameters(), *model.unused.parameters()]]  # fmt: skip
    for pair in zip(*read, strict=True):
        grads = []
        for x, _ in pair:
            loss = (model.judge(model.maker(x)) ** 2).mean()
            grads.append(torch.autograd.grad(loss, groups[0]))
        average_into(groups[0], grads)
        fakes = [model.maker(x).detach() for x, _ in pair]
        first.step()
        grads = []
        for rank, (x, _) in enumerate(pair):
            judged = model.judge(x).mean() - model.judge(fakes[rank]).mean()
            if rank == 0:
                judged = judged + model.unused(judged.reshape(1)).sum()
            grads.append(torch.autograd.grad(judged, groups[1], allow_unused=True))
        average_into(groups[1], grads)
        second.step()
    found = trained(seen, "adversaries")
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name], parameter), name
    assert torch.equal(found["net.0.weight"], start["net.0.weight"])
    assert not torch.equal(found["unused.weight"], start["unused.weight"])


def test_what_is_gathered_has_gradients_and_what_thaws_is_trained(seen):
    net = together.network()
    parts = [list(net[0].parameters()), list(net[3].parameters())]
    for epoch in (0, 1):
        net[3].requires_grad_(epoch > 0)
        read = [batches(rank, epoch, together.samples(22), 3) for rank in (0, 1)]
        for (one, _), (other, _) in zip(*read, strict=True):
            for part in parts[: 1 + epoch]:
                loss = net(one).mean() ** 2 + net(other).mean() ** 2
                grads = torch.autograd.grad(loss, part)
                with torch.no_grad():
                    for parameter, grad in zip(part, grads, strict=True):
                        parameter -= 0.1 * grad
    found = trained(seen, "in_turn")
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(found[f"net.{name}"], parameter.detach(), rtol=1e-4, atol=1e-6)
    assert {*seen[0]["in_turn"]["shapes"], *seen[1]["in_turn"]["shapes"]} == {(2,)}


def test_nobody_waits_for_a_process_with_less_data(seen):
    steps = {"stream": 6, "own": 8, "batches": 4}
    for name, count in steps.items():
        (mine, one), (theirs, other) = (result["uneven"][name] for result in seen)
        assert mine == theirs == count
        for key in one:
            assert "running" in key or torch.equal(one[key], other[key]), key
    assert [result["uneven"]["predicted"] for result in seen] == [3, 2]  # of five samples


def test_all_stop_when_one_wants_to(seen):
    assert seen[0]["stopping"] == seen[1]["stopping"]
    assert seen[0]["stopping"] == {"steps": 3, "epochs": 1, "interrupted": (True, 2)}


def test_a_run_goes_on_in_the_middle_of_an_epoch(seen):
    for result in seen:
        whole, rest = result["resumed"]["whole"], result["resumed"]["rest"]
        assert 0 < len(rest["notes"]) < len(whole["notes"])
        assert whole["notes"][-len(rest["notes"]) :] == rest["notes"]
        assert whole["metrics"] == rest["metrics"]
    trained([{"resumed": result["resumed"]["rest"]} for result in seen], "resumed")
    first = seen[0]["resumed"]
    for name, value in first["whole"]["weights"].items():
        assert torch.equal(value, first["rest"]["weights"][name]), name
    # the value of a batch is that of both processes
    assert seen[0]["resumed"]["whole"]["notes"] == seen[1]["resumed"]["whole"]["notes"]


def test_a_metric_that_has_seen_nothing_in_one_process(seen):
    assert [result["gathering"]["sum"] for result in seen] == [10, 10]


def test_a_norm_over_both_batches_is_that_of_the_whole_batch(seen):
    model = together.Normed()
    optimizer = model.configure_optimizers()
    read = [batches(rank, 0, together.samples(22), 3, seed=1) for rank in (0, 1)]
    for (one, first), (other, second) in zip(*read, strict=True):
        optimizer.zero_grad()
        model.loss((torch.cat([one, other]), torch.cat([first, second]))).backward()
        optimizer.step()
    for result in seen:
        for name, value in model.state_dict().items():
            found = result["normed"]["weights"][name]
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        expected = model.eval()(together.samples(2)[:])
    for rank, result in enumerate(seen):
        row = expected[rank : rank + 1]
        torch.testing.assert_close(result["normed"]["predicted"], row, rtol=1e-4, atol=1e-5)
