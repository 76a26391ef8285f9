"""Transitions: how a chain moves from one level of the bridge to the next."""
