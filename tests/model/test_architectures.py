"""Every architecture: the untouched base model is reproduced, whatever images an example has.

The reference is transformers' own forward pass, one example at a time.
"""

import numpy as np
import pytest
import torch
from families import WRITERS
from PIL import Image
from visuals import encoded

from pilot_flwr.config.model import FeatureCacheConfig, LoraConfig, ModelConfig
from pilot_flwr.data.collator import IGNORE_INDEX
from pilot_flwr.data.examples import Example, KeptImage, Turn
from pilot_flwr.errors import DataError, ModelError
from pilot_flwr.model.architectures import SPECS, feature_shape, read_config
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.feature_folder import FeatureFolder
from pilot_flwr.model.loading import load_base, load_processor, make_collator
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.processor import stand_in

CPU = torch.device("cpu")
SIZES = [(28, 28), (20, 61), (64, 30), (90, 90), (7, 100)]


@pytest.fixture(scope="module", params=list(WRITERS))
def path(request, tmp_path_factory):
    return WRITERS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(path):
    model = PilotModel(load_base(ModelConfig(path=path), CPU), ModelConfig(path=path))
    model.enter_stage1("vqa")
    return model.eval()


def image(height, width):
    pixels = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3))
    return KeptImage(Image.fromarray(pixels.astype(np.uint8)))


def example(*images, turns=1):
    words = [Turn("user", "<image>\n" * len(images) + "What is in the image?")]
    words += [Turn("assistant", "two zebras")]
    for _ in range(turns - 1):
        words += [Turn("user", "And what else?"), Turn("assistant", "one giraffe")]
    return Example(f"{[i.size() for i in images]}-{turns}", images, tuple(words))


EXAMPLES = [
    *(example(image(*size)) for size in SIZES),
    example(image(28, 28), image(20, 61)),
    example(turns=2),
    example(image(64, 30), turns=3),
]


def kit(model, path):
    processor = load_processor(path)
    collator = make_collator(ModelConfig(path=path), processor, max_length=2048)
    return processor, collator, FeatureCache(FeatureCacheConfig(where="off"))


def base_logits(base, processor, collator, one):
    """Logits at the answers' positions by transformers' own processor and forward pass."""
    batch = collator.train_batch([one])
    inputs = encoded(processor, collator, one)
    assert torch.equal(inputs["input_ids"], batch.input_ids)
    return base(**inputs).logits[:, :-1][batch.labels[:, 1:] != IGNORE_INDEX]


