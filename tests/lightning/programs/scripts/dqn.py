"""Deep Q-learning on a corridor: an agent fills a buffer while the module trains on it."""

from collections import OrderedDict, deque, namedtuple

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data.dataset import IterableDataset

Experience = namedtuple("Experience", ["state", "action", "reward", "done", "new_state"])


class Corridor:
    def reset(self):
        self.place = 0
        return self._see()

    def _see(self):
        return np.eye(6, dtype=np.float32)[self.place]

    def step(self, action):
        self.place = max(0, self.place + (1 if action else -1))
        done = self.place == 5
        return self._see(), float(done), done, {}


class ReplayBuffer:
    def __init__(self, capacity):
        self.buffer = deque(maxlen=capacity)

    def __len__(self):
        return len(self.buffer)

    def append(self, experience):
        self.buffer.append(experience)

    def sample(self, batch_size):
        indices = np.random.choice(len(self.buffer), batch_size, replace=False)
        s, a, r, d, n = zip(*[self.buffer[i] for i in indices])
        return (
            np.array(s),
            np.array(a),
            np.array(r, dtype=np.float32),
            np.array(d, dtype=bool),
            np.array(n),
        )


class RLDataset(IterableDataset):
    def __init__(self, buffer, sample_size=32):
        self.buffer, self.sample_size = buffer, sample_size

    def __iter__(self):
        states, actions, rewards, dones, new_states = self.buffer.sample(self.sample_size)
        for i in range(len(dones)):
            yield states[i], actions[i], rewards[i], dones[i], new_states[i]


class DQNLightning(pl.LightningModule):
    def __init__(
        self,
        sync_rate: int = 10,
        gamma: float = 0.9,
        lr: float = 1e-2,
        episode_length: int = 64,
        batch_size: int = 16,
        warm_start_steps: int = 100,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.save_hyperparameters()
        self.env = Corridor()
        self.net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
        self.target_net = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 2))
        self.buffer = ReplayBuffer(500)
        self.state = self.env.reset()
        self.total_reward = self.episode_reward = 0
        for _ in range(warm_start_steps):
            self.play(epsilon=1.0)

    @torch.no_grad()
    def play(self, epsilon):
        if np.random.random() < epsilon:
            action = np.random.randint(2)
        else:
            action = int(self.net(torch.tensor(self.state)[None]).argmax())
        new_state, reward, done, _ = self.env.step(action)
        self.buffer.append(Experience(self.state, action, reward, done, new_state))
        self.state = self.env.reset() if done else new_state
        return reward, done

    def forward(self, x):
        return self.net(x)

    def dqn_mse_loss(self, batch):
        states, actions, rewards, dones, next_states = batch
        q = self.net(states).gather(1, actions.unsqueeze(-1)).squeeze(-1)
        with torch.no_grad():
            n = self.target_net(next_states).max(1)[0]
            n[dones] = 0.0
        return nn.MSELoss()(q, n * self.hparams.gamma + rewards)

    def training_step(self, batch, nb_batch):
        device = self.get_device(batch)
        reward, done = self.play(max(0.01, 1.0 - self.global_step + 1 / 100))
        self.episode_reward += reward
        loss = self.dqn_mse_loss(batch)
        if done:
            self.total_reward = self.episode_reward
            self.episode_reward = 0
        if self.global_step % self.hparams.sync_rate == 0:
            self.target_net.load_state_dict(self.net.state_dict())
        log = {
            "total_reward": torch.tensor(self.total_reward).to(device),
            "steps": torch.tensor(self.global_step).to(device),
        }
        return OrderedDict({"loss": loss, "log": log, "progress_bar": log})

    def configure_optimizers(self):
        return [torch.optim.Adam(self.net.parameters(), lr=self.hparams.lr)]

    def train_dataloader(self):
        return DataLoader(
            dataset=RLDataset(self.buffer, self.hparams.episode_length),
            batch_size=self.hparams.batch_size,
            sampler=None,
        )

    def get_device(self, batch):
        return batch[0].device.index if self.on_gpu else "cpu"


if __name__ == "__main__":
    model = DQNLightning()
    trainer = pl.Trainer(max_epochs=5, val_check_interval=100)
    trainer.fit(model)
    assert trainer.global_step == 20
