"""Rows of ``gpu.json`` in the benchmark table."""

from typing import Any

from pilot_flwr.formatting import human_bytes

Results = dict[str, Any]
Rows = list[list[str]]
"""Cells: title, figure, goal."""


def gpu_rows(results: Results) -> Rows:
    """Rows of ``gpu.json``; parts that a stopped run did not reach have none."""
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
