"""The paper's scenario: settings, and conversion from annotation files to clients."""

import json

import pytest
import yaml
from PIL import Image

from pilot_flwr.cli.main import main
from pilot_flwr.config.loading import config_folder, load_config
from pilot_flwr.data.federation import client_examples, federation_clients, task_metric
from pilot_flwr.metrics import METRICS

PER_TASK = 12


def test_the_settings_of_the_paper_and_of_the_official_scripts():
    config = load_config("experiment=paper")
    assert config.model.path == "llava-hf/llava-1.5-7b-hf"
    assert config.data.tasks == ["gqa", "ocr_vqa", "captions"]
    assert (config.num_clients, config.data.partition.kind) == (9, "iid")
    assert (config.strategy.rounds, config.train.epochs) == (3, 1)
    assert (config.model.lora.rank, config.model.lora.alpha) == (64, 128)
    assert (config.train.stage1.lora_lr, config.train.stage2.lora_lr) == (2e-5, 4e-5)
    assert config.train.stage1.connector_lr == config.train.stage2.connector_lr == 2e-5
    assert (config.train.batch_size, config.train.accumulation_steps) == (16, 2)
    assert (config.train.warmup_ratio, config.train.weight_decay) == (0.03, 0)
    assert (config.train.max_length, config.data.image_aspect_ratio) == (2048, "pad")
    weights = (config.train.difference_loss.weight, config.train.balance_weight)
    assert (*weights, config.train.z_weight) == (0.1, 0.1, 0.01)
    assert config.model.system_prompt.endswith("and polite answers to the user's questions.")


def test_the_official_choices_are_all_that_differs():
    paper, official = (load_config(f"experiment={name}") for name in ("paper", "paper-official"))
    chosen = [
        "name=paper-official",
        "model.initialisation=official",
        "model.stage2_client_adapter=off",
        "model.router_dtype=bfloat16",
        "data.image_reading=official",
        "train.schedule=run",
        "train.clipping=global",
        "train.loss_reduction=micro_batch",
        "train.batching=length",
        "train.over_long=cut",
        "train.text_only=zero_image",
        "train.difference_loss.reduction=official",
        "train.balance_loss.reduction=per_image",
    ]
    assert official != paper
    assert official == load_config(" ".join(["experiment=paper", *chosen]))


def test_the_base_model_can_be_another():
    config = load_config("experiment=paper model=tiny model.lora.rank=4")
    assert (config.model.path, config.model.lora.rank) == ("tiny-llava", 4)


@pytest.mark.parametrize("path", sorted(config_folder().glob("data/*.yaml")), ids=lambda p: p.stem)
def test_the_metrics_of_every_shipped_scenario_exist(path):
    files = yaml.safe_load(path.read_text(encoding="utf-8")).get("files", {})
    for task, described in files.items():
        assert described.get("metric", "exact_match") in METRICS, task


@pytest.fixture
def downloads(tmp_path):
    """A small data folder, as docs/how-to/paper.md describes it, in the data sets' formats."""
    gqa = {
        str(n): {"imageId": str(n), "question": f"Is it {n}?", "answer": "yes"}
        for n in range(PER_TASK)
    }
    books = {
        f"{split}{n}": {
            "imageURL": "http://images/I.jpg",
            "questions": [f"Who wrote {n}?", f"What is {n}?"],
            "answers": ["A. Author", "A title"],
            "genre": "Law",
            "split": split,
        }
        for split in (1, 3)
        for n in range(PER_TASK // 2)
    }
    images = [
        {
            "filepath": "val2014",
            "filename": f"{n}.jpg",
            "cocoid": n,
            "split": "test" if n < PER_TASK else "train",
            "sentences": [{"raw": f"A picture of {n}."}],
        }
        for n in range(2 * PER_TASK)
    ]
    names = [f"gqa/images/{n}.jpg" for n in gqa] + [f"ocr_vqa/images/{n}.jpg" for n in books]
    names += [f"coco/val2014/{n}.jpg" for n in range(2 * PER_TASK)]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(tmp_path / name)
    for name, content in [
        ("gqa/questions.json", gqa),
        ("ocr_vqa/dataset.json", books),
        ("coco/dataset_coco.json", {"images": images}),
    ]:
        (tmp_path / name).write_text(json.dumps(content))
    return tmp_path


def test_from_annotation_files_to_clients(downloads):
    for name, file in [
        ("gqa", "gqa/questions.json"),
        ("ocr_vqa", "ocr_vqa/dataset.json"),
        ("coco_karpathy", "coco/dataset_coco.json"),
    ]:
        for split in ("train", "test"):
            source = downloads / file
            words = ["data", "convert", name, "--annotations", str(source), "--split", split]
            assert main([*words, "--out", str(source.parent / f"{split}.jsonl")]) == 0
    data = load_config(f"experiment=paper data.folder={downloads}").data
    seen: dict[str, list[str]] = {}
    for client in federation_clients(data):
        background = (122, 116, 104)
        train, test = (
            client_examples(data, client, split, seed=0, background=background)
            for split in ("train", "test")
        )
        assert len(train) == PER_TASK // 3
        assert len(test) == PER_TASK
        seen.setdefault(client.task, []).extend(example.id for example in train)
        for example in [*train, *test]:
            assert example.images[0].read().size == (8, 8)  # padded
            suffix = data.files[client.task].prompt_suffix
            assert example.turns[0].text.endswith(suffix or "the provided image.")
        metric = METRICS[task_metric(data, client.task)]
        said = [example.turns[-1].text for example in test]
        assert metric.score(said, [example.answers for example in test]).mean > 0.9
    assert {task: len(set(ids)) for task, ids in seen.items()} == dict.fromkeys(seen, PER_TASK)
