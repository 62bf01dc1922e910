"""The paper's experiments at a scale of choice: tiny on a laptop, small, on one GPU, or as in the paper.

A scale (`scale`) is a file that says what each stage (`stages`) trains and measures, in the `settings` of each. Stages
are made of units (`units`), which call what the package has (`works`) and are done once; what they found becomes rows,
drawings and verdicts (`findings`, `verdicts`), and a report (`report`). `run` puts it together.
"""

from masformer.study.report import report_files, write_report
from masformer.study.run import (
    STAGES,
    Stage,
    forecast_rows,
    forecast_table,
    parts_of,
    run_study,
    stages_of,
    units_of,
    write_recipes,
)
from masformer.study.scale import SCALES, Scale, data_names, load_scale, named_files, needs_model
from masformer.study.units import Place

__all__ = [
    "SCALES",
    "STAGES",
    "Place",
    "Scale",
    "Stage",
    "data_names",
    "forecast_rows",
    "forecast_table",
    "load_scale",
    "named_files",
    "needs_model",
    "parts_of",
    "report_files",
    "run_study",
    "stages_of",
    "units_of",
    "write_recipes",
    "write_report",
]
