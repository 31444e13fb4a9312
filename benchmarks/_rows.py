"""Rows of the benchmark table: one function per result file.

To add a benchmark, write its function and add it to `ROWS`.
"""

from collections.abc import Callable

from _gpu_rows import Results, Rows, gpu_rows

from pilot_flwr.formatting import human_bytes


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
            "size of that matrix at LLaVA-1.5-7B's N·C (computed)",
            f"{loss['literal_matrix_bytes_at_llava_size'] / 1e12:.1f} TB",
            "",
        ],
    ]


def aggregation_rows(results: Results) -> Rows:
    """Rows of ``aggregation.json``."""
    main, many, accuracy = results["main"], results["many"], results["accuracy"]
    memory, ratio = main["memory"], main["wall"]["ratio"]
    allowed = memory["output_mib"] + memory["largest_stacked_tensor_mib"]
    size = f"{main['clients']} clients x {main['parameters'] / 1e6:.1f} M"
    low, high = main["wall"]["ratio_range"]["to_flower"]
    least, most = many["wall"]["ratio_range"]["to_product"]
    return [
        [
            f"distances + ATA, {size} float32, to Flower's own weighted average; range",
            f"{ratio['to_flower']:.2f} x; {low:.2f} to {high:.2f}",
            "<= 2 x",
        ],
        [
            "the same in bfloat16; compared with the arithmetic of Flower's function, float32",
            f"{ratio['bfloat16_to_flower']:.2f} x; {ratio['to_flower_arithmetic_alone']:.2f} x",
            "",
        ],
        [
            f"distances + ATA, {many['clients']:,} clients x {many['parameters']:,}, to one "
            "float64 product X Xᵀ; range",
            f"{many['wall']['ratio']['to_product']:.2f} x; {least:.2f} to {most:.2f}",
            "<= 2 x",
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
    ]


def sketch_rows(results: Results) -> Rows:
    """Rows of ``sketch.json``, which also has its own table, `sketch_table`."""
    found = {number: one["neighbors"]["2"] for number, one in results["exchanges"].items()}
    agreement = ", ".join(f"{one['agreement']:.1%}" for one in found.values())
    further = ", ".join(f"{one['mean_distance_excess']:.2%}" for one in found.values())
    return [
        [
            f"`strategy.distances=sketch`: share of the 2 nearest neighbours that are the exact "
            f"ones, {results['clients']} clients' LoRAs of {results['parameters']:,} parameters, "
            "exchanges 1, 2; how much further away the neighbours are",
            f"{agreement}; {further}",
            "",
        ]
    ]


def client_session_rows(results: Results) -> Rows:
    """Rows of ``client_session.json``."""
    rows = []
    for name in ("tiny-llava", "random"):
        measured = results[name]
        seconds = measured["wall"]["median_seconds"]
        millions = measured["parameters"]["base"] / 1e6
        title = name if name != "random" else "random checkpoint"
        rows.append(
            [
                f"a client's session on a warm base, against loading it first, {title} "
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
            "demo: share of an exchange without any client training or evaluating, after the first",
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
            f"indexing {measured['rows']:,} rows of {measured['file_mb'] / 1000:.1f} GB of "
            f"{names[kind]}; reading one row; extra peak memory",
            f"{measured['walk_seconds']:.1f} s; {measured['random_row_microseconds']:.0f} µs; "
            f"{measured['extra_peak_mb']:.0f} MB",
            "",
        ]
        for kind, measured in results.items()
    ]


def plan_rows(results: Results) -> Rows:
    """``plan.json`` has its own table, `plan_table`: nothing in it is measured."""
    return []


def faults_rows(results: Results) -> Rows:
    """Rows of ``faults.json``."""
    phases = ", ".join(f"{count} {phase}" for phase, count in results["kills_by_phase"].items())
    return [
        [
            f"runs killed {results['kills']} times in all ({phases}) and resumed, bit-identical to "
            "an uninterrupted one",
            f"{results['identical']} of {results['runs']}",
            f"{results['runs']} of {results['runs']}",
        ]
    ]


def site_faults_rows(results: Results) -> Rows:
    """Rows of ``site_faults.json``."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in results["kills_by_kind"].items())
    return [
        [
            f"{results['kills']} kills at {results['sites']} real sites ({kinds}; "
            f"{results['kills_in_a_session']} during a session) in {results['exchanges']} "
            f"exchanges with `strategy.below_minimum=wait`, {results['repetitions']} repetitions; "
            "differences to an undisturbed federation in one process",
            str(len(results["differences"]) or "none, bit-identical"),
            "none",
        ]
    ]


def server_memory_rows(results: Results) -> Rows:
    """Rows of ``server_memory.json``."""
    return [
        [
            f"the server's memory, {one['clients']} clients x {one['parameters'] / 1e6:g} M "
            f"bfloat16 ({one['upload_bytes'] / 1e9:.1f} GB of uploads): its own at the peak; the "
            "limit that the system set, mapped pages included",
            f"{one['peak_anonymous_bytes'] / 2**30:.2f} GiB; "
            + (f"{one['limit_bytes'] / 2**30:g} GiB" if one["limit_bytes"] else "none"),
            "<= 2 GiB",
        ]
        for one in results.values()
    ]


def clients_rows(results: Results) -> Rows:
    """Rows of ``clients.json``, which also has its own table, `clients_table`."""
    sizes, thousand = results["same_number_drawn"], results["thousand"]
    peaks = [human_bytes(server_peak(one)["resident"]) for one in sizes]
    drawn = thousand["trained_per_exchange"]
    return [
        [
            "peak resident memory of ServerApp and Flower's simulation engine, one process, with "
            f"{', '.join(str(one['clients']) for one in sizes)} clients of which "
            f"{sizes[0]['trained_per_exchange'][0]} train in each exchange; largest to smallest",
            f"{', '.join(peaks)}; {1 + results['server_spread']['resident']:.3f} x",
            "<= 1.1 x",
        ],
        [
            f"`experiment=thousand`, {thousand['clients']:,} clients, {drawn[0]} in each of "
            f"{len(drawn)} exchanges, the tiny model: the run; the same process's peak",
            f"{thousand['run_seconds'] / 60:.0f} min; "
            f"{human_bytes(server_peak(thousand)['resident'])}",
            "",
        ],
    ]


def server_peak(measured: Results) -> dict[str, int]:
    """Return the peak memory of the process with the ServerApp, by kind."""
    peaks: dict[str, dict[str, int]] = measured["peak_bytes"]
    return next(peak for name, peak in peaks.items() if name.startswith("ServerApp"))


def object_stores_rows(results: Results) -> Rows:
    """Rows of ``object_stores.json``."""
    return [
        [
            f"resident memory of Flower's {name}, alone in a process, {when} {one['replies']} "
            f"{which} of {human_bytes(one['bytes'] // one['replies'])}",
            human_bytes(one[f"resident_bytes_{key}"]),
            "",
        ]
        for name, one in results.items()
        for key, when, which in (
            ("when_full", "with", "unread replies"),
            ("after_deletion", "after the deletion of", "replies"),
        )
    ]


def privacy_rows(results: Results) -> Rows:
    """Rows of ``privacy.json``, which also has its own table, `privacy_table`."""
    measured = [results["untrained"], *results["settings"]]
    scores = [f"{epsilon_text(one)}: {one['score_mean_over_tasks']:.3f}" for one in measured]
    title = f"the demo's mean score by ε, clipped to {results['clip_norm']:g}; 0 is the base model"
    return [[title, "; ".join(scores), ""]]


def epsilon_text(measured: Results) -> str:
    """Return ε of a row of ``privacy.json`` with three digits."""
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
            f"malformed inputs to {len(found)} readers of messages, files and settings; accepted; "
            "errors other than the reader's own; slowest input",
            f"{results['inputs_in_all']:,}; {accepted:,}; none; {slowest / 1000:.1f} s",
            "none",
        ]
    ]


def payload_rows(results: Results) -> Rows:
    """Rows of ``payload.json``."""
    rows = []
    for mode, one in results.items():
        rows += _payload_rows(one, mode_title(mode, one))
    return rows


def _payload_rows(results: Results, mode: str) -> Rows:
    first, peak = results["exchanges"][0], results["peak_bytes"]
    spent = ", ".join(
        f"{e['without_work_seconds']:.1f} s ({e['times_plain']:.1f} x)"
        for e in results["exchanges"]
    )
    downs = ", ".join(human_bytes(e["down_bytes"]) for e in results["exchanges"])
    return [
        [
            f"deployment over TLS on one machine, {mode}, one client with LLaVA-1.5-7B's payload, "
            f"down in stages 1 and 2: {downs}, up: {human_bytes(first['up_bytes'])}; seconds of an "
            "exchange without training or evaluation (multiple of plain HTTPS and one write)",
            spent,
            "<= 4 x",
        ],
        [
            "the same: peak memory of the server's processes; of the client's, in which "
            f"{results['base_parameters'] / 1e9:.1f} B parameters train on the CPU",
            f"{human_bytes(peak['server'])}; {human_bytes(peak['client'])}",
            "",
        ],
    ]


def deployment_rows(results: Results) -> Rows:
    """Rows of ``deployment.json``, which also has its own table, `deployment_table`."""
    rows = []
    for name, modes in results.items():
        titles = [mode_title(mode, one) for mode, one in modes.items()]
        seconds = [one["without_work_seconds"] for one in modes.values()]
        gain = f" ({seconds[0] / seconds[-1]:.1f} x)" if len(seconds) > 1 else ""
        rows.append(
            [
                "seconds of a deployed exchange without any client training or evaluating, after "
                f"the first, {name}: {'; '.join(titles)}",
                "; ".join(f"{one:.1f} s" for one in seconds) + gain,
                "<= 6 s" if name == "tiny-llava" else "",
            ]
        )
    return rows


def mode_title(mode: str, measured: Results) -> str:
    """Describe a mode of ``deployment.json``."""
    if mode == "base":
        return f"commit {measured['commit'][:7]}"
    return {"cold": "no service", "warm": "`site serve`"}[mode]


def training_step_rows(results: Results) -> Rows:
    """Rows of ``training_step.json``, which also has its own table, `training_step_table`."""
    goals, rows = results["goals"], []
    for stage in ("stage1", "stage2"):
        ratios = {name: one["ratios"][stage] for name, one in results["families"].items()}
        ranges = []
        for key in ("seconds", "peak_bytes"):
            least, most = (of(ratios, key=lambda n: ratios[n][key]) for of in (min, max))
            ranges.append(
                f"{ratios[least][key]:.2f} x ({least}) to {ratios[most][key]:.2f} x ({most})"
            )
        rows.append(
            [
                f"a training step of {len(ratios)} families on the CPU, stage {stage[-1]}, to "
                "transformers + peft: time; peak resident memory",
                "; ".join(ranges),
                f"<= {goals['seconds']:g} x; <= {goals['peak_bytes']:g} x",
            ]
        )
    return rows


def import_time_rows(results: Results) -> Rows:
    """Rows of ``import_time.json``."""
    titles = {
        "client_app": "importing the ClientApp",
        "server_app": "importing the ServerApp",
        "plan": "`pilot-flwr plan experiment=paper`",
    }
    return [
        [f"{titles[name]}, to `import {ratio['to']}`, CPU time", f"{ratio['cpu']:.2f} x", "<= 2 x"]
        for name, ratio in results["ratio"].items()
    ]


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


def milliseconds(seconds: float) -> str:
    """Return a time with three significant digits, in milliseconds."""
    return f"{1000 * seconds:.3g} ms"


def families_rows(results: Results) -> Rows:
    """Rows of ``families.json``: tests of all families that passed."""
    counts = [one for families in results["tests"].values() for one in families.values()]
    ran, passed = (sum(one[key] for one in counts) for key in ("ran", "passed"))
    families = len(next(iter(results["tests"].values())))
    return [[f"tests of {families} kinds of base models", f"{passed} of {ran} pass", "all"]]


ROWS: dict[str, Callable[[Results], Rows]] = {
    "connector": connector_rows,
    "aggregation": aggregation_rows,
    "sketch": sketch_rows,
    "server_memory": server_memory_rows,
    "object_stores": object_stores_rows,
    "clients": clients_rows,
    "client_session": client_session_rows,
    "demo": demo_rows,
    "rows": rows_rows,
    "training_step": training_step_rows,
    "gpu": gpu_rows,
    "plan": plan_rows,
    "families": families_rows,
    "faults": faults_rows,
    "site_faults": site_faults_rows,
    "payload": payload_rows,
    "deployment": deployment_rows,
    "privacy": privacy_rows,
    "fuzz": fuzz_rows,
    "engines": engines_rows,
    "import_time": import_time_rows,
}
"""Rows by the name of a result file."""
