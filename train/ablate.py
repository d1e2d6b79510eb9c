"""Train variants side by side: see fasteagle_jax/commands/ablate.py, or --help."""

import sys

from fasteagle_jax.commands.ablate import main

if __name__ == "__main__":
    sys.exit(main())
