"""A small agent: deep Q-learning in a corridor, whose dataset plays with the model being trained.

python examples/lightning_rl.py
"""

import random
from collections import deque

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.dataset import IterableDataset

import puretrain.lightning as pl

LENGTH = 8


class Corridor:
    """Start in the middle; the right end gives 1, the left end 0; each step costs a little."""

    def reset(self):
        self.place, self.steps = LENGTH // 2, 0
        return self.place

    def step(self, action):
        self.place += 1 if action else -1
        self.steps += 1
        done = self.place in (0, LENGTH - 1) or self.steps >= 50
        return self.place, float(self.place == LENGTH - 1) - 0.01, done


class RLDataset(IterableDataset):
    def __init__(self, buffer, count):
        self.buffer, self.count = buffer, count

    def __iter__(self):
        yield from random.sample(self.buffer, min(self.count, len(self.buffer)))


class DQN(pl.LightningModule):
    def __init__(self, gamma: float = 0.95, lr: float = 5e-3, sync_rate: int = 10):
        super().__init__()
        self.save_hyperparameters()
        self.net, self.target_net = nn.Embedding(LENGTH, 2), nn.Embedding(LENGTH, 2)
        self.env, self.buffer = Corridor(), deque(maxlen=500)
        self.state, self.returns, self.episode = self.env.reset(), deque(maxlen=20), 0.0
        for _ in range(100):
            self.play(epsilon=1.0)

    def play(self, epsilon):
        with torch.no_grad():
            greedy = int(self.net(torch.tensor(self.state)).argmax())
        action = random.randrange(2) if random.random() < epsilon else greedy
        new, reward, done = self.env.step(action)
        self.buffer.append((self.state, action, reward, float(done), new))
        self.episode += reward
        self.state = new
        if done:
            self.returns.append(self.episode)
            self.state, self.episode = self.env.reset(), 0.0

    def training_step(self, batch, batch_idx):
        self.play(epsilon=max(0.05, 1 - self.global_step / 150))
        states, actions, rewards, dones, following = batch
        values = self.net(states).gather(1, actions.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            best = self.target_net(following).max(1)[0] * (1 - dones.float())
        loss = F.mse_loss(values, best * self.hparams.gamma + rewards.float())
        if self.global_step % self.hparams.sync_rate == 0:
            self.target_net.load_state_dict(self.net.state_dict())
        self.log("return", sum(self.returns) / max(len(self.returns), 1), prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), lr=self.hparams.lr * 10)

    def train_dataloader(self):
        return DataLoader(RLDataset(self.buffer, 64), batch_size=16)


def main():
    pl.seed_everything(0)
    model = DQN()
    trainer = pl.Trainer(max_epochs=150, logger=False, checkpoint_callback=False)
    trainer.fit(model)
    policy = model.net.weight.argmax(1)[1 : LENGTH - 1]
    print(f"goes right from {int(policy.sum())} of {LENGTH - 2} places")


if __name__ == "__main__":
    main()
