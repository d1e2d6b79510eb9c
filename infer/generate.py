"""Answer prompts: see fasteagle_jax/commands/generate.py, or --help."""

import sys

from fasteagle_jax.commands.generate import main

if __name__ == "__main__":
    sys.exit(main())
