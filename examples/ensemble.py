"""Sixteen learning rates at once on handwritten digits: a sweep, a vote, and a population.

    python examples/ensemble.py                          # some seconds; prints the table of members
    python examples/ensemble.py --picture sweep.svg      # draws it as well
    python examples/ensemble.py --population             # bad members become copies of good ones

All members are one state and train in one step; each is what its own run would have been. The
images are those of examples/digits.py.
"""

import argparse
import sys
import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt


def data():
    """(images, labels) to train on, to validate on, and to test on at the very end."""
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images.float()[order] / 16, labels[order]
    parts = slice(0, 1200), slice(1200, 1437), slice(1437, 1797)
    return [(images[part], labels[part]) for part in parts]


def network():
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, 10))


apply, _, _ = pt.functional(network())
optimizer = pt.optim.inject_hyperparams(pt.optim.adamw)(lr=1e-3, weight_decay=0.05)


def first(key):
    """The first state of a member; its weights and its dropout are functions of the key."""
    _, params, buffers = pt.functional(network())
    return pt.TrainState.create(params, buffers, optimizer, key=key)


def loss(params, buffers, batch, key):
    images, labels = batch
    logits, _ = apply(params, buffers, images)
    return cross_entropy(logits, labels)


def logits_of(params, buffers, batch, key):
    return apply(params, buffers, batch[0], train=False)[0]


def metrics_of(logits, batch):
    _, labels = batch
    return {
        "loss": cross_entropy(logits, labels),
        "accuracy": pt.metrics.Accuracy.of(logits, labels),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--members", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--population", action="store_true", help="instead of early stopping")
    parser.add_argument("--picture", metavar="FILE", help="where to draw the sweep")
    options = parser.parse_args()

    rates = torch.logspace(-4, 0, options.members)
    keys = pt.random.split(pt.random.key(0), options.members)
    state = pt.ensemble(first, keys, lr=rates)

    if options.population:
        reducer = pt.population("val/loss", perturb={"lr": (0.7, 1.4)}, every=2)
    else:
        reducer = pt.per_member(pt.early_stopping("val/loss", patience=3, min_delta=1e-3))
    history = []

    def remember(state, event):
        if event.kind == "validation":
            history.append((event.step, event.metrics["val/loss"], state.stopped))

    training, validation, test = data()
    evaluate = pt.ensemble_eval_step(logits_of, metrics_of)
    begin = time.monotonic()
    state = pt.fit(
        state,
        pt.ensemble_step(loss, optimizer),
        pt.batches(training, 50, shuffle=True, seed=0),
        epochs=options.epochs,
        validation=pt.Validation(evaluate, pt.batches(validation, 237)),
        reducers=[reducer],
        observers=[remember, pt.progress()],
    )
    seconds = time.monotonic() - begin

    found = pt.evaluate(state, evaluate, pt.batches(validation, 237))
    order = pt.ranking(found["loss"])
    # The test images have not been used for anything so far.
    tested = pt.evaluate(state, evaluate, pt.batches(test, 360))
    chosen = pt.select_members(state, order[:5])
    vote = pt.evaluate(chosen, evaluate, pt.batches(test, 360))["ensemble/accuracy"]
    show(state, rates, order, found, tested)
    best = pt.member(state, int(order[0]))
    print(f"\ntrained       {state.members} members, {int(state.step)} steps in {seconds:.0f} s")
    print(f"best member   {int(order[0])}, test accuracy {tested['accuracy'][order[0]]:.2%}")
    print(f"the best five, voting: {vote:.2%}")
    print(f"state of the best {pt.tree.tree_digest(best)}")
    if options.picture:
        draw(options.picture, rates, history, tested["accuracy"], float(vote))
        print(f"picture       {options.picture}")
    else:
        print(f"picture       {pt.command_line('python', sys.argv[0], '--picture', 'sweep.svg')}")


def show(state, rates, order, found, tested):
    now = pt.optim.get_hyperparams(state.opt_state)["lr"]
    print(f"\n{'member':>6}  {'first lr':>8}  {'lr':>8}  {'stopped':>7}  val loss  test accuracy")
    for i in order.tolist():
        stopped = int(state.stopped[i])
        print(
            f"{i:>6}  {rates[i]:>8.2g}  {now[i]:>8.2g}  {stopped if stopped >= 0 else '-':>7}  "
            f"{found['loss'][i]:>8.3f}  {tested['accuracy'][i]:>13.1%}"
        )


def draw(path, rates, history, accuracy, vote):
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "puretrain", "svg.fonttype": "none", "font.size": 9})
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3.2), layout="constrained")
    colours = plt.get_cmap("viridis")(torch.linspace(0, 0.95, len(rates)).numpy())
    for i, colour in enumerate(colours):
        seen = [(step, float(losses[i])) for step, losses, stopped in history if stopped[i] < 0]
        ended = [
            (step, float(losses[i])) for step, losses, stopped in history if stopped[i] == step
        ]
        left.plot(*zip(*seen, *ended, strict=True), color=colour, linewidth=1)
        left.plot(*zip(*(ended or [(None, None)]), strict=True), "o", color=colour, markersize=4)
    left.set(xlabel="step", ylabel="validation loss", yscale="log")
    left.set_title("one curve for each member; a dot: stopped early", fontsize=9)
    right.scatter(rates, 100 * accuracy, c=colours, zorder=2)
    label = "the best five, voting"
    right.axhline(100 * vote, linestyle="--", color="gray", linewidth=1, label=label)
    right.legend(loc="lower left", frameon=False)
    right.set(xlabel="first learning rate", ylabel="test accuracy, %", xscale="log")
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


if __name__ == "__main__":
    main()
