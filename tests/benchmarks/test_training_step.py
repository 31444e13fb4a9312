"""The training-step benchmark: both loops see the same inputs in every family, and its figures."""

import importlib
import json
import pickle
from pathlib import Path

import pytest
import torch
from families import WRITERS
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def benchmark(monkeypatch):
    """Import a script of the folder by its name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


@pytest.fixture
def size(benchmark, request, tmp_path):
    sizes = benchmark("gpu.sizes")
    path = WRITERS[request.param](tmp_path / "base")
    return sizes.Size(str(path), sizes.SIZES["tiny"].lora, 24, 6, image=(61, 90))


@pytest.mark.parametrize("size", list(WRITERS), indirect=True)
def test_both_loops_start_from_the_same_loss(benchmark, size):
    """Of new adapters, with the features that the tower makes of the plain loop's pixels."""
    loops, example = benchmark("gpu.loops"), benchmark("gpu.sizes").EXAMPLE
    cpu = torch.device("cpu")
    plain = loops.PlainLoop(size, cpu)
    found = {n for n, p in plain.model.named_parameters() if p.requires_grad}
    decoder = len(plain.model.base_model.model.model.get_decoder().layers)
    assert len([name for name in found if "lora_" in name]) == 2 * 7 * decoder
    own = loops.PilotLoop(size, cpu, stage=1)
    data = own.data
    features, *besides = own.model.encode_images(data.images(2))
    assert features.shape == torch.cat([data.features] * 2).shape
    assert [b.shape for b in besides] == [torch.cat([data.beside] * 2).shape] * len(besides)
    (visual,) = data.encoder(own.model)([[example] * 2])
    assert len(visual.besides) == len(besides)
    visual = visual._replace(features=features, besides=tuple(besides))
    with torch.autocast("cpu", torch.bfloat16):
        output = own.model.train()(data.train_batch([example] * 2), visual)
    loss = functional.cross_entropy(output.logits.float(), output.labels)
    assert loss.item() == pytest.approx(plain.loss(2).item(), rel=5e-3)
    assert len(output.labels) == 2 * size.answer_tokens


@pytest.mark.parametrize("size", list(WRITERS), indirect=True)
def test_every_loop_trains_in_every_family(benchmark, size):
    for variant in benchmark("gpu.measure").VARIANTS[:3]:
        loop = variant.build(size, torch.device("cpu"))
        before = {n: p.clone() for n, p in loop.model.named_parameters() if p.requires_grad}
        assert len(loop.seconds(1, steps=1)) == 1
        after = dict(loop.model.named_parameters())
        moved = {name for name, value in before.items() if not torch.equal(value, after[name])}
        assert any("lora_B" in name for name in moved)
        assert any("lora_" not in name for name in moved)


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("size", list(WRITERS), indirect=True)
def test_the_gpu_benchmarks_arithmetic_is_torchs_own_count(benchmark, size, stage):
    """As for tiny-llava in test_benchmark_gpu.py: attention is eager, and so not causal."""
    loops = benchmark("gpu.loops")
    loop = loops.PilotLoop(size, torch.device("cpu"), stage=stage)
    config = loop.model.base.config
    loop.model.base.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        loop.seconds(micro_batch=2, steps=1)
    counted = benchmark("gpu.arithmetic").operations(
        config,
        size.batch(2),
        rank=size.lora.rank,
        stage=stage,
        tasks=3,
        causal=False,
    )
    steps = loops.WARM_UP + 1
    assert counter.get_total_flops() / steps == pytest.approx(counted.total, rel=2e-3)


def test_cut_configurations_keep_what_their_family_does(benchmark):
    families = benchmark("training_step").FAMILIES
    configs = {name: size.base_config() for name, size in families.items()}
    assert {name: config.model_type for name, config in configs.items()} == {n: n for n in families}
    assert configs["gemma3"].text_config.layer_types == ["sliding_attention", "full_attention"]
    assert configs["qwen2_5_vl"].vision_config.fullatt_block_indexes == [1]
    assert configs["qwen3_vl"].vision_config.deepstack_visual_indexes == [0, 1, 2]
    assert configs["qwen3_vl"].text_config.num_hidden_layers == 3


