"""Answer a file of requests: see fasteagle_jax/commands/batch.py, or --help."""

import sys

from fasteagle_jax.commands.batch import main

if __name__ == "__main__":
    sys.exit(main())
