"""A straight line through 100 noisy points, by three kinds of gradient descent.

    paceline run --workers 5 examples/linear.py --method batch        # or sgd, or minibatch

`batch` steps on the gradient of all points: the workers divide them equally, so any number of workers draws
the curve that one process draws, down to the least squares line, w = 3.008202 and b = 1.967103. `sgd` takes
one point a worker at a time, `minibatch` four; these hover about it, within 0.1. The points were drawn around
y = 3x + 2. Pictures of the line and of the loss go to plots/linear.png in the run's directory.
"""

import argparse
import math

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

parser = argparse.ArgumentParser()
parser.add_argument("--method", choices=["batch", "sgd", "minibatch"], default="batch")
parser.add_argument("--epochs", type=int, default=100)
args = parser.parse_args()

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x = torch.randn(100, 1)
y = 3 * x + 2 + 0.5 * torch.randn(100, 1)
model = nn.Linear(1, 1)

run = paceline.init()
share = math.ceil(len(x) / run.num_workers)
batch_size, lr = {"batch": (share, 0.1), "sgd": (1, 0.01), "minibatch": (4, 0.02)}[args.method]
optimizer = torch.optim.SGD(model.parameters(), lr)
loader = DataLoader(TensorDataset(x, y), batch_size, shuffle=args.method != "batch")
model, optimizer, loader = run.wrap(model, optimizer, loader)

losses = []
for epoch in range(1, args.epochs + 1):
    for inputs, targets in loader:
        loss = F.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        run.log(loss=loss)
    with torch.no_grad():
        losses.append(F.mse_loss(model(x), y).item())
    if run.is_main and (epoch == 1 or epoch % 10 == 0):
        print(f"Epoch {epoch}: Loss {losses[-1]:.6f}")

if run.is_main:
    w, b = model.weight.item(), model.bias.item()
    columns = torch.cat([x, torch.ones_like(x)], dim=1)
    best_w, best_b = torch.linalg.lstsq(columns, y).solution.flatten().tolist()
    print(f"Final model parameters: w = {w:.6f}, b = {b:.6f}")
    print(f"Least squares solution: w = {best_w:.6f}, b = {best_b:.6f}")

    figure = Figure(figsize=(10, 4), layout="constrained")
    line, curve = figure.subplots(1, 2)
    line.scatter(x.flatten(), y.flatten(), s=12, label="data")
    line.axline((0, b), slope=w, color="tab:red", label=f"y = {w:.3f}x + {b:.3f}")
    line.set(xlabel="x", ylabel="y", title="The fitted line")
    line.legend()
    curve.semilogy(range(1, len(losses) + 1), losses)
    curve.set(xlabel="epoch", ylabel="mean squared error", title="Loss over all data")
    plots = run.directory / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    figure.savefig(plots / "linear.png", dpi=120)
