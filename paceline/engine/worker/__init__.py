"""A worker's process while its script runs: passes over data, comings and goings, the end of training."""
