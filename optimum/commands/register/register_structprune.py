"""Makes `optimum-cli prune` known: Optimum's command line looks for files like this one in all packages.

None of the folders above it may have an `__init__.py`: Optimum's own files are in the same namespace.
"""

from hf_structprune.commands.optimum import PruneCommand


REGISTER_COMMANDS = [PruneCommand]
