"""Checkpoints: what workers give, what the launcher writes, what a resumed run takes."""
