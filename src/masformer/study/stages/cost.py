"""Cost: operations and caches as counted, and times and memory as measured."""

from __future__ import annotations

from masformer.benchmarks.models import FULL as MEASURED_FULL
from masformer.cost import ModelShape, compare
from masformer.evaluation.intervals import bootstrap
from masformer.study.findings import Findings, Results
from masformer.study.models import config_of, plan_of
from masformer.study.settings import CostStage
from masformer.study.units import Place, Unit
from masformer.study.verdicts import is_faster
from masformer.study.works import Bench

STAGE = "cost"
SHOWN = ("name", "length", "median", "tokens_per_second", "speedup", "ideal", "cache_bytes", "peak_bytes")
WORDS = {"prefill": "a prompt", "decode": "new tokens after a prompt", "train": "a training step"}


def units(stage: CostStage, place: Place) -> list[Unit]:
    """One for each bench: what is compared is timed in one run."""
    return [
        Unit(_name(bench), STAGE, Bench(stage.model, bench, stage.plans, tuple(lengths), stage.repeats))
        for bench, lengths in stage.benches.items()
    ]


def _name(bench: str) -> str:
    return f"{STAGE}/{bench}"


def findings(stage: CostStage, place: Place, results: Results) -> Findings:
    """What is counted, what was measured, and whether what is saved is saved in time as well."""
    shape = ModelShape.of(config_of(stage.model))
    plans = {name: plan_of(stage.model, text) for name, text in stage.plans.items()}
    counted = [
        {
            "name": name,
            "plan": str(plan),
            "length": each.plan.length,
            "attention": each.fractions["attention_flops"],
            "forward": each.fractions["forward_flops"],
            "cache": each.fractions["kv_cache_bytes"],
            "attention_flops": each.plan.attention_flops,
            "kv_cache_bytes": each.plan.kv_cache_bytes,
        }
        for name, plan in plans.items()
        for each in compare(shape, plan, stage.counted)
    ]
    made = Findings(
        "Cost",
        "Operations and cache as counted, as shares of all full; and medians of rounds in one run, as times "
        "faster than transformers by itself. Intervals in the verdicts are 95% over rounds.",
        {"counted": counted},
    )
    times: list[str] = []
    for bench in stage.benches:
        if _name(bench) not in results:
            continue
        rows = results[_name(bench)]["results"]
        made.rows[f"{WORDS[bench]}, measured"] = [
            {key: row[key] for key in SHOWN if key in row} | {"rounds": len(row["seconds"])} for row in rows
        ]
        longest = max(row["length"] for row in rows)
        seconds = {row["name"]: row["seconds"] for row in rows if row["length"] == longest}
        what = f"{WORDS[bench]} of {longest:,} tokens"
        ratios = {
            name: bootstrap([full / plan for full, plan in zip(seconds[MEASURED_FULL], seconds[name], strict=True)])
            for name, plan in plans.items()
            if name in seconds and not plan.is_full
        }
        titled = {f"{name}, {what}": found for name, found in ratios.items()}
        made.verdicts.append(is_faster(f"What a mix saves, it saves in time: {WORDS[bench]}.", titled))
        if ratios:
            times.append(f"{what}: " + ", ".join(f"{name} {found.mean:.2f}" for name, found in ratios.items()))
    if times:
        made.short = f"Measured, times as fast as full attention: {'; '.join(times)}."
    return made
