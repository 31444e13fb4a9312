"""Events of a run with everything filled in; a test names what matters to it."""

from dataclasses import replace

from pilot_flwr.run.events import (
    Aggregated,
    ClientFailed,
    Evaluated,
    ExchangeClosed,
    InstructionSent,
    RosterCalled,
    RosterEntry,
    Trained,
)

ROSTER = RosterCalled(
    exchange=1,
    clients=(
        RosterEntry("captioning-0", "captioning", 180, 1),
        RosterEntry("vqa-1", "vqa", 90, 1),
    ),
)
TRAINED = Trained(
    exchange=1,
    stage=1,
    client="vqa-1",
    task="vqa",
    losses={"total": 1.2, "ce": 1.1, "difference": 0.1, "balance": 0.0, "z": 0.0},
    examples=180,
    steps=6,
    seconds=3.14,
    gradients={"lora": 10},
    bytes_down=640,
    bytes_up=1_234_567,
    up={"lora": 1_234_567},
)
EVALUATED = Evaluated(
    exchange=0,
    client="vqa-1",
    task="vqa",
    score=0.61,
    metric="exact_match",
    examples=60,
    seconds=1.2,
)
SENT = InstructionSent(
    exchange=1, phase="train", client="vqa-1", task="vqa", stage=1, down={"lora": 640}
)
AGGREGATED = Aggregated(exchange=1, seconds=0.2, clients=2)
FAILED = ClientFailed(exchange=1, phase="train", client="vqa-1", reason="boom")
CLOSED = ExchangeClosed(exchange=1, exchanges=4, seconds=80.4)


def trained(**changes):
    return replace(TRAINED, **changes)


def evaluated(**changes):
    return replace(EVALUATED, **changes)


def sent(**changes):
    return replace(SENT, **changes)
