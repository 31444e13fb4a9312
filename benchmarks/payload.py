"""Send the payload of LLaVA-1.5-7B's clients through a deployment, and measure memory.

The base model here is a random one of 0.4 B parameters whose layers are as wide as those of the 7B
model (4,096, images 1,024) and as many (32), but thin inside. With a LoRA of rank 160, adapter and
LoRA have exactly the parameters and tensors of LLaVA-1.5-7B at the paper's rank 64: 180,887,552 in
452, sent as bfloat16. The commands of the deployment guide start one federation over TLS with node
keys on this machine; its one site trains both stages, so its second exchange also receives the
other tasks' adapters. Codec, strategy, aggregation, checkpoint and private state are the app's own.

Memory is the peak of resident memory, sampled five times a second, of each machine's processes
together and of each program.

Run ``python benchmarks/payload.py`` (about 6 minutes, 10 GiB, 6 GB of disk) to update
``benchmarks/results/payload.json``, or ``--quick`` to send a small payload and write nothing.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from _record import RESULTS, write_record
from deployment.exchanges import measure_exchanges
from deployment.federation import SERVER, run_federation
from random_base import TINY, Size, write_random_base

RESULT = RESULTS / "payload.json"
SITE = "north-hospital"
WIDE = Size(
    vision_width=1024, vision_layers=2, width=4096, inner=768, layers=32, vocabulary=512, heads=1
)
RANK = 160
SENT_BY_7B = 180_887_552
"""Parameters that a client of LLaVA-1.5-7B sends, from ``benchmarks/plan.py``."""

SETTINGS = (
    "train.epochs=1 train.batch_size=2 evaluation.max_new_tokens=2 strategy.num_neighbors=1 "
    "strategy.rounds=1 model.dtype=bfloat16 model.sent_dtype=bfloat16"
)


def measure(folder: Path, size: Size, rank: int) -> dict[str, Any]:
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
    )
    sessions = [event for event in done.events if event["event"] == "train"]
    return {
        "base_parameters": parameters,
        "gateway": done.gateway,
        "exchanges": [
            {
                "stage": session["stage"],
                "down_bytes": session["bytes_down"],
                "up_bytes": session["bytes_up"],
            }
            | times
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


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, print, and write the result file unless this is a quick run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny base, write nothing")
    parser.add_argument("--output", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    size, rank = (TINY, 8) if options.quick else (WIDE, RANK)
    with tempfile.TemporaryDirectory() as name:
        results = measure(Path(name), size, rank)
    print(json.dumps(results, indent=2))
    if not options.quick:
        write_record(options.output, results, packages=["flwr", "torch", "transformers"])
    return results


if __name__ == "__main__":
    main()
