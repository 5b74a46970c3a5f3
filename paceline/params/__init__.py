"""A model as flat vectors: its table of slices, its shards, its optimizer's state."""
