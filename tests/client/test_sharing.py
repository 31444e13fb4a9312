"""What of the trained parameters is sent, what is kept, and what is trained at all."""

import pytest
import torch
from flwr.app import MessageType
from inprocess import SMALL, finish
from quick_training import quick_training
from visuals import encoder

from pilot_flwr.algorithm.parameter_groups import Sharing
from pilot_flwr.client.personalization import Received, personalize_as_trained
from pilot_flwr.client.private_state import PrivateState
from pilot_flwr.client.session import session_generator
from pilot_flwr.client.training import Proximal, sent_parameters, train
from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.config.schema import SharingConfig
from pilot_flwr.config.train import StageConfig, TrainConfig
from pilot_flwr.data.collator import Collator
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.errors import StateError
from pilot_flwr.flower.codec import decode_state
from pilot_flwr.flower.messages import decode_update
from pilot_flwr.inference.runs import client_model, load_model, open_run, select_consensus
from pilot_flwr.model.loading import initial_state
from pilot_flwr.protocol import LOSSES

CPU = torch.device("cpu")
TWO = f"{SMALL} data.tasks=[vqa] data.clients_per_task=2 strategy.rounds=1 evaluation.enabled=false"
PLAIN = f"{TWO} model.client_adapter=false strategy.stages=1"
ONE = f"{PLAIN} data.clients_per_task=1"


@pytest.fixture(scope="module")
def examples():
    data = DataConfig(train_examples=12)
    return client_examples(data, federation_clients(data)[0], "train", seed=0)[:4]


@pytest.fixture
def run(processor, examples):
    """Train a model on four examples; `proximal` is as of `train`, the rest of `TrainConfig`."""

    def call(model, *, proximal=None, **config):
        return train(
            model,
            examples,
            collator=Collator(processor, max_length=256),
            encode=encoder(model, processor),
            config=TrainConfig(**({"epochs": 1, "batch_size": 2} | config)),
            generator=torch.Generator().manual_seed(0),
            progress=lambda line: None,
            proximal=proximal,
        )

    return call


def start(model):
    """Load a LoRA that has begun to learn."""
    lora = initial_state(model.config, seed=0).lora
    generator = torch.Generator().manual_seed(1)
    model.load(
        "lora", {n: t + 0.01 * torch.randn(t.shape, generator=generator) for n, t in lora.items()}
    )
    return model


def states(model):
    return {f"{g}/{n}": t for g in model.groups() for n, t in model.state(g).items()}


def test_ffa_lora_leaves_a_as_drawn_to_the_bit(make_model, run):
    model = start(make_model(client_adapter=False))
    before = states(model)
    result = run(model, lora_matrices="B")
    after = states(model)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {
        name for name in before if name.startswith("own_task_adapter/") or name.endswith("lora_B")
    }
    trained = sum(t.numel() for n, t in before.items() if n.endswith("lora_B"))
    assert result.gradients["lora"] == trained


def test_the_whole_lora_is_trained_again_after_half_of_it_was(make_model, run):
    model = start(make_model(client_adapter=False))
    run(model, lora_matrices="B")
    before = model.state("lora")
    run(model)
    assert not any(torch.equal(t, before[name]) for name, t in model.state("lora").items())


def test_lr_scale_is_that_many_times_every_rate(make_model, run):
    found = []
    for scale, rates in ((2.0, (1e-3, 3e-4)), (1.0, (2e-3, 6e-4))):
        model = start(make_model())
        run(model, lr_scale=scale, stage1=StageConfig(*rates))
        found.append(states(model))
    assert all(torch.equal(t, found[1][name]) for name, t in found[0].items())


@pytest.mark.parametrize("shared", ["AB", "A", "B"])
def test_the_proximal_gradient_is_autograds_of_the_explicit_sum(make_model, shared):
    model = start(make_model())
    sharing = Sharing.of(SharingConfig(lora=shared), "AB")
    weight = 0.7
    anchors = {n: t.double() for n, t in states(model).items()}
    proximal = Proximal(sent_parameters(model, sharing), weight)
    generator = torch.Generator().manual_seed(2)
    for named in model.groups().values():
        for parameter in named.values():
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    losses = proximal.backpropagate()

    sent = {  # written out: the own adapter, and of the LoRA what is shared
        f"{group}/{name}": parameter
        for group, named in model.groups().items()
        for name, parameter in named.items()
        if group == "own_task_adapter" or (group == "lora" and name[-1] in shared)
    }
    copies = {n: p.detach().double().requires_grad_() for n, p in sent.items()}
    total = 0.5 * weight * sum(((w - anchors[n]) ** 2).sum() for n, w in copies.items())
    total.backward()
    assert losses.tolist() == pytest.approx(
        [total.item() if name in ("total", "proximal") else 0.0 for name in LOSSES], rel=1e-5
    )
    for group, named in model.groups().items():
        for name, parameter in named.items():
            expected = copies.get(f"{group}/{name}")
            if expected is None:
                assert parameter.grad is None
            else:
                torch.testing.assert_close(
                    parameter.grad.double(), expected.grad, rtol=1e-5, atol=1e-8
                )


