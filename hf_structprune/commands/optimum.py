"""`optimum-cli prune`: the same command, options and errors as `hf-structprune prune`."""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from .cli import COMMANDS, main


class PruneCommand(BaseOptimumCLICommand):
    """Hands everything behind `optimum-cli prune` over to `hf-structprune prune`."""

    COMMAND = CommandInfo(name="prune", help=COMMANDS["prune"])

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Leaves options, `--help` among them, to our own parser."""
        parser.prefix_chars = "\0"  # nothing on a command line begins with it, so that nothing is an option here
        parser.add_argument("arguments", nargs="*")

    def run(self) -> None:
        """Prunes; exits with the code of `hf-structprune`."""
        sys.exit(main(["prune", *self.args.arguments]))
