"""Checkpoints of other projects, converted onto networks that are called `network(x, t) -> eps`."""
