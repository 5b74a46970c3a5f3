"""Training from a database: a data set that streams rows of SQLite, as large as the disk, never all in memory.

The readings are made up (a daily wave with noise), and the network learns it back.

    paceline run --workers 2 --pace bounded:4 examples/readings.py
"""

import math
import random
import sqlite3
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn, optim
from torch.utils.data import DataLoader, IterableDataset

import paceline

ROWS, BATCH, EPOCHS = 20_000, 100, 3


def make_database(path: Path) -> None:
    draw = random.Random(0)
    hours = (draw.uniform(0.0, 24.0) for _ in range(ROWS))
    rows = [(hour, 10.0 + 5.0 * math.sin(hour * math.pi / 12.0) + draw.gauss(0.0, 0.5)) for hour in hours]
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE readings (hour REAL, celsius REAL)")
        database.executemany("INSERT INTO readings VALUES (?, ?)", rows)


class Readings(IterableDataset[tuple[Tensor, Tensor]]):
    """All rows in their order; each worker reads on past those that are not its own."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        with sqlite3.connect(self.path) as database:
            for hour, celsius in database.execute("SELECT hour, celsius FROM readings ORDER BY rowid"):
                angle = hour * math.pi / 12.0
                yield torch.tensor([math.sin(angle), math.cos(angle)]), torch.tensor([celsius])


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "readings.db"
        make_database(path)
        run = paceline.init()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 1))
        optimizer = optim.Adam(model.parameters(), lr=0.02)
        loader = DataLoader(Readings(path), batch_size=BATCH)
        model, optimizer, loader = run.wrap(model, optimizer, loader)
        for epoch in range(EPOCHS):
            losses = []
            for x, y in loader:
                loss = nn.functional.mse_loss(model(x), y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                run.log(loss=loss)
                losses.append(loss.item())
            if run.is_main:
                mean = sum(losses) / len(losses)
                print(f"epoch {epoch + 1}  mean squared error {mean:.3f}  (the noise alone is 0.25)")


if __name__ == "__main__":
    main()
