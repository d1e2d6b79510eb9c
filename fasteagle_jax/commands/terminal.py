"""Parts of all command-line programs: options with one-line errors, exit codes, a dtype by its name.

Exit codes: 0 done, 2 something the user can mend (one line on stderr says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, Protocol

from fasteagle_jax.decoding.sampling_fields import FIELDS, SamplingField
from fasteagle_jax.devices.chips import set_libtpu_flags
from fasteagle_jax.errors import UserError

USER_ERROR, INTERRUPTED, TERMINATED = 2, 130, 143


class Main(Protocol):
    """A program: takes the words after its name (None: those of the command line), returns its exit code."""

    def __call__(self, argv: Sequence[str] | None = None) -> int:
        """Runs it."""
        ...


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are one line and whose help keeps the lines of its texts."""

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        kwargs.setdefault("allow_abbrev", False)  # what an abbreviation means would change with new options
        super().__init__(**kwargs)

    def error(self, message: str) -> NoReturn:
        """Raises UserError, which `program` prints."""
        raise UserError(f"{message} (see {self.prog} --help)")


def program(main: Callable[[Sequence[str] | None], int | None]) -> Main:
    """`main` as a program: errors that a user can mend become one line on stderr and exit code 2."""

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        set_libtpu_flags()
        try:
            return main(argv) or 0
        except SystemExit as stop:  # argparse's --help
            return stop.code if isinstance(stop.code, int) else 0
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED)
        except UserError as error:
            return _fail(str(error))
        except BrokenPipeError:  # the reader of our output went away, `| head` for one
            sys.stdout = None  # type: ignore[assignment]  # nothing more to flush
            return 0
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            return _fail(f"{place}{error.strerror or error}")
        except MemoryError as error:
            return _fail(_OUT_OF_MEMORY + f" ({error})" * bool(str(error)))
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):  # how XLA says that memory has run out
                raise
            return _fail(_OUT_OF_MEMORY)

    return guarded


_OUT_OF_MEMORY = "out of memory: use a smaller batch, shorter lengths or --dtype bfloat16"


def _fail(message: str, code: int = USER_ERROR) -> int:
    print("error:" if code == USER_ERROR else "", " ".join(message.split()), file=sys.stderr)
    return code


# --- types of options -------------------------------------------------------------------------------------------


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of at least {least}")
        return value

    return parse


def add_sampling_options(parser: Any, temperature: float) -> None:
    """Adds an option for each sampling field, to be read with `sampling_fields.from_options`."""
    group = parser.add_argument_group("sampling")
    row = FIELDS["temperature"]
    _add_sampling_option(group, row, temperature, f"{row.help} (default {temperature:g})")
    add_filter_options(group)


def add_filter_options(group: Any) -> None:
    """Adds an option for each sampling field but temperature."""
    for name, row in FIELDS.items():
        if name != "temperature":
            _add_sampling_option(group, row, row.default, row.help)


def _add_sampling_option(group: Any, row: SamplingField, default: float, help: str) -> None:
    group.add_argument(row.option, type=row.python_type, default=default, metavar=row.metavar, help=help)


def add_dtype_option(parser: Any, note: str) -> None:
    """Adds --dtype, to be read with `dtype_named`."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help=f"of the weights; {note}")


def dtype_named(name: str | None, on_cpu: str = "float32") -> Any:
    """The jnp dtype of --dtype; where it was not given, `on_cpu` on a CPU and bfloat16 on an accelerator."""
    import jax
    import jax.numpy as jnp

    name = name or (on_cpu if jax.default_backend() == "cpu" else "bfloat16")
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16}[name]


def add_share_options(parser: Any, what: str) -> None:
    """Adds the options that `join` reads; `what` is shared, e.g. "the lines"."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed", action="store_true", help="be one of those that jax.distributed finds; implied by the rest"
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="where process 0 listens; also JAX_COORDINATOR_ADDRESS"
    )
    group.add_argument("--num-processes", type=whole(1), metavar="N", help=f"that share {what}")
    group.add_argument("--process-id", type=whole(0), metavar="I", help="this one, from 0")
