"""The plan against arithmetic done by hand, and its memory against a real forward pass."""

import functools
import json

import pytest
import torch
from visuals import visual

from pilot_flwr.algorithm.parameter_groups import group_parameters
from pilot_flwr.cli import main as cli
from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.model.architectures import known_config
from pilot_flwr.model.loading import load_base, make_collator
from pilot_flwr.model.memory import MicroBatch, Stage, training_memory
from pilot_flwr.model.pilot_model import PilotModel, empty_base, empty_model
from pilot_flwr.model.resource_plan import make_plan
from pilot_flwr.model.shapes import group_shapes, layout_of
from pilot_flwr.run.checkpoint import KEPT_ROUNDS

# (D, C, intermediate, layers, key and value width, vision tower's and language model's
# parameters without the projector), from the published dimensions.
MODELS = {
    "llava-1.5-7b": (1024, 4096, 11008, 32, 4096),
    "llava-1.5-13b": (1024, 5120, 13824, 40, 5120),
    "llava-interleave-0.5b": (1152, 1024, 2816, 24, 1024),
    "llava-onevision-0.5b": (1152, 896, 4864, 24, 128),
}


@functools.cache
def plan_of(overrides, micro_batch=1):
    return make_plan(load_config(overrides), micro_batch=micro_batch)


def lora_parameters(rank, c, intermediate, layers, kv):
    """r × (inputs + outputs) of q, k, v, o, gate, up and down in every layer."""
    sizes = [(c, c), (c, kv), (c, kv), (c, c), (c, intermediate), (c, intermediate)]
    sizes += [(intermediate, c)]
    return layers * sum(rank * (inputs + outputs) for inputs, outputs in sizes)


def adapter_parameters(d, c):
    """Two linear layers with biases: D → C → C."""
    return d * c + c + c * c + c


@pytest.mark.parametrize("name", MODELS)
def test_counts_of_every_model_are_those_by_hand(name):
    d, c, intermediate, layers, kv = MODELS[name]
    plan = plan_of(f"model={name}")
    lora, adapter = lora_parameters(64, c, intermediate, layers, kv), adapter_parameters(d, c)
    first, second = plan.stages[1], plan.stages[2]
    assert first.parameters["lora"] == second.parameters["lora"] == lora
    assert first.trained == lora + 2 * adapter
    assert first.sent == second.sent == lora + adapter
    assert first.private == adapter
    assert second.private == 3 * adapter + 3 * d  # ψ_s, two ψ_c, and the router without bias
    assert second.trained == lora + 3 * adapter + 3 * d
    assert first.up_bytes == first.down_bytes == 2 * (lora + adapter)
    assert second.down_bytes == 2 * (lora + 3 * adapter)
    assert plan.total_bytes == 9 * (
        4 * (lora + adapter)  # exchange 1
        + 3 * 2 * (2 * lora + 4 * adapter)  # three more
        + 2 * (lora + 3 * adapter)  # the closing evaluation, downwards
    )


def test_what_exact_aggregation_adds_is_counted():
    """A larger residual in every exchange but the first, and in the closing evaluation."""
    plan = plan_of("strategy=fedex_lora data.clients_per_task=3 data.tasks=[vqa,counting,reading]")
    base = plan_of("strategy=fedit data.clients_per_task=3 data.tasks=[vqa,counting,reading]")
    (stage,), (other,) = plan.stages.values(), base.stages.values()
    whole = stage.parameters["residual"] * 4
    assert stage.parameters["residual"] > stage.parameters["lora"]
    sizes = stage.residual_bytes
    assert sizes[-1] == whole and sizes == sorted(sizes) and len(sizes) == 4
    assert stage.trained == other.trained and stage.up_bytes == other.up_bytes
    assert stage.down_bytes == other.down_bytes + whole
    assert plan.total_bytes - base.total_bytes == 9 * sum(sizes)
    assert stage.memory.total > other.memory.total


