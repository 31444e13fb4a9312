"""A client's session: which states the model holds when it is evaluated and when it is trained.

`train` and `evaluate` are replaced by ones that note the model's states; training is then a
deterministic change of what the stage trains, so that everything can be told apart.
"""

import itertools
import json
import os
from dataclasses import replace

import pytest
import torch

from pilot_flwr.algorithm.parameter_groups import trained_groups
from pilot_flwr.client import client_data as data_module
from pilot_flwr.client import rank as rank_module
from pilot_flwr.client import session as session_module
from pilot_flwr.client.node import Site
from pilot_flwr.client.session import run_session
from pilot_flwr.config.data import DataConfig, TaskFiles
from pilot_flwr.config.model import FeatureCacheConfig, LoraConfig, ModelConfig
from pilot_flwr.config.schema import EvaluationConfig, PilotConfig, StrategyConfig
from pilot_flwr.config.train import TrainConfig
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.errors import ConfigError, DataError, StateError, TrainingError
from pilot_flwr.model.loading import initial_state, loaded_model
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.protocol import EvaluationResult, Instruction, TrainingResult

TASKS = ("vqa", "counting", "captioning")
CONFIG = PilotConfig(
    model=ModelConfig(lora=LoraConfig(dropout=0.1)),
    data=DataConfig(clients_per_task=1, train_examples=6, test_examples=4),
    train=TrainConfig(batch_size=4),
    evaluation=EvaluationConfig(max_new_tokens=2),
)


@pytest.fixture(scope="module")
def initial():
    return initial_state(CONFIG.model, seed=0)


@pytest.fixture
def sites(tmp_path):
    clients = federation_clients(CONFIG.data)
    return {c.task: Site(c, tmp_path / c.id, "cpu") for c in clients}


@pytest.fixture
def make_instruction(initial):
    """Build an instruction whose adapters and LoRA differ by task and by exchange."""

    def make(stage, *, server_round=None, task="vqa", tasks=TASKS, **more):
        server_round = server_round or stage
        known = tasks if stage == 2 else (task,)
        return Instruction(
            server_round=server_round,
            stage=stage,
            tasks=tasks,
            adapters={t: shifted(initial.adapter, t, server_round) for t in known},
            lora=shifted(initial.lora, "lora", server_round),
            **more,
        )

    return make


class Seen:
    """The model's architecture and states whenever it was evaluated and trained."""

    def __init__(self):
        self.evaluated, self.trained = [], []

    def note(self, where, model):
        states = {group: model.state(group) for group in model.groups() if group != "base"}
        where.append((model.stage, getattr(model.connector, "tasks", ()), states))


@pytest.fixture
def seen(monkeypatch):
    seen = Seen()
    change = itertools.count(1)

    def train(model, examples, **_):
        seen.note(seen.trained, model)
        add = 1e-3 * next(change)
        with torch.no_grad():
            for group in trained_groups(model.stage):
                for parameter in model.groups()[group].values():
                    parameter += add
        return TrainingResult({"total": 1.0}, 1, len(examples), 0.0, {})

    def evaluate(model, examples, *, metric, **_):
        seen.note(seen.evaluated, model)
        return EvaluationResult(0.5, metric, len(examples), 0.0)

    monkeypatch.setattr(rank_module, "train", train)
    monkeypatch.setattr(session_module, "evaluate", evaluate)
    return seen


def shifted(state, name, number):
    shift = 1e-3 * (number + 10 * len(name))
    return {key: tensor + shift for key, tensor in state.items()}


def run(site, instruction, config=CONFIG, progress=lambda line: None):
    return run_session(site, config, instruction, progress=progress)


def private(site):
    return site.private_store.load().groups


def private_bytes(site):
    return site.private_store.newest().read_bytes()


def assert_equal(state, expected):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(state[name], tensor), name


def differ(state, other):
    return all(not torch.equal(tensor, other[name]) for name, tensor in state.items())


def assert_received(states, instruction, own="vqa"):
    """The model holds what the server sent: own adapter, LoRA and every foreign adapter."""
    assert_equal(states["lora"], instruction.lora)
    assert_equal(states["own_task_adapter"], instruction.adapters[own])
    for task, adapter in instruction.adapters.items():
        if task != own:
            got = {n: states["foreign_task_adapters"][f"{task}/{n}"] for n in adapter}
            assert_equal(got, adapter)
    foreign = sum(len(a) for task, a in instruction.adapters.items() if task != own)
    assert len(states["foreign_task_adapters"]) == foreign


