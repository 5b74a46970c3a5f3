"""A small transformer learns to write Python, byte by byte, from the standard library's own source.

    paceline run --workers 2 examples/text.py        # alone: python examples/text.py

Nothing is downloaded: the 12 MB of text came with the interpreter. The loss on the last 5 % of it, which is held
out, begins at log(256) = 5.55 nats a byte; two workers' default run ends near 1.6.
"""

import argparse
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import paceline

CONTEXT = 128  # bytes the model looks back on


class ByteTransformer(nn.Module):
    """From bytes int64[n, t] to scores float32[n, t, 256] of the byte after each, seeing none that follow."""

    def __init__(self, width: int = 128, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        self.bytes = nn.Parameter(0.1 * torch.randn(256, width))
        self.positions = nn.Parameter(0.1 * torch.randn(CONTEXT, width))
        layer = nn.TransformerEncoderLayer(width, heads, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.scores = nn.Linear(width, 256)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1])
        hidden = F.embedding(x, self.bytes) + self.positions[: x.shape[1]]
        scores: Tensor = self.scores(self.layers(hidden, mask, is_causal=True))
        return scores


def loss_per_byte(model: nn.Module, windows: Tensor) -> Tensor:
    x, y = windows[:, :-1].long(), windows[:, 1:].long()
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten())


parser = argparse.ArgumentParser()
parser.add_argument("--samples", type=int, default=25_600, help="windows of text in an epoch")
parser.add_argument("--epochs", type=int, default=1)
args = parser.parse_args()

torch.manual_seed(0)
root = Path(sysconfig.get_paths()["stdlib"])
left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
paths = sorted(path for path in root.rglob("*.py") if left_out.isdisjoint(path.relative_to(root).parts))
text = torch.frombuffer(bytearray().join(path.read_bytes() for path in paths), dtype=torch.uint8)
windows = text.unfold(0, CONTEXT + 1, 1)  # a view: row i is the window that begins at byte i
cut = len(windows) * 95 // 100
data = TensorDataset(windows[torch.randint(cut - CONTEXT, (args.samples,))])
model = ByteTransformer()
optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95))
loader = DataLoader(data, batch_size=16, shuffle=True)

run = paceline.init()
model, optimizer, loader = run.wrap(model, optimizer, loader)
steps = args.epochs * len(loader)  # known only now: all workers' batches of a step count as one
scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps, pct_start=0.05, cycle_momentum=False)
for _ in range(args.epochs):
    for (batch,) in loader:
        loss = loss_per_byte(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        run.log(loss=loss)

if run.is_main:
    with torch.no_grad():
        loss = loss_per_byte(model, windows[torch.linspace(cut, len(windows) - 1, 128).long()])
        print(f"held-out loss: {loss:.3f} nats per byte")
        written = torch.tensor([list(b"def ")])
        for _ in range(160):
            likely = (model(written[:, -CONTEXT:])[:, -1] / 0.7).softmax(1)
            written = torch.cat([written, likely.multinomial(1)], dim=1)
        print(bytes(written[0].tolist()).decode(errors="replace"))
