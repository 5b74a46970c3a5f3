"""Which worker trains on which samples, and how many there are in a batch."""
