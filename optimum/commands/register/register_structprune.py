"""Makes `optimum-cli prune` known: Optimum's command line looks for files like this one in all packages.

None of the folders above it may have an `__init__.py`: Optimum's own files are in the same namespace.
"""

from __future__ import annotations

import argparse
import sys

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo

from hf_structprune.commands.cli import COMMANDS, main


class PruneCommand(BaseOptimumCLICommand):
    """Hands everything behind `optimum-cli prune` over to `hf-structprune prune`."""

    COMMAND = CommandInfo(name="prune", help=COMMANDS["prune"][1])

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        """Leaves options, `--help` among them, to our own parser."""
        parser.prefix_chars = "\0"  # nothing on a command line begins with it, so that nothing is an option here
        parser.add_argument("arguments", nargs="*")

    def run(self) -> None:
        """Prunes; exits with the code of `hf-structprune`."""
        sys.exit(main(["prune", *self.args.arguments]))


REGISTER_COMMANDS = [PruneCommand]