def test_a_server_is_planned_with_the_clients_drawn_and_with_all():
    """50 of 1,002 in each of 10 exchanges: 500 have a LoRA of their own in the end, at most."""
    plan = plan_of("experiment=thousand")
    drawn, everyone = plan.server
    lora, adapter = 4 * 58368, 4 * 15552
    assert (drawn.clients, everyone.clients) == (50, 1002)
    for side, own in ((drawn, 500), (everyone, 1002)):
        n = side.clients
        assert side.up_bytes == n * (lora + adapter)
        assert side.down_bytes == n * (lora + 3 * adapter)
        # Uploads, and checkpoints: three versions of the adapters and of each replaced LoRA.
        assert side.disk_bytes == side.up_bytes + (own + 2 * n) * lora + 3 * 3 * adapter
    assert plan.total_bytes == 50 * (
        10 * (lora + adapter)  # up
        + (lora + adapter)  # the first exchange
        + 10 * (lora + 3 * adapter)  # nine more, and the closing evaluation
    )


TINY = "model=tiny data.tasks=[vqa,counting] data.clients_per_task=3 strategy.rounds=2"
ADAM = "strategy.server_optimizer.name=adam"
LORA, ADAPTER = 58368, 15552


@pytest.mark.parametrize(("lora", "kept"), [("adaptive", 6), ("task", 2), ("global", 1)])
def test_clients_that_share_a_lora_take_its_bytes_once(lora, kept):
    plan = plan_of(f"{TINY} strategy.lora={lora}")
    (side,) = plan.server
    numbers = LORA * (6 + 3 * kept) + ADAPTER * (6 + 3 * 2)
    assert side.clients == 6 and side.disk_bytes == 4 * numbers


@pytest.mark.parametrize(
    ("overrides", "extra_loras", "extra_adapters", "moments"),
    [  # six clients in two tasks: in float32 as everything, moments are two numbers each
        ("strategy.update_norm.action=clip", 3, 3, 0),
        (f"{ADAM} strategy.lora=adaptive", 2 * 6 + 6, 0, 4 * (6 * LORA + 2 * ADAPTER) + LORA),
        (f"{ADAM} strategy.lora=task", 2 * 2 + 2, 0, 4 * (2 * LORA + 2 * ADAPTER) + LORA),
    ],
)
def test_what_server_optimizer_and_clipping_write_is_counted(
    overrides, extra_loras, extra_adapters, moments
):
    kept = 2 if "lora=task" in overrides else 6
    (side,) = plan_of(f"{TINY} {overrides}").server
    loras, adapters = 6 + 3 * kept + extra_loras, 6 + 3 * 2 + extra_adapters
    assert side.disk_bytes == 4 * (loras * LORA + adapters * ADAPTER + 2 * moments)


def test_the_residual_of_exact_aggregation_is_counted_on_the_servers_disk():
    (exact,) = (plan := plan_of(f"{TINY} strategy=fedex_lora")).server
    (mean,) = plan_of(f"{TINY} strategy=fedit").server
    assert exact.disk_bytes - mean.disk_bytes == 4 * plan.stages[1].residual_bytes[-1]


D, C = 64, 96


