"""A multilayer perceptron with Adam under torch's DistributedDataParallel: the counterpart of mlp.py.

    torchrun --nproc-per-node 2 examples/mlp_ddp.py --save ddp.safetensors
    paceline run --workers 2 examples/mlp.py --save ours.safetensors

Step k takes batches k n to k n + n - 1 of the data in order, one a worker, in both, so that both end at equal
parameters, to about 1e-15 in float64; the checksums show it. `diff` shows what each way asks of a script.
"""

import argparse

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import BatchSampler, DataLoader, TensorDataset

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=10)
parser.add_argument("--samples", type=int, default=960, help="a multiple of 16 times the number of workers")
parser.add_argument("--save", metavar="FILE", help="write the final parameters here, as safetensors")
args = parser.parse_args()

torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
x = torch.randn(args.samples, 32)
y = (x @ torch.randn(32, 10)).argmax(1)
data = TensorDataset(x, y)
model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)

dist.init_process_group("gloo")
batches = list(BatchSampler(range(args.samples), batch_size=16, drop_last=False))
loader = DataLoader(data, batch_sampler=batches[dist.get_rank() :: dist.get_world_size()])
replica = DistributedDataParallel(model)

for epoch in range(1, args.epochs + 1):
    for inputs, targets in loader:
        loss = F.cross_entropy(replica(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if dist.get_rank() == 0:
        with torch.no_grad():
            print(f"epoch {epoch}: loss {F.cross_entropy(model(x), y):.12f}")

if dist.get_rank() == 0:
    state = model.state_dict()
    print(f"checksum: {sum(value.abs().sum().item() for value in state.values()):.12f}")
    print("first weights:", *(f"{value:.12f}" for value in state["0.weight"].flatten()[:4].tolist()))
    if args.save:
        save_file({name: value.clone() for name, value in state.items()}, args.save)
# The replica holds the group. With it alive, destroying leaves gloo's threads running into the interpreter's
# end, where letting go of the last gradient aborted the process in 7 runs of 30; without it, in none of 40.
del replica
dist.destroy_process_group()
