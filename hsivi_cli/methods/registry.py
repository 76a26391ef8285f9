"""Every method by its name: what runs name in their configuration, and what the contract's tests run through."""

from hsivi_cli.engine.contract import Method
from hsivi_cli.methods import ddpm, hsivi_sm

METHODS: dict[str, Method] = {"ddpm": ddpm, "hsivi-sm": hsivi_sm}
