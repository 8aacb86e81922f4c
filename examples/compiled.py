"""One graph for a whole step, in `fit`: dropout, schedule, clipping, donation and all.

    python examples/compiled.py        # half a minute, most of it in the compiler

Needs a C++ compiler on the CPU. The network reads handwritten digits, which scikit-learn ships.
"""

import time

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import puretrain as pt

images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
images = images.float() / 16
with pt.random.scope(pt.random.key(0)):
    apply, params, buffers = pt.functional(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 10))
    )


def loss(params, buffers, batch, key):
    images, labels = batch
    scores, _ = apply(params, buffers, images)
    return cross_entropy(scores, labels)


optimizer = pt.optim.chain(
    pt.optim.clip_by_global_norm(1.0), pt.optim.adamw(pt.optim.cosine(3e-3, 1000))
)
state = pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(0))
eager = pt.train_step(loss, optimizer)
compiled = pt.compiled(eager)
data = pt.batches((images[:1400], labels[:1400]), 50, shuffle=True)
states, seconds = {}, {}
pt.fit(state, compiled, data, steps=1)  # compiles
for name, step in (("eager", eager), ("compiled", compiled)):
    begin = time.perf_counter()
    states[name] = pt.fit(state, step, data, steps=1000)
    seconds[name] = time.perf_counter() - begin

print(compiled.report())
apart = max(d.max_abs for d in pt.tree.tree_diff(*(s.params for s in states.values())))
scores, _ = apply(states["compiled"].params, buffers, images[1400:], train=False)
accuracy = (scores.argmax(1) == labels[1400:]).float().mean()
print(f"1000 steps: eager {seconds['eager']:.2f} s, compiled {seconds['compiled']:.2f} s")
print(f"parameters apart by at most {apart:.1e} after them")
print(f"test accuracy {accuracy:.2%}, state {pt.tree.tree_digest(states['compiled'])}")
