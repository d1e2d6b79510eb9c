"""Store the target's features of the training data: see fasteagle_jax/commands/prepare_features.py, or --help."""

import sys

from fasteagle_jax.commands.prepare_features import main

if __name__ == "__main__":
    sys.exit(main())
