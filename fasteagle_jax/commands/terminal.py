"""Parts of all command-line programs: options with one-line errors, exit codes, a dtype by its name.

Exit codes: 0 done, 2 something the user can mend (one line on stderr says what), 130 interrupted.
"""

from __future__ import annotations

import argparse
import functools
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from fasteagle_jax.decoding.sampling_fields import FIELDS, RULE_FIELDS, SamplingField
from fasteagle_jax.devices.chips import set_libtpu_flags
from fasteagle_jax.devices.compiled import keep_compiled
from fasteagle_jax.errors import UserError
from fasteagle_jax.io.text import parse_json

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


# Packages that decoding does without, and the extra of this package that installs each.
EXTRAS = {
    "datasets": "train",
    "llguidance": "grammar",
    "matplotlib": "plot",
    "orbax": "train",
    "pyarrow": "ray",
    "ray": "ray",
    "tensorboardX": "train",
    "wandb": "wandb",
}


def not_installed(error: ModuleNotFoundError) -> str | None:
    """What to say of a missing package that an extra installs; None of any other."""
    package = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(package)
    return extra and f"{package} is not installed: pip install 'fasteagle-jax[{extra}]'"


def program(main: Callable[[Sequence[str] | None], int | None], keeps_compiled: bool = True) -> Main:
    """`main` as a program: errors that a user can mend become one line on stderr and exit code 2.

    What it compiles is kept in the user's cache folder (see `keep_compiled`) unless `keeps_compiled` is False.
    """

    @functools.wraps(main)
    def guarded(argv: Sequence[str] | None = None) -> int:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)
        set_libtpu_flags()
        if keeps_compiled:
            keep_compiled()
        try:
            return main(argv) or 0
        except SystemExit as stop:  # argparse's --help
            return stop.code if isinstance(stop.code, int) else 0
        except KeyboardInterrupt:
            return _fail("interrupted", INTERRUPTED)
        except UserError as error:
            return _fail(str(error))
        except ModuleNotFoundError as error:
            if (message := not_installed(error)) is None:
                raise
            return _fail(message)
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


def add_rule_options(parser: Any) -> None:
    """Adds an option for each rule on logits, to be read with `rules_from_options`."""
    group = parser.add_argument_group("rules on the tokens of an answer")
    for row in RULE_FIELDS.values():
        help = f"{row.help} (default {row.default:g})" if row.default == 0 else row.help
        _add_sampling_option(group, row, row.default, help)
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_bias,
        default=[],
        metavar="ID=X",
        help="add X (-100 to 100) to the logit of a token; repeatable",
    )
    group.add_argument("--allowed-token-ids", nargs="+", type=whole(0), metavar="ID", help="choose no other tokens")
    group.add_argument(
        "--bad-words", action="append", default=[], metavar="TEXT", help="never write this text's tokens; repeatable"
    )
    group.add_argument(
        "--json-schema", type=Path, metavar="FILE", help="answer in JSON that follows a schema (llguidance)"
    )
    group.add_argument("--regex", metavar="R", help="answer with a text that matches R as a whole (llguidance)")


def rules_from_options(args: Any) -> dict[str, Any]:
    """SamplingParams' fields for the options of `add_rule_options`; none if the program does not have them."""
    if not hasattr(args, "bad_words"):
        return {}
    rules = {name: getattr(args, name) for name in (*RULE_FIELDS, "allowed_token_ids", "bad_words")}
    rules["logit_bias"] = dict(args.logit_bias)
    if args.json_schema is not None and args.regex is not None:
        raise UserError("--json-schema with --regex: leave one of them out")
    if args.json_schema is not None:
        rules["structured_outputs"] = {"json": _read_schema(args.json_schema)}
    elif args.regex is not None:
        rules["structured_outputs"] = {"regex": args.regex}
    return rules


def _read_schema(path: Path) -> dict[str, Any]:
    """The JSON schema in a file."""
    try:
        schema: Any = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): mend it") from None
    if not isinstance(schema, dict):
        raise UserError(f"{path} is no JSON schema: give an object")
    return schema


def _bias(text: str) -> tuple[int, float]:
    """An argparse type: a token and its bias."""
    token, _, bias = text.partition("=")
    try:
        return int(token), float(bias)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not understood: write ID=X, e.g. 5=-100") from None


def _add_sampling_option(group: Any, row: SamplingField, default: float, help: str) -> None:
    group.add_argument(row.option, type=row.python_type, default=default, metavar=row.metavar, help=help)


def add_dtype_option(parser: Any, note: str) -> None:
    """Adds --dtype, to be read with `dtype_named`."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "int8"), help=f"of the weights; {note}")


def dtype_named(name: str | None, on_cpu: str = "float32") -> Any:
    """The jnp dtype of --dtype; if it was not given, `on_cpu` on a CPU and bfloat16 on an accelerator."""
    import jax
    import jax.numpy as jnp

    name = name or (on_cpu if jax.default_backend() == "cpu" else "bfloat16")
    return {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}[name]


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


def add_ray_options(parser: Any) -> None:
    """Adds the options of a Ray cluster, to be checked with `check_ray_options`."""
    group = parser.add_argument_group("a Ray cluster")
    group.add_argument(
        "--ray",
        nargs="?",
        const="",
        metavar="ADDRESS",
        help="share the work by a cluster: HOST:PORT, or auto for this machine's; without ADDRESS that of RAY_ADDRESS, "
        "else Ray is started on this machine",
    )
    group.add_argument("--workers", type=whole(1), metavar="N", help="engines (default as many as the cluster holds)")
    group.add_argument(
        "--worker",
        metavar="KIND=N",
        help="what a worker takes: TPU=4, GPU=1 or CPU=1 (default the cluster's accelerators, as many as --mesh has; "
        "else one worker a machine)",
    )


def check_ray_options(args: argparse.Namespace) -> None:
    """Raises UserError for options of a Ray cluster without one, or beside those of `join`."""
    if args.ray is None and (args.workers is not None or args.worker is not None):
        raise UserError("--workers and --worker are of a Ray cluster: give --ray, or leave them out")
    shares = (args.coordinator, args.num_processes, args.process_id)
    if args.ray is not None and (args.distributed or any(value is not None for value in shares)):
        raise UserError("--ray shares the work out by itself: leave --distributed, --coordinator and the like out")
