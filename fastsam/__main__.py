"""`python -m fastsam`: the diagnosis; `python -m fastsam demo`: the demo; `python -m fastsam methods`: all methods."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastsam.commands import demo, diagnosis, methods


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsam",
        description="Without a command: what is installed, which backend each device gets and why, and whether the "
        "backends agree (exit status 0 only if they do).",
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    for module, help in (
        (demo, "train a small network on real handwritten digits, with and without SAM"),
        (methods, "list the methods of the SAM family: passes, memory, what is saved, paper, how to write it"),
    ):
        story, _, details = (module.__doc__ or "").partition("\n\n")
        parse = argparse.RawDescriptionHelpFormatter
        name = module.__name__.rpartition(".")[2]
        module.add_arguments(
            commands.add_parser(name, help=help, description=story, epilog=details, formatter_class=parse)
        )
    options = parser.parse_args(arguments)
    known = {"demo": demo.main, "methods": methods.main}
    return known[options.command](options) if options.command else diagnosis.main()


if __name__ == "__main__":
    sys.exit(main())
