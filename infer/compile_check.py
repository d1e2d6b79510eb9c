"""Compile a run's programs from shapes: see fasteagle_jax/commands/compile_check.py, or --help."""

import sys

from fasteagle_jax.commands.compile_check import main

if __name__ == "__main__":
    sys.exit(main())
