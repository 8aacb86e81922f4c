"""Find out why a network does not learn: a learning rate that is too high kills its units.

python examples/explain.py                            # a few seconds
python examples/explain.py --lr 0.05                  # the same, all well
python examples/explain.py --picture history.svg      # draws what happened, step by step
puretrain explain examples/explain.py                 # the first step, from the command line
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt
from puretrain.explain import draw_explanations, read_explanations


def run(directory="runs/explain", lr=1.0, epochs=6):
    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    with pt.random.scope(pt.random.key(0)):
        apply, params, buffers = pt.functional(
            nn.Sequential(
                *(nn.Linear(64, 64), nn.ReLU()),
                *(nn.Linear(64, 64), nn.ReLU()),
                nn.Linear(64, 10),
            )
        )

    def loss(params, buffers, batch, key):
        images, labels = batch
        scores, _ = apply(params, buffers, images)
        accuracy = (scores.argmax(1) == labels).float().mean()
        return cross_entropy(scores, labels), pt.Aux(metrics={"accuracy": accuracy})

    optimizer = pt.optim.sgd(lr, momentum=0.9)
    step = pt.train_step(loss, optimizer)
    return pt.Run(
        state=pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0)),
        step=step,
        batches=pt.batches((images.float() / 16, labels), 50, shuffle=True),
        epochs=epochs,
        observers=[pt.explanations(f"{directory}/explained.jsonl", step, every=10)],
        directory=directory,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", default="runs/explain", help="where the history goes")
    parser.add_argument("--lr", type=float, default=1.0)
    parser.add_argument("--picture", metavar="FILE", help="draw the history there (.svg, .png)")
    options = parser.parse_args()
    directory = pt.new_directory(options.directory)
    this = run(directory, options.lr)
    state = this.fit()
    batch = next(this.batches.read(this.state.cursor)).batch
    print(pt.explain(this.step, state, batch))
    history = read_explanations(f"{directory}/explained.jsonl")
    for name in [name for name in history if name.startswith("dead/")]:
        shares = "  ".join(f"{share:.0%}" for share in history[name][:: len(history[name]) // 6])
        print(f"{name:<16} {shares}")
    if options.picture:
        title = f"SGD with a learning rate of {options.lr:g}"
        draw_explanations(history, options.picture, title=title)
    print(f"draw it  {pt.command_line('puretrain', 'explain', directory / 'explained.jsonl')}")


if __name__ == "__main__":
    main()
