import copy
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from PIL import Image

from pilot_flwr.config.data import DataConfig
from pilot_flwr.config.model import FeatureCacheConfig
from pilot_flwr.data.examples import Turn
from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.data.images import ImageFile
from pilot_flwr.model.feature_cache import FeatureCache, forget_features
from pilot_flwr.model.feature_folder import FeatureFolder


@pytest.fixture
def examples():
    data = DataConfig(train_examples=6)
    return client_examples(data, federation_clients(data)[0], "train", seed=0)[:4]


@pytest.fixture
def counted(make_model, monkeypatch):
    """A model that counts the images that its vision tower encodes."""
    model = make_model()
    encode, count = model.encode_images, []
    monkeypatch.setattr(
        model,
        "encode_images",
        lambda inputs: (count.append(len(inputs["pixel_values"])), encode(inputs))[1],
    )
    return model, count


@pytest.fixture(autouse=True)
def nothing_in_memory():
    forget_features()


def cache(folder, where, max_gib=1.0):
    config = FeatureCacheConfig(where=where, max_gib=max_gib)
    if where != "disk":
        return FeatureCache(config)
    limit = int(max_gib * 2**30)
    return FeatureCache(config, FeatureFolder(folder, limit=limit, since=0, progress=print))


@pytest.mark.parametrize(("where", "encoded"), [("memory", 4), ("disk", 4), ("off", 8)])
def test_each_image_is_encoded_once_if_kept(tmp_path, counted, processor, examples, where, encoded):
    model, count = counted
    kept = cache(tmp_path, where)
    first = kept.encode(model, processor, examples)
    second = cache(tmp_path, where).encode(model, processor, list(reversed(examples)))
    assert torch.equal(first.features, second.features.flip(0))
    assert sum(count) == encoded


def test_a_text_can_have_the_features_of_zeros_behind_those_of_images(
    tmp_path, make_model, processor, examples
):
    """As the official data set gives a text row ``torch.zeros(3, H, W)`` for its image."""
    model = make_model()
    texts = [replace(e, images=(), turns=(Turn("user", "How?"), *e.turns[1:])) for e in examples]
    mixed = [texts[0], examples[1], texts[2]]
    config = FeatureCacheConfig(where="off")
    zeroed = FeatureCache(config, zero_images=True)
    side = model.base.config.vision_config.image_size
    zero = model.encode_images({"pixel_values": torch.zeros(1, 3, side, side)})[0]
    plain = cache(tmp_path, "off").encode(model, processor, mixed)
    found = zeroed.encode(model, processor, mixed)
    assert plain.images == (1,) and found.images == (1, 1, 1)
    assert (plain.shown, found.shown) == (1, 1)
    torch.testing.assert_close(found.features, torch.cat([plain.features, zero, zero]))
    alone = zeroed.encode(model, processor, texts[:1])
    assert alone.shown == 0
    torch.testing.assert_close(alone.features, zero)


def test_features_are_transformers_own(tmp_path, make_model, processor, examples):
    """The projector applied to our features is LLaVA's `get_image_features`."""
    model = make_model()
    features = cache(tmp_path, "off").encode(model, processor, examples)
    images = [example.images[0].read() for example in examples]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    projector = model.connector.task_adapter
    model.base.model.multi_modal_projector = projector
    expected = torch.stack(list(model.base.get_image_features(pixels).pooler_output))
    torch.testing.assert_close(projector(features.features), expected)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_bound_is_kept_and_the_rest_encoded_again(
    tmp_path, counted, processor, examples, where
):
    model, count = counted
    one = cache(tmp_path, "off").encode(model, processor, examples[:1])
    count.clear()
    from pilot_flwr.model import feature_cache as module

    used = module._used_memory if where == "memory" else 0
    bound = (used + 2.5 * (one.features.nbytes + (where == "disk") * 300)) / 2**30
    small = cache(tmp_path, where, max_gib=bound)
    small.encode(model, processor, examples)
    small.encode(model, processor, examples)
    assert count == [4, 2]


def test_kept_files_are_not_flushed_and_leave_nothing_beside_them(
    tmp_path, counted, processor, examples, monkeypatch
):
    """They can be made anew; two flushes an image would take longer than encoding it."""

    def flush(descriptor):
        raise AssertionError("flushed")

    monkeypatch.setattr("os.fsync", flush)
    cache(tmp_path, "disk").encode(counted[0], processor, examples)
    kept = [path.suffix or path.name for path in tmp_path.iterdir()]
    assert sorted(kept) == [".bytes", ".lock", *[".safetensors"] * len(examples)]


def test_a_torn_or_changed_file_counts_as_absent(tmp_path, counted, processor, examples):
    model, count = counted
    expected = cache(tmp_path, "disk").encode(model, processor, examples)
    empty, short, changed, _ = sorted(tmp_path.glob("*.safetensors"))
    empty.write_bytes(b"")
    short.write_bytes(short.read_bytes()[:-1])
    content = changed.read_bytes()
    changed.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(2):  # encoded again, then found
        again = cache(tmp_path, "disk").encode(model, processor, examples)
        torch.testing.assert_close(again.features, expected.features)
    assert count == [4, 3]


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_equal_content_shares_features_and_equal_ids_do_not(
    tmp_path, counted, processor, examples, where
):
    model, count = counted
    one, *others = examples
    renamed = replace(one, id="other")
    same_ids = [replace(example, id=one.id) for example in others]
    for batch in ([one], [renamed], same_ids, same_ids):
        cache(tmp_path, where).encode(model, processor, batch)
    assert count == [1, 3]


