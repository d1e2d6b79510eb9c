"""A target with experts out of a dense one: see fasteagle_jax/commands/sparsify.py, or --help."""

import sys

from fasteagle_jax.commands.sparsify import main

if __name__ == "__main__":
    sys.exit(main())
