"""A script whose every bit depends on what a checkpoint has to bring back."""

from __future__ import annotations

import json

from tests.process.runner import Ended

# Random numbers in the data set and in dropout, buffers, a scheduler by step, one by epoch, a thing of its own,
# and an evaluation after every pass. Worker 0 leaves all of it as numbers.
TRAINING = """
import json
import sys

import torch
from standing import stand
from torch import nn
from torch.utils.data import DataLoader, Dataset

import paceline

epochs, stop_at = int(sys.argv[1]), int(sys.argv[2])


class Noisy(Dataset):
    def __len__(self):
        return 90

    def __getitem__(self, number):
        torch_number = torch.randn(6) * 0.1 + number % 7
        return torch_number, torch.tensor(number % 3)


class Average:
    def __init__(self):
        self.value, self.seen = torch.zeros(()), {1: ("a", 0)}

    def state_dict(self):
        return {"value": self.value, "seen": self.seen}

    def load_state_dict(self, state):
        self.value, self.seen = state["value"], state["seen"]


torch.manual_seed(3)
run = paceline.init()
model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Dropout(0.4), nn.Linear(16, 3))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
by_step = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.99)
plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
loader = DataLoader(Noisy(), batch_size=4, shuffle=True)
test = DataLoader(Noisy(), batch_size=30)
model, optimizer, by_step, plateau, loader = run.wrap(model, optimizer, by_step, plateau, loader)
average = Average()
run.keep(average)
for epoch in range(epochs):
    model.train()
    for x, y in loader:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        by_step.step()
        average.value = 0.9 * average.value + 0.1 * loss.detach()
        average.seen[1] = ("a", average.seen[1][1] + 1)
        if run.step == stop_at and run.is_main:
            stand(stop_at)
    model.eval()
    with torch.no_grad():
        total = sum(nn.functional.cross_entropy(model(x), y).item() for x, y in test)
    plateau.step(total)
if run.is_main:
    numbers = {name: values.double().sum().item() for name, values in model.state_dict().items()}
    numbers |= {"average": average.value.item(), "seen": average.seen[1][1], "rate": optimizer.param_groups[0]["lr"]}
    (run.directory / "numbers.json").write_text(json.dumps(numbers))
"""


def numbers(ended: Ended) -> dict[str, float]:
    assert ended.code == 0, ended.err
    return dict(json.loads((ended.directory / "numbers.json").read_text()))
