"""Measure the cost of a deployed exchange besides training and evaluation.

Flower starts a fresh process for every message. The commands of the deployment guide start a
federation over TLS with node keys on this machine, and the time of its exchanges is split into
parts (`deployment.exchanges`), for

- ``base``: the code of an earlier commit, with its own benchmark, in the same environment;
- ``cold``: the present code; each message loads torch and the base model again;
- ``warm``: the present code with ``pilot-flwr site serve`` at the site.

There is one site: several would share this machine's cores, unlike real ones. The base models are
the shipped ``tiny-llava`` and a random checkpoint of 0.5 B parameters in Hugging Face format, read
from the operating system's file cache, the best case. The site has its own copy of it, and the
kernel reports how often its weights are opened.

Run ``python benchmarks/deployment/run.py`` (about 14 minutes, 6 GiB, 3 GB of disk) to update
``benchmarks/results/deployment.json``, with ``--model`` and ``--mode`` in parts: results of the
same commit are kept. ``--quick`` splits a made-up run and writes nothing.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from _record import RESULTS, commit, write_record

from deployment.exchanges import PARTS, measure_exchanges

RESULT = RESULTS / "deployment.json"
BASE = "7df00890cf524806a76636a15c17f068c2973671"
"""The commit that the deployment's first result names."""

TINY, HALF = "tiny-llava", "a base of 0.5 B"
MODES = ("base", "cold", "warm")
SETTINGS = "train.epochs=1 train.batch_size=4 evaluation.max_new_tokens=4 strategy.num_neighbors=1"
ROUNDS = 3
EXAMPLES = {TINY: {}, HALF: {"train": 4, "test": 2}}
"""Of the site: few for the larger base, whose training is not what is measured."""
SITE, TASK = "north-hospital", "vqa"


def measure(folder: Path, mode: str, *, tree: Path | None, base: Path | None) -> dict[str, Any]:
    """Run a federation and measure its exchanges; without a base, on ``tiny-llava``.

    `tree` is the checkout of the earlier commit.
    """
    from deployment.earlier import run_earlier
    from deployment.federation import run_federation
    from deployment.watch import Opened

    words, more = f"{SETTINGS} strategy.rounds={ROUNDS}", ""
    examples = EXAMPLES[HALF if base else TINY]
    load, began_at = os.getloadavg()[0], time.time()
    with ExitStack() as stack:
        opened = None
        if base is not None:
            words += f" model.path={base} model.dtype=bfloat16 model.sent_dtype=bfloat16"
            own = base.parent / "base-of-the-site"
            more = f'model-path = "{own}"\n'
            (weights,) = own.glob("*.safetensors")
            opened = stack.enter_context(Opened(weights))
        if tree is not None:
            events, began, gateway, moments = run_earlier(
                tree, folder, SITE, TASK, words, site_config=more, **examples
            )
        else:
            done = run_federation(
                folder, {SITE: TASK}, words, site_config=more, warm=mode == "warm", **examples
            )
            events, began, gateway = done.events, done.began, done.gateway
            moments = done.moments[SITE]
    measured = summary(measure_exchanges(events, began, {SITE: moments}))
    if opened is not None:
        ends = [began + event["elapsed"] for event in events if event["event"] == "round"]
        times = [when for when in opened.times if ends[0] < when <= ends[-1]]
        measured["weights_opened_after_first"] = len(times)
    seconds = round(time.time() - began_at, 1)
    return measured | {"gateway": gateway, "load_before": round(load, 2), "seconds": seconds}


def summary(exchanges: list[dict[str, Any]]) -> dict[str, Any]:
    """Return all exchanges and the medians over those after the first one.

    The first exchange also waits for its sites, and fills the file cache for later ones.
    """
    later = exchanges[1:]
    medians = {
        name: round(
            median(e["parts_seconds"][name] for e in later if name in e["parts_seconds"]), 2
        )
        for name in PARTS
        if any(name in e["parts_seconds"] for e in later)
    }
    return {
        "without_work_seconds": round(median(e["without_work_seconds"] for e in later), 2),
        "parts_seconds": medians,
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
            session |= {"turn_seconds": 10.0, "seconds": 8.0, "elapsed": begin + 24.0}
            events.append(session)
            score = {"event": "evaluate", "round": number - 1, "client": client, "seconds": 1.0}
            events.append(score)
        events.append({"event": "round", "round": number, "elapsed": begin + 25.0, "seconds": 25.0})
    moments = [
        (begin + when, kind)
        for begin in (0.0, 30.0)
        for when, kind in [
            (101.0, "process"),  # the query's
            (104.5, "receiving"),
            (105.5, "process"),
            (107.0, "running"),
            (122.0, "sending"),
        ]
    ]
    return summary(measure_exchanges(events, 100.0, dict.fromkeys("ab", moments)))


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless this is a quick run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a made-up run, write nothing")
    parser.add_argument("--model", choices=["tiny", "half"], nargs="*", default=["tiny", "half"])
    parser.add_argument("--mode", choices=MODES, nargs="*", default=MODES)
    parser.add_argument("--base", default=BASE, help="the earlier commit")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.quick:
        results: dict[str, Any] = {"example": make_example()}
        print(json.dumps(results, indent=2))
        return results
    results = of_this_commit(options.output)
    for name in options.model:
        for title, mode, measured in run_modes(name, options.mode, options.base):
            print(f"{title}, {mode}: {json.dumps(measured, indent=2)}", flush=True)
            found = results.get(title, {}) | {mode: measured}
            results[title] = {mode: found[mode] for mode in MODES if mode in found}
            write_record(options.output, results, packages=["flwr", "torch", "transformers"])
    return results


def run_modes(
    name: str, modes: Sequence[str], earlier: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Measure a base model in several modes, one after the other; yield title, mode and figures."""
    from random_base import HALF_BILLION, write_random_base

    from deployment.earlier import checkout

    title, base = TINY, None
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        if name == "half":
            title, base = HALF, Path(folder) / "base"
            write_random_base(base, HALF_BILLION)
            shutil.copytree(base, Path(folder) / "base-of-the-site")
        tree = stack.enter_context(checkout(earlier)) if "base" in modes else None
        for mode in modes:
            before = tree if mode == "base" else None
            measured = measure(Path(folder) / mode, mode, tree=before, base=base)
            yield title, mode, measured | ({"commit": earlier} if before is not None else {})


def of_this_commit(path: Path) -> dict[str, Any]:
    """Return the results of a file that this commit has written, so that parts add up."""
    if not path.exists():
        return {}
    record = json.loads(path.read_text())
    return dict(record["results"]) if record["commit"] == commit() else {}


if __name__ == "__main__":
    main()
