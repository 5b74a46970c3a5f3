"""Softmax regression on 1,797 scanned handwritten digits of 8 x 8 pixels (scikit-learn's `load_digits`).

    paceline run --workers 2 --servers 1 examples/digits.py        # alone: python examples/digits.py

A step takes 100 digits however many workers divide them, so the loss falls as it does on one process. After
1,000 steps the loss over the 1,500 training digits is about 0.27, and about 94 % of the other 297 are named
right.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=1000)
parser.add_argument("--batch", type=int, default=100, help="digits in a step, all workers together")
args = parser.parse_args()

torch.manual_seed(0)
digits = load_digits()
images, labels = torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)
train, test = torch.randperm(len(images)).split([1500, 297])
model = nn.Linear(64, 10)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

run = paceline.init()
batch_size = args.batch // run.num_workers
loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size, shuffle=True, drop_last=True)
model, optimizer, loader = run.wrap(model, optimizer, loader)

for epoch in range(math.ceil(args.steps / len(loader))):
    for step, (x, y) in enumerate(loader, start=epoch * len(loader) + 1):
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
        if run.is_main and step % 100 == 0:
            with torch.no_grad():
                loss = F.cross_entropy(model(images[train]), labels[train])
            print(f"step {step}: loss {loss:.4f}", flush=True)
        if step == args.steps:
            break

if run.is_main:
    right = (model(images[test]).argmax(1) == labels[test]).sum().item()
    print(f"test accuracy: {right / len(test):.4f} ({right} of {len(test)})")
