"""Make the pages' tables from ``benchmarks/results``, so that no number is typed.

Run ``python benchmarks/tables.py`` to print the benchmark table, ``--readme`` to renew all tables
of the README and of the pages that have some: what stands between ``<!-- table: NAME -->`` and
``<!-- end -->``.
"""

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from _record import RESULTS, ROOT
from scenarios.tables import scenario_tables

from pilot_flwr.server.tables import markdown
from pilot_flwr.wording import human_bytes

PAGES = (
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("deployment", "privacy", "scenarios")),
)
Results = dict[str, Any]
Rows = list[list[str]]
"""What was measured, the figure, the goal."""


def connector_rows(results: Results) -> Rows:
    """Rows of ``connector.json``."""
    connectors, loss = results["connectors"], results["reductions"]
    ratio, goals = connectors["wall"]["ratio"], connectors["goals"]
    size, shape = connectors["size"], loss["shape"]
    flat, times = shape["N"] * shape["C"], loss["wall"]["median_seconds"]
    peak = loss["peak_bytes"]
    return [
        [
            f"CT-MoA forward + backward, N={size['tokens']}, D={size['vision']}, "
            f"C={size['channels']}, T={connectors['tasks']}, to its bare matrix products",
            f"{ratio['ct_moa_to_products']:.2f} x",
            f"<= {goals['ct_moa_to_products']} x",
        ],
        [
            "difference loss (normalized) to stage 1's forward + backward, same size",
            f"{ratio['difference_loss_to_stage1']:.1%}",
            f"<= {goals['difference_loss_to_stage1']:.0%}",
        ],
        *(
            [
                f"difference loss ({name}), N·C={flat:,}, B={shape['B']}, forward + backward, "
                "against the (N·C)² formula",
                f"{milliseconds(times[name])} and {human_bytes(peak[name])} against "
                f"{milliseconds(times['literal'])} and {human_bytes(peak['literal'])}",
                "",
            ]
            for name in ("normalized", "official")
        ),
        [
            "that matrix alone at LLaVA-1.5-7B's N·C (computed)",
            f"{loss['literal_matrix_bytes_at_llava_size'] / 1e12:.1f} TB",
            "",
        ],
    ]


def aggregation_rows(results: Results) -> Rows:
    """Rows of ``aggregation.json``."""
    main, accuracy = results["main"], results["accuracy"]
    memory, ratio = main["memory"], main["wall"]["ratio"]
    allowed = memory["output_mib"] + memory["largest_stacked_tensor_mib"]
    size = f"{main['clients']} clients x {main['parameters'] / 1e6:.1f} M float32"
    curve = [
        f"{point['clients']}: {point['wall']['ratio']['to_flower']:.2f} x"
        for point in results["curve"]
    ]
    return [
        [
            f"distances + ATA, {size}, to Flower's own weighted average",
            f"{ratio['to_flower']:.2f} x",
            "<= 4 x",
        ],
        [
            "the same, in 56 large tensors (r=64)",
            f"{results['few_large_tensors']['wall']['ratio']['to_flower']:.2f} x",
            "",
        ],
        [
            "the same, if decoding the records, which Flower's function does, is added to ours; "
            "to the bare arithmetic of Flower's",
            f"{ratio['with_decoding_to_flower']:.2f} x; "
            f"{ratio['to_flower_arithmetic_alone']:.2f} x",
            "",
        ],
        [
            "extra peak memory of distances; of ATA",
            f"{memory['distances_extra_peak_mib']:.1f} MiB; {memory['mix_extra_peak_mib']:.1f} MiB",
            f"<= {allowed:.1f} MiB (output + one stacked tensor)",
        ],
        [
            "relative error of distances, common offset "
            f"{accuracy['common_offset_over_differences']:,} times the differences",
            f"{accuracy['distances_max_relative_error']:.1e}",
            "<= 1e-6",
        ],
        [
            f"the same ratio by number of clients, {results['curve'][0]['parameters'] / 1e6:.1f} M",
            ", ".join(curve),
            "",
        ],
    ]


