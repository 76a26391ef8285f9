"""Bridges: noise schedules and grids between the base and the target."""
