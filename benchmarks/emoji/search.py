"""Search every method's learning-rate scale on validation rows, with equal budgets.

Every method that trains has four candidates of `train.lr_scale`, which multiplies all its learning
rates; FedAdam has four server learning rates. Two ablations, `pilot_stage1_only` and
`pilot_fedavg_lora`, are searched as well. All run on `both` with a seed that the comparison does
not use. The highest mean over tasks wins, diverged runs are last, and of equal candidates the
lowest is chosen. It is used on all federations; the other variants of Pilot use Pilot's.

    python benchmarks/emoji/search.py

writes ``benchmarks/emoji/rates.json`` and ``benchmarks/results/emoji/search.json``.
"""

import functools
import json
import statistics
import sys
from collections.abc import Mapping
from pathlib import Path

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import RESULTS, ROOT, write_record

from emoji.federation import task_of
from emoji.runs import PACKAGES, Job, JobResult, parser, run_all

METHODS = (
    "zero_shot",
    "local",
    "fedit",
    "fedavg_per_task",
    "fedprox",
    "fedadam",
    "ffa_lora",
    "fedsa_lora",
    "fedex_lora",
    "ditto",
    "feddpa",
    "feddat",
    "pilot",
    "pilot_auto",
    "centralised",
)
"""In the order of the tables."""
SEARCHED = (
    *(method for method in METHODS if method not in ("zero_shot", "pilot_auto")),
    "pilot_stage1_only",
    "pilot_fedavg_lora",
)
"""Methods with a rate of their own; other variants of Pilot use Pilot's."""
SCALE, SERVER_RATE = "train.lr_scale", "strategy.server_optimizer.learning_rate"
CANDIDATES = {SCALE: (0.25, 0.5, 1, 2), SERVER_RATE: (0.003, 0.01, 0.03, 0.1)}
SCENARIO, SEED = "both", 100
RATES = ROOT / "benchmarks" / "emoji" / "rates.json"
"""Method → the override that the search chose."""


def searched(method: str) -> str:
    """Return the setting to search for a method."""
    return SERVER_RATE if method == "fedadam" else SCALE


def candidates(method: str) -> list[Job]:
    """Return a job per candidate rate, the lowest rate first."""
    setting = searched(method)
    return [Job(SCENARIO, SEED, method, (f"{setting}={value}",)) for value in CANDIDATES[setting]]


def mean_over_tasks(found: JobResult) -> float:
    """Return the mean over tasks of the mean over a task's rows; minus infinity if it diverged."""
    if found.scores is None:
        return float("-inf")
    tasks: dict[str, list[float]] = {}
    for client, scores in found.scores.items():
        tasks.setdefault(task_of(client), []).extend(scores.values())
    return statistics.fmean(map(statistics.fmean, tasks.values()))


def chosen(scores: Mapping[str, float]) -> str:
    """Return the override with the highest score, the first of equal ones."""
    return max(scores, key=scores.__getitem__)


@functools.cache
def read_rates() -> Mapping[str, str]:
    """Return the rates that the search chose."""
    rates: dict[str, str] = json.loads(RATES.read_text())
    return rates


def rate_of(method: str) -> tuple[str, ...]:
    """Return a method's learning-rate override: its own if searched, or Pilot's."""
    if method == "zero_shot":
        return ()
    return (read_rates()[method if method in SEARCHED else "pilot"],)


def job_of(scenario: str, seed: int, label: str, *, rate: str = "") -> Job:
    """Return a job of `label`, a method followed by settings, at `rate` or the method's own."""
    method, *more = label.split()
    return Job(scenario, seed, method, (*((rate,) if rate else rate_of(method)), *more))


def label_of(job: Job) -> str:
    """Return a job's method with its settings besides the rate."""
    return " ".join((job.method, *job.overrides[1:]))


def main() -> None:
    """Search, and write the chosen rates with the scores behind them."""
    options = parser(__doc__).parse_args()
    found = run_all([job for method in SEARCHED for job in candidates(method)], options)
    scores: dict[str, dict[str, float]] = {}
    for one in found:
        scores.setdefault(one.job.method, {})[one.job.overrides[0]] = mean_over_tasks(one)
    rates = {method: chosen(of) for method, of in scores.items()}
    RATES.write_text(json.dumps(rates, indent=2) + "\n")
    shown = {
        method: {override: None if s < 0 else round(s, 4) for override, s in of.items()}
        for method, of in scores.items()
    }
    write_record(
        RESULTS / "emoji" / "search.json",
        {
            "scenario": SCENARIO,
            "seed": SEED,
            "in_parallel": options.jobs,
            "seconds": round(sum(one.seconds for one in found)),
            "scores": shown,
        },
        packages=PACKAGES,
    )
    print(json.dumps(rates, indent=2))


if __name__ == "__main__":
    main()