def client_turn_rows(results: Results) -> Rows:
    """Rows of ``client_turn.json``."""
    rows = []
    for name in ("tiny-llava", "random"):
        measured = results[name]
        seconds = measured["wall"]["median_seconds"]
        millions = measured["parameters"]["base"] / 1e6
        title = name if name != "random" else "random checkpoint"
        rows.append(
            [
                f"a client's turn with the base warm, against loading it, {title} "
                f"({millions:,.1f} M), one example, one step",
                f"{seconds['warm_turn']:#.3g} s against {seconds['cold_turn']:#.3g} s "
                f"({measured['wall']['ratio']['cold_to_warm']:.1f} x); of it "
                f"{measured['training_seconds_in_a_turn']:#.3g} s training, swap "
                f"{seconds['swap_in']:.3f} s in, {seconds['swap_out']:.3f} s out",
                "",
            ]
        )
    return rows


def demo_rows(results: Results) -> Rows:
    """Rows of ``demo.json``."""
    first, later = results["first_exchange"], results["idle_share_after_first"]
    goal = results["goals"]["idle_share_after_first"]
    return [
        [
            "demo: share of an exchange in which no client trains or evaluates, after the first",
            f"{later['overall']:.1%} (worst exchange {later['largest']:.1%})",
            f"<= {goal:.0%}",
        ],
        [
            "the same for the first exchange, which starts Ray and torch",
            f"{first['idle_share']:.1%} of {first['wall_seconds']:.0f} s",
            "",
        ],
    ]


def rows_rows(results: Results) -> Rows:
    """Rows of ``rows.json``."""
    names = {"array": "LLaVA JSON", "lines": "JSONL"}
    return [
        [
            f"finding {measured['rows']:,} rows in {measured['file_mb'] / 1000:.1f} GB of "
            f"{names[kind]}; reading one of them; extra peak memory",
            f"{measured['walk_seconds']:.1f} s; {measured['random_row_microseconds']:.0f} µs; "
            f"{measured['extra_peak_mb']:.0f} MB",
            "",
        ]
        for kind, measured in results.items()
    ]


def gpu_rows(results: Results) -> Rows:
    """Rows of ``gpu.json``; what a run that was stopped did not come to has none."""
    goals = results["goals"]
    rows = [row for best in results.get("best", []) for row in best_rows(best, results)]
    for stage in (1, 2):
        ratios = [
            f"{case['micro_batch']}{'*' * case['gradient_checkpointing']}: "
            f"{case['time_to_plain']:.2f} x, {case['peak_to_plain']:.2f} x"
            for case in results.get("comparisons", [])
            if case["stage"] == stage
        ]
        rows.append(
            [
                f"stage {stage}, time and peak memory to transformers + peft at the same "
                "micro-batch (*: with gradient checkpointing)",
                "; ".join(ratios),
                f"<= {goals['time_to_plain']:g} x, <= {goals['peak_to_plain']:g} x",
            ]
        )
    if switch := results.get("switch"):
        rows.append(
            [
                "another client's personalised model on the warm base "
                f"({human_bytes(switch['bytes'])} from memory and the cached disk)",
                f"{switch['seconds']:.2f} s",
                f"< {goals['switch_seconds']:g} s",
            ]
        )
    return rows


def best_rows(best: Results, results: Results) -> Rows:
    """Rows of one stage and setting of checkpointing at its fastest micro-batch."""
    goals = results["goals"]
    checkpointing = "with" if best["gradient_checkpointing"] else "without"
    rows = [
        [
            f"local training of {results['size']['name']}, stage {best['stage']}, {checkpointing} "
            f"gradient checkpointing, micro-batch {best['micro_batch']}",
            f"{best['tokens_per_second']:,.0f} tokens/s, {best['examples_per_second']:.1f} "
            f"examples/s, peak {human_bytes(best['peak_bytes'])}",
            "",
        ],
        [
            "the same: operations needed, to the measured bf16 matrix rate "
            f"({results['matrix_flops'] / 1e12:.0f} TFLOP/s)",
            f"{best['utilisation']:.1%}",
            f">= {goals['utilisation']:.0%}",
        ],
    ]
    if "plain_micro_batch" in best:
        rows.append(
            [
                "the same, to transformers + peft at its own best micro-batch "
                f"({best['plain_micro_batch']}): time of an example, peak memory",
                f"{best['time_to_plain']:.2f} x, {best['peak_to_plain']:.2f} x",
                f"<= {goals['time_to_plain']:g} x, <= {goals['peak_to_plain']:g} x",
            ]
        )
    return rows


