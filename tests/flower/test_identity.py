"""What server and clients have in common: the same wherever it is the same, another otherwise."""

import json
import re
import shutil
from dataclasses import replace

import pytest
import torch
from flwr.app import MessageType
from inprocess import TWO_TASKS, Federation
from safetensors.torch import load_file, save_file

from pilot_flwr.client.node import site_config
from pilot_flwr.client.node_config import NodeSettings
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import RunError
from pilot_flwr.flower import compatibility as identity
from pilot_flwr.flower.compatibility import NAMES, differences, identity_of
from pilot_flwr.model.checkpoints import checkpoint_path, weights_sample
from pilot_flwr.model.loading import initial_state
from pilot_flwr.model.shapes import layout_of

CONFIG = load_config(TWO_TASKS)
HERE = identity_of(CONFIG)


@pytest.fixture
def base(tmp_path):
    """Return a copy of the tiny base, to be changed."""
    folder = tmp_path / "base"
    shutil.copytree(checkpoint_path("tiny-llava"), folder)
    return folder


def tensors(folder):
    return load_file(folder / "model.safetensors")


def changed(other):
    here = identity_of(other)
    return {key for key in NAMES if HERE[key] != here[key]}


def with_base(folder):
    identity._KNOWN.clear()
    return replace(CONFIG, model=replace(CONFIG.model, path=str(folder)))


def test_every_row_has_a_value():
    assert list(identity_of(CONFIG)) == list(NAMES)
    assert differences(identity_of(CONFIG), identity_of(CONFIG)) == []


def test_what_a_site_has_of_its_own_changes_nothing(base):
    node = NodeSettings(micro_batch=1, model_path=base)
    own = site_config(node, CONFIG, simulated=False)
    assert own != CONFIG and changed(own) == set()
    assert changed(replace(CONFIG, name="x", run=replace(CONFIG.run, folder="/x"))) == set()


@pytest.mark.parametrize(
    ("words", "rows"),
    [
        ("train.stage1.lora_lr=0.5", {"settings"}),
        ("train.accumulation_steps=2", {"settings"}),
        ("seed=1", {"settings"}),
        ("data.train_examples=9", {"settings"}),
        ("model.lora.rank=4", {"settings", "base.layout"}),
        ("model.sent_dtype=bfloat16", {"settings", "base.layout"}),
        ("strategy.min_replies=2 simulation.cpus=1", set()),
    ],
)
def test_a_setting_that_clients_use_is_seen(words, rows):
    assert changed(load_config(f"{TWO_TASKS} {words}")) == rows


