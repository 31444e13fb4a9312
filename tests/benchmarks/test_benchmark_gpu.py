"""The GPU benchmark at tiny size, and its arithmetic against torch's own count."""

import importlib
import json
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pilot_flwr.config.model import LoraConfig
from pilot_flwr.data.examples import Example

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# Torch's compiler warns about settings of the GPU that are none of ours.
ON_GPU = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]
DEVICES = ["cpu", pytest.param("cuda", marks=ON_GPU)]
GIB = 2**30


@pytest.fixture
def gpu(monkeypatch):
    """Import a module of the benchmark's folder by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return lambda name: importlib.import_module(f"gpu.{name}")


@pytest.fixture
def rows(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("_rows")


@pytest.mark.slow
@pytest.mark.parametrize("device", DEVICES)
def test_tiny_size_measures_all_there_is(gpu, rows, tmp_path, device, capsys):
    out = tmp_path / "new.json"
    options = ["--size", "tiny", "--device", device, "--out", str(out)]
    results = gpu("run").main([*options, "--steps", "1", "--rounds", "1", "--most", "1"])
    assert capsys.readouterr().out
    cases = {(c["loop"], c["stage"], c["gradient_checkpointing"]): c for c in results["cases"]}
    kinds = [("pilot", 1), ("plain", None), ("pilot", 2)]
    assert set(cases) == {(*kind, light) for kind in kinds for light in (False, True)}
    for kind, case in cases.items():
        assert case["micro_batch"] == 1 and not case["out_of_memory"]
        seconds = case["seconds_per_step"]
        assert case["examples_per_second"] == pytest.approx(1 / seconds)
        assert case["tokens_per_second"] == pytest.approx((16 + 24) / seconds)
        if kind[0] == "pilot":
            done = sum(case["operations"].values())
            expected = done / seconds / results["matrix_flops"]
            assert case["utilisation"] == pytest.approx(expected)
            assert (case["hardware_utilisation"] > case["utilisation"]) == kind[2]
            ratio = case["planned_bytes"] / case["peak_bytes"]
            assert case["planned_to_measured"] == ratio > 0
    compared = {(c["stage"], c["gradient_checkpointing"]): c for c in results["comparisons"]}
    assert set(compared) == {(s, light) for s in (1, 2) for light in (False, True)}
    for (stage, light), ratios in compared.items():
        own, plain = cases["pilot", stage, light], cases["plain", None, light]
        for key, name in (("seconds_per_step", "time"), ("peak_bytes", "peak")):
            assert ratios[f"{name}_to_plain"] == pytest.approx(own[key] / plain[key])
    assert results["switch"]["seconds"] > 0
    assert (results["compile"] is not None) == (device == "cuda")
    record = json.loads(out.read_text())
    assert record["results"]["complete"]
    assert ("seconds_per_step" in record["results"]["cases"][0]) == (device == "cuda")
    assert "time_to_plain" in record["results"]["best"][0]
    assert any("tokens/s" in row[1] for row in rows.gpu_rows(results))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("stage", [1, 2])
def test_arithmetic_is_torchs_own_count(gpu, device, stage, checkpointing):
    """Every product of a training step, counted as it is computed; eager attention is not causal.

    Torch also counts the sums of the losses, which are products of vectors. Of a layer that is
    computed again it does not see what comes after the last tensor needed, here the last LoRA.
    """
    loops, arithmetic = gpu("loops"), gpu("arithmetic")
    size = gpu("sizes").SIZES["tiny"]
    loop = loops.PilotLoop(size, torch.device(device), stage=stage, checkpointing=checkpointing)
    model = loop.model
    config = model.base.config
    model.base.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        loop.seconds(micro_batch=2, steps=1)
    steps = loops.WARM_UP + 1
    counted = arithmetic.operations(
        config, size.batch(2), rank=size.lora.rank, stage=stage, tasks=3, causal=False
    )
    expected = counted.total + checkpointing * counted.recomputed
    tolerance = 5e-3 if checkpointing else 1e-3
    assert counter.get_total_flops() / steps == pytest.approx(expected, rel=tolerance)
    assert min(counted.frozen, counted.lora, counted.attention, counted.connector) > 0


def test_llava_15_7b_needs_the_operations_that_its_size_says(gpu):
    """2 + 2 per frozen parameter and token, 6 per trained one: from the published sizes."""
    measure, arithmetic = gpu("measure"), gpu("arithmetic")
    size = gpu("sizes").SIZES["llava-1.5-7b"]
    config = measure.Planned(size).config
    counted = arithmetic.operations(config, size.batch(1), rank=64, stage=1, tasks=3)
    tokens = 576 + 128
    assert counted.frozen == 4 * tokens * 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert counted.lora == 6 * tokens * 159_907_840
    assert counted.head == 4 * 32 * 4096 * 32064
    adapter = 1024 * 4096 + 4096**2
    assert counted.connector == 576 * 2 * (6 * adapter - 2 * 1024 * 4096)
    assert counted.attention == 32 * 6 * (2 * 4096) * tokens * (tokens + 1) // 2


def test_the_plain_loop_trains_what_it_says_on_the_models_own_loss(gpu):
    """LoRA in the language model alone, and the projector; labels shifted, all logits there."""
    size = gpu("sizes").SIZES["tiny"]
    loop = gpu("loops").PlainLoop(size, torch.device("cpu"))
    names = [n for n, p in loop.model.named_parameters() if p.requires_grad]
    lora = [n for n in names if "lora_" in n]
    assert len(lora) == 2 * 7 * 4 and all("language_model.layers" in n for n in lora)
    assert all("multi_modal_projector" in n for n in set(names) - set(lora))
    assert len(names) == len(lora) + 4
    assert {p.dtype for p in loop.trained} == {torch.float32}
    batch = loop.data.train_batch([Example("a", (), gpu("sizes").EXAMPLE.turns)] * 2)
    with torch.autocast("cpu", torch.bfloat16):
        output = loop.model(input_ids=batch.input_ids, use_cache=False, **loop.data.images(2))
    kept = batch.labels[:, 1:] != -100
    assert int(kept.sum()) == 2 * size.answer_tokens
    expected = torch.nn.functional.cross_entropy(
        output.logits[:, :-1][kept].float(), batch.labels[:, 1:][kept]
    )
    assert loop.loss(2).item() == pytest.approx(expected.item(), rel=1e-3)
    before = loop.trained[0].clone()
    assert len(loop.seconds(2, steps=2)) == 2
    assert not torch.equal(before, loop.trained[0])


def test_both_loops_train_as_many_lora_parameters(gpu):
    size = gpu("sizes").SIZES["tiny"]
    own = gpu("loops").PilotLoop(size, torch.device("cpu"), stage=1).model
    plain = gpu("loops").PlainLoop(size, torch.device("cpu")).model
    counts = [
        sum(p.numel() for n, p in model.named_parameters() if "lora_" in n and p.requires_grad)
        for model in (own, plain)
    ]
    assert counts[0] == counts[1] > 0


def test_out_of_memory_is_recorded_and_ends_the_sweep(gpu, monkeypatch):
    measure, sizes = gpu("measure"), gpu("sizes")
    tried = []

    class Small:
        model = torch.nn.Linear(1, 1)
        release = staticmethod(lambda: None)

        def seconds(self, micro_batch, steps):
            tried.append(micro_batch)
            if micro_batch > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [1.0, 2.0, 9.0]

    monkeypatch.setattr(measure.Variant, "build", lambda *_: Small())
    cases = measure.measure_variant(
        measure.Variant(1, False),
        sizes.SIZES["tiny"],
        torch.device("cpu"),
        micro_batches=[1, 2, 4, 8],
        steps=3,
    )
    assert [case["out_of_memory"] for case in cases] == [False, False, True, True]
    assert [case["micro_batch"] for case in cases] == [1, 2, 4, 8]
    assert cases[0]["seconds_per_step"] == 2 and "seconds_per_step" not in cases[2]
    assert tried == [1, 1, 2, 2, 4]  # on a CPU once more, for the time


def case(gpu, variant, micro_batch, seconds, peak=1.0):
    named = gpu("measure").Variant(*variant).named()
    if seconds is None:
        return {**named, "micro_batch": micro_batch, "out_of_memory": True}
    return {
        **named,
        "micro_batch": micro_batch,
        "out_of_memory": False,
        "seconds_per_step": seconds,
        "peak_bytes": peak,
    }


def test_the_best_are_compared_though_one_alone_fits(gpu):
    """The plain loop has no room for 4 examples: ratios at 2, and of 4 against 2."""
    figures = gpu("figures")
    own, plain = (1, False), (0, False)
    rounds = [
        [
            case(gpu, own, 2, 1.0, 3 * GIB),
            case(gpu, own, 4, 1.5, 5 * GIB),
            case(gpu, plain, 2, seconds, 6 * GIB),
            case(gpu, plain, 4, None),
        ]
        for seconds in (2.0, 1.0, 5.0)
    ]
    merged = figures.merged(rounds)
    assert merged[2]["seconds_per_step"] == 2.0 and merged[3]["out_of_memory"]
    (ratio,) = figures.comparisons(merged)
    assert (ratio["micro_batch"], ratio["time_to_plain"], ratio["peak_to_plain"]) == (2, 0.5, 0.5)
    assert ratio["time_to_plain_range"] == [0.2, 1.0]
    done = [
        {
            **c,
            "examples_per_second": c["micro_batch"] / c["seconds_per_step"],
            "tokens_per_second": 1.0,
            "utilisation": 0.5,
            "hardware_utilisation": 0.5,
        }
        if not c["out_of_memory"]
        else c
        for c in merged
    ]
    (best,) = figures.best(done)
    assert (best["micro_batch"], best["plain_micro_batch"]) == (4, 2)
    assert best["time_to_plain"] == pytest.approx(1.5 / 4 / (2 / 2))
    assert best["peak_to_plain"] == pytest.approx(5 / 6)
    (alone,) = figures.best([c for c in done if c["loop"] == "pilot"])
    assert "time_to_plain" not in alone


@pytest.mark.parametrize(
    ("largest", "most", "expected"),
    [(1, 64, [1]), (0, 64, [1]), (6, 64, [1, 2, 4, 6]), (99, 8, [1, 2, 4, 8])],
)
def test_micro_batches_double_up_to_the_largest(gpu, largest, most, expected):
    assert gpu("measure").ladder(largest, most) == expected


def test_the_plans_largest_micro_batch_follows_memory(gpu):
    measure, sizes = gpu("measure"), gpu("sizes")
    planned = measure.Planned(sizes.SIZES["tiny"])
    variant = measure.Variant(0, False)
    assert 0 < planned.largest(variant, GIB) < planned.largest(variant, 2 * GIB)
    assert sizes.SIZES["llava-1.5-7b"].lora == LoraConfig(rank=64, alpha=128)


def test_without_times_nothing_says_how_fast(gpu):
    figures = gpu("figures")
    results = {"cases": [{"seconds_per_step": 1, "round_seconds": [1], "peak_bytes": 2}], "a": 1}
    assert figures.without_times(results) == {"cases": [{"peak_bytes": 2}], "a": 1}


def test_the_default_result_file_is_the_readmes(gpu):
    run = gpu("run")
    assert run.default_file("llava-1.5-7b", torch.device("cuda")) == "gpu.json"
    assert run.default_file("tiny", torch.device("cpu")) == "gpu_tiny_cpu.json"