@pytest.mark.parametrize(
    ("overrides", "lora", "adapter", "up", "down"),
    [  # LoRA and adapter: (trained, sent, private); clients that send, and that receive
        ("", "AB AB -", (1, 1, 0), 6, 6),
        ("strategy.sharing.lora=B train.lora_matrices=B", "B B -", (1, 1, 0), 6, 6),
        ("strategy.sharing.lora=A", "AB A B", (1, 1, 0), 6, 6),
        ("strategy.sharing={adapter:false,lora:none}", "AB - AB", (1, 0, 1), 6, 6),
        ("train.personal.model=whole train.epochs=2", "AB AB AB", (1, 1, 1), 6, 6),
        ("train.personal.model=beside train.epochs=2", "AB AB AB", (1, 1, 0), 6, 6),
        (
            "strategy.trained_by=pooled strategy.adapters=global strategy.lora=global",
            "AB AB -",
            (1, 1, 0),
            1,
            6,
        ),
        ("strategy.trained_by=nobody", "AB AB -", (1, 1, 0), 0, 6),
    ],
)
def test_counts_of_methods_with_one_connector(overrides, lora, adapter, up, down):
    plan = plan_of(f"{TINY} model.client_adapter=false strategy.stages=1 {overrides}")
    # Four layers, rank 8, of q, k, v, o, gate, up and down: inputs in A, outputs in B.
    size = {"A": 32 * (4 * C + 2 * C + 256), "B": 32 * (4 * C + 2 * 256 + C)}
    expected = [
        sum(size[letter] for letter in letters if letter in size) + n * adapter_parameters(D, C)
        for letters, n in zip(lora.split(), adapter, strict=True)
    ]
    (stage,) = plan.stages.values()
    assert [stage.trained, stage.sent, stage.private] == expected
    sent = 4 * expected[1]
    assert stage.up_bytes == stage.down_bytes == sent
    assert plan.total_bytes == 3 * (up + down) * sent + 6 * sent  # and the closing evaluation


def built(config, base, stage=2, tasks=("a", "b", "c")):
    """Shapes of the model that transformers and peft build, in the parameters' order."""
    model = empty_model(config, base, tasks=tasks, stage=stage)
    assert {p.device.type for p in model.parameters()} == {"meta"}
    return {
        group: {name: tuple(p.shape) for name, p in named.items()}
        for group, named in group_parameters(model.base, own_task=tasks[0]).items()
    }


FAST = {"llava-interleave-0.5b", "llava-onevision-0.5b"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in MODELS]
)
def test_shapes_of_every_model_are_those_of_the_model_itself(name):
    config = load_config(f"model={name}").model
    shapes = group_shapes(config, tasks=("a", "b", "c"), stage=2)
    groups = built(config, known_config(config))
    assert shapes == groups
    assert list(shapes["lora"]) == list(groups["lora"])  # the draw of Θ_l follows the order
    # Stage 2 has parameters of every group but the one that exact aggregation adds.
    assert [group for group, named in groups.items() if not named] == ["residual"]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "model.client_adapter=false model.cross_task_adapters=false",
        "model.lora.targets=[o_proj,down_proj]",
    ],
)
def test_shapes_follow_the_settings(overrides, stage):
    config = load_config(overrides).model
    shapes = group_shapes(config, tasks=("a", "b", "c"), stage=stage)
    assert shapes == built(config, known_config(config), stage)


def test_the_base_counted_is_the_base_without_its_projector():
    config = load_config("model=llava-interleave-0.5b").model
    base = empty_base(known_config(config))
    total = sum(p.numel() for p in base.parameters())
    stage = plan_of("model=llava-interleave-0.5b").stages[1]
    assert stage.parameters["base"] == total - adapter_parameters(1152, 1024)


def test_activations_are_what_a_real_forward_pass_keeps(processor):
    """On the tiny base: the storages that autograd saves, counted on real tensors."""
    data = DataConfig(train_examples=6)
    examples = client_examples(data, federation_clients(data)[0], "train", seed=0)[:1] * 4
    config = ModelConfig(dtype="bfloat16")
    model = PilotModel(load_base(config, torch.device("cpu")), config)
    model.enter_stage1("vqa")
    model.train()
    collator = make_collator(ModelConfig(), processor, max_length=99)
    batch = collator.train_batch(examples)
    answers = int((batch.labels[0, 1:] != -100).sum())
    text = batch.input_ids.shape[1] - 16
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    features = visual(model, processor, examples)
    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16):
        model(batch, features)
    measured = sum(size for size, _ in kept.values())
    stage = Stage(config, ("vqa",), 1)
    planned = training_memory(stage, MicroBatch(4, (1, 16, 64), 16, text, answers)).activations
    assert planned == pytest.approx(measured, rel=0.1)


