"""Damaged, foreign and text-only checkpoints are named before anything is counted or loaded."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from llava_files import write_federation

import pilot_flwr
from pilot_flwr.cli.main import main
from pilot_flwr.client.node import Site
from pilot_flwr.client.preflight import check_readiness
from pilot_flwr.config.model import ModelConfig
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.federation import Client
from pilot_flwr.errors import ModelError
from pilot_flwr.model.architectures import known_config, read_config
from pilot_flwr.model.loading import load_processor

FOLDER = Path(pilot_flwr.__file__).parent / "assets" / "tiny-llava"
WEIGHTS = "model.safetensors"


@pytest.fixture
def folder(tmp_path):
    target = tmp_path / "model"
    shutil.copytree(FOLDER, target, ignore=shutil.ignore_patterns("bundle.json"))
    return target


def refused(folder, message):
    config = ModelConfig(path=str(folder))
    for read in (read_config, known_config):
        with pytest.raises(ModelError, match=message):
            read(config)


def test_whole_weights_and_a_configuration_alone_are_read(folder):
    assert read_config(ModelConfig(path=str(folder))).model_type == "llava"
    (folder / WEIGHTS).unlink()
    assert read_config(ModelConfig(path=str(folder))).model_type == "llava"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git-lfs pointer"),
        (b"<!DOCTYPE html><html></html>", "HTML page"),
        (b"", "empty"),
        (b"\x10\0\0", "cut off"),
        (b"PK\x03\x04" + bytes(60), "not a safetensors file"),
    ],
)
def test_a_file_that_holds_no_weights_is_named(folder, content, message):
    (folder / WEIGHTS).write_bytes(content)
    refused(folder, f"`model.path` is .* whose file {WEIGHTS} is .*{message}")


@pytest.mark.parametrize("kept", [20, 200, -1])
def test_weights_that_are_cut_off_are_found_by_their_size(folder, kept):
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(whole[:kept])
    refused(folder, f"{WEIGHTS} is cut off")


def test_a_missing_shard_and_a_tensor_in_another_file_are_found(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": WEIGHTS, "b": "second.safetensors"}}))
    refused(folder, "without tensor 'a'")
    index.write_text(json.dumps({"weight_map": {"b": "second.safetensors"}}))
    refused(folder, "second.safetensors is missing")
    index.write_text("version https://git-lfs.github.com/spec/v1")
    refused(folder, "index.json is a git-lfs pointer")


def test_the_original_format_of_llava_is_refused(folder):
    values = {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "hidden_size": 4096}
    (folder / "config.json").write_text(json.dumps(values))
    refused(folder, "original LLaVA format")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "has no chat template"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}", "a text-only chat template"),
        ("{# image #}{{ messages[0]['content'] + 'x' }}", "cannot render an image"),
        ("{# image #}{{ messages[0]['content'][1]['text'] }}", "renders no '<image>'"),
    ],
)
def test_a_chat_template_without_images_is_named_at_load(folder, template, message):
    set_template(folder, template)
    with pytest.raises(ModelError, match=f"`model.path` is .*{message}.*chat_template.jinja"):
        load_processor(str(folder))


def set_template(folder, template):
    (folder / "chat_template.jinja").unlink()
    if template:
        (folder / "chat_template.jinja").write_text(template)


@pytest.mark.parametrize("file", ["chat_template.json", "processor_config.json"])
def test_a_chat_template_may_be_in_another_file(folder, file):
    template = (folder / "chat_template.jinja").read_text()
    set_template(folder, None)
    place = folder / file
    values = json.loads(place.read_text()) if place.exists() else {}
    place.write_text(json.dumps(values | {"chat_template": template}))
    assert read_config(ModelConfig(path=str(folder))).model_type == "llava"
    assert load_processor(str(folder)).original.chat_template == template


def pointer(folder):
    (folder / WEIGHTS).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")


def cut_off(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])


def missing_shard(folder):
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def original_format(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "mm_hidden_size": 1024}))


def text_template(folder):
    set_template(folder, "{% for m in messages %}{{ m['content'] }}{% endfor %}")


FAULTS = {
    pointer: "model.safetensors is a git-lfs pointer",
    cut_off: "model.safetensors is cut off",
    missing_shard: "model-00002-of-00002.safetensors is missing",
    original_format: "config.json in the original LLaVA format",
    text_template: "a text-only chat template. .* chat_template.jinja",
    lambda folder: set_template(folder, None): "no chat template. .* chat_template.jinja",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_command_and_a_sites_preflight_name_the_fault(folder, tmp_path, capsys, fault):
    """Before anything is counted, trained or loaded."""
    fault(folder)
    path, message = f"model.path={folder}", f"`model.path`.*{FAULTS[fault]}"
    data = write_federation(tmp_path, train=2, test=1, clients=1)
    for words in (["plan", path], ["data", "check", f"data={data}", path]):
        assert main(words) == 1
        assert re.search(message, capsys.readouterr().err)
    site = Site(Client("vqa-0", "vqa", 0), tmp_path / "state", "cpu")
    with pytest.raises(ModelError, match=message):
        check_readiness(site, replace(PilotConfig(), model=ModelConfig(path=str(folder))))