def plan_rows(results: Results) -> Rows:
    """``plan.json`` has a table of its own, see `plan_table`; nothing in it is measured."""
    return []


def faults_rows(results: Results) -> Rows:
    """Rows of ``faults.json``."""
    phases = ", ".join(f"{count} {phase}" for phase, count in results["kills_by_phase"].items())
    return [
        [
            f"runs killed {results['kills']} times in all ({phases}) and resumed, bit-identical to "
            "one that was left alone",
            f"{results['identical']} of {results['runs']}",
            f"{results['runs']} of {results['runs']}",
        ]
    ]


def privacy_rows(results: Results) -> Rows:
    """Rows of ``privacy.json``, which has a table of its own as well, see `privacy_table`."""
    measured = [results["untrained"], *results["settings"]]
    told = [f"{epsilon_words(one)}: {one['score_mean_over_tasks']:.3f}" for one in measured]
    what = f"the demo's mean score by ε, clipped to {results['clip_norm']:g}; 0 is the base model"
    return [[what, "; ".join(told), ""]]


def privacy_table(record: Results) -> str:
    """Return the table of ``privacy.json``: a row per size of the noise."""
    results = record["results"]
    tasks = list(results["untrained"]["score_per_task"])
    several = len(results["run"]["seeds"]) > 1
    rows = [
        [
            "uploads",
            f"ε after {results['run']['exchanges']} exchanges, δ = {results['delta']:g}",
            *tasks,
            "mean over tasks",
            *["range over seeds"] * several,
        ]
    ]
    for measured in [results["untrained"], *results["settings"]]:
        low, high = measured.get("score_range_over_seeds", [measured["score_mean_over_tasks"]] * 2)
        rows.append(
            [
                upload_words(measured, results["clip_norm"]),
                epsilon_words(measured),
                *(f"{measured['score_per_task'][task]:.3f}" for task in tasks),
                f"{measured['score_mean_over_tasks']:.3f}",
                *[f"{low:.3f} to {high:.3f}"] * several,
            ]
        )
    return f"{markdown(rows)}\n{note(record)}\n"


def upload_words(measured: Results, clip_norm: float) -> str:
    """Return what was uploaded in a row of ``privacy.json``."""
    if "noise_multiplier" not in measured:
        return "none: the base model"
    if measured["noise_multiplier"] is None:
        return "exact: the demo"
    return f"clipped to {clip_norm:g}, noise multiplier {measured['noise_multiplier']:g}"


def epsilon_words(measured: Results) -> str:
    """Return ε of a row of ``privacy.json``, three digits of it."""
    if "noise_multiplier" not in measured:
        return "0"
    value = measured["epsilon_after_all_exchanges"]
    if value is None:
        return "no bound"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if rounded >= 1000 else f"{rounded:g}"


def fuzz_rows(results: Results) -> Rows:
    """Rows of ``fuzz.json``."""
    found = results["targets"].values()
    accepted = sum(target["outcomes"].get("accepted", 0) for target in found)
    slowest = max(target["slowest_input_milliseconds"] for target in found)
    return [
        [
            f"odd inputs for {len(found)} readers of messages, files and settings; of them taken; "
            "errors that are not the reader's own; slowest input",
            f"{results['inputs_in_all']:,}; {accepted:,}; none; {slowest / 1000:.1f} s",
            "none",
        ]
    ]