def run(seconds, loaded, peak):
    return {
        "trained": 3e6,
        "seconds": seconds,
        "loaded_bytes": loaded,
        "peak_bytes": peak,
        "above_bytes": peak - loaded,
    }


def test_ratios_are_to_the_plain_loop_of_the_same_run(benchmark):
    """Times 1/2, 6/6, 3/4 in stage 1: their median is 3/4; peaks of 6 and 8, 4 and 6 above 2."""
    step = benchmark("training_step")
    plain = [run(2.0, 2, 8), run(6.0, 2, 8), run(4.0, 2, 8)]
    stages = [[run(s, 2, 6) for s in (1.0, 6.0, 3.0)], [run(s, 2, 9) for s in (4.0, 6.0, 8.0)]]
    found = step.summary({"stage1": stages[0], "plain": plain, "stage2": stages[1]})
    assert found["loops"]["stage2"] == run(6.0, 2, 9)
    ratio = found["ratios"]["stage1"]
    assert (ratio["seconds"], ratio["seconds_range"]) == (0.75, [0.5, 1.0])
    assert (ratio["peak_bytes"], ratio["above_bytes"]) == (6 / 8, 4 / 6)
    assert found["ratios"]["stage2"]["seconds"] == 2.0


def test_one_family_keeps_the_others_of_the_same_commit(benchmark, monkeypatch, tmp_path, capsys):
    step = benchmark("training_step")
    measured = [run(1.0, 2, 6)]
    figures = step.summary(dict.fromkeys(step.LOOPS, measured))
    monkeypatch.setattr(step, "RESULT", tmp_path / "training_step.json")
    monkeypatch.setattr(step, "measure_family", lambda size, steps, runs: figures)
    for name, known in (("gemma3", ["gemma3"]), ("llava", ["llava", "gemma3"])):
        step.main(["--family", name])
        record = json.loads(step.RESULT.read_text())
        assert list(record["results"]["families"]) == known
    record["commit"]["id"] = "another"
    step.RESULT.write_text(json.dumps(record))
    assert list(step.main(["--family", "smolvlm"])["families"]) == ["smolvlm"]


def test_a_size_goes_to_another_process_after_its_use(benchmark):
    size = benchmark("gpu.sizes").SIZES["tiny"]
    assert len(size.image_tokens()) == 16
    assert pickle.loads(pickle.dumps(size)) == size


def test_memory_of_a_loop_is_measured_after_loading(benchmark):
    step, size = benchmark("training_step"), benchmark("gpu.sizes").SIZES["tiny"]
    found = step.measure_loop(size, stage=2, steps=1)
    model = benchmark("gpu.loops").PilotLoop(size, torch.device("cpu"), stage=2).model
    assert found["trained"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert found["seconds"] > 0
    assert found["peak_bytes"] == found["loaded_bytes"] + found["above_bytes"]
    assert found["loaded_bytes"] > 0 and found["above_bytes"] >= 0


def test_rows_and_table_name_the_extremes(benchmark, tmp_path):
    step, record = benchmark("training_step"), benchmark("_record")
    families = {}
    for name, seconds in (("llava", 1.0), ("gemma3", 3.0)):
        loops = {"stage1": [run(seconds, 2, 6)], "plain": [run(2.0, 2, 8)]}
        families[name] = {"path": f"a/{name}", "layers": [2, 3], "parameters": 5e8} | {
            "image_tokens": 7,
            **step.summary(loops | {"stage2": loops["plain"]}),
        }
    path = tmp_path / "training_step.json"
    record.write_record(path, {"goals": step.GOALS, "families": families}, packages=())
    results = json.loads(path.read_text())
    first, second = benchmark("_rows").training_step_rows(results["results"])
    assert first[1] == "0.50 x (llava) to 1.50 x (gemma3); 0.75 x (llava) to 0.75 x (llava)"
    assert first[2] == second[2] == "<= 1 x; <= 0.7 x"
    table = benchmark("_own_tables").training_step_table(results)
    assert "llava (2, 3) " in table and "| 0.50 x; 0.75 x; 0.67 x" in table
