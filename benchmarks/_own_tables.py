"""Tables of single result files, and the note below every table."""

import statistics
from collections.abc import Callable

from _rows import Results, epsilon_text, mode_title

from pilot_flwr.formatting import human_bytes, human_seconds
from pilot_flwr.run.tables import markdown


def privacy_table(record: Results) -> str:
    """Return the table of ``privacy.json``: a row per noise multiplier."""
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
                upload_text(measured, results["clip_norm"]),
                epsilon_text(measured),
                *(f"{measured['score_per_task'][task]:.3f}" for task in tasks),
                f"{measured['score_mean_over_tasks']:.3f}",
                *[f"{low:.3f} to {high:.3f}"] * several,
            ]
        )
    return f"{markdown(rows)}\n{note(record)}\n"


def upload_text(measured: Results, clip_norm: float) -> str:
    """Describe the uploads of a row of ``privacy.json``."""
    if "noise_multiplier" not in measured:
        return "none: the base model"
    if measured["noise_multiplier"] is None:
        return "exact: the demo"
    return f"clipped to {clip_norm:g}, noise multiplier {measured['noise_multiplier']:g}"


PARTS = {
    "roster": "roster query, answered by a fresh process",
    "poll": "the SuperNode asks for messages every 3 s (Flower)",
    "launch": "its SuperExec starts a process (Flower)",
    "python": "Python and Flower's imports (Flower)",
    "app": "fetching the instruction, unpacking and importing the app, torch or the hand-over",
    "base": "base model or switch to this client, data, private state",
    "reply": "packing the update, handing it to the SuperNode",
    "upload": "sending the update, polling for it",
    "server": "aggregation",
    "checkpoint": "the server's checkpoint",
}
"""Parts of an exchange in ``deployment.json`` other than training and evaluation."""


def deployment_table(record: Results) -> str:
    """Return the table of ``deployment.json``: a row per part, a column per base model and mode."""
    columns = {
        f"{title}, {mode_title(mode, one)}": one
        for title, modes in record["results"].items()
        for mode, one in modes.items()
    }
    rows = [["seconds of an exchange, median after the first", *columns]]
    for part, title in PARTS.items():
        rows.append([title, *(f"{one['parts_seconds'][part]:.1f}" for one in columns.values())])
    without = [f"**{one['without_work_seconds']:.1f}**" for one in columns.values()]
    work = [f"{one['parts_seconds']['work']:.1f}" for one in columns.values()]
    opened = [str(one.get("weights_opened_after_first", "")) for one in columns.values()]
    rows += [["**without training or evaluation**", *without], ["training and evaluation", *work]]
    if any(opened):
        rows.append(["the base's weights are opened, times after the first exchange", *opened])
    return f"{markdown(rows)}\n{note(record)}\n"


def payload_table(record: Results) -> str:
    """Return the table of ``payload.json``: seconds of its exchanges, then memory."""
    modes = record["results"]
    columns = {
        f"stage {e['stage']}, {mode_title(mode, one)}": e
        for mode, one in modes.items()
        for e in one["exchanges"]
    }
    rows = [["", *columns]]
    for title, value in (
        ("the client receives", lambda e: human_bytes(e["down_bytes"])),
        ("the client sends", lambda e: human_bytes(e["up_bytes"])),
        ("seconds without training or evaluation", lambda e: f"{e['without_work_seconds']:.1f}"),
        ("of it Flower's part", lambda e: f"{flower_sum(e):.1f}"),
        ("plain HTTPS both ways and one write", lambda e: f"{plain_sum(e):.1f}"),
        ("multiple of it", lambda e: f"{e['times_plain']:.1f}"),
    ):
        rows.append([title, *map(value, columns.values())])
    memory = [["peak resident memory", "in all", "per program"]]
    for mode, one in modes.items():
        for machine, peak in one["peak_bytes"].items():
            programs = one["peak_bytes_by_program"][machine].items()
            each = ", ".join(f"{name} {human_bytes(size)}" for name, size in programs)
            memory.append([f"{machine}, {mode_title(mode, one)}", human_bytes(peak), each])
    return f"{markdown(rows)}\n{markdown(memory)}\n{note(record)}\n"


def plain_sum(exchange: Results) -> float:
    """Return the seconds of the yardstick of ``payload.json`` for an exchange's bytes."""
    return float(sum(exchange["plain_seconds"].values()))


