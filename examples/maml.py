"""Learn to learn: first weights and a learning rate from which a few steps fit any sine wave.

    python examples/maml.py                                 # half a minute
    python examples/maml.py --picture docs/images/maml.svg  # and draw what it has learned

The task of Finn et al., "Model-agnostic meta-learning" (ICML 2017): a sine wave of unknown
amplitude and phase, seen at ten places. What is minimized is the loss at other places after five
steps of descent; its derivative goes through those steps, with ``pt.scan``. The outer training is
an ordinary run of ``pt.fit``.
"""

import argparse
import math

import torch
from torch import nn
from torch.nn.functional import mse_loss

import puretrain as pt

STEPS, SHOTS, TASKS = 5, 10, 16


def network():
    with pt.random.scope(pt.random.key(1)):  # the same first weights for all that is compared
        return nn.Sequential(
            nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1)
        )


apply, first_weights, _ = pt.functional(network())
descent = pt.optim.inject_hyperparams(pt.optim.sgd)(lr=0.01)


def sines(key, number=TASKS):
    """Some tasks: x and y of shape (number, 2 * SHOTS, 1)."""
    with pt.random.scope(key):
        x = torch.rand(number, 2 * SHOTS, 1) * 10 - 5
        amplitude, phase = torch.rand(2, number, 1, 1)
        return x, (0.1 + 4.9 * amplitude) * torch.sin(x - math.pi * phase)


def loss(weights, buffers, batch, key):
    x, y = batch
    return mse_loss(apply(weights, {}, x)[0], y)


inner_step = pt.train_step(loss, descent, draws=False)


def adapted(params, x, y, steps=STEPS, remat=False):
    """The weights after some steps on one task: a function that can be differentiated."""
    state = pt.TrainState.create(params["weights"], None, descent, key=pt.random.key(0))
    opt_state = pt.optim.set_hyperparams(state.opt_state, lr=params["log_lr"].exp())
    return pt.scan(inner_step, state.replace(opt_state=opt_state), [(x, y)] * steps, remat=remat)


def loss_after_steps(params, buffers, tasks, key, steps=STEPS):
    """The mean over the tasks, each at the places that its weights were not adapted to."""

    def of_one(x, y):
        weights = adapted(params, x[:SHOTS], y[:SHOTS], steps).params
        return loss(weights, None, (x[SHOTS:], y[SHOTS:]), None)

    return torch.func.vmap(of_one)(*tasks).mean()


def loss_at_once(params, buffers, tasks, key):
    """For comparison, without looking ahead: one network for all tasks."""
    return loss(params["weights"], None, tasks, None)


def train(outer_loss, iterations):
    params = {"weights": first_weights, "log_lr": torch.tensor(0.01).log()}
    schedule = pt.optim.cosine(5e-3, iterations)
    optimizer = pt.optim.chain(pt.optim.clip_by_global_norm(10.0), pt.optim.adam(schedule))
    state = pt.TrainState.create(params, None, optimizer, key=pt.random.key(0))
    step = pt.train_step(outer_loss, optimizer, draws=False)
    tasks = [sines(key) for key in pt.random.split(pt.random.key(2), iterations)]
    return pt.fit(state, step, tasks, steps=iterations).params


def draw(path, learned, curves):
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "puretrain"  # the same file each time
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    x, y = (leaf[0] for leaf in sines(pt.random.key(7), 1))
    line = torch.linspace(-5, 5, 200)[:, None]
    for steps, style in ((0, ":"), (1, "--"), (STEPS, "-")):
        weights = adapted(learned, x[:SHOTS], y[:SHOTS], steps).params
        label = f"after {steps} step{'s' * (steps != 1)}"
        left.plot(line, apply(weights, {}, line)[0], style, color="C0", label=label)
    left.plot(x[:SHOTS], y[:SHOTS], "o", color="black", label="seen")
    left.plot(x[SHOTS:], y[SHOTS:], "x", color="C3", label="not seen")
    left.set(title="a new sine wave", xlabel="x", ylabel="y")
    left.legend(fontsize="small")
    for name, losses in curves.items():
        right.plot(losses, "o-", label=name)
    right.set(title="100 new sine waves", xlabel="steps", ylabel="loss where not seen")
    right.set(yscale="log")
    right.legend(fontsize="small")
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=800)
    parser.add_argument("--picture", metavar="FILE", help="draw an SVG there")
    options = parser.parse_args()

    together = train(loss_at_once, options.iterations)
    learned = train(loss_after_steps, options.iterations)
    new = sines(pt.random.key(3), 100)
    curves = {
        name: [float(loss_after_steps(params, None, new, None, n)) for n in range(STEPS + 1)]
        for name, params in (("trained on all at once", together), ("learned to learn", learned))
    }
    print("loss after steps   " + "".join(f"{n:>8}" for n in range(STEPS + 1)))
    for name, losses in curves.items():
        print(f"{name:<23}" + "".join(f"{x:8.3f}" for x in losses))
    print(f"learned learning rate {learned['log_lr'].exp():.4f}, it began at 0.01")
    if options.picture:
        draw(options.picture, learned, curves)


if __name__ == "__main__":
    main()
