"""One thin module a subcommand; the only floor that prints, parses options or chooses an exit code."""
