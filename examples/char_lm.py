"""Teach a small transformer to write Python, byte by byte, from the standard library's sources.

    python examples/char_lm.py                 # about a minute on two cores
    python examples/char_lm.py --resume        # after Ctrl-C: goes on, bit for bit
    puretrain fit examples/char_lm.py --directory runs/long --steps 5000

The table of byte embeddings and the weights that predict the next byte are one tensor, used in two
places. It is one leaf of the state, with one gradient and one optimizer state.
"""

import argparse
import math
import sys
import sysconfig
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import puretrain as pt

CONTEXT = 64  # bytes that the model looks back
WIDTH, HEADS, LAYERS = 128, 4, 2


# ── The text: the modules at the top of the standard library, in the order of their names ─────────


def read_text(size=1_500_000):
    """The first bytes of the library as (training, validation) tensors of dtype uint8."""
    text = bytearray()
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
        text += path.read_bytes()
        if len(text) >= size:
            break
    text = torch.frombuffer(text[:size], dtype=torch.uint8)
    cut = len(text) * 9 // 10
    return text[:cut], text[cut:]


def windows(text, stride):
    """Pieces of CONTEXT + 1 bytes, as a view: a row per sample, cut out when it is read."""
    return text.unfold(0, CONTEXT + 1, stride)


# ── The model ─────────────────────────────────────────────────────────────────────────────────────


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        n, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(n, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, WIDTH))
        return x + self.down(gelu(self.up(self.norm2(x))))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(256, WIDTH)
        self.position = nn.Parameter(0.02 * torch.randn(CONTEXT, WIDTH))
        self.blocks = nn.Sequential(*(Block() for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.02)
        self.head.weight = self.embedding.weight

    def forward(self, tokens):
        x = self.embedding(tokens) + self.position[: tokens.shape[1]]
        return self.head(self.norm(self.blocks(x)))


# ── The run ───────────────────────────────────────────────────────────────────────────────────────


def model(seed=0):
    with pt.random.scope(pt.random.key(seed)):  # the first weights are a function of the seed
        return pt.functional(Transformer())


def run(directory="runs/char_lm", steps=500, seed=0, lr=3e-3, batch_size=32):
    apply, params, buffers = model(seed)

    def loss(params, buffers, batch, key, train=True):
        tokens = batch.long()
        logits, _ = apply(params, buffers, tokens[:, :-1], train=train)
        return cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def evaluate(params, buffers, batch, key):
        nats = loss(params, buffers, batch, key, train=False)
        return {"loss": nats, "bits_per_byte": nats / math.log(2)}

    # The rate does not depend on `steps`: a longer run begins with the very steps of a shorter one.
    optimizer = pt.optim.chain(
        pt.optim.clip_by_global_norm(1.0),
        pt.optim.adamw(pt.optim.linear(0.0, lr, 50), betas=(0.9, 0.98), weight_decay=0.01),
    )
    training, validation = read_text()
    return pt.Run(
        state=pt.TrainState.create(params, buffers, optimizer, key=pt.random.key(seed)),
        step=pt.train_step(loss, optimizer),
        batches=pt.batches(
            windows(training, stride=CONTEXT // 2), batch_size, shuffle=True, seed=seed
        ),
        steps=steps,
        validation=pt.Validation(
            pt.eval_step(evaluate),
            pt.batches(windows(validation, stride=CONTEXT), 128),
            every=100,
            limit=4,
        ),
        observers=[
            pt.progress(),
            pt.tensorboard(directory),
            pt.journal(directory, every=50),
            pt.checkpoints(directory, every=100, keep=2),
        ],
        directory=directory,
    )


def write(state, prompt=b"def ", length=300, temperature=0.8):
    """Let the model continue a text; a function of the state's key."""
    apply, _, _ = model()
    text = torch.tensor(list(prompt))
    with torch.no_grad(), pt.random.scope(pt.random.stream(state.key, "sample")):
        for _ in range(length):
            logits, _ = apply(state.params, state.buffers, text[None, -CONTEXT:], train=False)
            chances = torch.softmax(logits[0, -1] / temperature, dim=0)
            text = torch.cat([text, torch.multinomial(chances, 1)])
    return bytes(text.tolist()).decode("latin-1")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--directory", default="runs/char_lm", help="where logs and states go")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--resume", action="store_true", help="go on with the run in --directory")
    options = parser.parse_args()

    directory = options.directory if options.resume else pt.new_directory(options.directory)
    begin = time.monotonic()
    this = run(directory, steps=options.steps)
    state = this.fit(resume=options.resume)
    seconds = time.monotonic() - begin
    metrics = pt.evaluate(state, this.validation.step, this.validation.batches)

    print(f"\nIt writes:\n\n{write(state)}\n")
    print(f"{metrics['bits_per_byte']:.3f} bits per byte on text that it has not seen")
    print(f"{int(state.step)} steps in {seconds:.0f} s; state {pt.tree.tree_digest(state)}")
    further = ["--directory", directory, "--resume", "--steps", str(2 * options.steps)]
    print(f"logs      {pt.command_line('tensorboard', '--logdir', directory)}")
    print(f"replay    {pt.command_line('puretrain', 'replay', directory)}")
    print(f"report    {pt.command_line('puretrain', 'report', directory)}")
    print(f"go on     {pt.command_line('python', sys.argv[0], *further)}")


if __name__ == "__main__":
    main()
