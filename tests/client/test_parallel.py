"""Several processes of one client: equal to one process, and none outlives the client's."""

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from families import WRITERS
from perturbed import perturb
from visuals import encoder

from pilot_flwr.algorithm.lora_ranks import at_rank
from pilot_flwr.client import parallel
from pilot_flwr.client.evaluation import answer
from pilot_flwr.client.node import Site
from pilot_flwr.client.parallel import Ranks, end_ranks, in_parallel
from pilot_flwr.client.session import run_session
from pilot_flwr.client.training import accumulate
from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.model import LoraConfig, ModelConfig
from pilot_flwr.config.schema import EvaluationConfig
from pilot_flwr.config.train import DifferenceLossConfig, TrainConfig
from pilot_flwr.data.collator import Collator
from pilot_flwr.data.examples import Turn
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.errors import DataError, TrainingError
from pilot_flwr.model.loading import initial_state, load_processor, loaded_model
from pilot_flwr.model.resource_plan import out_of_memory_explained
from pilot_flwr.protocol import Instruction

TASKS = ("vqa", "counting", "captioning")
CPU = torch.device("cpu")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _enough_gpus(request):
    if "cuda" in request.node.name and torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")


@pytest.fixture(scope="module", autouse=True)
def nothing_left():
    """Whatever the tests of this module did, their processes are gone in the end."""
    yield
    end_ranks()
    assert ranks_of(os.getpid()) == []


def ranks_of(pid):
    """Return the other ranks that a process has started."""
    return [
        child
        for child in psutil.Process(pid).children()
        if "pilot_flwr.client.parallel" in child.cmdline()
    ]


def gone(process, seconds=10.0):
    deadline = time.monotonic() + seconds
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


# What every rank runs is a function of a module, which the other ranks import.


def model_of(stage, device, reduction):
    model = loaded_model(
        ModelConfig(lora=LoraConfig(dropout=0.0)),
        reduction="normalized",
        balance_reduction=reduction,
        device=torch.device(device),
    )
    model.enter_stage1("vqa")
    if stage == 2:
        model.enter_stage2(TASKS, torch.Generator().manual_seed(0))
    model.load("lora", initial_state(model.config, seed=0).lora)
    return perturb(model)


def some_examples(number):
    """Examples of one image, but the first has none, and more answers than the others."""
    data = DataConfig(train_examples=12)
    found = client_examples(data, federation_clients(data)[0], "train", seed=0)[:number]
    talk = tuple(Turn(role, "zwei drei vier") for role in ("user", "assistant") * 2)
    return [replace(found[0], images=(), turns=talk), *found[1:]]


def step_gradients(ranks, stage, number, size, device, reduction="pooled", loss="step"):
    """The losses and gradients of one optimizer step with micro-batches of `size` examples."""
    if device == "cuda" and ranks.rank:
        device = f"cuda:{ranks.rank}"
    model, examples = model_of(stage, device, reduction), some_examples(number)
    processor = load_processor("tiny-llava")
    collator = Collator(processor, max_length=256)
    parts = ranks.own([examples[i : i + size] for i in range(0, number, size)])
    config = TrainConfig(
        balance_weight=30.0,
        z_weight=30.0,
        difference_loss=DifferenceLossConfig(weight=30.0),
        loss_reduction=loss,
        autocast="off",
    )
    batches = [collator.train_batch(part) for part in parts]
    losses = accumulate(model, batches, encoder(model, processor)(parts), config, ranks)
    trained = [p for named in model.groups().values() for p in named.values() if p.requires_grad]
    ranks.add_up([losses])
    ranks.add_up_gradients(trained)
    gradients = [None if p.grad is None else p.grad.cpu().clone() for p in trained]
    for parameter in trained:
        parameter.grad = None
    return losses.cpu(), gradients