def memory(overrides, **options):
    return plan_of(f"model.dtype=bfloat16 {overrides}", **options).stages[2].memory


def test_memory_follows_the_settings():
    plain = memory("", micro_batch=40)
    twice = memory("", micro_batch=80)
    assert twice.base == plain.base
    assert twice.activations == pytest.approx(2 * plain.activations, rel=0.1)
    light = memory("model.gradient_checkpointing=true", micro_batch=40)
    assert light.activations < plain.activations / 2
    small = memory("model.quantization=4bit", micro_batch=40)
    config = known_config(ModelConfig()).text_config
    c, inner = config.hidden_size, config.intermediate_size
    decoder = config.num_hidden_layers * (4 * c * c + 3 * c * inner)  # the layers' matrices
    assert plain.base - small.base == pytest.approx(decoder * (2 - 0.516), rel=0.01)
    assert (
        plain.largest_micro_batch(
            plain.total + 99, plan_of("model.dtype=bfloat16", micro_batch=40).batch
        )
        == 40
    )
    assert (
        plain.largest_micro_batch(plain.base, plan_of("model.dtype=bfloat16", micro_batch=40).batch)
        == 0
    )


@pytest.mark.parametrize("checkpointing", [False, True])
def test_every_part_of_the_memory_is_that_by_hand(checkpointing):
    """LLaVA-1.5-7B, stage 1, four examples of 576 + 128 tokens, 32 of them labelled.

    Activations: what a decoder layer keeps, counted from its formula in bytes a token.
    """
    plan = plan_of(
        f"model=llava-1.5-7b model.gradient_checkpointing={str(checkpointing).lower()}",
        micro_batch=4,
    )
    memory = plan.stages[1].memory
    trained = lora_parameters(64, *MODELS["llava-1.5-7b"][1:]) + 2 * adapter_parameters(1024, 4096)
    assert memory.adapters == memory.gradients == 4 * trained
    assert memory.optimizer == 8 * trained
    assert memory.logits == 4 * 32 * 32064 * 2 * (4 + 2)
    # Weights in bfloat16, without the projector: embeddings and head, layers, norms, the tower.
    decoder = 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 4096
    tower = 24 * (4 * 1024**2 + 2 * 1024 * 4096 + 4 * 1024 + 4096 + 1024 + 4 * 1024)
    tower += 1024 * 14 * 14 * 3 + 577 * 1024 + 1024 + 4 * 1024
    assert memory.base == 2 * (2 * 32064 * 4096 + decoder + tower)
    tokens, c, inner = 4 * 704, 4096, 11008
    # bfloat16: four inputs of linear layers (attention, output, MLP, down), q, k, v and what
    # attention gives, gate, up and their product's parts; float32: the input of both norms.
    layer = tokens * (2 * (3 * c + inner) + 2 * 4 * c + 2 * 3 * inner + 2 * 4 * c)
    layers = 32 * tokens * 2 * c + layer if checkpointing else 32 * layer
    assert memory.activations == pytest.approx(layers, rel=0.25)
    parts = ("base", "adapters", "gradients", "optimizer", "activations", "logits")
    total = sum(getattr(memory, part) for part in parts)
    assert memory.reserve == int(0.1 * total)
    assert memory.total == total + memory.reserve


