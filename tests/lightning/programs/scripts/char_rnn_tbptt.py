"""A character model with truncated backpropagation, sampling in the end of each epoch."""

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset

TEXT = "the quick brown fox jumps over the lazy dog " * 12


class Characters(Dataset):
    def __init__(self, length=40):
        self.alphabet = sorted(set(TEXT))
        data = torch.tensor([self.alphabet.index(c) for c in TEXT])
        self.chunks = [data[i : i + length + 1] for i in range(0, len(data) - length, length)]

    def __len__(self):
        return len(self.chunks)

    def __getitem__(self, index):
        return self.chunks[index][:-1], self.chunks[index][1:]


class CharRNN(pl.LightningModule):
    def __init__(self, vocabulary, hidden=48, truncated_bptt_steps=10, lr=0.01):
        super().__init__()
        self.save_hyperparameters()
        self.truncated_bptt_steps = truncated_bptt_steps
        self.embedding = nn.Embedding(vocabulary, 16)
        self.lstm = nn.LSTM(16, hidden, num_layers=1, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)
        self.pieces, self.samples = [], []

    def forward(self, x, hiddens=None):
        out, hiddens = self.lstm(self.embedding(x), hiddens)
        return self.head(out), hiddens

    def training_step(self, batch, batch_idx, hiddens):
        x, y = batch
        self.pieces.append((x.shape[1], hiddens is None))
        logits, hiddens = self(x, hiddens)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        self.log("perplexity", loss.exp().detach(), prog_bar=True, on_step=False, on_epoch=True)
        return {"loss": loss, "hiddens": hiddens}

    @torch.no_grad()
    def sample(self, alphabet, count=10):
        x, hiddens, text = torch.zeros(1, 1, dtype=torch.long, device=self.device), None, ""
        for _ in range(count):
            logits, hiddens = self(x, hiddens)
            x = torch.multinomial(logits[:, -1].softmax(-1), 1)
            text += alphabet[int(x)]
        return text

    def on_epoch_end(self):
        self.eval()
        self.samples.append(self.sample(sorted(set(TEXT))))
        self.logger.experiment.add_text("sample", self.samples[-1], self.current_epoch)
        self.train()

    def configure_optimizers(self):
        optimizer = torch.optim.RMSprop(self.parameters(), lr=self.hparams.lr)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.97)]


if __name__ == "__main__":
    pl.seed_everything(7)
    data = Characters()
    model = CharRNN(len(data.alphabet))
    trainer = pl.Trainer(
        max_epochs=8, gradient_clip_val=0.5, progress_bar_refresh_rate=0, terminate_on_nan=True
    )
    trainer.fit(model, DataLoader(data, batch_size=4, drop_last=True))
    assert set(model.pieces) == {(10, True), (10, False)}
    assert [first for _, first in model.pieces[:4]] == [True, False, False, False]
    assert trainer.callback_metrics["perplexity"] < 8, trainer.callback_metrics
    assert len(model.samples) == 8
