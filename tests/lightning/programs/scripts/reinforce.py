"""Policy gradient on a corridor, fed by an iterable data set that plays with the policy itself."""

import argparse
from collections import deque

import pytorch_lightning as pl
import torch
from torch import nn, optim
from torch.utils.data import DataLoader, IterableDataset


class Corridor:
    """Walk right to the end of a corridor of five fields."""

    def reset(self):
        self.place, self.time = 0, 0
        return self.observe()

    def observe(self):
        return torch.nn.functional.one_hot(torch.tensor(self.place), 5).float()

    def step(self, action):
        self.place = max(0, self.place + (1 if action else -1))
        self.time += 1
        done = self.place == 4 or self.time >= 20
        return self.observe(), (1.0 if self.place == 4 else -0.05), done


class ExperienceSourceDataset(IterableDataset):
    def __init__(self, generate_batch):
        self.generate_batch = generate_batch

    def __iter__(self):
        return iter(self.generate_batch())


class Reinforce(pl.LightningModule):
    def __init__(
        self, gamma=0.95, lr=0.05, batch_size=64, entropy_beta=0.01, batches_per_epoch=8, **kwargs
    ):
        super().__init__()
        self.save_hyperparameters()
        self.env = Corridor()
        self.net = nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 2))
        self.total_rewards, self.done_episodes = deque(maxlen=50), 0

    def forward(self, x):
        return self.net(x)

    def discount(self, rewards):
        total, found = 0.0, []
        for reward in reversed(rewards):
            total = reward + self.hparams.gamma * total
            found.insert(0, total)
        return found

    def train_batch(self):
        for _ in range(self.hparams.batches_per_epoch * self.hparams.batch_size):
            state, done, states, actions, rewards = self.env.reset(), False, [], [], []
            while not done:
                with torch.no_grad():
                    probs = torch.softmax(self(state.to(self.device)), -1)
                action = int(torch.multinomial(probs, 1))
                states.append(state)
                state, reward, done = self.env.step(action)
                actions.append(action)
                rewards.append(reward)
            self.done_episodes += 1
            self.total_rewards.append(sum(rewards))
            for item in zip(states, actions, self.discount(rewards)):
                yield item

    def loss(self, states, actions, returns):
        returns = (returns - returns.mean()) / (returns.std() + 1e-6)
        log_probs = torch.log_softmax(self(states), -1)
        policy = -(log_probs[range(len(actions)), actions] * returns).mean()
        entropy = -(log_probs.exp() * log_probs).sum(-1).mean()
        return policy - self.hparams.entropy_beta * entropy

    def training_step(self, batch, _):
        states, actions, returns = batch
        loss = self.loss(states, actions, returns.float())
        mean = torch.tensor(sum(self.total_rewards) / max(1, len(self.total_rewards)))
        self.log_dict({"episodes": float(self.done_episodes), "avg_reward": mean}, prog_bar=True)
        if batch and self.global_step >= 60:
            self.trainer.should_stop = True
        return loss

    def configure_optimizers(self):
        return [optim.Adam(self.parameters(), lr=self.hparams.lr)]

    def train_dataloader(self):
        return DataLoader(
            ExperienceSourceDataset(self.train_batch), batch_size=self.hparams.batch_size
        )

    def get_device(self, batch):
        return batch[0].device.index if self.on_gpu else "cpu"


if __name__ == "__main__":
    pl.seed_everything(123)
    parser = argparse.ArgumentParser(add_help=False)
    parser = pl.Trainer.add_argparse_args(parser)
    args = parser.parse_args()
    model = Reinforce(**vars(args))
    trainer = pl.Trainer.from_argparse_args(args, max_steps=90, log_every_n_steps=1)
    trainer.fit(model)
    assert 60 <= trainer.global_step <= 62, trainer.global_step
    assert trainer.callback_metrics["avg_reward"] > 0.5, trainer.callback_metrics