def test_files_share_features_by_content_and_reading(tmp_path, counted, processor, examples):
    """Whatever their names; a file that changes is another image."""
    model, count = counted
    picture = examples[0].images[0].read()
    for name in ("a.png", "b.png"):
        picture.save(tmp_path / name)

    def encode(name, **reading):
        images = (ImageFile(tmp_path, name, "row 1", **reading),)
        example = replace(examples[0], images=images)
        kept = cache(tmp_path / "kept", "disk")
        return kept.encode(model, processor, [example]).features

    first = encode("a.png")
    assert torch.equal(encode("b.png"), first) and count == [1]
    encode("a.png", official=True)
    encode("a.png", background=(1, 2, 3))
    assert count == [1, 1, 1]
    picture.rotate(90).save(tmp_path / "a.png")
    assert not torch.equal(encode("a.png"), first)
    assert torch.equal(encode("b.png"), first) and count == [1, 1, 1, 1]


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("change", ["weights", "layer", "dtype", "processor"])
def test_another_tower_or_processor_does_not_get_the_features(
    tmp_path, make_model, processor, examples, where, change
):
    cache(tmp_path, where).encode(make_model(), processor, examples)
    other, model = copy.deepcopy(processor), make_model()
    tower = model.base.model.vision_tower
    if change == "dtype":
        tower.bfloat16()
    if change == "weights":
        next(tower.parameters()).data.view(-1)[-1] += 1e-3
    if change == "layer":
        model.base.config.vision_feature_layer = -1
    if change == "processor":
        other.image_processor.image_mean = [0.4, 0.5, 0.6]
    vars(model).pop("vision_identity", None)  # of the model that this one is a copy of
    kept, plain = cache(tmp_path, where), cache(tmp_path, "off")
    found = kept.encode(model, other, examples).features
    expected = plain.encode(model, other, examples).features
    assert found.dtype == expected.dtype and torch.equal(found, expected)


class Named(NamedTuple):
    """An image that several examples may share."""

    image: Image.Image
    name: str

    def read(self):
        return self.image

    def size(self):
        return self.image.height, self.image.width

    def identity(self):
        return self.name


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_an_image_that_examples_share_is_encoded_once(
    tmp_path, counted, processor, examples, where
):
    model, count = counted
    one, other = (Named(e.images[0].read(), f"{where}{n}") for n, e in enumerate(examples[:2]))
    shared = [
        replace(example, images=(image,))
        for example, image in zip(examples, (one, one, other, one), strict=True)
    ]
    kept = cache(tmp_path, where)
    first = kept.encode(model, processor, shared)
    kept.encode(model, processor, shared[1:2])
    again = cache(tmp_path, where)
    again.encode(model, processor, shared[::-1])
    assert count == [2]
    assert torch.equal(first.features[0], first.features[1])
    assert not torch.equal(first.features[0], first.features[2])


def test_the_bound_holds_for_what_a_folder_already_has(tmp_path, counted, processor, examples):
    model, count = counted
    one = cache(tmp_path / "size", "disk")
    one.encode(model, processor, examples[:1])
    (size,) = (file.stat().st_size for file in (tmp_path / "size").glob("*.safetensors"))
    for _ in range(3):  # each a process of its own
        kept = cache(tmp_path, "disk", max_gib=2.5 * size / 2**30)
        kept.encode(model, processor, examples)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


def test_what_is_kept_in_memory_does_not_hold_its_whole_batch(
    tmp_path, counted, processor, examples
):
    from pilot_flwr.model import feature_cache as module

    kept = cache(tmp_path, "memory")
    kept.encode(counted[0], processor, examples)
    mine = [tensor for features in module._MEMORY.values() for tensor in features]
    assert len(mine) == len(examples)
    assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in mine)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_of_two_batches_in_flight_is_encoded_once(
    tmp_path, counted, processor, examples, workers
):
    """Both are decoded before either is encoded; the first one's features are used for both."""
    model, count = counted
    parts = [examples[:2], examples[:2], examples]
    kept = cache(tmp_path, "memory")
    list(kept.stream(model, processor, parts, workers=workers))
    assert count == [2, 2]


def test_an_image_that_a_batch_holds_twice_is_read_once(tmp_path, counted, processor, examples):
    reads = []

    class Counted(Named):
        def read(self):
            reads.append(self.name)
            return super().read()

    image = Counted(examples[0].images[0].read(), "counted")
    shared = [replace(example, images=(image,)) for example in examples]
    visual = cache(tmp_path, "off").encode(counted[0], processor, shared)
    assert reads == ["counted"]
    assert len(visual.features) == len(visual.images) == len(examples)
