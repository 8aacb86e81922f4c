"""What tests/test_zero.py runs under torchrun: several checks in one start; rank 0 writes facts."""

import functools
import json
import sys

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import Replicate, Shard

import puretrain as pt
from puretrain import sharding
from puretrain.errors import NonFiniteError, OptimizerError, StructureError
from puretrain.tree import tree_diff, tree_digest, tree_equal

FACTS = {}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.linear1 = nn.Linear(width, 3 * width + 1)
        self.linear2 = nn.Linear(3 * width + 1, width)

    def forward(self, x):
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + F.dropout(self.linear2(F.gelu(self.linear1(x))), 0.1, self.training)


class Model(nn.Module):
    """Attention, a view of a weight that outlives its block, tied weights, a GRU, an idle layer."""

    def __init__(self, width):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.blocks = nn.ModuleList([Block(width), Block(width)])
        self.recurrent = nn.GRU(width, width, batch_first=True)
        self.idle = nn.Linear(width, width)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.head = nn.Linear(width, 11, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, tokens):
        early = self.blocks[1].linear1.weight.T
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.recurrent(x)[0] + (x @ early).mean() * self.scale
        return self.head(x)


def model(width=6):
    torch.manual_seed(0)
    return pt.functional(Model(width))


def loss_of(apply):
    def loss(params, buffers, batch, key):
        logits, buffers = apply(params, buffers, batch[:, :-1])
        value = F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return value, pt.Aux(buffers=buffers, metrics={"top": logits.amax()})

    return loss


def data():
    return torch.randint(11, (22, 6), generator=torch.Generator().manual_seed(1))


def batches(mesh):
    return sharding.divide(pt.batches(data(), 8), mesh)  # the last batch has 6


def run(mesh, stage, optimizer, *, width=6, whole=(), smallest=1, **options):
    """Train; returns the plan, the state and the whole state."""
    apply, params, buffers = model(width)
    plan = sharding.zero(
        mesh, params, optimizer, stage=stage, whole=whole, smallest=smallest, bucket_megabytes=0.001
    )
    state = pt.TrainState.create(plan.params, buffers, plan.optimizer, key=pt.random.key(0))
    step = pt.train_step(loss_of(apply), plan.optimizer, across=plan.across, **options)
    state = pt.fit(state, step, batches(mesh), epochs=1)
    return plan, state, sharding.gather(state, mesh, plan.placements(state))


@functools.cache
def usual(mesh, stage):
    """As `run`, with the usual optimizer; several checks look at what comes out."""
    return run(mesh, stage, ADAMW)


@functools.cache
def ddp(mesh, optimizer, epochs=1, width=6, **options):
    apply, params, buffers = model(width)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
    step = pt.train_step(loss_of(apply), optimizer, across=sharding.ddp(mesh), **options)
    return pt.fit(state, step, batches(mesh), epochs=epochs)


def worst(a, b):
    """The largest absolute difference of two trees of one structure; 0 if they have equal bits."""
    found = tree_diff(a, b)
    if any(d.kind != "value" for d in found):
        return [f"{d.path} {d.kind} {d.a} {d.b}" for d in found if d.kind != "value"]
    return max((d.max_abs for d in found), default=0.0)


ADAMW = pt.optim.adamw(1e-2, fused=False)


def agrees(mesh):
    """Each stage and optimizer against ddp."""
    for stage in (1, 2, 3):
        FACTS[f"agrees adamw {stage}"] = worst(ddp(mesh, ADAMW), usual(mesh, stage)[2])
    optimizers = {
        "fused adamw": pt.optim.adamw(1e-2),
        "torch sgd": pt.optim.from_torch(torch.optim.SGD, lr=1e-2, momentum=0.9),
        "adafactor": pt.optim.multi_transform(
            {"blocks.**": pt.optim.from_torch(torch.optim.Adafactor), "**": pt.optim.lion(1e-3)}
        ),
        "clipped": pt.optim.chain(pt.optim.clip_by_global_norm(0.1), ADAMW),
        "lamb": pt.optim.lamb(1e-2),
        "muon": pt.optim.multi_transform(
            {"blocks.*.linear*.weight": pt.optim.muon(1e-2), "**": ADAMW}
        ),
    }
    for name, optimizer in optimizers.items():
        expected = ddp(mesh, optimizer)
        whole = ["blocks.**"] if name in ("adafactor", "muon") else []
        for stage in (1, 2, 3):
            _, _, state = run(mesh, stage, optimizer, whole=whole)
            FACTS[f"agrees {name} {stage}"] = worst(expected, state)