def test_a_copy_of_the_base_in_other_files_and_with_other_names_is_the_same(base):
    state = tensors(base)
    (base / "model.safetensors").unlink()
    names = sorted(state, reverse=True)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    weight_map = {name: file for file, part in parts.items() for name in part}
    for file, part in parts.items():
        written = {name: state[name] for name in part}
        if file == "b.safetensors":
            written["vision.position_ids"] = torch.arange(9)  # as older versions wrote
        save_file(written, base / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    config = json.loads((base / "config.json").read_text())
    config |= {"transformers_version": "4.37.0", "_name_or_path": "elsewhere/llava"}
    (base / "config.json").write_text(json.dumps(config))
    assert changed(with_base(base)) == set()


def test_other_weights_are_another_base(base):
    state = tensors(base)
    name = next(n for n in state if "language_model" in n and n.endswith("q_proj.weight"))
    state[name][0, 0] += 1
    save_file(state, base / "model.safetensors")
    assert changed(with_base(base)) == {"base.weights"}
    projector = next(n for n in state if "multi_modal_projector" in n and n.endswith("1.weight"))
    state[projector][5, 5] += 1  # neither in the first row nor in the last
    save_file(state, base / "model.safetensors")
    assert changed(with_base(base)) == {"base.weights", "base.projector"}
    save_file({n: t.to(torch.float16) for n, t in state.items()}, base / "model.safetensors")
    assert changed(with_base(base)) == {"base.weights", "base.projector"}


def test_another_architecture_is_another_base(base):
    config = json.loads((base / "config.json").read_text())
    config["text_config"]["rms_norm_eps"] = 0.5
    (base / "config.json").write_text(json.dumps(config))
    assert changed(with_base(base)) == {"base.config"}


def test_another_image_processor_is_another_base(base):
    """It decides how many tokens an image has, and how its pixels are normalized."""
    file = base / "processor_config.json"
    values = json.loads(file.read_text())
    for change in ({"image_mean": [0.1, 0.2, 0.3]}, {"crop_size": {"height": 16, "width": 16}}):
        changed_values = values | {"image_processor": values["image_processor"] | change}
        file.write_text(json.dumps(changed_values))
        assert changed(with_base(base)) == {"base.processor"}
    file.unlink()  # as on a server
    absent = identity_of(with_base(base))
    assert absent["base.processor"] == "" and differences(HERE, absent) == []


def test_weights_that_are_not_here_yet_are_not_compared(base):
    index = {"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    (base / "model.safetensors").rename(base / "b.safetensors")
    sample = weights_sample(ModelConfig(path=str(base)))
    assert sample.projector == weights_sample(CONFIG.model).projector and sample.whole == ""
    server = identity_of(CONFIG)
    assert differences(server | {"base.weights": ""}, server) == []
    assert differences(server, server | {"base.weights": ""}) == []


def test_the_layout_is_that_of_what_is_sent_and_kept(tmp_path):
    layout = layout_of(CONFIG.model, ("vqa", "counting"))
    initial = initial_state(CONFIG.model, seed=0)
    for group, state in (("own_task_adapter", initial.adapter), ("lora", initial.lora)):
        assert layout.sent[group] == {name: list(t.shape) for name, t in state.items()}
    run = Federation(tmp_path, f"{TWO_TASKS} evaluation.enabled=false").run()
    kept = run.private("vqa-0").groups.values()
    numbers = sum(tensor.numel() for state in kept for tensor in state.values())
    assert layout.private_bytes == 4 * numbers


LIES = {
    "app": (
        "0.0.9 (code 123)",
        r"app version: 0\.0\.9 \(code 123\) there, 0\.1\.0 \(code \w+\) he",
    ),
    "settings": ("0123456789ab", r"settings: 0123456789ab there, \w{12} here"),
    "base.layout": ("0123456789ab", r"layout of trained and sent tensors: 0123456789ab there, \w+"),
    "base.weights": ("\x1b[2J" + "x" * 999, r"weights \(sample\): x{60} there, \w+ here"),
}


def test_a_client_of_another_version_is_refused_with_both_values(tmp_path):
    federation = Federation(tmp_path, f"{TWO_TASKS} evaluation.enabled=false")

    def lie(message, reply):
        if message.metadata.message_type == MessageType.QUERY:
            node = message.metadata.dst_node_id
            if node == 1:
                reply.content["identity"].update({key: value for key, (value, _) in LIES.items()})
            if node == 2:
                del reply.content["identity"]["app"]
            if node == 3:
                del reply.content["identity"]
        return reply

    federation.grid.on_reply = lie
    federation.run()
    told = {f["client"]: f["reason"] for f in federation.events("failure", round=1)}
    assert "version mismatch with the server" in told["node 1"]
    for _, pattern in LIES.values():
        assert re.search(pattern, told["node 1"]), told["node 1"]
    assert "app version: missing there, 0.1.0" in told["node 2"]
    assert "no record `identity`" in told["node 3"]
    assert {e["client"] for e in federation.events("train", round=2)} == {"counting-1"}


def test_a_site_with_another_base_trains_nothing(tmp_path, base):
    state = tensors(base)
    save_file({n: t + 1 for n, t in state.items()}, base / "model.safetensors")
    site = {"client-id": "vqa-0", "state-folder": str(tmp_path / "s"), "model-path": str(base)}
    words = f"{TWO_TASKS} data.tasks=[vqa] data.clients_per_task=1 strategy.wait_seconds=0.2"
    federation = Federation(tmp_path / "run", words, num_nodes=1, node_configs=[site])
    with pytest.raises(RunError, match="base model's projector: .* base model's weights"):
        federation.run()
    assert federation.events("train") == []
