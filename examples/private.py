"""Read handwritten digits without remembering any writer's: differentially private training.

    python examples/private.py                                    # a minute
    python examples/private.py --picture docs/images/private.svg  # and draw noise against accuracy

Each example's gradient is clipped, noise is added to their sum (Abadi et al., "Deep learning with
differential privacy", 2016), and an accountant says how much the trained weights can tell about any
single example. Another thing that per-example gradients are good for: some labels are made wrong,
and found again by the influence that an example has on itself.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt

BATCH, DELTA = 100, 1e-4

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
images, labels = images.float()[order] / 16, labels[order]
training, test = (images[:1400], labels[:1400]), (images[1400:], labels[1400:])

with pt.random.scope(pt.random.key(0)):
    apply, first, _ = pt.functional(nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)))


def loss(params, buffers, batch, key):
    x, y = batch
    return cross_entropy(apply(params, {}, x)[0], y)


def accuracy(state):
    x, y = test
    return float((apply(state.params, {}, x)[0].argmax(1) == y).float().mean())


def train(step_loss, data, optimizer, reducers=()):
    state = pt.TrainState.create(first, None, optimizer, key=pt.random.key(1))
    step = pt.train_step(step_loss, optimizer)
    return pt.fit(state, step, data, epochs=1, reducers=reducers)


def privately(epsilon, steps):
    """A run with just the noise that makes it (epsilon, DELTA)-differentially private."""
    data = pt.per_example.PoissonSampled(training, BATCH, steps=steps, key=pt.random.key(2))
    noise = pt.per_example.noise_multiplier(
        epsilon=epsilon, sample_rate=data.sample_rate, steps=steps, delta=DELTA
    )
    private = pt.per_example.private(loss, max_norm=0.5, noise_multiplier=noise, batch_size=BATCH)
    watching = pt.per_example.noise_scale(loss, every=20)
    return train(private, data, pt.optim.sgd(2.0, momentum=0.5), [watching]), noise


def wrong_labels(steps, number=70):
    """Self-influence of all examples along a run, and which labels were made wrong."""
    x, y = training
    wrong = torch.randperm(len(y), generator=torch.Generator().manual_seed(1))[:number]
    y = y.clone()
    y[wrong] = (y[wrong] + 1 + torch.arange(number) % 9) % 10
    data = pt.per_example.PoissonSampled((x, y), BATCH, steps=steps, key=pt.random.key(2))
    reducer = pt.per_example.influence(loss, (x, y), (x, y), every=steps // 4)
    state = train(loss, data, pt.optim.sgd(0.5), [reducer])
    scores = state.reducers["influence"].scores.diagonal()
    return scores, torch.isin(torch.arange(len(y)), wrong)


def draw(path, results, plain, scores, wrong):
    import matplotlib as mpl
    import matplotlib.pyplot as plt

    mpl.rcParams["svg.hashsalt"] = "puretrain"  # the same file each time
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(list(results), [100 * x for x in results.values()], "o-", label="private")
    left.axhline(100 * plain, color="black", linestyle=":", label="not private")
    left.set(xscale="log", xlabel=f"ε at δ = {DELTA:g}", ylabel="test accuracy, %")
    left.set(title="privacy and accuracy")
    left.set_xticks(list(results), [f"{x:g}" for x in results], minor=False)
    left.minorticks_off()
    left.legend()
    order = scores.argsort(descending=True)
    found = wrong[order].cumsum(0) / wrong.sum()
    share = torch.arange(1, len(found) + 1) / len(found)
    right.plot(100 * share, 100 * found, label="by self-influence")
    right.plot([0, 100], [0, 100], ":", color="black", label="at random")
    right.set(xlabel="examples looked at, %", ylabel="wrong labels found, %")
    right.set(title="finding wrong labels")
    right.legend()
    figure.savefig(path, metadata={"Date": None})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--epsilons", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0, 8.0])
    parser.add_argument("--picture", metavar="FILE", help="draw an SVG there")
    options = parser.parse_args()

    data = pt.per_example.PoissonSampled(training, BATCH, steps=options.steps, key=pt.random.key(2))
    plain = accuracy(train(loss, data, pt.optim.sgd(0.5, momentum=0.5)))
    print(f"not private           test accuracy {plain:.1%}")
    results = {}
    for epsilon in options.epsilons:
        state, noise = privately(epsilon, options.steps)
        results[epsilon] = accuracy(state)
        print(
            f"epsilon {epsilon:4.1f}  noise {noise:5.2f}  test accuracy {results[epsilon]:.1%}  "
            f"clipped {float(state.metrics['clipped']):.0%}  "
            f"noise scale {float(state.metrics.get('noise_scale', float('nan'))):.0f}"
        )
    scores, wrong = wrong_labels(options.steps)
    suspects = scores.argsort(descending=True)[: int(wrong.sum())]
    print(f"wrong labels among as many of the highest self-influence: {wrong[suspects].sum()} "
          f"of {int(wrong.sum())}")  # fmt: skip
    if options.picture:
        draw(options.picture, results, plain, scores, wrong)


if __name__ == "__main__":
    main()