def test_a_training_with_a_proximal_term_is_adamw_on_the_sum_of_both(make_model, run):
    """The first step has no pull; at the second it changes the gradient, and so what is trained."""
    free, pulled = start(make_model(client_adapter=False)), start(make_model(client_adapter=False))
    first = run(free)
    proximal = Proximal(sent_parameters(pulled, Sharing()), 1e3)
    second = run(pulled, proximal=proximal)
    assert first.losses["proximal"] == 0 < second.losses["proximal"]
    assert second.losses["total"] == pytest.approx(
        second.losses["ce"] + second.losses["proximal"], rel=1e-5
    )
    distances = [
        sum(float((model.state("lora")[n] - t).square().sum()) for n, t in begun.items())
        for begun in [start(make_model(client_adapter=False)).state("lora")]
        for model in (free, pulled)
    ]
    assert distances[1] < distances[0]


# Settings, what is sent, and what a client keeps.
CASES = {
    "A": ("strategy.sharing.lora=A", {"lora_A", "adapter"}, {"lora_B"}),
    "FFA": ("strategy.sharing.lora=B train.lora_matrices=B", {"lora_B", "adapter"}, set()),
    "LoRA alone": ("strategy.sharing.adapter=false", {"lora_A", "lora_B"}, {"adapter"}),
    "local": (
        "strategy.sharing.adapter=false strategy.sharing.lora=none",
        set(),
        {"lora_A", "lora_B", "adapter"},
    ),
}


def kinds(*groups):
    """Which kinds of tensor there are among LoRAs and adapters, by their names."""
    names = {name for group in groups for name in group}
    return {n[-6:] if n.endswith(("lora_A", "lora_B")) else "adapter" for n in names}


@pytest.mark.parametrize("case", CASES)
def test_only_what_is_shared_is_in_any_message_and_the_rest_is_kept(tmp_path, case):
    overrides, sent, kept = CASES[case]
    with quick_training():
        federation = finish(tmp_path / "run", f"{PLAIN} {overrides}")
    assert federation.events("failure") == []
    for message in federation.grid.messages:
        records = message.content.array_records.values()
        expected = set() if message.metadata.message_type == MessageType.QUERY else sent
        assert kinds(*map(decode_state, records)) == expected
    for client in ("vqa-0", "vqa-1"):
        groups = federation.private(client).groups
        assert kinds(*groups.values()) == kept
        # Its model is put together of both, and of what nobody has trained.
        model = client_model(open_run(tmp_path / "run"), client, device=CPU)
        server, own = federation.strategy.state, groups
        pieces = own.get("lora", {}) | server.loras[client]
        drawn = initial_state(model.config, seed=0).lora
        for name, tensor in model.state("lora").items():
            assert torch.equal(tensor, pieces.get(name, drawn[name])), name
        adapter = own.get("own_task_adapter") or server.adapters["vqa"]
        for name, tensor in model.state("own_task_adapter").items():
            assert torch.equal(tensor, adapter[name])


def test_a_client_that_shares_nothing_trains_as_if_it_were_alone(tmp_path, processor, make_model):
    """Two exchanges of `local` are two trainings of one model, one after the other."""
    federation = finish(tmp_path / "run", f"{PLAIN} data.train_examples=4 {CASES['local'][0]}")
    config, client = federation.config, federation_clients(federation.config.data)[1]
    model = make_model(client_adapter=False)
    model.load("lora", initial_state(model.config, seed=0).lora)
    for exchange in (1, 2):
        train(
            model,
            client_examples(config.data, client, "train", seed=0),
            collator=Collator(processor, max_length=256),
            encode=encoder(model, processor),
            config=config.train,
            generator=session_generator(0, client.id, exchange),
            progress=lambda line: None,
        )
    groups = federation.private(client.id).groups
    for group in ("lora", "own_task_adapter"):
        for name, tensor in model.state(group).items():
            assert torch.equal(tensor, groups[group][name]), name
    # Nothing was shared: a new client of the task gets the base model and an inert LoRA.
    run = open_run(tmp_path / "run")
    fresh = make_model(client_adapter=False)
    fresh.load("lora", initial_state(model.config, seed=0).lora)
    new = states(load_model(run, select_consensus(run, "vqa"), device=CPU))
    assert all(torch.equal(tensor, new[name]) for name, tensor in states(fresh).items())


def test_a_private_state_of_another_sharing_is_refused(make_model):
    model, initial = make_model(client_adapter=False), initial_state(ModelConfig(), seed=0)
    sharing = Sharing(lora="A")
    with pytest.raises(StateError, match="0 tensors of lora .* another `strategy.sharing`"):
        personalize_as_trained(
            model,
            PrivateState(1, groups={"client_adapter": {}}),
            Received(
                "vqa",
                ("vqa",),
                {"vqa": initial.adapter},
                initial.sent(sharing).lora,
                sharing=sharing,
            ),
        )


def test_a_private_upload_is_of_what_is_sent_alone(tmp_path):
    """Clipped to norm C is the change of what leaves, whatever the rest has done."""
    found = []
    for name, privacy in (
        ("plain", ""),
        ("clipped", "privacy.enabled=true privacy.clip_norm=0.01 privacy.noise_multiplier=1e-6"),
    ):
        overrides = f"{ONE} strategy.sharing.lora=A strategy.sharing.adapter=false {privacy}"
        with quick_training():
            federation = finish(tmp_path / name, overrides)
        update = decode_update(federation.replies(MessageType.TRAIN)[0].content)
        assert update.adapter == {} and kinds(update.lora) == {"lora_A"}
        sent = initial_state(federation.config.model, seed=0).lora
        found.append(torch.cat([(t - sent[n]).flatten() for n, t in update.lora.items()]).double())
    whole, clipped = found
    assert whole.norm() > 0.1
    # float32 rounds what was sent plus a small change, number by number.
    assert (clipped - 0.01 * whole / whole.norm()).norm() < 0.02 * 0.01
