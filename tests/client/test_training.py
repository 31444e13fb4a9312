import math
from dataclasses import replace

import pytest
import torch
import transformers
from perturbed import perturb
from torch.optim.optimizer import register_optimizer_step_pre_hook
from visuals import encoder

from pilot_flwr.algorithm.connector import ConnectorOutput
from pilot_flwr.client import training
from pilot_flwr.client.evaluation import evaluate
from pilot_flwr.client.optimizer import RunSchedule, rate_factor
from pilot_flwr.client.training import autocast, total_loss, train
from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.model import LoraConfig
from pilot_flwr.config.schema import (
    EvaluationConfig,
)
from pilot_flwr.config.train import DifferenceLossConfig, StageConfig, TrainConfig
from pilot_flwr.data.collator import Collator
from pilot_flwr.data.examples import Example, Turn
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.errors import StateError, TrainingError
from pilot_flwr.model.loading import initial_state
from pilot_flwr.model.slot import Visual
from pilot_flwr.protocol import LOSSES

TASKS = ("vqa", "counting", "captioning")
TRAINED = {
    1: {"own_task_adapter", "client_adapter", "lora"},
    2: {"own_task_adapter", "cross_task_adapters", "router", "lora"},
}


@pytest.fixture(scope="module")
def examples():
    data = DataConfig(train_examples=12)
    return client_examples(data, federation_clients(data)[0], "train", seed=0)[:8]


@pytest.fixture
def run(processor, examples):
    """Train a model on eight examples; keyword arguments change `TrainConfig`."""

    def call(
        model, *, seed=0, given=examples, progress=lambda line: None, run_schedule=None, **config
    ):
        return train(
            model,
            given,
            collator=Collator(processor, max_length=256),
            encode=encoder(model, processor),
            config=TrainConfig(**({"epochs": 1, "batch_size": 4} | config)),
            generator=torch.Generator().manual_seed(seed),
            progress=progress,
            run_schedule=run_schedule,
        )

    return call


@pytest.fixture
def steps():
    """What every optimizer holds just before each of its steps: settings and gradients."""
    seen = []

    def note(optimizer, args, kwargs):
        settings = [
            {key: group[key] for key in ("lr", "weight_decay")} for group in optimizer.param_groups
        ]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        seen.append((settings, {p: p.grad.clone() for p in parameters}))

    handle = register_optimizer_step_pre_hook(note)
    yield seen
    handle.remove()


def gradient_norms(model, step):
    """‖gradient‖₂ of every trained group at one step of the fixture `steps`."""
    gradients = step[1]
    return {
        group: math.sqrt(sum(float(gradients[p].square().sum()) for p in parameters.values()))
        for group, parameters in model.groups().items()
        if group in TRAINED[model.stage]
    }


def states(model):
    return {group: model.state(group) for group in model.groups()}


@pytest.mark.parametrize("stage", [1, 2])
def test_exactly_the_trained_groups_change_and_have_gradients(make_model, generator, run, stage):
    model = make_model()
    if stage == 2:
        model.enter_stage2(TASKS, generator)
    before = states(model)
    result = run(model)
    after = states(model)
    for group, tensors in before.items():
        same = all(torch.equal(t, after[group][name]) for name, t in tensors.items())
        assert same == (group not in TRAINED[stage] or not tensors), group
        size = sum(t.numel() for t in tensors.values())
        assert result.gradients[group] == (size if group in TRAINED[stage] else 0), group
    assert all(p.grad is None for p in model.base.parameters())


def test_the_loss_falls(make_model, run):
    model = make_model()
    first = run(model).losses
    for _ in range(3):
        last = run(model).losses
    assert last["ce"] < 0.7 * first["ce"]


def test_stage_losses(make_model, generator, run):
    model = make_model()
    losses = run(model, epochs=3).losses  # x_s is zero until the first step that changes it
    assert losses["balance"] == losses["z"] == 0 < losses["difference"] <= 1
    assert losses["total"] == pytest.approx(losses["ce"] + 0.1 * losses["difference"], rel=1e-5)
    model.enter_stage2(TASKS, generator)
    losses = run(model).losses
    assert losses["difference"] == 0 < losses["z"]
    assert 1 <= losses["balance"] <= len(TASKS)
    expected = losses["ce"] + 0.1 * losses["balance"] + 0.01 * losses["z"]
    assert losses["total"] == pytest.approx(expected, rel=1e-5)


