"""Targets: what a chain is to sample from; here a pretrained diffusion score network."""
