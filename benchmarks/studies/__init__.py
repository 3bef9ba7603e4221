"""Studies: what SAM does, on data and networks small enough for a laptop, one file each.

    python -m benchmarks.studies                       # what there is
    python -m benchmarks.studies label_noise --quick   # few seeds
    python -m benchmarks.studies all --quick           # each, one after the other
    python -m benchmarks.studies page                  # docs/studies/ from the results that are committed

A study writes NAME.json (each run, settings, command, machine, versions), NAME.png and NAME.md. Its module has
DEFAULTS and QUICK (settings, which are its options, too), `run`, `report`, `plot`, and THEIRS: what others report.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parent.parent))  # the other benchmarks are scripts

NAMES = (
    *("toy", "label_noise", "significance", "p_norm", "m_sharpness", "second_order"),
    *("hessian", "ascent_fraction", "late_phase", "methods", "finetune"),
)