def payload_rows(results: Results) -> Rows:
    """Rows of ``payload.json``."""
    first, peak = results["exchanges"][0], results["peak_bytes"]
    spent = ", ".join(f"{e['without_work_seconds']:.0f} s" for e in results["exchanges"])
    downs = ", ".join(human_bytes(e["down_bytes"]) for e in results["exchanges"])
    return [
        [
            "deployment over TLS on one machine, one client with LLaVA-1.5-7B's payload, down in "
            f"stages 1 and 2: {downs}, up: {human_bytes(first['up_bytes'])}; seconds of an "
            "exchange without training or evaluation",
            spent,
            "",
        ],
        [
            "the same: peak memory of the server's processes; of the client's, in which "
            f"{results['base_parameters'] / 1e9:.1f} B parameters train on the CPU",
            f"{human_bytes(peak['server'])}; {human_bytes(peak['client'])}",
            "",
        ],
    ]


def deployment_rows(results: Results) -> Rows:
    """Rows of ``deployment.json``."""
    return [
        [
            "seconds of a deployed exchange in which no client trains or evaluates, after the "
            f"first, {name}",
            f"{measured['without_work_seconds']:.1f} s: "
            + ", ".join(f"{part} {s:.1f}" for part, s in shown_parts(measured).items()),
            "",
        ]
        for name, measured in results.items()
    ]


def shown_parts(measured: Results) -> dict[str, float]:
    """Return the parts of an exchange without work, by the words of ``deployment.json``."""
    return {n: s for n, s in measured["parts_seconds"].items() if n != "work"}


PART_WORDS = {
    "roster": "asking who is there, answered by a fresh process",
    "dispatch": "the order on its way",
    "start": "a fresh process: Python, imports, fetching the order",
    "base": "the base model, data, private state",
    "reply": "packing, sending, fetching the update",
    "server": "aggregation",
    "checkpoint": "the server's checkpoint",
}
"""Parts of an exchange of ``deployment.json`` that are not work."""


def deployment_table(record: Results) -> str:
    """Return the table of ``deployment.json``: a row per part of an exchange."""
    measured = record["results"]
    rows = [["seconds of an exchange, mean after the first", *measured]]
    for part, words in PART_WORDS.items():
        rows.append([words, *(f"{m['parts_seconds'][part]:.1f}" for m in measured.values())])
    without = [f"**{m['without_work_seconds']:.1f}**" for m in measured.values()]
    work = [f"{m['parts_seconds']['work']:.1f}" for m in measured.values()]
    rows += [["**without training or evaluation**", *without], ["training and evaluation", *work]]
    return f"{markdown(rows)}\n{note(record)}\n"


def payload_table(record: Results) -> str:
    """Return the table of ``payload.json``: seconds of its exchanges, then memory."""
    results = record["results"]
    rows = [["", *(f"stage {e['stage']}" for e in results["exchanges"])]]
    for words, value in (
        ("the client receives", lambda e: human_bytes(e["down_bytes"])),
        ("the client sends", lambda e: human_bytes(e["up_bytes"])),
        ("seconds without training or evaluation", lambda e: f"{e['without_work_seconds']:.0f}"),
    ):
        rows.append([words, *(value(e) for e in results["exchanges"])])
    memory = [["peak resident memory", "all together", "its programs, each by itself"]]
    for machine, peak in results["peak_bytes"].items():
        programs = results["peak_bytes_by_program"][machine].items()
        each = ", ".join(f"{name} {human_bytes(size)}" for name, size in programs)
        memory.append([machine, human_bytes(peak), each])
    return f"{markdown(rows)}\n{markdown(memory)}\n{note(record)}\n"


def plan_table(record: Results) -> str:
    """Return the table of ``plan.json``: a row per base model."""
    plans = record["results"]
    sizes = next(iter(plans.values()))["largest_micro_batch"]
    rows = [
        [
            "base model",
            "LoRA",
            "per adapter",
            "a client sends per exchange",
            "receives (stage 2)",
            "GPU memory, estimated",
            *(f"largest micro-batch, {size} GiB" for size in sizes),
        ]
    ]
    for title, plan in plans.items():
        rows.append(
            [
                title,
                f"{plan['lora'] / 1e6:.1f} M",
                f"{plan['adapter'] / 1e6:.2f} M",
                f"{plan['sent'] / 1e6:.1f} M, {human_bytes(plan['up_bytes'])}",
                human_bytes(plan["down_bytes"]),
                f"{plan['memory_bytes'] / 2**30:.0f} GiB at {plan['micro_batch']} x "
                f"{plan['tokens']} tokens",
                *(str(number or "none") for number in plan["largest_micro_batch"].values()),
            ]
        )
    return f"{markdown(rows)}\n{note(record)}\n"