def agrees_with_options(mesh):
    for name, options in {
        "accumulate": {"accumulate": 2},
        "bf16": {"precision": "bf16"},
        "16": {"precision": "16"},
        "raise": {"nonfinite": "raise"},
    }.items():
        expected = ddp(mesh, ADAMW, **options)
        for stage in (1, 2, 3):
            _, _, state = run(mesh, stage, ADAMW, **options)
            FACTS[f"agrees {name} {stage}"] = worst(expected, state)


def agrees_where_vectors_fit(mesh):
    """The fused kernel, where shards are multiples of the vectors of a processor."""
    expected = ddp(mesh, pt.optim.adamw(1e-2), width=16)
    for stage in (1, 2, 3):
        _, _, state = run(
            mesh,
            stage,
            pt.optim.adamw(1e-2),
            width=16,
            whole=["embedding.**", "blocks.*.linear*.**"],
            smallest=256,
        )
        FACTS[f"agrees even {stage}"] = worst(expected, state)


def agrees_nearly(mesh):
    """Where more than two processes may add up in other orders; 2 and 3 have the same bits."""
    sgd = pt.optim.sgd(1e-2, momentum=0.9)
    clipped = pt.optim.chain(pt.optim.clip_by_global_norm(0.1), sgd)
    for name, optimizer in {"sgd": sgd, "clipped": clipped}.items():
        expected = ddp(mesh, optimizer)
        for stage in (1, 2, 3):
            _, _, state = run(mesh, stage, optimizer)
            FACTS[f"nearly {name} {stage}"] = worst(expected, state)
            FACTS[f"digest {name} {stage}"] = tree_digest(state)


def held(mesh):
    """What is cut, and how many elements each process holds."""
    for stage in (1, 2, 3):
        plan, state, whole = usual(mesh, stage)
        placements = plan.placements(state)
        FACTS[f"placements of whole {stage}"] = placements.dims._items == (
            plan.placements(whole).dims._items
        )
        FACTS[f"held {stage}"] = {
            "state": [pt.tree.tree_size(getattr(state, f))[1] for f in ("params", "opt_state")],
            "whole": [pt.tree.tree_size(getattr(whole, f))[1] for f in ("params", "opt_state")],
        }
        FACTS[f"table {stage}"] = sharding.table(state, mesh, placements).splitlines()
        back = sharding.shard(whole, mesh, placements)
        FACTS[f"shard of gathered {stage}"] = tree_equal(back, state)
        only = sharding.gather(state, mesh, placements, to=mesh.size() - 1)
        FACTS[f"gathered to one {stage}"] = (only is None) == (
            mesh.get_rank() != mesh.size() - 1
        ) and (only is None or tree_equal(only, whole))


def all_the_same(mesh):
    """Every process has the same whole state."""
    for stage in (1, 2, 3):
        _, _, whole = usual(mesh, stage)
        digests = [None] * mesh.size()
        torch.distributed.all_gather_object(digests, tree_digest(whole))
        FACTS[f"same {stage}"] = len(set(digests))