@pytest.mark.parametrize(
    ("stage", "reduction", "loss"),
    [
        (1, "pooled", "step"),
        (2, "pooled", "step"),
        (2, "per_image", "step"),
        (2, "", "micro_batch"),
    ],
)
@pytest.mark.parametrize(
    ("number", "size", "processes"),
    [
        pytest.param(7, 2, 2, id="4-parts-on-2"),
        pytest.param(2, 2, 2, id="1-on-2"),
        pytest.param(1, 1, 2, id="text-alone"),
        pytest.param(7, 1, 3, id="7-on-3", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("device", DEVICES)
def test_losses_and_gradients_are_those_of_one_process(
    stage, reduction, loss, number, size, processes, device
):
    """Ranks have different numbers of micro-batches, images and answer tokens, or none at all."""
    step = (stage, number, size, device, reduction or "pooled", loss)
    expected_losses, expected = step_gradients(Ranks(), *step)
    with in_parallel(processes, torch.device(device), step_gradients, *step) as ranks:
        losses, gradients = step_gradients(ranks, *step)
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-7)
    assert any(gradient is not None for gradient in expected)
    for one, other in zip(expected, gradients, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert float((one - other).norm()) <= 2e-4 * float(one.norm()) + 1e-7


def answers(ranks, batch_size):
    model = model_of(1, "cpu", "pooled")
    processor = load_processor("tiny-llava")
    return answer(
        model,
        some_examples(7)[1:],
        collator=Collator(processor, max_length=256),
        encode=encoder(model, processor),
        config=EvaluationConfig(batch_size=batch_size, max_new_tokens=3),
        autocast_choice="off",
        ranks=ranks,
    )


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_answers_are_those_of_one_process_in_order(batch_size):
    expected = answers(Ranks(), batch_size)
    assert len(set(expected.texts)) > 1
    with in_parallel(2, CPU, answers, batch_size) as ranks:
        assert answers(ranks, batch_size) == expected


CONFIG = (
    "data.tasks=[vqa,counting] data.clients_per_task=1 data.train_examples=7 data.test_examples=10 "
    "train.batch_size=1 train.accumulation_steps=3 train.epochs=2 model.lora.dropout=0 "
    "evaluation.max_new_tokens=3 model.sent_dtype=float32"
)


def sessions(folder, overrides, processes):
    """Train both stages at one client; return uploads, evaluations and the last private state."""
    config = load_config(f"{CONFIG} {overrides}")
    client = federation_clients(config.data)[0]
    rank = config.model.lora.client_ranks.get(client.id, 0)
    site = Site(client, folder / str(processes), "cpu", processes=processes, lora_rank=rank)
    initial, results = initial_state(config.model, seed=0), []
    if rank:
        initial = initial._replace(lora=at_rank(initial.lora, rank))
    for stage in (1, 2):
        known = ("vqa", "counting")[: 2 if stage == 2 else 1]
        instruction = Instruction(
            server_round=stage,
            stage=stage,
            tasks=("vqa", "counting"),
            adapters={task: initial.adapter for task in known},
            lora=initial.lora,
        )
        lines = []
        result = run_session(site, config, instruction, progress=lines.append)
        results.append((result, lines))
    return results, site.private_store.load(), initial


def tensors(private):
    found = {f"{g}/{n}": t for g, state in private.groups.items() for n, t in state.items()}
    found |= {f"personal/{g}/{n}": t for g, s in private.personal.items() for n, t in s.items()}
    return found | {f"moments/{n}": t for n, t in private.moments.items()}


@pytest.mark.parametrize(
    "overrides",
    [
        "",
        "train.schedule=run train.proximal_weight=0.1 train.weight_decay=0.1",
        "train.clipping=global train.batching=length strategy.lora=exact",
        "strategy=ditto train.epochs=2",
        "strategy=feddpa train.epochs=2",
        "strategy=feddat train.epochs=2",
        "+model.lora.client_ranks={vqa-0:2}",
    ],
    ids=["plain", "schedule", "length", "ditto", "feddpa", "feddat", "rank"],
)
def test_uploads_and_private_state_are_those_of_one_process(tmp_path, overrides):
    """AdamW divides by a gradient's size, so rounding moves parameters of tiny gradients."""
    alone, kept, initial = sessions(tmp_path, overrides, 1)
    together, also_kept, _ = sessions(tmp_path, overrides, 2)
    for (one, _), (two, _) in zip(alone, together, strict=True):
        for sent, mine, theirs in (
            (initial.adapter, one.adapter, two.adapter),
            (initial.lora, one.lora, two.lora),
        ):
            assert mine.keys() == theirs.keys()
            difference = sum(float((t - theirs[n]).square().sum()) for n, t in mine.items())
            change = sum(float((t - sent[n]).square().sum()) for n, t in mine.items())
            assert 0 < change and difference <= 1e-7 * change
        # The divergence of almost equal probabilities is a difference of almost equal numbers.
        rounding = 2e-6 if "feddat" in overrides else 1e-7
        assert two.training.losses == pytest.approx(one.training.losses, rel=1e-5, abs=rounding)
        assert two.training.gradients == one.training.gradients
        assert (two.training.steps, two.training.examples) == (4, 4)  # of 3 and of 1 micro-batches
        assert (two.evaluation.score, two.evaluation.cut, two.evaluation.examples) == (
            pytest.approx(one.evaluation.score),
            one.evaluation.cut,
            one.evaluation.examples,
        )
    mine, theirs = tensors(kept), tensors(also_kept)
    assert mine.keys() == theirs.keys()
    assert any(name.startswith("moments/") for name in mine) == ("schedule=run" in overrides)
    for name, tensor in mine.items():
        assert float((tensor - theirs[name]).norm()) <= 1e-3 * float(tensor.norm()) + 1e-6, name


@pytest.mark.parametrize("family", ["qwen3-vl", pytest.param("llava-next", marks=pytest.mark.slow)])
def test_features_of_other_families_are_gathered(tmp_path, family):
    """H_v of Qwen3-VL's images is packed, (R, D); H_v of crops is (R, N, D)."""
    overrides = f"model.path={WRITERS[family](tmp_path / 'base')} train.balance_weight=10"
    alone, _, initial = sessions(tmp_path, overrides, 1)
    together, _, _ = sessions(tmp_path, overrides, 2)
    for (one, _), (two, _) in zip(alone, together, strict=True):
        assert two.training.losses == pytest.approx(one.training.losses, rel=1e-4, abs=1e-6)
        assert one.adapter.keys() == two.adapter.keys() == initial.adapter.keys()


def test_examples_cut_by_any_process_are_reported(tmp_path):
    lines = {}
    for processes in (1, 2):
        results, *_ = sessions(tmp_path, "train.over_long=cut train.max_length=34", processes)
        lines[processes] = [line for _, said in results for line in said if "cut" in line]
    assert lines[1] == lines[2] != []


def adamw_shards(ranks):
    parameters = [torch.nn.Parameter(torch.ones(n)) for n in (5, 1, 4, 3, 3)]
    return [[len(p) for p in share] for share in ranks.shard(parameters)]


def test_shards_are_equal_in_size_and_in_order():
    assert adamw_shards(Ranks()) == [[5, 1, 4, 3, 3]]
    assert adamw_shards(Ranks(1, 2)) == [[5, 3], [1, 4, 3]]


def wait_for_rank_0(ranks):
    ranks.totals(1)


def fail_with(ranks, error):
    if ranks.rank == 1:
        raise error
    ranks.totals(1)


def run_out_of_memory(ranks, config):
    with out_of_memory_explained(config, 1):
        raise torch.OutOfMemoryError("CUDA out of memory.")


class Odd(Exception):
    """An error that cannot be sent, because it cannot be copied."""

    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def fail_oddly(ranks):
    raise Odd("salt", "pepper")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_what_another_rank_raises_ends_the_session(processes):
    error = DataError("row 7 of train.json has no image")
    with pytest.raises(DataError, match="row 7 of train.json has no image"):
        with in_parallel(processes, CPU, fail_with, error) as ranks:
            ranks.totals(1)
    assert ranks_of(os.getpid()) == []
    config = load_config("train.batch_size=3")
    with pytest.raises(TrainingError, match="ran out of memory in stage 1 with a micro-batch of 3"):
        with in_parallel(processes, CPU, run_out_of_memory, config) as ranks:
            ranks.totals(1)
    assert ranks_of(os.getpid()) == []
    with pytest.raises(TrainingError, match="Process 2 of .*Odd: salt and pepper"):
        with in_parallel(2, CPU, fail_oddly) as ranks:
            ranks.totals(1)
    assert ranks_of(os.getpid()) == []


@pytest.mark.parametrize(
    "error", [DataError("mine"), KeyboardInterrupt("mine"), RuntimeError("mine")]
)
def test_what_rank_0_raises_ends_the_others(error, monkeypatch):
    monkeypatch.setattr(parallel, "GRACE_SECONDS", 0.5)
    with pytest.raises(type(error), match=str(error)):
        with in_parallel(3, CPU, wait_for_rank_0):
            raise error
    assert ranks_of(os.getpid()) == []


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_a_rank_that_dies_is_reported_and_the_next_call_works(processes):
    for _ in range(2):
        with pytest.raises(TrainingError, match=r"Process 2 of the \d .* killed by signal 9"):
            with in_parallel(processes, CPU, wait_for_rank_0) as ranks:
                for rank in parallel._processes._children:
                    if rank.rank == 1:
                        threading.Timer(0.2, rank.process.kill).start()
                time.sleep(0.5)
                ranks.totals(1)
        assert ranks_of(os.getpid()) == []
        with in_parallel(processes, CPU, wait_for_rank_0) as ranks:
            assert ranks.totals(1) == [processes]


@pytest.mark.slow
def test_a_rank_that_died_between_two_calls_is_replaced():
    with in_parallel(2, CPU, wait_for_rank_0) as ranks:
        ranks.totals(1)
    (first,) = ranks_of(os.getpid())
    with in_parallel(2, CPU, wait_for_rank_0) as ranks:
        ranks.totals(1)
    assert ranks_of(os.getpid()) == [first]  # with its model
    first.kill()
    parallel._processes._children[0].process.wait(10)
    with in_parallel(2, CPU, wait_for_rank_0) as ranks:
        assert ranks.totals(3) == [4]


@pytest.mark.slow
def test_a_killed_rank_fails_the_session_and_leaves_the_private_state(tmp_path):
    """SIGKILL in the middle of a training; the next session repeats it as if nothing happened."""
    config = load_config(f"{CONFIG} train.epochs=20 train.log_every_seconds=1e-6")
    site = Site(federation_clients(config.data)[0], tmp_path, "cpu", processes=2)
    initial = initial_state(config.model, seed=0)
    instruction = Instruction(1, 1, ("vqa", "counting"), {"vqa": initial.adapter}, initial.lora)

    def kill(line):
        if line.startswith("step 3/"):
            (rank,) = ranks_of(os.getpid())
            rank.kill()

    with pytest.raises(TrainingError, match="Process 2 of the 2 of this client was killed by sig"):
        run_session(site, config, instruction, progress=kill)
    assert ranks_of(os.getpid()) == []
    assert site.private_store.load() is None
    result = run_session(site, config, instruction, progress=lambda line: None)
    assert result.training.steps == 40 and site.private_store.load().stage == 1


@pytest.mark.parametrize("command", [[sys.executable, "-c", "raise SystemExit(3)"]])
def test_a_rank_that_does_not_start_is_reported(monkeypatch, command):
    end_ranks()
    monkeypatch.setattr(parallel, "_COMMAND", command)
    with pytest.raises(TrainingError, match="Process 2 of the 2 of this client ended with code 3"):
        with in_parallel(2, CPU, wait_for_rank_0):
            pass
    assert ranks_of(os.getpid()) == []


def test_a_rank_that_hangs_at_its_start_is_reported(monkeypatch):
    end_ranks()
    monkeypatch.setattr(parallel, "_COMMAND", [sys.executable, "-c", "import time; time.sleep(60)"])
    monkeypatch.setattr(parallel, "START_SECONDS", 0.5)
    with pytest.raises(TrainingError, match="did not start within 0 s|did not start within 1 s"):
        with in_parallel(2, CPU, wait_for_rank_0):
            pass
    assert psutil.Process().children() == []


PARENT = """
import os, sys, time, torch
from pilot_flwr.client.parallel import in_parallel
from test_parallel import wait_for_rank_0
if __name__ == "__main__":
    with in_parallel(3, torch.device("cpu"), wait_for_rank_0) as ranks:
        if sys.argv[1] == "forked" and not os.fork():  # a child with copies of all descriptors
            time.sleep(20)
            os._exit(0)
        print("ready", flush=True)
        time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "how"),
    [
        (signal.SIGKILL, ""),
        pytest.param(signal.SIGTERM, "", marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, "", marks=pytest.mark.slow),
        pytest.param(signal.SIGKILL, "forked", marks=pytest.mark.slow),
    ],
)
def test_the_ranks_end_with_rank_0_however_it_ends(tmp_path, number, how):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    with subprocess.Popen(
        [sys.executable, str(script), how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": path},
    ) as parent:
        try:
            assert parent.stdout.readline() == b"ready\n"
            ranks = ranks_of(parent.pid)
            forked = [p for p in psutil.Process(parent.pid).children() if p not in ranks]
            assert len(ranks) == 2 and len(forked) == bool(how)
            parent.send_signal(number)
            assert all(gone(rank) for rank in ranks)
            parent.wait(10)
        finally:
            parent.kill()
            for process in forked:
                process.kill()