def test_a_large_image_takes_its_tokens_and_what_is_too_long_is_said(capsys):
    """480 x 640 under OneVision: the whole image, 2 x 2 crops unpadded to 3:4, and newlines."""
    height, width = 2 * 27, 2 * 27
    kept = height - 2 * ((height - round(480 * width / 640)) // 2)
    expected = 27 * 27 + kept * (width + 1)
    assert cli.main(["plan", "model=llava-onevision-0.5b", "--micro-batch", "1"]) == 0
    out = capsys.readouterr().out
    assert f"each one image in {expected} tokens" in out
    assert f"has {expected + 128} tokens" in out and "`train.max_length` is 2048" in out


def test_the_command_prints_all_of_it(capsys):
    """LLaVA-1.5-7B, r = 64: 159.9 M, 20.98 M per adapter, 180.9 M = 362 MB in bfloat16."""
    assert cli.main(["plan", "experiment=paper", "--micro-batch", "2"]) == 0
    out = capsys.readouterr().out
    for words in ("159.91 M trained", "20.98 M trained", "180.89 M", "361.8 MB", "445.7 MB"):
        assert words in out
    assert "A micro-batch of 2 examples" in out
    assert "Largest micro-batch:" in out
    assert "| 9 clients |" in out and "The whole run, 4 exchanges: 32.3 GB of tensors" in out
    assert cli.main(["plan", "experiment=thousand"]) == 0
    out = capsys.readouterr().out
    assert "| 50 clients drawn | all 1,002 |" in out
    assert "The whole run, 10 exchanges with the clients drawn: at most 372.7 MB of tensors" in out
    assert cli.main(["plan", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["stages"]["1"]["sent"] == 58368 + 15552


def test_moments_on_the_disk_are_counted(capsys):
    """Two for each trained parameter: (58,368 Θ_l + 15,552 ψ_t + 15,552 ψ_s) · 2 · 4 bytes."""
    stages = make_plan(load_config("train.schedule=run")).stages
    assert stages[1].moments_bytes == (58368 + 2 * 15552) * 2 * 4
    assert stages[2].moments_bytes == (58368 + 3 * 15552 + 192) * 2 * 4
    assert make_plan(load_config()).stages[2].moments_bytes == 0
    assert cli.main(["plan", "train.schedule=run"]) == 0
    assert "AdamW's moments, kept on its disk" in capsys.readouterr().out
    layout = layout_of(load_config().model, ("vqa", "counting", "captioning"))
    assert layout.moments_bytes == stages[2].moments_bytes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lora-rank", "-1"], "`--lora-rank` is -1 but must be at least 0"),
        (["--lora-rank", "9"], "`--lora-rank` is 9 but must be at most 8, `model.lora.rank`"),
        (["--lora-rank", "4", "strategy=fedex_lora"], "`strategy.lora` is exact but must be"),
        (["--micro-batch", "-1"], "`--micro-batch` is -1 but must be at least 0"),
        (["--text-tokens", "0"], "`--text-tokens` is 0 but must be at least 1"),
        (["--image-size", "480"], "`--image-size` is '480' but must be height and width"),
        (["model.quantization=8bit"], "`model.quantization` is '8bit' but must be one of none, 4"),
    ],
)
def test_wrong_arguments_are_named(capsys, arguments, message):
    assert cli.main(["plan", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_client_of_a_smaller_rank_is_planned_as_a_run_of_that_rank():
    whole, small = plan_of("model.lora.rank=8"), plan_of("model.lora.rank=2")
    client = make_plan(load_config("model.lora.rank=8"), micro_batch=1, lora_rank=2)
    assert client.stages == small.stages
    assert (client.server, client.total_bytes) == (whole.server, whole.total_bytes)
    assert client.stages[1].up_bytes < whole.stages[1].up_bytes


def test_the_servers_disk_has_a_shared_lora_of_every_rank():
    plain = plan_of("strategy=fedit").server[-1].disk_bytes
    ranks = plan_of("strategy=fedit +model.lora.client_ranks={vqa-0:2,vqa-1:4,vqa-2:4}")
    lora = 4 * ranks.stages[1].sent_of["lora"]
    assert ranks.server[-1].disk_bytes - plain == 2 * (1 + KEPT_ROUNDS) * lora
