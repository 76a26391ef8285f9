"""Fast diffusion sampling and posterior fitting by hierarchical semi-implicit variational inference."""

__version__ = "0.1.0"
