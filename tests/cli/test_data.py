"""``pilot-flwr data check`` on a federation with known faults."""

import json
import re
import shutil

import pytest
from flwr.common.config import parse_config_args
from llava_files import write_federation
from PIL import Image

from pilot_flwr.cli.data import parse_node_config
from pilot_flwr.cli.main import main
from pilot_flwr.client import data_check
from pilot_flwr.data import demo
from pilot_flwr.data.images import ImageFile
from pilot_flwr.data.overlap import Overlap
from pilot_flwr.model.checkpoints import checkpoint_path


@pytest.fixture
def federation(tmp_path):
    return write_federation(tmp_path, train_examples=0)


def lines(path):
    return path.read_text().splitlines()


def check(path, *more, tmp_path):
    code = main(["data", "check", f"data={path}", "--json", str(tmp_path / "out.json"), *more])
    out = tmp_path / "out.json"
    return code, json.loads(out.read_text()) if out.exists() else None


def by_split(found):
    return {f"{entry['client']} {entry['split']}": entry for entry in found["splits"]}


def test_a_sound_federation_can_start(federation, tmp_path, capsys):
    code, found = check(federation, tmp_path=tmp_path)
    out = capsys.readouterr().out
    assert code == 0 and "A run can start." in out and "rows in common" not in out
    splits = by_split(found)
    assert list(splits)[:4] == ["vqa-0 train", "vqa-0 test", "vqa-1 train", "vqa-1 test"]
    assert all(entry["problems"] == {} and not entry["stops"] for entry in splits.values())
    assert [e["rows"] for e in splits.values()] == [6, 4] * 4
    train = [splits[f"vqa-{n} train"] for n in (0, 1)]
    assert sum(entry["images"] for entry in train) == 11  # the first row has none
    turns = sum(6 * entry["turns_mean"] for entry in train)
    assert turns == pytest.approx(26, abs=0.1)  # and two turns more
    assert splits["vqa-0 test"] | {"client": ""} == splits["vqa-1 test"] | {"client": ""}


def test_the_figures_of_the_answers(federation, tmp_path, processor):
    """Counted anew from the demo's own examples: four out of five counts are not the commonest."""
    _, found = check(federation, "data.clients_per_task=1", tmp_path=tmp_path)
    entry = by_split(found)["counting-0 train"]
    examples = demo.client_examples(
        "counting", client_index=0, num_clients=9, split="train", num_examples=12, seed=0
    )
    answers = ["0 1", *(example.turns[1].text for example in examples[1:])]
    top = max(set(answers), key=answers.count)
    share = answers.count(top) / 12
    assert entry["most_frequent_answer_share"] == pytest.approx(share)
    assert answers.count(entry["most_frequent_answer"]) == answers.count(top)
    assert entry["different_answers"] == len(set(answers))
    tokens = [len(processor.tokenizer(a, add_special_tokens=False)["input_ids"]) for a in answers]
    tokens[0] *= 2  # that row gives its answer twice
    ends = [1] * 12  # the end token after each answer
    ends[0] = 2
    assert entry["labelled_tokens_mean"] == pytest.approx((sum(tokens) + sum(ends)) / 12, abs=0.01)


