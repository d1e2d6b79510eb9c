"""Prepare training data: see fasteagle_jax/commands/prepare_data.py, or --help."""

import sys

from fasteagle_jax.commands.prepare_data import main

if __name__ == "__main__":
    sys.exit(main())