def test_each_coefficient_is_applied_once():
    parts = ConnectorOutput(torch.zeros(1), *map(torch.tensor, (10.0, 100.0, 1000.0)))
    config = TrainConfig(
        difference_loss=DifferenceLossConfig(weight=2), balance_weight=3, z_weight=5
    )
    assert total_loss(torch.tensor(1.0), parts, config).item() == 1 + 20 + 300 + 5000


def test_cross_entropy_is_transformers_own(make_model, run, processor, examples, llava):
    """One step over all examples with a tiny rate: the loss of LLaVA's own forward pass."""
    batch = Collator(processor, max_length=256).train_batch(examples)
    images = [example.images[0].read() for example in examples]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    expected = llava(
        input_ids=batch.input_ids,
        attention_mask=batch.attention_mask,
        labels=batch.labels,
        pixel_values=pixels,
    ).loss.item()
    got = run(make_model(), batch_size=len(examples)).losses["ce"]
    assert got == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(("stage", "reduction"), [(1, "pooled"), (2, "pooled"), (2, "per_image")])
def test_accumulation_changes_nothing_but_memory(
    make_model, run, examples, steps, stage, reduction
):
    """Seven examples at once, and split: the same gradients, whatever the losses' weights are.

    One example has no image and one two answers more, so micro-batches differ in images and
    tokens; 3 does not divide 7. The auxiliary losses weigh so much that they decide the gradients.
    """
    talk = tuple(Turn(role, "zwei drei vier") for role in ("user", "assistant") * 2)
    given = [replace(examples[0], images=(), turns=talk), *examples[1:7]]
    config = {
        "max_grad_norm": 1e9,
        "balance_weight": 30.0,
        "z_weight": 30.0,
        "difference_loss": DifferenceLossConfig(weight=30.0),
    }
    found = []
    for size in (12, 1, 2, 3, 4):
        model = make_model()
        model.balance_reduction = reduction
        if stage == 2:
            model.enter_stage2(TASKS, torch.Generator().manual_seed(0))
        model.load("lora", initial_state(model.config, seed=0).lora)  # A is drawn
        perturb(model)
        result = run(model, given=given, batch_size=size, accumulation_steps=12 // size, **config)
        ((_, gradients),) = steps
        steps.clear()
        found.append((list(gradients.values()), result.losses))
    (at_once, losses), *rest = found
    assert len(at_once) > 0
    for in_parts, split in rest:
        for one, other in zip(at_once, in_parts, strict=True):
            assert float((one - other).norm()) <= 2e-4 * float(one.norm()) + 1e-7
        assert split == pytest.approx(losses, rel=1e-4)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_step_can_be_the_mean_of_its_micro_batches(make_model, run, examples, steps, stage):
    """With `loss_reduction=micro_batch`: the mean of the gradients of each micro-batch alone.

    The micro-batches have different numbers of tokens, and one has a single image.
    """
    talk = tuple(Turn(role, "zwei drei vier") for role in ("user", "assistant") * 2)
    text = replace(examples[0], images=(), turns=talk)
    weights = {"max_grad_norm": 1e9, "balance_weight": 30.0, "z_weight": 30.0}

    def gradients(given, **config):
        model = make_model()
        if stage == 2:
            model.enter_stage2(TASKS, torch.Generator().manual_seed(0))
        model.load("lora", initial_state(model.config, seed=0).lora)
        perturb(model)
        losses = run(model, given=given, batch_size=2, **weights, **config).losses
        ((_, found),) = steps
        steps.clear()
        return losses, [gradient.double() for gradient in found.values()]

    given = [text, *examples[1:6]]
    generator = torch.Generator().manual_seed(0)
    torch.randint(2**62, (), generator=generator)  # dropout's seed
    order = torch.randperm(6, generator=generator).tolist()
    drawn = [given[order.index(i)] for i in range(6)]  # so that each pair below is a micro-batch
    losses, whole = gradients(drawn, accumulation_steps=3, loss_reduction="micro_batch")
    parts = [gradients(given[i : i + 2]) for i in (0, 2, 4)]
    for index, gradient in enumerate(whole):
        mean = sum(found[index] for _, found in parts) / 3
        torch.testing.assert_close(gradient, mean, rtol=1e-4, atol=1e-6)
    for name, value in losses.items():
        assert value == pytest.approx(sum(part[name] for part, _ in parts) / 3, rel=1e-5)
    by_step, _ = gradients(drawn, accumulation_steps=3)
    assert losses["ce"] != pytest.approx(by_step["ce"], rel=1e-2)


def test_number_of_steps_counts_epochs_and_accumulation(make_model, run, examples):
    result = run(make_model(), epochs=3, batch_size=3, accumulation_steps=2)
    assert result.steps == 3 * math.ceil(len(examples) / 6)
    assert result.examples == len(examples)


def test_even_a_single_step_trains(make_model, run):
    model = make_model()
    before = model.state("own_task_adapter")
    run(model, batch_size=8)
    after = model.state("own_task_adapter")
    assert not torch.equal(before["linear_1.weight"], after["linear_1.weight"])


def official_order(lengths, batch_size, accumulation, generator):
    """The order of ``group_by_modality_length``, step by step, from its description."""
    size = batch_size * accumulation

    def grouped(indices):
        indices = [indices[i] for i in torch.randperm(len(indices), generator=generator).tolist()]
        groups = []
        while indices:
            group, indices = indices[:size], indices[size:]
            group.sort(key=lambda i: -abs(lengths[i]))
            if len(group) % accumulation:
                chunks = [group[k::accumulation] for k in range(accumulation)]
            else:
                chunks, sums = [[] for _ in range(accumulation)], [0.0] * accumulation
                for i in group:
                    shortest = sums.index(min(sums))
                    chunks[shortest].append(i)
                    full = len(chunks[shortest]) == len(group) // accumulation
                    sums[shortest] = math.inf if full else sums[shortest] + abs(lengths[i])
            groups.append(sum(chunks, []))
        return groups

    pictured = grouped([i for i, n in enumerate(lengths) if n > 0])
    texts = grouped([i for i, n in enumerate(lengths) if n < 0])
    if not pictured or not texts:
        return sum(pictured + texts, [])
    last = sorted(pictured.pop() + texts.pop())
    groups = pictured + texts
    order = torch.randperm(len(groups), generator=generator).tolist()
    return sum((groups[i] for i in order), []) + last


@pytest.mark.parametrize(("pictured", "texts"), [(20, 0), (0, 7), (17, 11), (8, 8), (1, 1)])
def test_batches_by_length_are_those_of_the_official_sampler(
    make_model, run, examples, monkeypatch, pictured, texts
):
    """Examples with images and without are drawn apart, and by the number of their words."""
    words = torch.randint(1, 20, (pictured + texts,), generator=torch.Generator().manual_seed(1))
    given, lengths = [], []
    for number, count in enumerate(words.tolist()):
        image = number % 2 == 0 if number < 2 * min(pictured, texts) else pictured > texts
        asked = "<image> " * image + "eins " * count
        images = examples[0].images if image else ()
        turns = (Turn("user", asked), Turn("assistant", "zwei"))
        given.append(Example(str(number), images, turns))
        lengths.append((count + 1 + image) * (1 if image else -1))
    seen = []
    monkeypatch.setattr(
        Collator, "train_batch", lambda self, part: seen.append([int(e.id) for e in part]) or part
    )
    monkeypatch.setattr(training, "accumulate", lambda *args: torch.zeros(len(LOSSES)).double())
    monkeypatch.setattr(training, "_clip", lambda *args, **more: {"lora": torch.zeros(())})
    run(make_model(), given=given, batch_size=2, accumulation_steps=2, batching="length", epochs=2)
    generator = torch.Generator().manual_seed(0)
    torch.randint(2**62, (), generator=generator)  # dropout's seed
    expected = []
    for _ in range(2):
        order = official_order(lengths, 2, 2, generator)
        expected += [order[i : i + 2] for i in range(0, len(order), 2)]
    assert seen == expected
    assert sorted(sum(seen, [])) == sorted([*range(len(given))] * 2)


def test_lora_and_connector_have_their_own_learning_rates(make_model, run):
    tiny = 1e-12
    model = make_model()
    before = states(model)
    run(model, stage1=StageConfig(lora_lr=tiny, connector_lr=1e-3))
    after = states(model)

    def change(group):
        return max(float((t - after[group][n]).abs().max()) for n, t in before[group].items())

    assert change("lora") < 1e-8 < 1e-4 < change("own_task_adapter")


@pytest.mark.parametrize("stage", [1, 2])
def test_learning_rates_warm_up_and_follow_a_cosine(make_model, generator, run, steps, stage):
    """``lr · (s + 1)/(w + 1)`` in the w steps of warm-up, then the cosine of transformers."""
    model = make_model()
    if stage == 2:
        model.enter_stage2(TASKS, generator)
    rates = {f"stage{stage}": StageConfig(lora_lr=3e-4, connector_lr=2e-4)}
    run(model, epochs=3, warmup_ratio=0.4, **rates)
    n, w = 6, 2  # 3 epochs of 8 / 4 steps; 0.4 · 6 rounded down
    theirs = transformers_factors(w, n)
    factors = [(s + 1) / (w + 1) if s < w else theirs[s] for s in range(n)]
    for index, rate in enumerate((3e-4, 2e-4)):
        got = [settings[index]["lr"] for settings, _ in steps]
        assert got == pytest.approx([rate * factor for factor in factors])


def transformers_factors(warmup, total):
    """Return the factors of `get_cosine_schedule_with_warmup`."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total)
    return [schedule.lr_lambdas[0](step) for step in range(total)]


@pytest.mark.parametrize("total", [1, 2, 33, 34, 67, 500])
@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.5, 0.99])
def test_no_step_has_a_rate_of_zero(total, ratio):
    """From 34 steps on, 3 % are a warm-up, which in transformers starts at zero."""
    warmup = int(ratio * total)
    factors = [rate_factor(step, warmup=warmup, total=total) for step in range(total)]
    assert all(0 < factor <= 1 for factor in factors)
    assert factors[: warmup + 1] == sorted(factors[: warmup + 1])
    assert factors[warmup] == 1
    assert factors[warmup:] == transformers_factors(warmup, total)[warmup:]  # to the last bit


def test_a_run_has_one_schedule_and_one_optimizer(make_model, run, steps):
    """Three exchanges of two steps: torch's AdamW, given the same gradients, ends at the same.

    Stage 2 begins at the second exchange: Θ_l and ψ_t keep their moments, ψ_c and φ have none yet.
    """
    model = make_model()
    model.load("lora", initial_state(model.config, seed=0).lora)
    copies, optimizers, moments = {}, {}, {}
    peak = StageConfig(lora_lr=1e-3, connector_lr=5e-4)
    for exchange in range(3):
        if exchange == 1:
            adapter = model.state("own_task_adapter")
            model.enter_stage2(TASKS, torch.Generator().manual_seed(0))
            model.load("own_task_adapter", adapter)
        keys = {
            parameter: f"{group}/{name}"
            for group in TRAINED[model.stage]
            for name, parameter in model.groups()[group].items()
        }
        for parameter, key in keys.items():
            if key not in copies:
                copies[key] = parameter.detach().clone().requires_grad_()
                optimizers[key] = torch.optim.AdamW([copies[key]], weight_decay=0.0)
        schedule = RunSchedule(exchange, 3, moments)
        rates = {"warmup_ratio": 0.4, "stage1": peak, "stage2": peak}
        run(model, run_schedule=schedule, **rates)
        moments = schedule.moments
        for number, (_, gradients) in enumerate(list(steps), start=2 * exchange):
            factor = [1 / 3, 2 / 3, *transformers_factors(2, 6)[2:]][number]  # 0.4 · 6 rounded down
            for parameter, gradient in gradients.items():
                key = keys[parameter]
                lr = peak.lora_lr if key.startswith("lora/") else peak.connector_lr
                optimizers[key].param_groups[0]["lr"] = lr * factor
                copies[key].grad = gradient
                optimizers[key].step()
        steps.clear()
        assert {key.rpartition("/")[0] for key in moments} == set(keys.values())
        for parameter, key in keys.items():
            torch.testing.assert_close(
                parameter.detach(), copies[key].detach(), rtol=1e-5, atol=1e-7
            )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: whole | {"exp_avg": torch.zeros(3)}, "have shapes"),
        (lambda whole: whole | {"exp_avg": torch.zeros(()), "exp_avg_sq": torch.zeros(())}, "have"),
        (lambda whole: {"exp_avg": whole["exp_avg"]}, "but must be `step`"),
        (lambda whole: whole | {"other": torch.zeros(())}, "have shapes"),
    ],
)
def test_moments_of_another_layout_are_refused(make_model, run, change, message):
    model = make_model()
    name, tensor = next(iter(model.groups()["own_task_adapter"].items()))
    zeros = torch.zeros_like(tensor.detach())
    whole = {"step": torch.tensor(1.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    key = f"own_task_adapter/{name}"
    with pytest.raises(StateError, match=f"moments of `{key}` {message}|{message}"):
        run(
            model,
            run_schedule=RunSchedule(1, 2, {f"{key}/{q}": t for q, t in change(whole).items()}),
        )


def test_moments_of_unknown_tensors_are_refused(make_model, run):
    moments = {"lora/no.such.tensor/step": torch.tensor(1.0)}
    with pytest.raises(StateError, match=r"lacks: \['lora/no.such.tensor'\]"):
        run(make_model(), run_schedule=RunSchedule(1, 2, moments))


def test_weight_decay_is_for_all_that_is_trained(make_model, run, steps):
    """AdamW's decay is apart from the gradient: with a rate of lr, a weight shrinks by lr · λ."""
    plain, decayed = make_model(), make_model()
    before = plain.state("own_task_adapter")["linear_1.weight"]
    rates = {"stage1": StageConfig(lora_lr=1e-4, connector_lr=1e-4), "batch_size": 8}
    run(plain, **rates)
    run(decayed, weight_decay=0.5, **rates)
    decays = [[group["weight_decay"] for group in settings] for settings, _ in steps]
    assert decays == [[0, 0], [0.5, 0.5]]
    after, shrunk = (m.state("own_task_adapter")["linear_1.weight"] for m in (plain, decayed))
    torch.testing.assert_close(after - shrunk, 1e-4 * 0.5 * before, rtol=1e-2, atol=1e-7)


@pytest.mark.parametrize("stage", [1, 2])
def test_each_groups_gradient_is_clipped_by_itself(make_model, generator, run, steps, stage):
    model = make_model()
    if stage == 2:
        model.enter_stage2(TASKS, generator)
    before = states(model)
    for bound in (1e6, 1e-3):
        for group, state in before.items():
            model.load(group, state)
        run(model, batch_size=8, max_grad_norm=bound)
    free, clipped = (gradient_norms(model, step) for step in steps)
    assert min(free.values()) > 2e-3
    assert clipped == pytest.approx(dict.fromkeys(TRAINED[stage], 1e-3), rel=2e-3)  # norm + 1e-6
    for parameter, gradient in steps[0][1].items():  # the direction stays
        group = next(
            g for g, ps in model.groups().items() if any(p is parameter for p in ps.values())
        )
        expected = gradient * (clipped[group] / free[group])
        torch.testing.assert_close(steps[1][1][parameter], expected, rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_global_norm_is_clipped_as_torch_does(make_model, generator, run, steps, stage):
    """One norm over all that is trained, which is `clip_grad_norm_` of the free gradients."""
    model = make_model()
    if stage == 2:
        model.enter_stage2(TASKS, generator)
    before = states(model)
    for bound in (1e6, 1e-3):
        for group, state in before.items():
            model.load(group, state)
        run(model, batch_size=8, max_grad_norm=bound, clipping="global")
    (_, free), (_, clipped) = steps
    copies = [torch.nn.Parameter(torch.zeros_like(gradient)) for gradient in free.values()]
    for copy, gradient in zip(copies, free.values(), strict=True):
        copy.grad = gradient
    assert torch.nn.utils.clip_grad_norm_(copies, 1e-3) > 2e-3
    for copy, gradient in zip(copies, clipped.values(), strict=True):
        torch.testing.assert_close(gradient, copy.grad, rtol=1e-4, atol=1e-9)


def test_a_client_adapter_near_zero_does_not_slow_down_the_others(make_model, run, steps):
    """L_d's gradient grows as 1/‖x_s‖; that of Θ_l does not depend on L_d at all."""

    def norms(weight, max_norm):
        model = make_model()
        model.load("lora", initial_state(model.config, seed=0).lora)
        with torch.no_grad():
            last = model.connector.client_adapter.linear_2.weight
            last.normal_(std=1e-6, generator=torch.Generator().manual_seed(0))
        loss = DifferenceLossConfig(weight=weight)
        run(model, batch_size=8, max_grad_norm=max_norm, difference_loss=loss)
        return gradient_norms(model, steps[-1])

    free, without, clipped = norms(0.1, 1e6), norms(0.0, 1.0), norms(0.1, 1.0)
    assert free["client_adapter"] > 10 * free["lora"]
    assert clipped["client_adapter"] == pytest.approx(1, rel=1e-3)
    assert clipped["lora"] == pytest.approx(without["lora"], rel=1e-6)
    assert clipped["own_task_adapter"] == pytest.approx(without["own_task_adapter"], rel=0.05)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("group", ["lora", "client_adapter"])
def test_a_gradient_that_is_not_finite_stops_before_the_step(make_model, run, steps, group, value):
    """The loss is finite, the gradient is not: as after an overflow in the backward pass."""
    model = make_model()
    before = states(model)
    name, parameter = list(model.groups()[group].items())[-1]
    parameter.register_hook(lambda gradient: gradient + value)
    with pytest.raises(TrainingError, match=f"gradient of {group} is {value} in stage 1; lower"):
        run(model)
    assert not steps
    for other, tensors in before.items():
        assert all(torch.equal(t, model.state(other)[n]) for n, t in tensors.items())


def test_the_same_generator_gives_the_same_training(make_model, run):
    results = []
    for seed in (1, 1, 2):
        model = make_model(lora=LoraConfig(dropout=0.5))
        model.load("lora", initial_state(model.config, seed=0).lora)
        run(model, seed=seed)
        results.append(model.state("lora"))
    name = next(n for n in results[0] if n.endswith("lora_B"))
    assert torch.equal(results[0][name], results[1][name])
    assert not torch.equal(results[0][name], results[2][name])


def test_training_leaves_the_global_generator_alone(make_model, run):
    model = make_model(lora=LoraConfig(dropout=0.5))
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    run(model)
    assert torch.equal(torch.rand(3), expected)


def test_no_example_is_an_error(make_model, run):
    with pytest.raises(TrainingError, match="no training example"):
        run(make_model(), given=[])


def test_a_loss_that_is_not_finite_stops_with_the_setting_to_change(make_model, run):
    model = make_model()
    with torch.no_grad():
        model.groups()["own_task_adapter"]["linear_2.bias"].fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"loss is nan in stage 1; lower `train\.stage1"):
        run(model)


def test_progress_lines_come_as_often_as_asked(make_model, run):
    lines = []
    run(make_model(), progress=lines.append, log_every_seconds=1e-9)
    assert [line.split(",")[0] for line in lines] == ["step 1/2", "step 2/2"]
    quiet = []
    run(make_model(), progress=quiet.append, log_every_seconds=1e9)
    assert quiet == []


def test_bfloat16_autocast_trains(make_model, run):
    full = run(make_model(), autocast="off").losses["ce"]
    half = run(make_model(), autocast="bfloat16").losses["ce"]
    assert half == pytest.approx(full, rel=0.05)
    assert half != full


@pytest.mark.parametrize(
    ("device", "choice", "enabled"),
    [
        ("cuda", "auto", True),
        ("cpu", "auto", False),
        ("cuda", "bfloat16", True),
        ("cpu", "bfloat16", True),
        ("cuda", "off", False),
        ("cpu", "off", False),
    ],
)
def test_autocast_by_choice_and_device(monkeypatch, device, choice, enabled):
    """torch's own class warns where there is no GPU, so its arguments are looked at."""
    calls = []
    monkeypatch.setattr(torch, "autocast", lambda *args: calls.append(args))
    autocast(torch.device(device), choice)
    assert calls == ([(device, torch.bfloat16)] if enabled else [])


@pytest.mark.parametrize("choice", ["bfloat16", "off"])
def test_evaluation_generates_in_the_precision_of_training(
    make_model, processor, examples, monkeypatch, choice
):
    model, dtypes = make_model(), []
    model.base.lm_head.register_forward_hook(lambda m, a, logits: dtypes.append(logits.dtype))

    def checked(parts):
        for features in encoder(model, processor)(parts):
            assert features.features.dtype == torch.float32  # of the tower, as in training
            yield features

    result = evaluate(
        model,
        examples,
        collator=Collator(processor, max_length=256),
        encode=checked,
        metric="exact_match",
        config=EvaluationConfig(max_new_tokens=2, batch_size=5),
        autocast_choice=choice,
    )
    assert result.examples == len(examples)
    assert set(dtypes) == {torch.bfloat16 if choice == "bfloat16" else torch.float32}


def test_answers_that_the_limit_ends_are_counted(make_model, processor, examples):
    """The base answers in one or two tokens and an end token; one token is not enough."""
    model = make_model()
    options = {
        "collator": Collator(processor, max_length=256),
        "encode": encoder(model, processor),
        "metric": "exact_match",
        "autocast_choice": "off",
    }
    short = evaluate(model, examples, config=EvaluationConfig(max_new_tokens=1), **options)
    whole = evaluate(model, examples, config=EvaluationConfig(max_new_tokens=16), **options)
    assert (short.cut, whole.cut) == (len(examples), 0)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_zero_image_counts_in_the_auxiliary_losses_alone(make_model, processor, examples, stage):
    """The connector's own losses on both rows, and the cross-entropy of the batch without it."""
    talk = tuple(Turn(role, "zwei drei vier") for role in ("user", "assistant") * 2)
    given, model = [examples[1], replace(examples[0], images=(), turns=talk)], make_model()
    if stage == 2:
        model.enter_stage2(TASKS, torch.Generator().manual_seed(0))
    perturb(model)
    batch = Collator(processor, max_length=256).train_batch(given)
    plain = next(encoder(model, processor)([given]))
    side = model.base.config.vision_config.image_size
    zero = model.encode_images({"pixel_values": torch.zeros(1, 3, side, side)})[0]
    both = plain._replace(features=torch.cat([plain.features, zero]), images=(1, 1), zeros=1)
    without, found = (
        training.accumulate(model, [batch], iter([visual]), TrainConfig())
        for visual in (plain, both)
    )
    assert found[1] == without[1]  # L_ce
    expected = model.connector(both.features)
    for index, value in enumerate((expected.difference, expected.balance, expected.z), start=2):
        assert found[index].item() == pytest.approx(value.item(), rel=1e-5)
    alone = Visual(zero, (1,), {}, zeros=1)
    text = Collator(processor, max_length=256).train_batch(given[1:])
    split = training.accumulate(
        model, [batch, text], iter([plain, alone]), TrainConfig()
    )  # two micro-batches, the second of text alone
    assert split[4].item() == pytest.approx(expected.z.item(), rel=1e-5)


def test_a_step_of_text_alone_trains(make_model, run):
    texts = [Example(str(n), (), (Turn("user", "How?"), Turn("assistant", "two"))) for n in (1, 2)]
    model = make_model()
    before = {group: model.state(group) for group in ("lora", "own_task_adapter")}
    result = run(model, given=texts, batch_size=2)
    assert result.losses["difference"] == 0
    changed = {g for g, s in before.items() if any((model.state(g)[n] != s[n]).any() for n in s)}
    assert changed == {"lora"}
