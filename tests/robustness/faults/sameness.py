"""Compare what two runs left behind: everything but times must be the same, bit by bit."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from pilot_flwr.run.atomic import CHECKSUM

TIMES = {"elapsed", "seconds", "started", "turn_seconds"}
"""Fields of events that say when and how long."""

OF_AN_INTERRUPTION = {"resume", "repeat"}
"""Events that only a run has that was interrupted."""

NOT_COMPARED = {CHECKSUM, "flower-run"}
"""Metadata: safetensors orders the header at random, which a private state's checksum includes."""


def differences(reference: Path, other: Path) -> list[str]:
    """Say in what two finished runs differ.

    Parameters
    ----------
    reference, other : Path
        Run folders.

    Returns
    -------
    list of str
        Empty if checkpoints, private states, matrices, events, scores and tables are the same.
    """
    found = []
    for part in ("checkpoint", "clients", "aggregations"):
        found += _differing_tensors(reference / part, other / part, part)
    found += _differing_state(reference, other)
    if comparable_events(reference) != comparable_events(other):
        found.append("metrics.jsonl")
    for name in ("status", "failures", "scores"):
        if _result(reference).get(name) != _result(other).get(name):
            found.append(f"result.json: {name}")
    if (reference / "summary.md").read_bytes() != (other / "summary.md").read_bytes():
        found.append("summary.md")
    return found


def comparable_events(folder: Path) -> list[str]:
    """Return a run's events without times, in an order that does not depend on who was faster.

    Discarded attempts at an exchange are left out.
    """
    events: list[dict[str, Any]] = []
    for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        event = json.loads(line)
        if undone := event.get("undone", 0):
            del events[-undone:]
        events.append(event)
    kept = [event for event in events if event["event"] not in OF_AN_INTERRUPTION]
    return sorted(json.dumps(_without_times(event), sort_keys=True) for event in kept)


def _without_times(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_times(inner) for key, inner in value.items() if key not in TIMES}
    return value


def _differing_tensors(reference: Path, other: Path, part: str) -> list[str]:
    names = [_tensor_files(folder) for folder in (reference, other)]
    found = [f"{part}/{name} is in one only" for name in sorted(names[0] ^ names[1])]
    for name in sorted(names[0] & names[1]):
        if _content(reference / name) != _content(other / name):
            found.append(f"{part}/{name}")
    return found if names[0] else [f"{part}: there is nothing to compare"]


def _tensor_files(folder: Path) -> set[str]:
    found = (path.relative_to(folder) for path in folder.rglob("*.safetensors"))
    return {path.as_posix() for path in found if not path.parts[0].startswith((".", "refused-"))}


def _content(path: Path) -> dict[str, Any]:
    """Return metadata and tensors, each tensor by its bytes."""
    with safe_open(path, framework="pt") as file:
        metadata = {key: v for key, v in file.metadata().items() if key not in NOT_COMPARED}
        content: dict[str, Any] = {"": metadata}
        for name in file.keys():  # noqa: SIM118 - not a mapping
            tensor = file.get_tensor(name)
            data = bytes(tensor.contiguous().flatten().view(dtype=_bytes()).numpy().tobytes())
            content[name] = (str(tensor.dtype), tuple(tensor.shape), data)
    return content


def _bytes() -> Any:
    import torch

    return torch.uint8


def _differing_state(reference: Path, other: Path) -> list[str]:
    folders = [sorted((run / "checkpoint").glob("round-*")) for run in (reference, other)]
    if [f.name for f in folders[0]] != [f.name for f in folders[1]]:
        return ["names of the checkpoints"]
    found = []
    for one, two in zip(*folders, strict=True):
        states = [json.loads((f / "state.json").read_text(encoding="utf-8")) for f in (one, two)]
        for key in ("format", "round", "tasks", "task_of", "settings"):
            if states[0][key] != states[1][key]:
                found.append(f"{one.name}/state.json: {key}")
    return found


def _result(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content
