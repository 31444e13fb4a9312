"""`pilot-flwr export`: whole folders, loaded again."""

import json
import shutil

import pytest
import torch
import yaml
from perturbed import perturb, private_state
from transformers import AutoProcessor, LlavaForConditionalGeneration

from pilot_flwr.cli import main as cli
from pilot_flwr.client.private_state import PrivateStore
from pilot_flwr.inference import modeling_pilot
from pilot_flwr.inference.runs import client_model, open_run


@pytest.fixture
def export(finished, tmp_path, capsys):
    def call(*arguments, code=0):
        folder = tmp_path / "model"
        words = ["export", str(finished.folder.path), str(folder), *arguments]
        assert cli.main(words) == code
        return folder, capsys.readouterr()

    return call


def test_a_personal_model(finished, export):
    folder, captured = export("--client", "vqa-0")
    assert captured.out.strip() == str(folder)
    assert "never left client vqa-0" in captured.err
    loaded, processor = modeling_pilot.load(folder)
    run = open_run(finished.folder.path)
    model = client_model(run, "vqa-0", device=torch.device("cpu"))
    features = torch.randn(2, 16, 64)
    expected = model.connector(features).features
    connector = loaded.base_model.model.model.multi_modal_projector
    torch.testing.assert_close(connector(features), expected, rtol=1e-5, atol=1e-5)
    card = (folder / "README.md").read_text()
    (event,) = finished.events("evaluate", round=2, client="vqa-0")
    (row,) = [line for line in card.splitlines() if line.startswith("| vqa-0 ")]
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == ["vqa-0", "exact match", "6", f"{event['score']:.3f}"]
    assert "stage 2 (CT-MoA)" in card and "where: memory" in card and "licence of the base" in card
    assert "never left the client" in card


def test_a_consensus_model_merged_into_a_plain_checkpoint(export):
    folder, captured = export("--task", "vqa", "--merge")
    assert captured.err == ""  # nothing private, nothing unusual
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    processor = AutoProcessor.from_pretrained(folder)
    inputs = processor(text=["USER: Hello ASSISTANT:"], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=2).shape[1] > inputs["input_ids"].shape[1]
    card = (folder / "README.md").read_text()
    assert "consensus model of task `vqa`" in card and "A plain Hugging Face checkpoint" in card
    assert "not of this consensus model" in card


def test_a_stage_1_model_merged_with_the_class_that_it_needs(export, make_model, tmp_path):
    store = PrivateStore(tmp_path / "state", "vqa-0", "vqa")
    store.save(private_state(perturb(make_model("vqa"))), server_round=1)
    arguments = ["--client", "vqa-0", "--state", str(tmp_path / "state"), "--merge"]
    folder, captured = export(*arguments, "--dtype", "bfloat16")
    assert "hidden layer of 192" in captured.err
    config = json.loads((folder / "config.json").read_text())
    assert config["projector_hidden_size"] == 192
    assert config["dtype"] == "bfloat16"
    assert (folder / "modeling_wide.py").is_file()
    assert "trust_remote_code=True" in (folder / "README.md").read_text()


def test_what_cannot_be_done_is_said(export, tmp_path):
    folder, captured = export("--client", "vqa-0", "--merge", code=1)
    assert "CT-MoA" in captured.err and "`--task`" in captured.err
    assert not folder.exists()
    _, captured = export("--client", "vqa-0", "--dtype", "float32", code=2)
    assert "`--dtype` needs `--merge`" in captured.err
    folder.mkdir()
    (folder / "mine").touch()
    _, captured = export("--client", "vqa-0", code=1)
    assert "is not empty" in captured.err


def test_a_model_card_shows_an_interpolation_as_text(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SITE_SECRET", "hunter2")
    received = tmp_path / "received"
    shutil.copytree(finished.folder.path, received)
    recorded = yaml.safe_load((received / "config.yaml").read_text())
    recorded["model"]["system_prompt"] = "${oc.env:SITE_SECRET}"
    (received / "config.yaml").write_text(yaml.safe_dump(recorded))
    assert cli.main(["export", str(received), str(tmp_path / "model"), "--task", "vqa"]) == 0
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.count("${oc.env:SITE_SECRET}") == 2  # in the prompts and in the configuration
    assert not any(
        b"hunter2" in file.read_bytes()
        for file in (tmp_path / "model").rglob("*")
        if file.is_file()
    )