def test_the_first_stage_2_training_keeps_the_saved_client_adapter(sites, make_instruction, seen):
    site = sites["vqa"]
    run(site, make_instruction(1))
    saved, instruction = private(site), make_instruction(2)
    run(site, instruction)
    stage, tasks, states = seen.trained[-1]
    assert (stage, tasks) == (2, TASKS)
    assert_equal(states["client_adapter"], saved["client_adapter"])
    assert_received(states, instruction)
    assert not any(t.any() for n, t in states["cross_task_adapters"].items() if "linear_2" in n)


def test_a_later_stage_2_training_starts_from_the_saved_private_state(
    sites, make_instruction, seen
):
    site = sites["counting"]  # not the first of the federation's tasks
    for stage in (1, 2):
        run(site, make_instruction(stage, task="counting"))
    saved, instruction = private(site), make_instruction(2, server_round=3)
    run(site, instruction)
    stage, tasks, states = seen.trained[-1]
    assert (stage, tasks) == (2, ("counting", "vqa", "captioning"))
    for group in ("client_adapter", "cross_task_adapters", "router"):
        assert saved[group]
        assert_equal(states[group], saved[group])
    assert_received(states, instruction, own="counting")


def test_what_training_changed_is_saved_and_only_the_rest_is_sent(sites, make_instruction, seen):
    site = sites["vqa"]
    run(site, make_instruction(1))
    instruction = make_instruction(2)
    result = run(site, instruction)
    before, after = seen.trained[-1][2], private(site)
    assert differ(after["cross_task_adapters"], before["cross_task_adapters"])
    assert differ(after["router"], before["router"])
    assert_equal(after["client_adapter"], before["client_adapter"])  # frozen in stage 2
    assert differ(result.adapter, instruction.adapters["vqa"])
    assert differ(result.lora, instruction.lora)
    assert result.adapter.keys() == instruction.adapters["vqa"].keys()
    assert result.lora.keys() == instruction.lora.keys()


def test_a_stage_1_training_after_another_continues_the_client_adapter(
    sites, make_instruction, seen
):
    site = sites["vqa"]
    run(site, make_instruction(1))
    saved, instruction = private(site), make_instruction(1, server_round=2)
    run(site, instruction)
    stage, _, states = seen.trained[-1]
    assert stage == 1
    assert_equal(states["client_adapter"], saved["client_adapter"])
    assert_received(states, instruction)


@pytest.mark.parametrize("initialisation", ["identity", "official"])
def test_before_any_training_the_base_model_is_evaluated(sites, initial, seen, initialisation):
    """Whatever the initialisation, ψ_s is inert; the first exchange sends the base's adapters."""
    config = replace(CONFIG, model=replace(CONFIG.model, initialisation=initialisation))
    instruction = Instruction(1, 1, TASKS, {"vqa": initial.adapter}, initial.lora, train=False)
    run(sites["vqa"], instruction, config)
    ((stage, _, states),) = seen.evaluated
    assert stage == 1
    assert not any(t.any() for n, t in states["client_adapter"].items() if "linear_2" in n)
    assert_received(states, instruction)


def test_a_late_joiner_evaluates_the_adapters_that_it_is_sent(sites, make_instruction, seen):
    instruction = make_instruction(1, server_round=3)
    run(sites["vqa"], instruction)
    stage, _, states = seen.evaluated[-1]
    assert stage == 1
    assert_received(states, instruction)


def test_the_incoming_model_is_evaluated_as_it_was_last_trained(sites, make_instruction, seen):
    """Stage 1 in exchange 2, although stage 2 is to be trained; CT-MoA in exchange 3."""
    site = sites["vqa"]
    run(site, make_instruction(1))
    for server_round, expected in ((2, 1), (3, 2)):
        saved, instruction = private(site), make_instruction(2, server_round=server_round)
        run(site, instruction)
        stage, _, states = seen.evaluated[-1]
        assert stage == expected
        for group, state in saved.items():
            assert_equal(states[group], state)
        own = replace(instruction, adapters={"vqa": instruction.adapters["vqa"]})
        assert_received(states, instruction if expected == 2 else own)


def test_training_in_float16_on_a_cpu_is_refused(sites, make_instruction, seen):
    half = replace(CONFIG, model=replace(CONFIG.model, dtype="float16"))
    with pytest.raises(ConfigError, match=r"`model\.dtype` is float16 but must be bfloat16 or"):
        run(sites["vqa"], make_instruction(1), half)
    run(sites["vqa"], make_instruction(1, train=False, evaluate=True), half)


