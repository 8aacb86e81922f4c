"""The step by hand: a pure model, a pure optimizer, and a state and a loop of your own."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import puretrain as pt

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
apply, params, buffers = pt.functional(model)
optimizer = pt.optim.adamw(lr=1e-2)
x, y = map(torch.from_numpy, load_digits(return_X_y=True))


def loss(params, key):
    logits, _ = apply(params, buffers, x[:1400].float(), key=key)
    return nn.functional.cross_entropy(logits, y[:1400])


def step(params, opt_state, key):
    grads = torch.func.grad(loss)(params, key)
    return optimizer.update(grads, opt_state, params)


state = params, optimizer.init(params)
for key in pt.random.split(pt.random.key(0), 200):
    state = step(*state, key)
right = apply(state[0], buffers, x[1400:].float(), train=False)[0].argmax(1) == y[1400:]
print(f"test accuracy {right.float().mean():.2%}, state {pt.tree.tree_digest(state)}")
