"""Look at a loss around the states of a run: its sharpness, and slices through it.

    python examples/curvature.py                                      # half a minute
    python examples/curvature.py --picture docs/images/curvature.svg  # and draw them

Descent with a fixed learning rate leads to places where the largest eigenvalue of the Hessian is
about 2 / rate, where it would begin to diverge, and stays there (Cohen et al., "Gradient descent on
neural networks typically occurs at the edge of stability", ICLR 2021). This is seen here on real
images of handwritten digits, and so is the wall between two networks that were trained apart.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import one_hot

import puretrain as pt

RATES = {0.1: "C0", 0.2: "C1", 0.4: "C2"}  # with their colours

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
batch = (images[:500].float() / 16, one_hot(labels[:500], 10))


def network(seed):
    with pt.random.scope(pt.random.key(seed)):
        return nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10))


apply, _, _ = pt.functional(network(0))


def loss(params, buffers, batch, key):
    x, y = batch
    return (apply(params, buffers, x)[0] - y).square().sum(1).mean() / 2


def sharpness(state, k=1):
    return pt.curvature.eigh(loss, state, batch, k, tolerance=1e-3).values


def train(rate, steps, every, seed=0):
    """The last state, and the largest eigenvalue after every so many steps."""
    _, params, buffers = pt.functional(network(seed))
    optimizer = pt.optim.sgd(rate)
    state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(seed))
    found = []

    def watch(state, event):
        if event.kind == "step" and event.step % every == 0:
            found.append((event.step, float(sharpness(state)[0])))

    step = pt.train_step(loss, optimizer, draws=False)
    return pt.fit(state, step, [batch], epochs=steps, observers=[watch]), found


def draw(path, curves, between, around):
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "puretrain"  # the same file each time
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.4), layout="constrained")
    for rate, found in curves.items():
        steps, values = zip(*found, strict=True)
        left.plot(steps, values, color=RATES[rate], label=f"learning rate {rate}")
        left.axhline(2 / rate, color=RATES[rate], linestyle=":")
    left.set(xlabel="step", ylabel="largest eigenvalue", title="sharpness, and 2 / rate")
    left.legend(fontsize="small")
    for name, line in between.items():
        middle.plot(line.at, line.loss, label=name)
    middle.set(xlabel="place between the two states", ylabel="loss", title="between two states")
    middle.legend(fontsize="small")
    contours = right.contour(around.x, around.y, around.loss.clamp_min(1e-3).log10(), levels=14)
    right.clabel(contours, fontsize="x-small")
    right.set(title="log10 of the loss around a state", aspect="equal")
    right.set(xlabel="first direction", ylabel="second direction")
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--picture", metavar="FILE", help="draw an SVG there")
    options = parser.parse_args()

    curves, states = {}, {}
    for rate in RATES:
        states[rate], curves[rate] = train(rate, options.steps, max(options.steps // 40, 1))
        print(f"learning rate {rate}: largest eigenvalue {curves[rate][-1][1]:6.2f}, "
              f"2 / rate {2 / rate:6.2f}")  # fmt: skip
    state = states[0.4]
    other, _ = train(0.4, options.steps, options.steps, seed=1)
    values = sharpness(state, 5).tolist()
    print("five largest eigenvalues " + "  ".join(f"{x:.2f}" for x in values))
    estimate = pt.curvature.trace(loss, state, batch)
    print(f"trace {estimate.value:.1f} ± {estimate.error:.1f}")
    fisher = pt.curvature.fisher_diagonal(loss, state, batch)
    print("Fisher information by layer " + "  ".join(
        f"{name} {float(leaf.sum()):.2g}" for name, leaf in fisher.items()))  # fmt: skip
    between = {
        "two learning rates": pt.curvature.line(loss, states[0.1], state, batch, points=31),
        "two first weights": pt.curvature.line(loss, state, other, batch, points=31),
    }
    for name, line in between.items():
        print(f"barrier between {name}: {line.barrier:.3f}")
    if options.picture:
        around = pt.curvature.plane(loss, state, batch, points=31)
        draw(options.picture, curves, between, around)


if __name__ == "__main__":
    main()
