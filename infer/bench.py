"""Plain against speculative decoding: see fasteagle_jax/commands/bench.py, or --help."""

import sys

from fasteagle_jax.commands.bench import main

if __name__ == "__main__":
    sys.exit(main())
