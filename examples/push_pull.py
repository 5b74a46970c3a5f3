"""The parameter server used directly: no model, no optimizer, no data loader; named tensors that all workers share.

Each worker finds a line through points of its own by gradients it works out by hand, and pushes what is to be added.

    paceline run --workers 2 --servers 2 examples/push_pull.py
"""

import torch

import paceline

run = paceline.init()
store = run.store(weights=torch.zeros(8), points=torch.zeros(1))

truth = torch.linspace(-1, 1, 8)
points = torch.randn(2000, 8, generator=torch.Generator().manual_seed(run.rank))
values = points @ truth

for step in range(300):
    x, y = points[step % 50 :: 50], values[step % 50 :: 50]
    error = x @ store.pull("weights") - y
    handle = store.push(weights=-0.05 * x.T @ error / len(x), points=torch.tensor([float(len(x))]))
store.wait(handle)  # the last push is applied, and all before it

run.barrier()  # every worker's
if run.is_main:
    distance = float((store.pull("weights") - truth).norm())
    print(f"{int(store.pull('points')):,} points by {run.num_workers} workers, {distance:.1e} from the truth")
