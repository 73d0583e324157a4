"""The command line: one file a subcommand, `cli.py` is the entry point."""