def resumed(mesh, directory):
    """From a whole checkpoint and from one of all processes, at another stage."""
    expected = ddp(mesh, ADAMW, epochs=2)
    plan, state, whole = usual(mesh, 3)
    if mesh.get_rank() == 0:
        pt.save(f"{directory}/whole.ckpt", whole)
    sharding.save(f"{directory}/shards.ckpt", state, plan.placements(state), mesh)
    torch.distributed.barrier()
    for stage in (1, 2, 3):
        apply, params, buffers = model()
        plan = sharding.zero(mesh, params, ADAMW, stage=stage, smallest=1)
        step = pt.train_step(loss_of(apply), plan.optimizer, across=plan.across)
        fresh = pt.TrainState.create(params, buffers, ADAMW, key=pt.random.key(5))
        loaded = pt.load(f"{directory}/whole.ckpt", like=fresh)
        state = sharding.shard(loaded, mesh, plan.placements(loaded))
        state = pt.fit(state, step, batches(mesh), epochs=2)
        found = sharding.gather(state, mesh, plan.placements(state))
        FACTS[f"resumed {stage}"] = worst(expected, found)
        like = pt.TrainState.create(plan.params, buffers, plan.optimizer, key=pt.random.key(5))
        state = sharding.load(f"{directory}/shards.ckpt", like, plan.placements(like), mesh)
        state = pt.fit(state, step, batches(mesh), epochs=2)
        found = sharding.gather(state, mesh, plan.placements(state))
        FACTS[f"resumed from shards {stage}"] = worst(expected, found)


def averaged(mesh):
    """A reducer's memory of the parameters is cut as they are."""
    facts = []
    for stage in (0, 1, 2, 3):
        apply, params, buffers = model()
        optimizer, across = ADAMW, sharding.ddp(mesh)
        if stage:
            plan = sharding.zero(mesh, params, ADAMW, stage=stage, smallest=1)
            params, optimizer, across = plan.params, plan.optimizer, plan.across
        state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
        step = pt.train_step(loss_of(apply), optimizer, across=across)
        state = pt.fit(state, step, batches(mesh), epochs=1, reducers=[pt.ema(0.9)])
        if stage:
            state = sharding.gather(state, mesh, plan.placements(state))
        facts.append(state.reducers)
    for stage in (1, 2, 3):
        FACTS[f"averaged {stage}"] = worst(facts[0], facts[stage])


def evaluated(mesh):
    apply, _, _ = model()

    def metrics(params, buffers, batch, key):
        logits, _ = apply(params, buffers, batch, train=False)
        return {"mean": logits.mean()}

    evaluate = sharding.eval_across(pt.eval_step(metrics), mesh)
    expected = ddp(mesh, ADAMW)
    for stage in (1, 2, 3):
        plan, state, _ = usual(mesh, stage)
        found = pt.evaluate(
            state, lambda s, b, plan=plan: evaluate(plan.whole(s), b), batches(mesh)
        )
        wanted = pt.evaluate(expected, evaluate, batches(mesh))
        FACTS[f"evaluated {stage}"] = tree_equal(found, wanted)


def pure(mesh):
    """A step leaves its state as it was, and donated gives the same bits."""
    for stage in (1, 2, 3):
        apply, params, buffers = model()
        plan = sharding.zero(mesh, params, pt.optim.adamw(1e-2), stage=stage, smallest=1)
        state = pt.TrainState.create(plan.params, buffers, plan.optimizer, key=pt.random.key(0))
        step = pt.train_step(loss_of(apply), plan.optimizer, across=plan.across)
        source = pt.batches(data(), 8)
        batch = next(iter(sharding.divide(source, mesh)))
        before = tree_digest(state)
        plain = step(state, batch)
        again = step(state, batch)
        second = step(plain, batch)
        FACTS[f"pure {stage}"] = before == tree_digest(state) and tree_equal(plain, again)
        donated = step(step(state, batch, donate=True), batch, donate=True)
        FACTS[f"donated {stage}"] = tree_equal(second, donated)


