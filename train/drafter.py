"""Train a drafter: see fasteagle_jax/commands/train_drafter.py, or --help."""

import sys

from fasteagle_jax.commands.train_drafter import main

if __name__ == "__main__":
    sys.exit(main())