def test_evaluating_only_writes_nothing(sites, make_instruction, seen):
    site = sites["vqa"]
    result = run(site, make_instruction(1, train=False))
    assert result.evaluation and not result.training and not result.adapter and not result.lora
    assert site.private_store.stage(before=2) == 0 and site.private_store.newest() is None
    run(site, make_instruction(1))
    run(site, make_instruction(2))
    before = private_bytes(site)
    run(site, make_instruction(2, server_round=3, train=False))
    assert private_bytes(site) == before
    assert len(seen.trained) == 2


def test_training_only_evaluates_nothing(sites, make_instruction, seen):
    result = run(sites["vqa"], make_instruction(1, evaluate=False))
    assert result.training and result.evaluation is None and not seen.evaluated


def test_the_state_of_another_client_is_refused(sites, make_instruction, seen):
    site = sites["vqa"]
    run(site, make_instruction(1))
    other = replace(site, client=replace(site.client, id="vqa-1"))
    for use in (
        lambda: run(other, make_instruction(2)),
        lambda: other.private_store.stage(before=2),
    ):
        with pytest.raises(StateError, match="to client 'vqa-0', not to 'vqa-1'"):
            use()
    assert len(seen.trained) == 1


def test_stage_2_without_stage_1_is_refused(sites, make_instruction, seen):
    with pytest.raises(StateError, match="'vqa-0' was asked to train stage 2 but holds no"):
        run(sites["vqa"], make_instruction(2))
    assert not seen.trained


@pytest.mark.parametrize("tasks", [("vqa", "counting"), ("vqa", "captioning", "counting")])
def test_other_tasks_than_those_trained_are_refused(sites, make_instruction, seen, tasks):
    """The router's outputs and ψ_c belong to tasks in one instruction."""
    site = sites["vqa"]
    for stage in (1, 2):
        run(site, make_instruction(stage))
    before = private_bytes(site)
    for evaluate in (True, False):
        with pytest.raises(StateError, match="private state is for tasks"):
            run(site, make_instruction(2, server_round=3, tasks=tasks, evaluate=evaluate))
    assert private_bytes(site) == before


def fail(model, *args, **kwargs):
    spoil(model, float("inf"))
    raise TrainingError("the power went")


def leave_nan(model, examples, **_):
    spoil(model, float("nan"))
    return TrainingResult({}, 1, len(examples), 0.0, {})


def spoil(model, value):
    with torch.no_grad():
        for group in trained_groups(model.stage):
            for parameter in model.groups()[group].values():
                parameter.view(-1)[-1] = value


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize(
    ("broken", "message"), [(fail, "the power went"), (leave_nan, "of lora is not finite in stage")]
)
def test_a_training_that_fails_leaves_the_private_state(
    sites, make_instruction, seen, monkeypatch, stage, broken, message
):
    site = sites["vqa"]
    for earlier in range(1, stage + 1):
        run(site, make_instruction(earlier))
    before, instruction = private_bytes(site), make_instruction(stage, server_round=3)
    train = rank_module.train
    monkeypatch.setattr(rank_module, "train", broken)
    with pytest.raises(TrainingError, match=message):
        run(site, instruction)
    assert private_bytes(site) == before
    monkeypatch.setattr(rank_module, "train", train)  # and the client is not locked out
    saved = private(site)
    run(site, instruction)
    assert_equal(seen.trained[-1][2]["client_adapter"], saved["client_adapter"])
    assert_received(seen.trained[-1][2], instruction)


def test_each_group_that_is_saved_or_sent_must_be_finite(
    sites, make_instruction, seen, monkeypatch
):
    site = sites["vqa"]
    run(site, make_instruction(1))
    before = private_bytes(site)
    for group in trained_groups(2):

        def one(model, examples, *, group=group, **_):
            with torch.no_grad():
                next(iter(model.groups()[group].values())).view(-1)[0] = float("inf")
            return TrainingResult({}, 1, len(examples), 0.0, {})

        monkeypatch.setattr(rank_module, "train", one)
        with pytest.raises(TrainingError, match=f"of {group} is not finite"):
            run(site, make_instruction(2))
        assert private_bytes(site) == before


def test_another_clients_session_in_between_changes_no_bit(tmp_path, make_instruction):
    """The real training and evaluation, with dropout, on the one warm model."""
    clients = {c.task: c for c in federation_clients(CONFIG.data)}

    def history(folder, *, disturbed):
        site = Site(clients["vqa"], folder / "vqa", "cpu")
        other = Site(clients["captioning"], folder / "captioning", "cpu")
        results = []
        for server_round, stage in ((1, 1), (2, 2), (3, 2)):
            if disturbed:
                run(other, make_instruction(stage, task="captioning", server_round=server_round))
            results.append(run(site, make_instruction(stage, server_round=server_round)))
        return results, private(site)

    alone, alone_private = history(tmp_path / "alone", disturbed=False)
    between, between_private = history(tmp_path / "between", disturbed=True)
    for one, two in zip(alone, between, strict=True):
        assert_equal(two.adapter, one.adapter)
        assert_equal(two.lora, one.lora)
        assert two.training.losses == one.training.losses
        assert two.evaluation.score == one.evaluation.score
    for group, state in alone_private.items():
        assert_equal(between_private[group], state)