def refusals(mesh):
    apply, params, buffers = model()
    key = pt.random.key(0)

    def message(function):
        try:
            function()
        except (OptimizerError, StructureError, NonFiniteError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing was raised"

    muon = pt.optim.multi_transform(
        {"blocks.*.linear*.weight": pt.optim.muon(1e-2), "**": pt.optim.adam(1e-2)}
    )
    adafactor = pt.optim.from_torch(torch.optim.Adafactor)
    for stage in (1, 3):
        for name, optimizer in {"muon": muon, "adafactor": adafactor}.items():
            plan = sharding.zero(mesh, params, optimizer, stage=stage, smallest=1)
            FACTS[f"refuses {name} {stage}"] = message(
                lambda plan=plan: pt.TrainState.create(plan.params, None, plan.optimizer, key=key)
            )
    plan = sharding.zero(mesh, params, pt.optim.sgd(1e-2), stage=3, smallest=1)
    state = pt.TrainState.create(params, buffers, plan.optimizer, key=key)
    step = pt.train_step(loss_of(apply), plan.optimizer, across=plan.across)
    batch = next(iter(batches(mesh)))
    FACTS["refuses a whole state"] = message(lambda: step(state, batch))

    # A gradient that only the shard of one process has: all must notice.
    plan = sharding.zero(mesh, {"w": torch.ones(8)}, pt.optim.sgd(1e-2), stage=2, smallest=1)
    state = pt.TrainState.create(plan.params, None, plan.optimizer, key=key)

    def overflow(params, buffers, batch, key):
        return torch.where(params["w"] > 2.0, params["w"], 0.0).sum() + (
            (params["w"][0] - 1.0).abs() ** 0.5
        )

    ones = next(iter(sharding.divide(pt.batches(torch.ones(8), 8), mesh)))
    raising = pt.train_step(overflow, plan.optimizer, across=plan.across, nonfinite="raise")
    found = [None] * mesh.size()
    torch.distributed.all_gather_object(found, message(lambda: raising(state, ones)))
    FACTS["raised everywhere"] = found
    skipping = pt.train_step(overflow, plan.optimizer, across=plan.across, nonfinite="skip")
    skipped = [None] * mesh.size()
    torch.distributed.all_gather_object(skipped, int(skipping(state, ones).skipped))
    FACTS["skipped everywhere"] = skipped

    # Another order in each process.
    names = ("a.w", "b.w")
    pair = {name: torch.ones(8) for name in names}
    plan = sharding.zero(mesh, pair, pt.optim.sgd(1e-2), stage=3, smallest=1)
    state = pt.TrainState.create(plan.params, None, plan.optimizer, key=key)

    def disorder(params, buffers, batch, key):
        order = names if mesh.get_rank() % 2 else names[::-1]
        return sum((params[name] * params[name]).sum() for name in order)

    step = pt.train_step(disorder, plan.optimizer, across=plan.across)
    FACTS["refuses disorder"] = message(lambda: step(state, ones))


def placed(mesh):
    """Rules of one's own, uneven and empty shards, and what does not fit."""
    count = mesh.shape[1]
    tree = pt.tree.freeze({"w": torch.arange(15.0).view(5, 3), "b": torch.arange(3), "n": 7})
    placements = sharding.place(tree, {"b": Replicate(), "w": Shard(0)})
    mine = sharding.shard(tree, mesh, placements)
    expected = list(torch.chunk(tree["w"], count))
    expected += [torch.empty(0, 3)] * (count - len(expected))
    FACTS["chunks"] = torch.equal(mine["w"], expected[mesh.get_local_rank("shard")])
    FACTS["gathered"] = tree_equal(sharding.gather(mine, mesh, placements), tree)
    try:
        sharding.gather(
            {**mine, "w": torch.zeros(1 + mesh.get_local_rank("shard"), 3)}, mesh, placements
        )
        FACTS["no whole"] = "nothing was raised"
    except StructureError as error:
        FACTS["no whole"] = str(error)


def main():
    shard, directory, some = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    with sharding.processes(shard=shard) as mesh:
        checks = [placed, pure, held, all_the_same, evaluated, averaged, refusals]
        checks += [agrees, agrees_nearly, agrees_with_options, agrees_where_vectors_fit]
        for check in checks:
            if not some or check.__name__ in some:
                check(mesh)
        if not some or "resumed" in some:
            resumed(mesh, directory)
        everyone = [None] * mesh.size()
        torch.distributed.all_gather_object(everyone, FACTS)
        if mesh.get_rank() == 0:
            with open(f"{directory}/facts.json", "w") as file:
                json.dump(everyone, file)


if __name__ == "__main__":
    main()
