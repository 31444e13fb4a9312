"""Send the payload of LLaVA-1.5-7B's clients through a deployment, and measure memory.

The base model here is a random one of 0.4 B parameters whose layers are as wide as those of the 7B
model (4,096, images 1,024) and as many (32), but thin inside. With a LoRA of rank 160, adapter and
LoRA have exactly the parameters and tensors of LLaVA-1.5-7B at the paper's rank 64: 180,887,552 in
452, sent as bfloat16. The commands of the deployment guide start one federation over TLS with node
keys on this machine; its one site trains both stages, so its second exchange also receives the
other tasks' adapters. Codec, strategy, aggregation, checkpoint and private state are the app's own.

The federation runs without and with the site's warm service (``pilot-flwr site serve``). After
each run, the same bytes are downloaded and uploaded over plain HTTPS between two processes, with
the same certificates, and the upload is written to disk: that is the yardstick for the seconds of
an exchange without training and evaluation.

Memory is the peak of resident memory, sampled five times a second, of each machine's processes
together and of each program.

Run ``python benchmarks/payload.py`` (about 10 minutes, 10 GiB, 6 GB of disk) to update
``benchmarks/results/payload.json``, ``--mode warm`` or ``--mode cold`` to measure one of the two
(the other is kept if it is of the same commit), or ``--quick`` to send a small payload and write
nothing.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _plain_transfer import plain_seconds
from _record import RESULTS, commit, write_record
from deployment.exchanges import measure_exchanges
from deployment.federation import SERVER, run_federation
from random_base import TINY, Size, write_random_base

RESULT = RESULTS / "payload.json"
SITE = "north-hospital"
WIDE = Size(
    vision_width=1024, vision_layers=2, width=4096, inner=768, layers=32, vocabulary=512, heads=1
)
RANK = 160
MODES = ("cold", "warm")
"""Without and with the site's warm service."""

SENT_BY_7B = 180_887_552
"""Parameters that a client of LLaVA-1.5-7B sends, from ``benchmarks/plan.py``."""

SETTINGS = (
    "train.epochs=1 train.batch_size=2 evaluation.max_new_tokens=2 strategy.num_neighbors=1 "
    "strategy.rounds=1 model.sent_dtype=bfloat16"  # not every CPU multiplies bfloat16 fast
)


def measure(folder: Path, size: Size, rank: int, *, warm: bool) -> dict[str, Any]:
    """Run two exchanges with a base of this size and a LoRA of this rank; return the figures."""
    base = folder / "base"
    parameters = write_random_base(base, size)
    words = f"{SETTINGS} model.path={base} model.lora.rank={rank}"
    done = run_federation(
        folder / "federation",
        {SITE: "vqa"},
        words,
        train=4,
        test=2,
        site_config=f'model-path = "{base}"\n',
        warm=warm,
    )
    sessions = [event for event in done.events if event["event"] == "train"]
    tls = folder / "federation" / SERVER / "tls"
    return {
        "base_parameters": parameters,
        "gateway": done.gateway,
        "exchanges": [
            _beside_plain(
                session,
                times,
                plain_seconds(tls, folder, down=session["bytes_down"], up=session["bytes_up"]),
            )
            for session, times in zip(
                sessions, measure_exchanges(done.events, done.began, done.moments), strict=True
            )
        ],
        "peak_bytes": {
            "server": done.watch.peaks[SERVER],
            "client": done.watch.peaks[SITE],
        },
        "peak_bytes_by_program": {
            "server": done.watch.peak_by_program(SERVER),
            "client": done.watch.peak_by_program(SITE),
        },
    }


def _beside_plain(
    session: dict[str, Any], times: dict[str, Any], plain: dict[str, float]
) -> dict[str, Any]:
    return {
        "stage": session["stage"],
        "down_bytes": session["bytes_down"],
        "up_bytes": session["bytes_up"],
        **times,
        "plain_seconds": plain,
        "times_plain": round(times["without_work_seconds"] / sum(plain.values()), 2),
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless this is a quick run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny base, write nothing")
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--mode", choices=MODES, action="append", help="default: both")
    options = parser.parse_args(arguments)
    size, rank = (TINY, 8) if options.quick else (WIDE, RANK)
    results = {}
    if not options.quick and options.output.is_file():
        record = json.loads(options.output.read_text())
        results = record["results"] if record["commit"] == commit() else {}
    for mode in options.mode or MODES:
        with tempfile.TemporaryDirectory() as name:
            results[mode] = measure(Path(name), size, rank, warm=mode == "warm")
        if not options.quick:
            write_record(options.output, results, packages=["flwr", "torch", "transformers"])
    print(json.dumps(results, indent=2))
    return results


if __name__ == "__main__":
    main()
