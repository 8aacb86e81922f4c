"""Train a small ConvNet to read handwritten digits, and stop and resume it at will.

    python examples/digits.py                     # half a minute; prints what to try next
    python examples/digits.py --resume            # after Ctrl-C, or kill -9: goes on, bit for bit
    puretrain fit examples/digits.py --epochs 5   # the same run from the command line
    puretrain lr-find examples/digits.py          # which learning rate to begin with

The images are real: 1797 digits of 8x8 pixels that 43 people wrote (E. Alpaydin and C. Kaynak,
"Optical recognition of handwritten digits", 1998), as scikit-learn ships them.
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
    images, labels = images.float().reshape(-1, 1, 8, 8)[order] / 16, labels[order]
    parts = slice(0, 1200), slice(1200, 1437), slice(1437, 1797)
    return [(images[part], labels[part]) for part in parts]


def network():
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Dropout(0.25),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 10),
    )


def run(directory="runs/digits", epochs=15, seed=0, lr=2e-3, batch_size=50):
    training, validation, _ = data()
    with pt.random.scope(pt.random.key(seed)):  # the first weights are a function of the seed
        apply, params, buffers = pt.functional(network())

    def loss(params, buffers, batch, key):
        images, labels = batch
        logits, buffers = apply(params, buffers, images)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return cross_entropy(logits, labels), pt.Aux(buffers, {"accuracy": accuracy})

    @pt.eval_step
    def evaluate(params, buffers, batch, key):
        images, labels = batch
        logits, _ = apply(params, buffers, images, train=False)
        accuracy = (logits.argmax(1) == labels).float().mean()
        return {"loss": cross_entropy(logits, labels), "accuracy": accuracy}

    def evaluate_average(state, batch):  # the moving average of the weights does better
        return evaluate(pt.averaged(state), batch)

    # the learning rate is a part of the state, so that `puretrain lr-find` can try others
    adamw = pt.optim.inject_hyperparams(pt.optim.adamw, static=["weight_decay"])
    optimizer = adamw(lr=lr, weight_decay=0.05)
    return pt.Run(
        state=pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(seed)),
        step=pt.train_step(loss, optimizer),
        batches=pt.batches(training, batch_size, shuffle=True, seed=seed),
        epochs=epochs,
        validation=pt.Validation(evaluate_average, pt.batches(validation, 237)),
        reducers=[pt.ema(0.98), pt.best_k("val/accuracy", k=2, mode="max")],
        observers=[
            pt.progress(),
            pt.tensorboard(directory),
            pt.journal(directory, every=50),
            pt.checkpoints(directory, every=50, keep=2),
        ],
        directory=directory,
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", default="runs/digits", help="where logs and states go")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --directory")
    options = parser.parse_args()

    directory = options.directory if options.resume else pt.new_directory(options.directory)
    begin = time.monotonic()
    this = run(directory, epochs=options.epochs)
    state = this.fit(resume=options.resume)
    seconds = time.monotonic() - begin

    # The test images have not been used for anything so far.
    _, _, test = data()
    metrics = pt.evaluate(state, this.validation.step, pt.batches(test, 360))

    further = ["--directory", directory, "--resume", "--epochs", str(2 * options.epochs)]
    print(f"\ntest accuracy  {metrics['accuracy']:.2%} of 360 images that it has not seen")
    print(f"trained        {int(state.step)} steps in {seconds:.0f} s")
    print(f"state          {pt.tree.tree_digest(state)}")
    print(f"logs           {pt.command_line('tensorboard', '--logdir', directory)}")
    print(f"checkpoints    {pt.command_line('puretrain', 'inspect', directory)}")
    print(f"live it again  {pt.command_line('puretrain', 'replay', directory)}")
    print(f"report         {pt.command_line('puretrain', 'report', directory)}")
    print(f"go on          {pt.command_line('python', sys.argv[0], *further)}")


if __name__ == "__main__":
    main()