def flower_sum(exchange: Results) -> float:
    """Return the seconds of an exchange from the server's instruction to its reply, less a session.

    They are Flower's polling, programs and transfers, with the imports of the app's process or its
    hand-over to the service.
    """
    parts = exchange["parts_seconds"]
    names = ("poll", "launch", "python", "app", "reply", "upload")
    return float(sum(parts[name] for name in names))


def exchange_table(deployment: Results, payload: Results) -> str:
    """Return the seconds of an exchange without work: a row per base model, a column per mode."""
    modes = ("cold", "warm")
    rows = [["seconds per exchange", *(mode_title(mode, {}) for mode in modes)]]
    for title, measured in deployment["results"].items():
        rows.append([title, *(f"{measured[m]['without_work_seconds']:.1f}" for m in modes)])
    last = [payload["results"][mode]["exchanges"][-1] for mode in modes]
    title = f"LLaVA-1.5-7B's payload, {human_bytes(last[0]['up_bytes'])} up, stage 2"
    rows.append([title, *(f"{one['without_work_seconds']:.1f}" for one in last)])
    return markdown(rows)


def clients_table(record: Results) -> str:
    """Return the tables of ``clients.json``: costs by number of clients, and scores."""
    thousand = record["results"]["thousand"]
    columns = [*record["results"]["same_number_drawn"], thousand]
    lines: list[tuple[str, Callable[[Results], str]]] = [
        ("clients that train in an exchange", lambda one: str(one["trained_per_exchange"][0])),
        ("exchanges", lambda one: str(len(one["exchange_seconds"]))),
        ("the run", lambda one: human_seconds(one["run_seconds"])),
        ("the first roster", lambda one: human_seconds(one["roster_seconds"][0])),
        (
            "an exchange after the first, median",
            lambda one: human_seconds(statistics.median(one["exchange_seconds"][1:])),
        ),
        ("run folder, on disk", lambda one: human_bytes(one["folder_bytes"])),
        ("of it `metrics.jsonl`", lambda one: human_bytes(one["metrics_bytes"])),
    ]
    header = [f"{one['clients']:,} clients" for one in columns[:-1]]
    rows = [["", *header, f"{thousand['clients']:,} clients, `experiment=thousand`"]]
    rows += [[title, *map(value, columns)] for title, value in lines]
    memory = [["peak resident memory (anonymous)", *rows[0][1:]]]
    for name in sorted(
        thousand["peak_bytes"], key=lambda n: -thousand["peak_bytes"][n]["resident"]
    ):
        cells = [
            f"{human_bytes(peak['resident'])} ({human_bytes(peak['anonymous'])})"
            for peak in (one["peak_bytes"][name] for one in columns)
        ]
        memory.append([name, *cells])
    found = thousand["score_by_exchange"]
    scores = [["exchange", *found], ["mean score", *(f"{score:.3f}" for score in found.values())]]
    return f"{markdown(rows)}\n{markdown(memory)}\n{markdown(scores)}\n{note(record)}\n"


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


def aggregation_table(record: Results) -> str:
    """Return the cost curves of ``aggregation.json``: seconds of every step by K and P."""
    rows = [["K", "P", "distances", "from sketches", "exact to sketched", "weights", "mixtures"]]
    for one in record["results"]["costs"]:
        seconds = one["seconds"]
        gain = seconds["distances"] / seconds["sketched_distances"]
        rows.append(
            [
                f"{one['clients']:,}",
                f"{one['parameters']:,}",
                *(f"{seconds[name]:.3g} s" for name in ("distances", "sketched_distances")),
                f"{gain:.2g} x",
                *(f"{seconds[name]:.3g} s" for name in ("weights", "mix")),
            ]
        )
    return f"{markdown(rows)}\n{note(record)}\n"


def sketch_table(record: Results) -> str:
    """Return the table of ``sketch.json``: neighbours from sketches against the exact ones."""
    rows = [
        [
            "exchange",
            "M",
            "the same neighbours",
            "worst seed",
            "by chance",
            "further away, mean",
            "weight on other clients",
        ]
    ]
    for number, one in record["results"]["exchanges"].items():
        for m, found in one["neighbors"].items():
            rows.append(
                [
                    number,
                    m,
                    f"{found['agreement']:.1%}",
                    f"{found['agreement_worst_seed']:.1%}",
                    f"{found['by_chance']:.1%}",
                    f"{found['mean_distance_excess']:.2%}",
                    f"{found['weight_moved']:.1%}",
                ]
            )
    return f"{markdown(rows)}\n{note(record)}\n"


