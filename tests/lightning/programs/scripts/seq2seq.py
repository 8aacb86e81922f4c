"""A GRU that learns to reverse digits: batches that are dicts, two validation sets, a plateau."""

import os
from argparse import ArgumentParser, Namespace

import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint
from pytorch_lightning.utilities import rank_zero_info
from pytorch_lightning.utilities.apply_func import move_data_to_device
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset

PAD, BOS, EOS, VOCAB = 0, 1, 2, 8


class Reversal(Dataset):
    def __init__(self, count, longest, seed):
        generator = torch.Generator().manual_seed(seed)
        lengths = torch.randint(2, longest + 1, (count,), generator=generator)
        self.items = [torch.randint(3, VOCAB, (int(n),), generator=generator) for n in lengths]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        x = self.items[index]
        return {"src": x, "tgt": torch.cat([torch.tensor([BOS]), x.flip(0), torch.tensor([EOS])])}


def collate(examples):
    examples = sorted(examples, key=lambda e: -len(e["src"]))
    return {
        "src": pad_sequence([e["src"] for e in examples], batch_first=True, padding_value=PAD),
        "tgt": pad_sequence([e["tgt"] for e in examples], batch_first=True, padding_value=PAD),
        "lengths": [len(e["src"]) for e in examples],
    }


class Seq2Seq(pl.LightningModule):
    def __init__(self, hparams):
        super().__init__()
        self.hparams = hparams
        self.embed = nn.Embedding(VOCAB, hparams.hidden, padding_idx=PAD)
        self.encoder = nn.GRU(hparams.hidden, hparams.hidden, batch_first=True)
        self.decoder = nn.GRU(hparams.hidden, hparams.hidden, batch_first=True)
        self.out = nn.Linear(hparams.hidden, VOCAB)
        self.moved = 0

    def forward(self, src, lengths, tgt):
        packed = pack_padded_sequence(self.embed(src), lengths, batch_first=True)
        states, hidden = self.encoder(packed)
        states, _ = pad_packed_sequence(states, batch_first=True)
        out, _ = self.decoder(self.embed(tgt), hidden)
        weights = torch.softmax(out @ states.transpose(1, 2), -1)
        return self.out(out + weights @ states)

    def step(self, batch):
        logits = self(batch["src"], batch["lengths"], batch["tgt"][:, :-1])
        target = batch["tgt"][:, 1:]
        loss = F.cross_entropy(logits.reshape(-1, VOCAB), target.reshape(-1), ignore_index=PAD)
        mask = target != PAD
        return loss, (logits.argmax(-1) == target)[mask].float().mean()

    def training_step(self, batch, batch_nb):
        loss, acc = self.step(batch)
        return {"loss": loss, "acc": acc, "n": batch["src"].size(0)}

    def training_epoch_end(self, outputs):
        mean = torch.stack([o["loss"] * o["n"] for o in outputs]).sum() / sum(
            o["n"] for o in outputs
        )
        self.log("train_epoch_loss", mean)

    def validation_step(self, batch, batch_nb, dataloader_idx):
        loss, acc = self.step(batch)
        return {"val_loss": loss, "val_acc": acc}

    def validation_epoch_end(self, outputs):
        assert len(outputs) == 2
        for name, part in zip(("short", "long"), outputs):
            self.log(
                f"val_loss_{name}", torch.stack([o["val_loss"] for o in part]).mean(), prog_bar=True
            )
        self.log("val_acc", torch.stack([o["val_acc"] for part in outputs for o in part]).mean())

    test_step = training_step

    def test_epoch_end(self, outputs):
        self.log("test_acc", torch.stack([o["acc"] for o in outputs]).mean())

    def transfer_batch_to_device(self, batch, device):
        self.moved += 1
        lengths = batch.pop("lengths")
        return {**move_data_to_device(batch, device), "lengths": lengths}

    def configure_optimizers(self):
        optimizer = torch.optim.Adam(self.parameters(), lr=self.hparams.lr)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, "min", patience=0, factor=0.5
        )
        return {"optimizer": optimizer, "lr_scheduler": scheduler, "monitor": "val_loss_long"}

    def loader(self, count, longest, seed, shuffle=False):
        return DataLoader(
            Reversal(count, longest, seed), 32, shuffle=shuffle, collate_fn=collate, num_workers=0
        )

    def train_dataloader(self):
        return self.loader(256, 5, 0, shuffle=True)

    def val_dataloader(self):
        return [self.loader(32, 3, 1), self.loader(32, 5, 2)]

    def test_dataloader(self):
        return self.loader(64, 5, 3)


def main():
    parser = ArgumentParser(add_help=False)
    parser.add_argument("--hidden", default=32, type=int)
    parser.add_argument("--lr", default=0.02, type=float)
    parser.add_argument("--max_epochs", default=4, type=int)
    hparams = parser.parse_args()
    pl.seed_everything(5)
    model = Seq2Seq(hparams)
    checkpoint = ModelCheckpoint(
        dirpath=os.path.join(os.getcwd(), "out"),
        filename="{epoch:02d}-{val_acc:.2f}",
        monitor="val_acc",
        mode="max",
        save_top_k=1,
        verbose=True,
    )
    trainer = pl.Trainer(
        max_epochs=5,
        gradient_clip_val=1.0,
        callbacks=[EarlyStopping("val_loss_long", patience=3)],
        checkpoint_callback=checkpoint,
        progress_bar_refresh_rate=0,
        weights_summary="full",
    )
    trainer.fit(model)
    rank_zero_info("best %s", checkpoint.best_model_path)
    assert os.path.basename(checkpoint.best_model_path).startswith("epoch=0")
    best = Seq2Seq.load_from_checkpoint(checkpoint.best_model_path)
    assert isinstance(best.hparams, (dict, Namespace)) and best.hparams.hidden == 32
    (result,) = pl.Trainer(logger=False, checkpoint_callback=False).test(best)
    assert result["test_acc"] > 0.5, result
    assert model.moved > 0


if __name__ == "__main__":
    main()
