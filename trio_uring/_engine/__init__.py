"""From an `Operation` to its result: the ring, and Trio's I/O manager on it."""