def test_every_kind_of_fault_is_found_and_named(federation, tmp_path, capsys):
    """One row with bad structure, one without its image, one with half an image, one too long."""
    path = tmp_path / "counting/train.json"
    rows = [json.loads(line) for line in lines(path)]
    rows[1]["conversations"][0]["from"] = "Ann"
    rows[2]["image"] = "absent.png"
    whole = (tmp_path / "counting/images/train-3.png").read_bytes()
    (tmp_path / "counting/images/train-3.png").write_bytes(whole[: len(whole) // 2])
    rows[4]["conversations"][0]["value"] += " why" * 3000
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = (federation, "data.clients_per_task=1", "--show", "3")
    code, found = check(*arguments, tmp_path=tmp_path)
    out = capsys.readouterr().out
    assert code == 1 and "A run would fail at counting-0 train." in out
    entry = by_split(found)["counting-0 train"]
    assert entry["problems"] == {"row": 1, "image": 1, "pixels": 1, "tokens": 1}
    assert (entry["rows"], entry["usable"]) == (12, 8)
    assert [p["origin"] for p in entry["broken_rows"]] == [
        f"train.json, row {n}" for n in (2, 3, 4, 5)
    ]
    assert re.search(r"row 2: `conversations\[0\].from` must be human or gpt", out)
    assert re.search(r"row 3, image 1 cannot be opened .* \(absent.png\)", out)
    assert re.search(r"row 4, image 1 cannot be decoded \(truncated: .*\). \(train-3.png\)", out)
    assert "... and 1 more" in out

    code, found = check(*arguments, "--fast", tmp_path=tmp_path)  # half an image has a header
    assert by_split(found)["counting-0 train"]["problems"] == {"row": 1, "image": 1, "tokens": 1}
    code, found = check(*arguments, "--no-tokens", "--fast", tmp_path=tmp_path)
    assert by_split(found)["counting-0 train"]["problems"] == {"row": 1, "image": 1}


def cut_image(path):
    path.write_bytes(path.read_bytes()[:100])


def test_the_verdict_is_a_runs_own(federation, tmp_path, capsys):
    """An allowed share stops nothing; half an image is one of it if the run decodes beforehand."""
    path = tmp_path / "counting/train.json"
    rows = [json.loads(line) for line in lines(path)]
    rows[1]["image"] = "absent.png"
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = [federation, "data.clients_per_task=1"]
    assert check(*arguments, tmp_path=tmp_path)[0] == 1
    arguments += ["data.allowed_broken=0.2"]
    assert check(*arguments, tmp_path=tmp_path)[0] == 0
    cut_image(tmp_path / "counting/images/train-3.png")
    assert check(*arguments, tmp_path=tmp_path)[0] == 0
    assert "A run can start." in capsys.readouterr().out
    assert check(*arguments, "data.check_images=header", tmp_path=tmp_path)[0] == 1
    assert "A run would fail at counting-0 train." in capsys.readouterr().out
    assert check(*arguments, "data.allowed_broken=0.1", tmp_path=tmp_path)[0] == 1


@pytest.mark.parametrize("mode", ["decode", "header"])
def test_what_was_not_looked_at_is_not_called_sound(federation, tmp_path, capsys, mode):
    cut_image(tmp_path / "counting/images/train-3.png")
    words = [federation, f"data.check_images={mode}", "--fast"]
    assert check(*words, tmp_path=tmp_path)[0] == 0
    out = capsys.readouterr().out
    assert "No errors found; not checked: pixels and overlap (`--fast`).\n" in out
    assert check(*words, "--no-tokens", tmp_path=tmp_path)[0] == 0
    out += capsys.readouterr().out
    assert (
        "pixels and overlap (`--fast`), tokens (`--no-tokens`)." in out and "can start" not in out
    )


def test_an_image_of_several_rows_is_decoded_once_and_broken_in_each(
    federation, tmp_path, monkeypatch
):
    path = tmp_path / "counting/train.json"
    rows = [json.loads(line) for line in lines(path)]
    for row in rows[1:7]:
        row["image"] = "train-1.png"
    for row in rows[7:10]:
        row["image"] = "train-3.png"
    path.write_text("\n".join(map(json.dumps, rows)))
    cut_image(tmp_path / "counting/images/train-3.png")
    monkeypatch.setattr(data_check, "client_overlap", lambda *_, **__: Overlap(0, 0))
    read, decoded = ImageFile.read, []
    monkeypatch.setattr(ImageFile, "read", lambda self: (decoded.append(self.name), read(self))[1])
    _, found = check(federation, "data.tasks=[counting]", "--no-tokens", tmp_path=tmp_path)
    splits = [by_split(found)[f"counting-{n} train"] for n in (0, 1)]
    broken = [problem["origin"] for split in splits for problem in split["broken_rows"]]
    assert sorted(broken) == [f"train.json, row {n}" for n in (10, 8, 9)]
    assert decoded.count("train-1.png") == 1 and decoded.count("test-1.png") == 1


def test_references_that_the_metric_cannot_score_against_are_found(federation, tmp_path):
    words = [federation, "data.clients_per_task=1", "data.files.vqa.metric=vqav2"]
    code, found = check(*words, "--no-tokens", "--fast", tmp_path=tmp_path)
    entry = by_split(found)["vqa-0 test"]
    assert code == 1 and entry["problems"] == {"references": 4}
    assert by_split(found)["vqa-0 train"]["problems"] == {}  # nothing is scored there
    assert re.fullmatch(
        r"test.json, row 2: A question has 1 reference answers but .*",
        entry["broken_rows"][1]["message"],
    )


def test_a_file_that_cannot_be_read_is_reported_and_the_others_are_checked(federation, tmp_path):
    (tmp_path / "vqa/train.json").write_text('[{"id": 1}, {"id" 2}]')
    code, found = check(federation, tmp_path=tmp_path)
    splits = by_split(found)
    assert code == 1 and "row 2 is broken JSON at byte" in splits["vqa-0 train"]["error"]
    assert splits["counting-0 train"]["usable"] == 6


def test_rows_in_common_are_told(federation, tmp_path, capsys):
    code, found = check(
        federation, "data.files.vqa.test=[vqa/train.json]", "--no-tokens", tmp_path=tmp_path
    )
    assert found["shared_rows"] == [
        {"splits": ["vqa-0 train", "vqa-0 test"], "rows": 6},
        {"splits": ["vqa-0 train", "vqa-1 test"], "rows": 6},
        {"splits": ["vqa-0 test", "vqa-1 train"], "rows": 6},
        {"splits": ["vqa-1 train", "vqa-1 test"], "rows": 6},
    ]
    assert "vqa-0 train and vqa-0 test have 6 rows in common." in capsys.readouterr().out


def test_test_rows_that_are_training_rows_stop_a_run_unless_allowed(federation, tmp_path, capsys):
    """A copy under another name counts; a client is compared with its own training rows alone."""
    row = json.loads(lines(tmp_path / "counting/train.json")[3])
    images = tmp_path / "counting/images"
    shutil.copy(images / row["image"], images / "renamed.png")
    with (tmp_path / "counting/test.json").open("a") as file:
        file.write("\n" + json.dumps(row | {"id": "again", "image": "renamed.png"}))
    code, found = check(federation, "data.tasks=[counting]", "--no-tokens", tmp_path=tmp_path)
    out = capsys.readouterr().out
    overlaps = {name: entry["overlap"] for name, entry in by_split(found).items()}
    assert code == 1 and sorted(overlaps.values()) == [0, 0, 0, 1]
    (client,) = (name.split()[0] for name, rows in overlaps.items() if rows)
    said = f"{client}: 1 of 5 test rows are training rows too (same images and question), such as "
    assert f"{said}test.json, row 5 and train.json, row 4" in " ".join(out.split())
    assert f"A run would fail at {client} test." in out
    words = [federation, "data.tasks=[counting]", "data.allowed_overlap=0.2"]
    assert check(*words, "--no-tokens", tmp_path=tmp_path)[0] == 0
    assert said in " ".join(capsys.readouterr().out.split())

    node = f'client-id="counting-0" train-file="{tmp_path}/counting/train.json" '
    node += f'test-file="{tmp_path}/counting/test.json" image-folder="{images}"'
    words += ["--no-tokens", "--node-config"]
    assert check(*words, node, tmp_path=tmp_path)[0] == 1
    assert check(*words, f"{node} allowed-overlap=0.2", tmp_path=tmp_path)[0] == 0


def test_a_real_site_checks_its_own_data(federation, tmp_path, capsys):
    words = f'client-id="counting-1" train-file="{tmp_path}/counting/train.json" '
    words += f'image-folder="{tmp_path}/vqa" test-file="{tmp_path}/vqa/test.json"'
    code, found = check(federation, "--node-config", words, tmp_path=tmp_path)
    splits = by_split(found)
    assert list(splits) == ["counting-1 train", "counting-1 test"]
    assert splits["counting-1 train"]["rows"] == 12
    assert code == 1 and splits["counting-1 train"]["problems"] == {"image": 11}
    capsys.readouterr()
    for wrong in ('client-id="x', "client-id", "client-id=x", 'client-id="x" and more'):
        assert main(["data", "check", f"data={federation}", "--node-config", wrong]) == 2
        assert "but must be KEY=VALUE pairs" in capsys.readouterr().err


def test_a_real_sites_node_config_may_be_a_file(federation, tmp_path, capsys):
    """As `flower-supernode` reads it: Flower's own function finds the same values."""
    words = f'client-id="counting-1" train-file="{tmp_path}/counting/train.json" micro-batch=4 '
    words += f'image-folder="{tmp_path}/counting/images" test-file="{tmp_path}/vqa/test.json"'
    file = tmp_path / "site.toml"
    file.write_text(words.replace(" ", "\n"))
    found = [
        check(federation, "train.batch_size=8", "--node-config", given, tmp_path=tmp_path)
        for given in (words, str(file))
    ]
    assert found[0] == found[1] and set(by_split(found[0][1])) == {
        "counting-1 train",
        "counting-1 test",
    }
    assert parse_node_config(words) == parse_node_config(str(file)) == parse_config_args([words])
    for wrong in (tmp_path / "absent.toml", tmp_path / "counting" / "train.json.toml"):
        assert main(["data", "check", f"data={federation}", "--node-config", str(wrong)]) == 2
        assert "No such file" in capsys.readouterr().err
    file.write_text("client-id = north")
    assert main(["data", "check", f"data={federation}", "--node-config", str(file)]) == 2
    assert "site.toml': Invalid value" in capsys.readouterr().err


def test_a_site_alone_says_where_its_links_may_lead(federation, tmp_path, capsys):
    """The run's `data.linked_folders` is of simulations; a server cannot open a site's links."""
    (tmp_path / "blobs").mkdir()
    picture = tmp_path / "vqa" / "images" / "train-1.png"
    picture.rename(tmp_path / "blobs" / "0123")
    picture.symlink_to("../../blobs/0123")
    code, found = check(federation, tmp_path=tmp_path)
    assert code == 1 and by_split(found)["vqa-0 train"]["problems"] == {"image": 1}
    simulated = "data.linked_folders=[blobs]"
    assert check(federation, simulated, tmp_path=tmp_path)[0] == 0
    _, found = check(federation, "data.linked_folders=[x]", tmp_path=tmp_path)
    assert "`data.linked_folders` names '" in by_split(found)["vqa-0 train"]["error"]
    words = f'client-id="vqa-0" train-file="{tmp_path}/vqa/train.json" '
    words += f'image-folder="{tmp_path}/vqa/images" test-file="{tmp_path}/vqa/test.json"'
    assert check(federation, simulated, "--node-config", words, tmp_path=tmp_path)[0] == 1
    own = f' linked-folders="{tmp_path}/blobs"'
    assert check(federation, "--node-config", words + own, tmp_path=tmp_path)[0] == 0
    capsys.readouterr()
    own = f' linked-folders="{tmp_path}/none"'
    assert main(["data", "check", f"data={federation}", "--node-config", words + own]) == 2
    assert "`linked-folders` names '" in capsys.readouterr().err


def test_images_that_look_different_in_another_reading_are_counted(federation, tmp_path, capsys):
    """Of usable rows; a broken one is not counted."""
    folder, exif = tmp_path / "vqa" / "images", Image.Exif()
    exif[0x0112] = 6
    Image.new("RGBA", (32, 32)).save(folder / "train-1.png", exif=exif)
    Image.new("RGB", (32, 32)).save(folder / "train-2.png", exif=exif)
    Image.effect_noise((32, 32), 90).convert("LA").save(folder / "train-4.png")
    cut_image(folder / "train-4.png")
    _, found = check(federation, "data.clients_per_task=1", tmp_path=tmp_path)
    split = by_split(found)["vqa-0 train"]
    assert (split["images"], split["transparent"], split["turned"]) == (10, 1, 2)
    line = "vqa-0 train: 1 image with transparency (shown on white), 2 with an EXIF orientation"
    out = capsys.readouterr().out
    assert f"{line} (applied): `data.image_reading` is viewer." in out
    assert "vqa-0 test: 0 images" not in out
    more = ("data.clients_per_task=1", "data.image_reading=official")
    check(federation, *more, tmp_path=tmp_path)
    assert "(dropped), 2 with an EXIF orientation (ignored)" in capsys.readouterr().out


def test_a_real_sites_tokens_are_its_own_models(federation, tmp_path, capsys):
    """As a run has them there: the folder that `model-path` names, and no path of the run's."""
    words = f'client-id="vqa-1" train-file="{tmp_path}/vqa/train.json" '
    words += f'test-file="{tmp_path}/vqa/test.json" image-folder="{tmp_path}/vqa/images"'
    model = shutil.copytree(checkpoint_path("tiny-llava"), tmp_path / "model")
    arguments = [federation, "model.path=absent/model", "--node-config"]
    own = f' model-path="{model}"'
    assert check(*arguments, words + own, tmp_path=tmp_path)[0] == 0
    path = f"model.path={model}"
    assert main(["data", "check", f"data={federation}", path, "--node-config", words]) == 2
    assert "must be a shipped name or a hub id" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["nowhere/x.json", "vqa/train.json"])
def test_figures_are_not_written_anywhere(federation, tmp_path, capsys, name):
    before = (tmp_path / "vqa/train.json").read_bytes()
    words = [f"data={federation}", "--no-tokens", "--json", str(tmp_path / name)]
    assert main(["data", "check", *words]) == 2
    assert "`--json` is '" in capsys.readouterr().err
    assert (tmp_path / "vqa/train.json").read_bytes() == before


def test_padding_makes_an_image_no_larger_than_its_square(federation, tmp_path):
    Image.new("RGB", (64, 16)).save(tmp_path / "vqa/images/train-1.png")
    code, found = check(federation, "data.image_aspect_ratio=pad", tmp_path=tmp_path)
    assert code == 0 and by_split(found)["vqa-0 train"]["problems"] == {}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["experiment=demo"], "`data.source` must be llava"),
        (["data=absent.yaml"], "`data` is 'absent.yaml', which cannot be read"),
        (["data=example-llava", "--workers", "0"], "`--workers` is 0 but must be at least 1"),
    ],
)
def test_wrong_usage(words, message, capsys):
    assert main(["data", "check", *words]) == 2
    assert message in capsys.readouterr().err
