"""The command line: see the package."""

import sys

from benchmarks.studies.framework import main

main(sys.argv[1:])