def test_ids_that_are_not_unique_are_refused_in_either_split(
    sites, make_instruction, seen, monkeypatch
):
    """Ids name examples in the log and in caches."""
    read = data_module.client_examples
    for split, instruction in (
        ("test", make_instruction(1, train=False)),
        ("train", make_instruction(1)),
    ):

        def twice(data, client, asked, *, split=split, **more):
            examples = read(data, client, asked, **more)
            return [*examples[:-1], examples[0]] if asked == split else examples

        monkeypatch.setattr(data_module, "client_examples", twice)
        message = f"{split} split of client 'vqa-0', 1 ids belong to more than one example"
        with pytest.raises(DataError, match=message):
            run(sites["vqa"], instruction)
    assert not seen.trained


def test_a_model_of_another_type_does_not_get_kept_features(sites, make_instruction, monkeypatch):
    seen_dtypes = []
    for config in (CONFIG, replace(CONFIG, model=replace(CONFIG.model, dtype="bfloat16"))):
        real = session_module.evaluate

        def evaluate(model, examples, *, encode, real=real, **kwargs):
            seen_dtypes.append(next(encode([examples[:1]])).features.dtype)
            return real(model, examples, encode=encode, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(session_module, "evaluate", evaluate)
            run(sites["vqa"], make_instruction(1, train=False), config)
    assert seen_dtypes == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("flower_run", ["", "7"])
def test_features_on_disk_are_those_of_all_runs(
    flower_run, make_instruction, tmp_path, monkeypatch
):
    """A site's lie beside its runs; those of a simulation in the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    encoded = []
    encode = PilotModel.encode_images

    def counted(model, inputs):
        encoded.append(len(inputs["pixel_values"]))
        return encode(model, inputs)

    monkeypatch.setattr(PilotModel, "encode_images", counted)
    model = replace(CONFIG.model, feature_cache=FeatureCacheConfig(where="disk"))
    client = federation_clients(CONFIG.data)[0]
    for number in range(2):
        site = Site(client, tmp_path / "runs" / str(number), "cpu", flower_run=flower_run)
        run(site, make_instruction(1), replace(CONFIG, model=model))
        total = sum(encoded)
    examples = CONFIG.data.test_examples + len(
        data_module.client_examples(CONFIG.data, client, "train", seed=CONFIG.seed)
    )
    assert sum(encoded) == total == examples
    folder = tmp_path / ("runs" if flower_run else "cache/pilot-flwr") / "features"
    assert len(list(folder.glob("*.safetensors"))) == examples


def test_entries_of_this_run_are_known_by_its_first_session(tmp_path, monkeypatch):
    """In a simulation by that of any of its clients, at a site by its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    config = replace(
        CONFIG, model=replace(CONFIG.model, feature_cache=FeatureCacheConfig(where="disk"))
    )
    client = federation_clients(CONFIG.data)[0]
    for number, name in enumerate(("a", "b")):
        lock = tmp_path / "runs" / name / session_module.SESSION_LOCK
        lock.parent.mkdir(parents=True)
        lock.touch()
        os.utime(lock, ns=(0, 5 + number))
    for flower_run, expected in (("", 5), ("7", 6)):
        site = Site(client, tmp_path / "runs" / "b", "cpu", flower_run=flower_run)
        assert data_module._features(site, config, print).since == expected


def test_evaluation_uses_the_autocast_of_training(sites, make_instruction, seen, monkeypatch):
    given = []
    noted = session_module.evaluate

    def evaluate(*args, autocast_choice, **kwargs):
        given.append(autocast_choice)
        return noted(*args, **kwargs)

    monkeypatch.setattr(session_module, "evaluate", evaluate)
    config = replace(CONFIG, train=replace(CONFIG.train, autocast="bfloat16"))
    run(sites["vqa"], make_instruction(1, train=False), config)
    assert given == ["bfloat16"]


@pytest.mark.parametrize("stage", [1, 2])
def test_out_of_memory_says_what_to_change(sites, make_instruction, seen, monkeypatch, stage):
    if stage == 2:
        run(sites["vqa"], make_instruction(1))

    def fail(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nMore.")

    monkeypatch.setattr(rank_module, "train", fail)
    message = (
        rf"ran out of memory in stage {stage} with a micro-batch of 4\..*expects \d.*"
        r"`train\.batch_size`.*`model\.gradient_checkpointing=true`.*`model\.quantization=4bit`"
        r".*Tried to allocate 2\.00 GiB\.$"
    )
    with pytest.raises(TrainingError, match=message):
        run(sites["vqa"], make_instruction(stage))


def test_what_is_sent_is_rounded_once_and_what_stays_is_not(sites, initial, make_instruction, seen):
    config = replace(CONFIG, model=replace(CONFIG.model, sent_dtype="bfloat16"))
    assert {t.dtype for t in initial_state(config.model, seed=0).lora.values()} == {torch.bfloat16}
    result = run(sites["vqa"], make_instruction(1), config)
    assert {t.dtype for t in {**result.lora, **result.adapter}.values()} == {torch.bfloat16}
    held = loaded_model(config.model, reduction="normalized", device=torch.device("cpu"))
    assert {p.dtype for p in held.groups()["lora"].values()} == {torch.float32}
    for name, parameter in held.groups()["lora"].items():
        assert torch.equal(result.lora[name], parameter.to(torch.bfloat16))
    kept = private(sites["vqa"])["client_adapter"]
    assert {t.dtype for t in kept.values()} == {torch.float32}
    exact = run(sites["counting"], make_instruction(1, task="counting"))
    assert {t.dtype for t in exact.lora.values()} == {torch.float32}


def test_a_session_copies_no_tensor_of_the_frozen_base(sites, make_instruction, seen, monkeypatch):
    """At 7B, such a copy is 13.5 GB."""
    state, copied = PilotModel.state, {}

    def noting(model, group, **options):
        copied[group] = state(model, group, **options)
        return copied[group]

    monkeypatch.setattr(PilotModel, "state", noting)
    run(sites["vqa"], make_instruction(1))
    assert copied["base"] == copied["residual"] == {}
    assert copied["client_adapter"] and copied["own_task_adapter"]


def test_examples_that_were_cut_are_reported(sites, make_instruction, monkeypatch):
    """Their number, in the site's own log: nothing is truncated quietly."""
    lengths = []

    def train(model, examples, *, collator, **_):
        lengths.extend(len(collator.train_batch([example]).input_ids[0]) for example in examples)
        return TrainingResult({"total": 1.0}, 1, len(examples), 0.0, {})

    monkeypatch.setattr(rank_module, "train", train)
    run(sites["vqa"], make_instruction(1))
    longest, lines = max(lengths), []
    over = sum(length == longest for length in lengths)
    lengths.clear()
    short = replace(CONFIG.train, max_length=longest - 1, over_long="cut")
    config = replace(CONFIG, train=short)
    run_session(sites["vqa"], config, make_instruction(1), progress=lines.append)
    assert max(lengths) == longest - 1
    noun = "training example" if over == 1 else "training examples"
    assert lines[-1] == f"cut {over} {noun} at `train.max_length`, {longest - 1} tokens"


def test_a_pooled_training_counts_each_cut_example_once(tmp_path):
    answers = ["a", "a b c d", "a b c d e f g h", "b", "b c d e f g h i j"]
    turns = [[{"from": "human", "value": "Say."}, {"from": "gpt", "value": a}] for a in answers]
    rows = [{"id": str(n), "conversations": turn} for n, turn in enumerate(turns)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    config = PilotConfig(
        model=replace(CONFIG.model, client_adapter=False),
        data=DataConfig(
            source="llava",
            tasks=["vqa"],
            clients_per_task=2,
            folder=str(tmp_path),
            files={"vqa": TaskFiles(train=["rows.json"], test=["rows.json"])},
        ),
        strategy=StrategyConfig(trained_by="pooled", stages=1, adapters="global", lora="global"),
    )
    start = initial_state(config.model, seed=0)
    instruction = Instruction(
        server_round=1, stage=1, tasks=("vqa",), adapters={"vqa": start.adapter}, lora=start.lora
    )
    site = Site(federation_clients(config.data)[0], tmp_path / "state", "cpu")
    data = session_module.Session(site, config, instruction, None, print).data
    lengths = [len(data.collator.tokenize(example)[0]) for example in data.examples("train")]
    limit = sorted(lengths)[2]
    number = sum(length > limit for length in lengths)
    train = TrainConfig(over_long="cut", max_length=limit, epochs=2)
    lines = []
    run(site, instruction, replace(config, train=train), lines.append)
    assert [line for line in lines if line.startswith(f"cut {number} training examples")]
