"""Check the nodes of a Ray cluster for what clients need; run by `ray_cluster`.

The answer is one line of JSON on standard output. This is a separate program because Ray can
terminate the process that connects to it, or block it for minutes.
"""

import json
import os
import sys
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy


def main() -> None:
    """Check the cluster described by the first argument, JSON.

    Its keys: ``address`` of the cluster, ``folder`` of the run, the file ``probe`` in it that
    contains ``token``, ``paths`` that must exist, ``packages`` whose versions to report,
    ``seconds`` to wait for the nodes, and ``answer``, the prefix of the answer's line.
    """
    request: dict[str, Any] = json.loads(sys.argv[1])
    answer: dict[str, Any]
    try:
        answer = _inspect(request)
    except Exception as error:  # Ray raises its own types and Python's
        answer = {"error": str(error) or type(error).__name__}
    print(request["answer"] + json.dumps(answer), flush=True)


def _inspect(request: dict[str, Any]) -> dict[str, Any]:
    # The path that Flower's simulation engine will give to the clients' processes.
    path = os.pathsep.join(filter(None, sys.path))
    ray.init(
        request["address"],
        runtime_env={"env_vars": {"PYTHONPATH": path}},
        log_to_driver=False,
        logging_level="ERROR",
    )
    found = _ask_nodes(request)
    free = ray.available_resources()
    context = ray.get_runtime_context()
    return {
        "address": context.gcs_address,
        "nodes": found,
        "free": {name: float(free.get(name, 0)) for name in ("CPU", "GPU")},
    }


def _ask_nodes(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Query every node, and wait for those that Ray considers alive.

    Ray detects a dead node after about 30 seconds. Flower would wait for clients on it forever, so
    this check waits longer than that.
    """
    answers: dict[str, dict[str, Any]] = {}
    errors: dict[str, str] = {}
    pending: dict[str, Any] = {}
    check = _remote_check()
    deadline = time.monotonic() + float(request["seconds"])
    while True:
        nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"]}
        for identity in nodes.keys() - answers.keys() - pending.keys():
            place = NodeAffinitySchedulingStrategy(identity, soft=False)
            pending[identity] = check.options(scheduling_strategy=place).remote(request, identity)
        for identity in list(pending):
            if not ray.wait([pending[identity]], timeout=0)[0]:
                continue
            try:
                answers[identity] = ray.get(pending.pop(identity))
            except ray.exceptions.RayError as error:  # retried while the node is alive
                errors[identity] = str(error).strip()
        if nodes.keys() <= answers.keys() or time.monotonic() > deadline:
            return [
                _row(nodes[identity], answers.get(identity), errors.get(identity, ""))
                for identity in sorted(nodes)
            ]
        time.sleep(0.2)


def _row(node: dict[str, Any], answer: dict[str, Any] | None, error: str) -> dict[str, Any]:
    resources = node["Resources"]
    return {
        "name": f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})",
        "cpus": float(resources.get("CPU", 0)),
        "gpus": float(resources.get("GPU", 0)),
        "answer": answer,
        "error": error,
    }


def _remote_check() -> Any:
    """Return the remote task, an inner function: Ray ships its code, so nodes do not need it."""

    def check(request: dict[str, Any], identity: str) -> dict[str, Any]:
        from importlib.metadata import PackageNotFoundError, version
        from pathlib import Path

        versions: dict[str, str] = {}
        for package in request["packages"]:
            try:
                versions[package] = version(package)
            except PackageNotFoundError:
                versions[package] = ""
        folder = Path(request["folder"])
        problem = ""
        try:
            if (folder / request["probe"]).read_text(encoding="utf-8") != request["token"]:
                problem = "a different folder there"
            else:
                trial = folder / f"{request['probe']}-{identity}"
                trial.write_text("", encoding="utf-8")
                trial.unlink()
        except OSError as error:
            problem = error.strerror or type(error).__name__
        missing = [path for path in request["paths"] if not Path(path).exists()]
        return {"versions": versions, "folder": problem, "missing": missing}

    return ray.remote(num_cpus=0, max_retries=0)(check)
