"""Measure the cost of a deployed exchange besides training and evaluation.

Flower starts a fresh process for every message, so each exchange loads Python, torch and the base
model again. The commands of the deployment guide start a federation over TLS with node keys on this
machine, and the time of its exchanges is split into parts (`deployment.exchanges`). It has one
site: several would share this machine's cores, unlike real ones. The base models are the
shipped ``tiny-llava`` and a random checkpoint of 0.5 B parameters in Hugging Face format, read from
the operating system's file cache, the best case.

Run ``python benchmarks/deployment/run.py`` (about 6 minutes, 6 GiB, 2 GB of disk) to update
``benchmarks/results/deployment.json``; ``--quick`` splits a made-up run and writes nothing.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import RESULTS, write_record

from deployment.exchanges import PARTS, measure_exchanges

RESULT = RESULTS / "deployment.json"
SETTINGS = "train.epochs=1 train.batch_size=4 evaluation.max_new_tokens=4 strategy.num_neighbors=1"
SITE = "north-hospital"


def measure(folder: Path, *, base: Path | None = None) -> dict[str, Any]:
    """Run a federation and measure its exchanges; without a base, on ``tiny-llava``."""
    from deployment.federation import run_federation

    words, more = SETTINGS, ""
    if base is not None:
        words += f" model.path={base} model.dtype=bfloat16 model.sent_dtype=bfloat16"
        more = f'model-path = "{base}"\n'
    done = run_federation(folder, {SITE: "vqa"}, words, site_config=more)
    lives = {SITE: [process.began for process in done.watch.lives(SITE, "flwr-clientapp")]}
    return summary(measure_exchanges(done.events, done.began, lives)) | {"gateway": done.gateway}


def summary(exchanges: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all exchanges and the mean over those after the first one.

    The first exchange also waits for its sites, and fills the file cache for later ones.
    """
    later = exchanges[1:]
    means = {
        name: round(mean(e["parts_seconds"][name] for e in later if name in e["parts_seconds"]), 2)
        for name in PARTS
        if any(name in e["parts_seconds"] for e in later)
    }
    return {
        "without_work_seconds": round(mean(e["without_work_seconds"] for e in later), 2),
        "parts_seconds": means,
        "exchanges": exchanges,
    }


def make_example() -> dict[str, Any]:
    """Split a made-up run of two clients: exchange 2 is 4 s of roster, 20 s of sessions, 1 s."""
    events: list[dict[str, Any]] = []
    for number, begin in ((1, 0.0), (2, 30.0)):
        events.append({"event": "roster", "round": number, "elapsed": begin + 4.0})
        for client in "ab":
            session = {
                "event": "train",
                "round": number,
                "client": client,
                "started": begin + 110.0,
            }
            session |= {"turn_seconds": 12.0, "seconds": 8.0, "elapsed": begin + 24.0}
            events.append(session)
            score = {"event": "evaluate", "round": number - 1, "client": client, "seconds": 1.0}
            events.append(score)
        events.append({"event": "round", "round": number, "elapsed": begin + 25.0, "seconds": 25.0})
    return summary(measure_exchanges(events, 100.0, dict.fromkeys("ab", [101.0, 105.0, 135.0])))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless this is a quick run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a made-up run, write nothing")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.quick:
        results: dict[str, Any] = {"example": make_example()}
    else:
        from random_base import HALF_BILLION, write_random_base

        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            parameters = write_random_base(folder / "base", HALF_BILLION)
            results = {
                "tiny-llava": measure(folder / "tiny"),
                f"a base of {parameters / 1e9:.1f} B": measure(
                    folder / "half", base=folder / "base"
                ),
            }
    print(json.dumps(results, indent=2))
    if not options.quick:
        write_record(options.output, results, packages=["flwr", "torch", "transformers"])
    return results


if __name__ == "__main__":
    main()
