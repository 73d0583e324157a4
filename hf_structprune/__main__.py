"""`python -m hf_structprune` is `hf-structprune`; so `accelerate launch -m hf_structprune prune ...` finds it."""

import sys

from .commands.cli import main


if __name__ == "__main__":
    sys.exit(main())
