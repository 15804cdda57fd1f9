"""The ``dsv3`` command: a table of names, and one place where errors become messages.

Each command lives in a module of its own that has ``add_arguments(parser)`` and ``run(args) -> int``.
The module is imported only when its command is called, so ``dsv3 doctor`` starts at once and still works
where another command's imports do not.
"""

import argparse
import importlib
import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

from rich.text import Text

from dsv3lib.errors import Dsv3Error
from dsv3lib.terminal import plain_console, write_anything

EXIT_ERROR = 2  # the same as argparse's own, for every refusal that names its cause
EXIT_INTERRUPTED = 130  # what a shell reports for a program that Ctrl-C ended


@dataclass(frozen=True)
class Command:
    """One subcommand: the module that carries it out, and its line in the help."""

    module: str
    help: str


COMMANDS: Mapping[str, Command] = MappingProxyType(
    {
        "lab": Command("dsv3lib.course.lab", "open your own copy of the course in JupyterLab"),
        "progress": Command("dsv3lib.course.report", "say how far you are in the course, or hand it in"),
        "doctor": Command("dsv3lib.doctor", "say what this machine has, and what works without the rest"),
        "train": Command("dsv3lib.training.run.command", "train a small DeepSeek-V3 on real text"),
        "watch": Command("dsv3lib.viz.watch_command", "see the experts' load of a run, live in the browser"),
        "generate": Command("dsv3lib.inference.generate_command", "let a trained model write"),
        "pipeline": Command("dsv3lib.pipeline.command", "plan a training cluster; show a schedule, or run it here"),
        "kernels": Command(
            "dsv3lib.kernels.toolchain.command", "compile every GPU kernel and say what its code holds"
        ),
    }
)


def main(argv: Sequence[str] | None = None, commands: Mapping[str, Command] = COMMANDS) -> int:
    """Runs one ``dsv3`` command.

    Args:
        argv: the words after ``dsv3``; the process's own by default.
        commands: the table of commands by name.

    Returns:
        The exit status: what the command returns, 2 after an error that was told in words, 130 after Ctrl-C.
    """
    write_anything()
    arguments = _top_parser(commands).parse_args(argv)
    if arguments.command is None:
        _top_parser(commands).print_help()
        return 0
    return _run(arguments.command, commands[arguments.command], arguments.rest, arguments.debug)


def _run(name: str, command: Command, rest: Sequence[str], debug: bool) -> int:
    """Imports a command's module, parses its arguments, runs it, and turns what it raises into words."""
    parser = argparse.ArgumentParser(prog=f"dsv3 {name}", description=f"{command.help.capitalize()}.")
    parser.add_argument("--debug", action="store_true", default=debug, help="show the traceback of an error")
    debug = debug or "--debug" in rest  # known before parsing, for errors that come before it
    try:
        module = importlib.import_module(command.module)
        module.add_arguments(parser)
        status = module.run(parser.parse_args(rest))
        sys.stdout.flush()  # a reader that is gone shows here, inside the try, and not at exit
        return status
    except Dsv3Error as error:
        return _tell(f"{type(error).__name__}: {error}", debug)
    except ImportError as error:
        return _tell(
            f"dsv3 {name} cannot start: {error}. Run `make setup` (or pip install -e '.[lab]'), "
            f"then `dsv3 doctor`; --debug shows where it happened.",
            debug,
        )
    except KeyboardInterrupt:
        return _tell("Stopped by Ctrl-C.", debug, EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output has gone (`dsv3 doctor | head -1`): nothing is wrong, nothing left to do.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _top_parser(commands: Mapping[str, Command]) -> argparse.ArgumentParser:
    """The parser of ``dsv3`` itself; a command's own arguments are left for the command."""
    lines = [f"  {name:10} {command.help}" for name, command in commands.items()]
    parser = argparse.ArgumentParser(
        prog="dsv3",
        usage="dsv3 [--help] [--version] [--debug] COMMAND ...",
        description="DeepSeek-V3, built for real.",
        epilog="\n".join(["commands:", *lines, "", "dsv3 COMMAND --help tells more of each."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dsv3lib {_own_version()}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("command", nargs="?", choices=[*commands], help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parser


def _own_version() -> str:
    """The installed version, or a word where the package runs from a folder that was never installed."""
    try:
        return version("dsv3lib")
    except PackageNotFoundError:
        return "(not installed)"


def _tell(message: str, debug: bool, status: int = EXIT_ERROR) -> int:
    """Prints a message in red on the error stream, after the traceback if it was asked for."""
    if debug:
        traceback.print_exc()
    one_line = " ".join(message.split())
    plain_console(stderr=True).print(Text(one_line, style="red"))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
