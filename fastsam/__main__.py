"""`python -m fastsam`: the diagnosis; `python -m fastsam demo`: the demo."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from fastsam.commands import demo, diagnosis


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m fastsam",
        description="Without a command: what is installed, which backend each device gets and why, and whether the "
        "backends agree (exit status 0 only if they do).",
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    story, _, details = (demo.__doc__ or "").partition("\n\n")
    demo.add_arguments(
        commands.add_parser(
            "demo",
            help="train a small network on real handwritten digits, with and without SAM",
            description=story,
            epilog=details,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    )
    options = parser.parse_args(arguments)
    return demo.main(options) if options.command == "demo" else diagnosis.main()


if __name__ == "__main__":
    sys.exit(main())
