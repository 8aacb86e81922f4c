"""Functions around losses, steps and optimizers, each against a plain torch loop."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, kl_div, mse_loss

import puretrain as pt
from puretrain import compose
from puretrain.errors import ConfigurationError, LossError, OptimizerError
from puretrain.tree import tree_equal, tree_leaves, tree_map, tree_stack, tree_unstack

STEPS, LR, CLASSES = 4, 0.1, 3


def network():
    torch.manual_seed(0)
    layers = [nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.3), nn.Linear(8, CLASSES)]
    return nn.Sequential(*layers)


APPLY, PARAMS, BUFFERS = pt.functional(network())


def loss(params, buffers, batch, key):
    x, y = batch
    logits, buffers = APPLY(params, buffers, x)
    return cross_entropy(logits, y), pt.Aux(buffers)


def batch_of(n, size=12):
    generator = torch.Generator().manual_seed(n)
    x = torch.rand(size, 5, generator=generator)
    return x, torch.randint(CLASSES, (size,), generator=generator)


def trained(loss, optimizer=None, buffers=BUFFERS, wrap=lambda step: step, steps=STEPS, **options):
    optimizer = optimizer or pt.optim.sgd(LR)
    state = pt.TrainState.create(PARAMS, buffers, optimizer, key=pt.random.key(7))
    step = wrap(pt.train_step(loss, optimizer, **options))
    for n in range(steps):
        state = step(state, batch_of(n))
    return state


def raw(gradients, make=None, after=lambda model, optimizer: None):
    """A plain torch loop: ``gradients(model, x, y)`` leaves them in the parameters."""
    model = network()
    optimizer = make(model.parameters()) if make else torch.optim.SGD(model.parameters(), lr=LR)
    losses = []
    for n in range(STEPS):
        x, y = batch_of(n)
        with pt.random.scope(pt.random.fold_in(pt.random.key(7), n)):
            optimizer.zero_grad()
            losses.append(gradients(model, x, y).detach())
            optimizer.step()
        after(model, optimizer)
    return model, losses


def assert_same(state, model, value=None):
    """To the bit."""
    for name, parameter in model.named_parameters():
        assert torch.equal(state.params[name], parameter), name
    buffers = state.buffers.get("model", state.buffers)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffers[name], buffer), name
    if value is not None:
        assert torch.equal(state.metrics["loss"], value)


def backward(value):
    value.backward()
    return value


def one_hot(y):
    return nn.functional.one_hot(y, CLASSES).float()


# ── Each against a loop by hand ───────────────────────────────────────────────────────────────────


def test_label_smoothing():
    def gradients(model, x, y):
        return backward(cross_entropy(model(x), one_hot(y) * (1 - 0.2) + 0.2 / CLASSES))

    smoothed = compose.label_smoothing(loss, 0.2, classes=CLASSES)
    model, losses = raw(gradients)
    assert_same(trained(smoothed), model, losses[-1])
    x, y = batch_of(0)
    with pt.random.scope(pt.random.key(0)):
        ours = smoothed(PARAMS, BUFFERS, (x, y), None)[0]
    with pt.random.scope(pt.random.key(0)):
        torchs = cross_entropy(APPLY(PARAMS, BUFFERS, x)[0], y, label_smoothing=0.2)
    torch.testing.assert_close(ours, torchs)


def test_mixup():
    def gradients(model, x, y):
        share = torch.distributions.Beta(0.4, 0.4).sample()
        order = torch.randperm(len(y))
        y = one_hot(y)
        x, y = (share * part + (1 - share) * part[order] for part in (x, y))
        return backward(cross_entropy(model(x), y))

    model, losses = raw(gradients)
    assert_same(trained(compose.mixup(loss, 0.4, classes=CLASSES)), model, losses[-1])


def test_sam():
    def gradients(model, x, y):
        before = {name: buffer.clone() for name, buffer in model.named_buffers()}
        cross_entropy(model(x), y).backward()
        first = {name: buffer.clone() for name, buffer in model.named_buffers()}
        norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
        old = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                p.add_(p.grad * (0.1 / (norm + 1e-12)))
        model.zero_grad()
        for name, buffer in model.named_buffers():
            buffer.copy_(before[name])
        value = backward(cross_entropy(model(x), y))
        with torch.no_grad():
            for p, start in zip(model.parameters(), old, strict=True):
                p.copy_(start)
            for name, buffer in model.named_buffers():
                buffer.copy_(first[name])
        return value

    model, losses = raw(gradients)
    state = trained(compose.sam(loss, 0.1))
    for name, parameter in model.named_parameters():  # a norm is summed in another order
        torch.testing.assert_close(state.params[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.metrics["loss"], losses[-1])
    assert state.metrics["sharpness"].abs() < 1


@pytest.mark.parametrize("clean", [0.0, 0.5])
def test_fgsm(clean):
    def gradients(model, x, y):
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        leaf = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(cross_entropy(model(leaf), y), leaf)
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
        moved = (x + 0.05 * slope.sign()).clamp(0, 1)
        value = cross_entropy(model(moved), y)
        after = {name: buffer.clone() for name, buffer in model.named_buffers()}
        if clean:
            value = (1 - clean) * value + clean * cross_entropy(model(x), y)
        backward(value)
        for name, buffer in model.named_buffers():
            buffer.copy_(after[name])
        return value

    model, losses = raw(gradients)
    state = trained(compose.fgsm(loss, 0.05, clean=clean, limits=(0.0, 1.0)))
    assert_same(state, model, losses[-1])


def test_pgd():
    def gradients(model, x, y):
        kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
        moved = torch.minimum(
            torch.maximum(x + 0.1 * (2 * torch.rand_like(x) - 1), x - 0.1), x + 0.1
        )
        for _ in range(3):
            leaf = moved.clone().requires_grad_()
            (slope,) = torch.autograd.grad(cross_entropy(model(leaf), y), leaf)
            moved = torch.minimum(torch.maximum(moved + 0.04 * slope.sign(), x - 0.1), x + 0.1)
            for name, buffer in model.named_buffers():
                buffer.copy_(kept[name])
        return backward(cross_entropy(model(moved), y))

    model, losses = raw(gradients)
    assert_same(trained(compose.pgd(loss, 0.1, 0.04, 3)), model, losses[-1])


def test_pcgrad():
    def one(params, buffers, batch, key):
        logits, buffers = APPLY(params, buffers, batch[0])
        return cross_entropy(logits, batch[1]), pt.Aux(buffers, {"entropy": logits.mean()})

    def other(params, buffers, batch, key):
        logits, buffers = APPLY(params, buffers, batch[0])
        return mse_loss(logits, -one_hot(batch[1])), pt.Aux(buffers)

    conflicts = []

    def gradients(model, x, y):
        values = [lambda: cross_entropy(model(x), y), lambda: mse_loss(model(x), -one_hot(y))]
        own, totals = [], []
        for value in values:
            totals.append(value())
            slopes = torch.autograd.grad(totals[-1], list(model.parameters()))
            own.append(torch.cat([slope.flatten() for slope in slopes]))
        total = torch.zeros_like(own[0])
        for i, slope in enumerate(own):
            for j in torch.randperm(2).tolist():
                dot = torch.dot(slope, own[j])
                if i != j and dot < 0:
                    conflicts.append((i, j))
                    slope = slope - dot / torch.dot(own[j], own[j]) * own[j]
            total += slope
        start = 0
        for p in model.parameters():
            p.grad = total[start : start + p.numel()].view_as(p)
            start += p.numel()
        return sum(totals)

    model, losses = raw(gradients)
    state = trained(compose.pcgrad({"one": one, "other": other}))
    assert conflicts
    for name, parameter in model.named_parameters():  # dot products are summed in another order
        torch.testing.assert_close(state.params[name], parameter.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state.metrics["loss"], losses[-1])
    torch.testing.assert_close(state.metrics["one"] + state.metrics["other"], losses[-1])
    assert "entropy" in state.metrics


def logits(params, buffers, batch):
    return APPLY(params, buffers, batch[0], train=False)[0]


TAUGHT = compose.distillation(loss, logits, weight=0.3, temperature=3.0)
WITH_TEACHER = compose.with_teacher(BUFFERS, PARAMS, BUFFERS)


def test_distillation_from_a_moving_average():
    teacher = network().eval()

    def gradients(model, x, y):
        value = cross_entropy(model(x), y)
        with torch.no_grad():
            wanted = (teacher(x) / 3).softmax(-1)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        # The logits for the teacher come from the model as it stood before the batch.
        before = APPLY(dict(model.named_parameters()), held[0], x, train=False)[0]
        apart = kl_div((before / 3).log_softmax(-1), wanted, reduction="batchmean") * 9
        assert buffers
        return backward(0.7 * value + 0.3 * apart)

    def follow(model, optimizer):
        held[0] = {name: buffer.clone() for name, buffer in model.named_buffers()}
        pairs = [
            *zip(teacher.parameters(), model.parameters(), strict=True),
            *zip(teacher.buffers(), model.buffers(), strict=True),
        ]
        with torch.no_grad():
            for old, new in pairs:
                if old.is_floating_point():
                    old.copy_(old + torch.tensor(1 - 0.9) * (new - old))
                else:
                    old.copy_(new)

    held = [dict(BUFFERS)]
    model, losses = raw(gradients, after=follow)
    state = trained(
        TAUGHT, buffers=WITH_TEACHER, wrap=lambda step: compose.ema_teacher(step, decay=0.9)
    )
    assert_same(state, model, losses[-1])
    for name, parameter in teacher.named_parameters():
        assert torch.equal(state.buffers["teacher"]["params"][name], parameter)


def test_a_fixed_teacher_stays():
    state = trained(TAUGHT, buffers=WITH_TEACHER)
    assert tree_equal(state.buffers["teacher"], WITH_TEACHER["teacher"])
    assert state.metrics["distillation"] > 0


def test_the_teacher_moves_with_updates_not_with_batches():
    def wrap(step):
        return compose.ema_teacher(step, decay=0.5)

    state = trained(TAUGHT, buffers=WITH_TEACHER, wrap=wrap, steps=1, accumulate=2)
    assert tree_equal(state.buffers["teacher"]["params"], PARAMS)
    step = wrap(pt.train_step(TAUGHT, pt.optim.sgd(LR), accumulate=2))
    flushed = step.flush(state)
    teacher = flushed.buffers["teacher"]["params"]["0.weight"]
    expected = PARAMS["0.weight"] + 0.5 * (flushed.params["0.weight"] - PARAMS["0.weight"])
    assert torch.equal(teacher, expected)
    assert not hasattr(step, "recipe")


@pytest.mark.parametrize("donate", [False, True])
def test_lookahead(donate):
    slow = [p.detach().clone() for p in network().parameters()]
    count = [0]

    def back(model, optimizer):
        count[0] += 1
        if count[0] % 2 == 0:
            with torch.no_grad():
                for s, p in zip(slow, model.parameters(), strict=True):
                    s += 0.5 * (p - s)
                    p.copy_(s)

    model, losses = raw(
        lambda model, x, y: backward(cross_entropy(model(x), y)),
        lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
        back,
    )
    optimizer = pt.optim.lookahead(pt.optim.adamw(0.01), k=2)
    state = pt.TrainState.create(PARAMS, BUFFERS, optimizer, key=pt.random.key(7))
    step = pt.train_step(loss, optimizer)
    for n in range(STEPS):
        state = step(state, batch_of(n), donate=donate)
    assert_same(state, model, losses[-1])


# ── Together ──────────────────────────────────────────────────────────────────────────────────────

AROUND = {
    "label_smoothing": lambda loss: compose.label_smoothing(loss, 0.1, classes=CLASSES),
    "mixup": lambda loss: compose.mixup(loss, 0.4, classes=CLASSES),
    "sam": lambda loss: compose.sam(loss, 0.05),
    "fgsm": lambda loss: compose.fgsm(loss, 0.05),
    "pgd": lambda loss: compose.pgd(loss, 0.05, 0.02, 2),
    "pcgrad": lambda loss: compose.pcgrad({"a": loss, "b": loss}),
    "distillation": lambda loss: compose.distillation(loss, logits),
}


@pytest.mark.parametrize(("inner", "outer"), list(itertools.permutations(AROUND, 2)))
def test_any_two_in_any_order_learn_and_resume(inner, outer, tmp_path):
    buffers = WITH_TEACHER if "distillation" in (inner, outer) else BUFFERS
    both = AROUND[outer](AROUND[inner](loss))
    optimizer = pt.optim.lookahead(pt.optim.sgd(LR), k=2)
    step = pt.train_step(both, optimizer)
    if "distillation" in (inner, outer):
        step = compose.ema_teacher(step)
    state = pt.TrainState.create(PARAMS, buffers, optimizer, key=pt.random.key(0))
    before = tree_map(torch.clone, state)
    generator = torch.get_rng_state()
    first = step(state, batch_of(0))
    assert torch.equal(torch.get_rng_state(), generator)
    assert tree_equal(state, before)
    assert tree_equal(first, step(state, batch_of(0)))
    assert not tree_equal(first.params, state.params)
    pt.save(tmp_path / "a.ckpt", first)
    loaded = pt.load(tmp_path / "a.ckpt", like=state)
    straight = step(first, batch_of(1), donate=True)
    assert tree_equal(step(loaded, batch_of(1)), straight)
    assert all(leaf.isfinite().all() for leaf in tree_leaves(straight.params))


@pytest.mark.parametrize("outer", AROUND)
def test_it_works_under_vmap_and_equals_each_member(outer):
    apply, params, buffers = pt.functional(nn.Linear(5, CLASSES))

    def linear(params, buffers, batch, key):
        return cross_entropy(apply(params, buffers, batch[0])[0], batch[1])

    def scores(params, buffers, batch):
        return apply(params, buffers, batch[0])[0]

    around = AROUND | {"distillation": lambda loss: compose.distillation(loss, scores)}
    if outer == "distillation":
        buffers = compose.with_teacher(buffers, params, buffers)
    optimizer = pt.optim.lookahead(pt.optim.sgd(LR), k=1)
    step = pt.train_step(around[outer](linear), optimizer)
    members = [
        pt.TrainState.create(
            tree_map(lambda leaf, i=i: leaf + i, params), buffers, optimizer, key=pt.random.key(0)
        )
        for i in range(2)
    ]
    together = torch.func.vmap(step, (0, None), randomness="same")(tree_stack(members), batch_of(0))
    for member in tree_unstack(together):
        assert member.params["weight"].isfinite().all()
    if outer in ("label_smoothing", "sam", "fgsm", "distillation"):  # these draw nothing
        for member, state in zip(tree_unstack(together), members, strict=True):
            expected = step(state, batch_of(0))
            torch.testing.assert_close(member.params["weight"], expected.params["weight"])


def test_all_of_them_compile_into_one_graph():
    around = compose.mixup(compose.sam(compose.pgd(TAUGHT, 0.05, 0.02, 2)), classes=CLASSES)
    both = compose.pcgrad({"hard": around, "smooth": AROUND["label_smoothing"](TAUGHT)})
    optimizer = pt.optim.lookahead(pt.optim.sgd(LR), k=2)
    state = pt.TrainState.create(PARAMS, WITH_TEACHER, optimizer, key=pt.random.key(0))
    step = compose.ema_teacher(pt.train_step(both, optimizer))
    compiled = pt.compiled(step, backend="eager")
    after = compiled(compiled(state, batch_of(0)), batch_of(1))
    expected = step(step(state, batch_of(0)), batch_of(1))
    for found, wanted in zip(tree_leaves(after.params), tree_leaves(expected.params), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert len(compiled.report().graphs) == 1


# ── What goes wrong ───────────────────────────────────────────────────────────────────────────────


def test_what_cannot_work_says_so():
    with pytest.raises(LossError, match="mixup draws random numbers.*draws=False"):
        trained(compose.mixup(loss, classes=CLASSES), draws=False)
    with pytest.raises(LossError, match=r"mixup: the targets are torch.int64; give classes="):
        trained(compose.mixup(loss))
    with pytest.raises(LossError, match="pgd with random_start draws"):
        trained(compose.pgd(loss, 0.1, 0.1), draws=False)
    with pytest.raises(LossError, match="no teacher in the buffers"):
        trained(TAUGHT)
    for make, message in (
        (lambda: compose.label_smoothing(loss, 2.0, classes=3), "amount is a number from 0 to 1"),
        (lambda: compose.mixup(loss, 0.0), "alpha is a number"),
        (lambda: compose.sam(loss, -1.0), "rho is a number from 0"),
        (lambda: compose.pgd(loss, 0.1, 0.1, 0), "steps is a whole number from 1"),
        (lambda: compose.pcgrad({"a": loss}), "two losses or more by name"),
        (lambda: compose.distillation(loss, logits, temperature=0), "temperature"),
        (lambda: compose.ema_teacher(lambda state, batch: state, 1.5), "decay"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            make()
    for make, message in (
        (lambda: pt.optim.lookahead(pt.optim.scale(1.0)), "takes an optimizer"),
        (lambda: pt.optim.lookahead(pt.optim.sgd(0.1), k=0), "whole number from 1"),
        (lambda: pt.optim.lookahead(pt.optim.sgd(0.1), alpha=2.0), "alpha"),
    ):
        with pytest.raises(OptimizerError, match=message):
            make()
