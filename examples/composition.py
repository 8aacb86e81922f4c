"""Functions around one loss: what mixup, SAM, adversarial examples and a teacher do to a model.

    python examples/composition.py                        # some ten seconds
    python examples/composition.py --picture bars.svg     # draws the table as well

The same small network reads handwritten digits (scikit-learn ships them), each time with another
function around its loss, and is then tested on digits that it has not seen: as they are, and moved
against it (FGSM, by 0.1 of the range of a pixel).
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt
from puretrain import compose

CLASSES, EPSILON = 10, 0.1


def data():
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images.float()[order] / 16, labels[order]
    return (images[:600], labels[:600]), (images[600:], labels[600:])


with pt.random.scope(pt.random.key(0)):
    apply, params, buffers = pt.functional(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2), nn.Linear(64, CLASSES))
    )


def loss(params, buffers, batch, key):
    images, targets = batch
    scores, buffers = apply(params, buffers, images)
    return cross_entropy(scores, targets), pt.Aux(buffers)


def logits(params, buffers, batch):
    return apply(params, buffers, batch[0], train=False)[0]


def smooth(loss):
    return compose.label_smoothing(loss, 0.1, classes=CLASSES)


def mix(loss):
    return compose.mixup(loss, 0.4, classes=CLASSES)


def flat(loss):
    return compose.sam(loss, 0.1)


def robust(loss):
    return compose.pgd(loss, EPSILON, EPSILON / 2, 3, limits=(0.0, 1.0))


def taught(loss):
    return compose.distillation(loss, logits, weight=0.5)


# By name: what stands around the loss, from the innermost to the outermost.
VARIANTS = {
    "plain": [],
    "label smoothing": [smooth],
    "mixup": [mix],
    "SAM": [flat],
    "EMA teacher": [taught],
    "PGD": [robust],
    "all of them": [taught, smooth, robust, flat, mix],
}


def train(around, training, epochs):
    composed = loss
    for function in around:
        composed = function(composed)
    optimizer = pt.optim.lookahead(pt.optim.adamw(3e-3), k=5)
    step = pt.train_step(composed, optimizer)
    given = buffers
    if taught in around:
        given = compose.with_teacher(buffers, params, buffers)
        step = compose.ema_teacher(step, decay=0.95)
    state = pt.TrainState.create(params, given, optimizer, key=pt.random.key(0))
    return pt.fit(state, step, pt.batches(training, 50, shuffle=True), epochs=epochs)


def accuracy(state, batch):
    scores = apply(state.params, buffers, batch[0], train=False)[0]
    return float((scores.argmax(1) == batch[1]).float().mean())


def attacked(state, batch):
    images, labels = batch
    slope = torch.func.grad(
        lambda images: cross_entropy(logits(state.params, buffers, (images,)), labels)
    )(images)
    return (images + EPSILON * slope.sign()).clamp(0, 1), labels


def draw(results, path):
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "puretrain", "font.size": 9}):
        figure = Figure(figsize=(7, 3), layout="constrained")
        axes = figure.add_subplot()
        for place, (label, column) in enumerate((("as they are", 0), ("moved by FGSM", 1))):
            heights = [100 * numbers[column] for numbers in results.values()]
            at = [number + 0.4 * place for number in range(len(results))]
            axes.bar(at, heights, 0.38, label=label, color=("#2563eb", "#d97706")[place])
        axes.set_xticks([number + 0.2 for number in range(len(results))], results)
        axes.set_ylabel("test accuracy in %")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="lower left", ncols=2, bbox_to_anchor=(0, 1))
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--picture", metavar="FILE", help="draw the table there (.svg, .png)")
    options = parser.parse_args()
    training, test = data()
    results = {}
    print(f"{'around the loss':<18}{'test':>8}{'attacked':>10}")
    for name, around in VARIANTS.items():
        state = train(around, training, options.epochs)
        results[name] = accuracy(state, test), accuracy(state, attacked(state, test))
        print(f"{name:<18}{results[name][0]:>8.1%}{results[name][1]:>10.1%}")
    print(f"state {pt.tree.tree_digest(state)}")
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
