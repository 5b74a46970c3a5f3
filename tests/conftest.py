"""What every test starts from: one thread a process, no screen, and nothing of the caller's environment."""

import os
import resource
from zlib import crc32

import pytest
from hypothesis import settings

# Before anything imports torch or numpy: their thread pools are sized once. A test of N processes on two
# cores is slow and uneven if each of them brings a pool of its own.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# Tests start hundreds of processes: where nothing is written beside the sources, each would compile paceline anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

# Jobs in threads leave their mappings to the end of the process, and each has a descriptor.
_most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (_most, _most))

# A test under `paceline run`, torchrun or SLURM, or with options in the environment, must see none of it.
FOREIGN = ("PACELINE_", "SLURM_", "RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "RAY_ADDRESS")
for name in [name for name in os.environ if name.startswith(FOREIGN)]:
    del os.environ[name]

# No deadline: how long an example takes says nothing here. In CI the examples are the same every time.
settings.register_profile("paceline", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("paceline")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the settings of a test that is marked ``sampled`` about a third is left to `make test`, always the same."""
    for item in items:
        if item.get_closest_marker("sampled") and crc32(item.name.encode()) % 3:
            item.add_marker(pytest.mark.long)
