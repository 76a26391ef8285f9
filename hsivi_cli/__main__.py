"""`python -m hsivi_cli` and the `hsivi` entry point."""

import sys

from hsivi_cli.cli.app import main


def run() -> None:
    """Run the command line and leave with its exit code."""
    sys.exit(main())


if __name__ == "__main__":
    run()