FAMILIES = {
    "llava-1.5": "LLaVA-1.5",
    "interleave": "LLaVA-Interleave",
    "llava-next": "LLaVA-NeXT",
    "onevision": "LLaVA-OneVision",
    "qwen2.5-vl": "Qwen2.5-VL",
    "qwen3-vl": "Qwen3-VL",
    "internvl": "InternVL3",
    "gemma3": "Gemma 3",
    "idefics3": "Idefics3",
    "smolvlm": "SmolVLM2",
    "fastvlm": "FastVLM",
}
CHECKS = ("logits", "generate", "labels", "training", "federation", "export", "plan")


def families_table(record: Results) -> str:
    """Return the table of ``families.json``: a row per family, passed tests per check."""
    tests = record["results"]["tests"]

    def cell(one: Results) -> str:
        ran, passed = one["ran"], one["passed"]
        return f"passes ({ran})" if ran == passed else f"**{ran - passed} of {ran} fail**"

    rows = [["family", *CHECKS]]
    for family in sorted(tests[CHECKS[0]], key=list(FAMILIES).index):
        rows.append([FAMILIES[family], *(cell(tests[check][family]) for check in CHECKS)])
    return f"{markdown(rows)}\n{note(record)}\n"


def training_step_table(record: Results) -> str:
    """Return the table of ``training_step.json``: a row per family, two columns per stage."""
    stages = {"stage1": "stage 1", "stage2": "stage 2"}
    rows = [
        [
            "family",
            "model (layers of decoder, tower)",
            "parameters",
            "image tokens",
            "trained: plain, stages 1, 2",
            "transformers + peft",
            *stages.values(),
            *(f"{title}: time; peak; above the loaded model" for title in stages.values()),
        ]
    ]
    for name, one in record["results"]["families"].items():
        layers = f" ({', '.join(map(str, one['layers']))})" if one["layers"] else ""
        loops, ratios = one["loops"], one["ratios"]
        rows.append(
            [
                name,
                one["path"].partition("/")[2] + layers,
                f"{one['parameters'] / 1e9:.2f} B",
                str(one["image_tokens"]),
                ", ".join(f"{loops[loop]['trained'] / 1e6:.0f} M" for loop in ("plain", *stages)),
                *(
                    f"{loops[loop]['seconds']:.1f} s, {human_bytes(loops[loop]['peak_bytes'])}"
                    for loop in ("plain", *stages)
                ),
                *(
                    "; ".join(
                        f"{ratios[stage][key]:.2f} x"
                        for key in ("seconds", "peak_bytes", "above_bytes")
                    )
                    for stage in stages
                ),
            ]
        )
    return f"{markdown(rows)}\n{note(record)}\n"


def note(record: Results) -> str:
    """Return command (with the script's present path), machine, versions and date of a result."""
    command = record["command"]
    for old, new in MOVED.items():
        command = command.replace(old, new)
    machine, versions = record["machine"], record["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    changed = ", with uncommitted changes" if record["commit"]["dirty"] else ""
    commit = (record["commit"]["id"] or "unknown")[:12]
    gpu = record["results"].get("device")
    where = f"{gpu['name']}, " if isinstance(gpu, dict) and "name" in gpu else ""
    return (
        f"`{command}`: {where}{machine['cores']} cores of {machine['cpu']}, load "
        f"{machine['load_average'][0]:.1f}, {packages}, {record['date'][:10]}, "
        f"commit {commit}{changed}"
    )


MOVED = {
    "benchmarks/faults/": "tests/robustness/faults/",
    "benchmarks/fuzz/": "tests/robustness/fuzz/",
    "client_turn.py": "client_session.py",
}
"""Former → present path of scripts that have moved since a result was recorded."""

OWN_TABLES: dict[str, Callable[[Results], str]] = {
    "aggregation": aggregation_table,
    "sketch": sketch_table,
    "plan": plan_table,
    "families": families_table,
    "training_step": training_step_table,
    "privacy": privacy_table,
    "deployment": deployment_table,
    "payload": payload_table,
    "clients": clients_table,
}
"""Tables of single result files, by the file's name."""