@torch.no_grad()
@pytest.mark.family("logits")
def test_the_base_model_is_reproduced_for_any_images(path, model):
    processor, collator, cache = kit(model, path)
    base = load_base(ModelConfig(path=path), CPU).eval()
    expected = [base_logits(base, processor, collator, one) for one in EXAMPLES]
    got = model(collator.train_batch(EXAMPLES), cache.encode(model, processor, EXAMPLES))
    torch.testing.assert_close(got.logits, torch.cat(expected), atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.family("logits")
def test_stage_2_starts_at_the_base_model(path):
    """Equal experts whose weights sum to 1, and inert ψ_s and ψ_c."""
    model = PilotModel(load_base(ModelConfig(path=path), CPU), ModelConfig(path=path)).eval()
    processor, collator, cache = kit(model, path)
    batch, visual = collator.train_batch(EXAMPLES), cache.encode(model, processor, EXAMPLES)
    model.enter_stage1("vqa")
    expected = model(batch, visual).logits
    model.enter_stage2(("vqa", "counting", "captioning"), torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(batch, visual).logits, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.family("generate")
def test_generation_is_transformers_own(path, model):
    processor, collator, cache = kit(model, path)
    base = load_base(ModelConfig(path=path), CPU).eval()
    stop = collator.end_token_id()
    tokens = model.generate(
        collator.prompt_batch(EXAMPLES),
        cache.encode(model, processor, EXAMPLES),
        max_new_tokens=6,
        stop=stop,
    )
    for one, row in zip(EXAMPLES, tokens, strict=True):
        inputs = encoded(processor, collator, one, generate=True)
        ends = [*model.end_tokens(stop)]
        expected = base.generate(
            **inputs, max_new_tokens=6, do_sample=False, eos_token_id=ends, pad_token_id=ends[0]
        )[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(row[: len(expected)], expected)
        assert all(int(token) == ends[0] for token in row[len(expected) :])


@torch.no_grad()
@pytest.mark.family("generate")
def test_decoding_is_greedy_whatever_the_checkpoint_asks_for(path):
    """Penalties, beams and sampling of ``generation_config.json`` would change every score."""
    model, tokens = None, []
    for own in ({}, {"repetition_penalty": 1.5, "no_repeat_ngram_size": 1, "num_beams": 3}):
        model = PilotModel(load_base(ModelConfig(path=path), CPU), ModelConfig(path=path))
        model.enter_stage1("vqa")
        model.base.generation_config.update(**own)
        processor, collator, cache = kit(model, path)
        visual = cache.encode(model, processor, EXAMPLES)
        batch = collator.prompt_batch(EXAMPLES)
        tokens.append(model.eval().generate(batch, visual, max_new_tokens=8))
    assert torch.equal(*tokens)


@pytest.mark.family("logits")
def test_a_batch_of_text_alone_trains_the_lora_and_nothing_else(path):
    config = ModelConfig(path=path, lora=LoraConfig(rank=2))
    model = PilotModel(load_base(config, CPU), config)
    model.enter_stage1("vqa")
    processor, collator, cache = kit(model, path)
    texts = [example(turns=2), example(turns=1)]
    visual = cache.encode(model, processor, texts)
    assert visual.images == ()
    output = model(collator.train_batch(texts), visual)
    assert [float(loss) for loss in output.connector[1:]] == [0, 0, 0]
    output.logits.sum().backward()
    groups = model.groups()
    assert any(p.grad is not None and p.grad.any() for p in groups["lora"].values())
    assert all(p.grad is None for p in groups["own_task_adapter"].values())


@torch.no_grad()
def test_a_zero_image_reaches_the_connector_alone(path, model):
    """`train.text_only`: the logits stay, and H_v has one more image."""
    processor, collator, cache = kit(model, path)
    texts = [example(image(20, 61)), example(turns=2)]
    batch = collator.train_batch(texts)
    plain = cache.encode(model, processor, texts)
    config = FeatureCacheConfig(where="off")
    zeroed = FeatureCache(config, zero_images=True).encode(model, processor, texts)
    assert zeroed.zeros == 1 and len(zeroed.images) == len(plain.images) + 1
    assert zeroed.shown == plain.shown == len(plain.features) < len(zeroed.features)
    torch.testing.assert_close(model(batch, zeroed).logits, model(batch, plain).logits)


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.family("logits")
def test_workers_change_nothing(path, model, tmp_path, workers):
    processor, _, cache = kit(model, path)
    parts = [EXAMPLES[:3], EXAMPLES[3:4], EXAMPLES[2:]] * 2
    plain = [cache.encode(model, processor, part) for part in parts]
    folder = FeatureFolder(tmp_path, limit=2**30, since=0, progress=print)
    kept = FeatureCache(FeatureCacheConfig(where="disk"), folder)
    streamed = list(kept.stream(model, processor, parts, workers=workers))
    assert len(streamed) == len(parts)
    for one, other in zip(streamed, plain, strict=True):
        assert one.images == other.images
        torch.testing.assert_close(one.features, other.features)


def test_rows_have_the_size_that_the_configuration_says(path, model):
    processor, _, cache = kit(model, path)
    config = read_config(ModelConfig(path=path))
    for one in EXAMPLES:
        if len(one.images) == 1:
            layout = processor.layout(one.images[0].size(), alone=True)
            visual = cache.encode(model, processor, [one])
            assert tuple(visual.features.shape) == feature_shape(config, layout.shape)


def test_an_architecture_without_a_row_is_refused(tmp_path):
    from transformers import BertConfig

    BertConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=rf"type 'bert' but must be one of {', '.join(SPECS)}"):
        read_config(ModelConfig(path=str(tmp_path)))


def test_kept_features_need_no_memory_for_pixels(path, model):
    """The stand-in for the pixels of equal images is one number, whatever their size."""
    processor, _, cache = kit(model, path)
    visual = cache.encode(model, processor, [example(image(64, 30))] * 3)
    assert "pixel_values" not in visual.inputs and "pixel_attention_mask" not in visual.inputs
    pixels = stand_in(visual.shapes, CPU, torch.float32)
    assert pixels.untyped_storage().nbytes() == 4
    assert len(pixels) == sum(shape[0] for shape in visual.shapes)


def test_nothing_of_a_batch_stays_after_it_or_after_an_interrupt(path, model, monkeypatch):
    processor, collator, cache = kit(model, path)
    batch = collator.train_batch(EXAMPLES[:2])
    visual = cache.encode(model, processor, EXAMPLES[:2])
    before = model(batch, visual).logits
    assert model.slot.output is model.slot.visual is model.slot.seen is None

    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.base.model, "get_image_features", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(batch, visual)
        with pytest.raises(KeyboardInterrupt):
            cache.encode(model, processor, EXAMPLES[:1])
    assert model.slot.output is model.slot.visual is model.slot.seen is None
    again = model(batch, cache.encode(model, processor, EXAMPLES[:2])).logits
    assert torch.equal(again, before)


@pytest.mark.parametrize("kind", ["qwen2.5-vl", "qwen3-vl"])
def test_an_image_whose_shape_the_processor_refuses_is_an_error_of_its_row(kind, tmp_path):
    """Qwen's refuse a side more than 200 times the other; the check of rows must name the row."""
    path = WRITERS[kind](tmp_path)
    collator = make_collator(ModelConfig(path=path), load_processor(path), max_length=2048)
    one = example(image(1, 300))
    with pytest.raises(DataError, match="refuses an image of this shape") as caught:
        collator.tokenize(one)
    assert str(caught.value).startswith(one.name)