def engines_rows(results: Results) -> Rows:
    """Rows of ``engines.json``."""
    ray, here = results["ray"]["command_seconds"], results["in-process"]["command_seconds"]
    further = results["sweep_in_process"]["further_job_seconds"]
    return [
        [
            "the demo from command to exit: Flower's simulation with Ray; in-process; a further "
            "job of an in-process sweep",
            f"{ray:.0f} s; {here:.0f} s; {further:.0f} s",
            "",
        ]
    ]


ROWS: dict[str, Callable[[Results], Rows]] = {
    "connector": connector_rows,
    "aggregation": aggregation_rows,
    "client_turn": client_turn_rows,
    "demo": demo_rows,
    "rows": rows_rows,
    "gpu": gpu_rows,
    "plan": plan_rows,
    "faults": faults_rows,
    "payload": payload_rows,
    "deployment": deployment_rows,
    "privacy": privacy_rows,
    "fuzz": fuzz_rows,
    "engines": engines_rows,
}
"""Rows by the name of a result file."""


def milliseconds(seconds: float) -> str:
    """Return a time with three significant digits, in milliseconds."""
    return f"{1000 * seconds:.3g} ms"


def table(folder: Path = RESULTS) -> str:
    """Return the table of all result files that there are, and what they were measured on."""
    rows = [["measured", "figure", "goal"]]
    notes = []
    for name, rows_of in ROWS.items():
        path = folder / f"{name}.json"
        if path.exists():
            record = json.loads(path.read_text())
            rows += rows_of(record["results"])
            notes.append(note(record))
    return markdown(rows) + "".join(f"\n- {line}" for line in notes) + "\n"


def note(record: Results) -> str:
    """Return how, on what and when a result file was measured."""
    machine, versions = record["machine"], record["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    changed = ", with uncommitted changes" if record["commit"]["dirty"] else ""
    commit = (record["commit"]["id"] or "unknown")[:12]
    gpu = record["results"].get("device")
    where = f"{gpu['name']}, " if isinstance(gpu, dict) and "name" in gpu else ""
    return (
        f"`{record['command']}`: {where}{machine['cores']} cores of {machine['cpu']}, load "
        f"{machine['load_average'][0]:.1f}, {packages}, {record['date'][:10]}, "
        f"commit {commit}{changed}"
    )


OWN_TABLES: dict[str, Callable[[Results], str]] = {
    "plan": plan_table,
    "privacy": privacy_table,
    "deployment": deployment_table,
    "payload": payload_table,
}
"""Tables made of one result file, by its name."""


def readme(text: str, folder: Path = RESULTS) -> str:
    """Return a page with its tables renewed; one without a result file stays as it is."""
    contents = {"benchmarks": table(folder)}
    demo = folder / "demo.json"
    if demo.exists():
        record = json.loads(demo.read_text())
        body = record["results"]["timeline"].split("\n\n", 1)[1]  # without its heading
        contents |= {
            "demo": f"{record['results']['summary']}\n{note(record)}\n",
            "timeline": body,
        }
    for name, made in OWN_TABLES.items():
        path = folder / f"{name}.json"
        if path.exists():
            contents[name] = made(json.loads(path.read_text()))
    contents |= scenario_tables(folder / "scenarios")
    for name, content in contents.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, new=content: m[1] + new + m[2], text, flags=re.DOTALL)
    return text


def main() -> None:
    """Print the benchmark table, or renew the pages."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", action="store_true", help="renew the tables of all pages")
    if parser.parse_args().readme:
        for page in PAGES:
            page.write_text(readme(page.read_text()))
    else:
        print(table(), end="")


if __name__ == "__main__":
    main()
