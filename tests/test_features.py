import pytest
import torch

from pilot_flwr.data.federation import client_examples, federation_clients
from pilot_flwr.data_settings import DataConfig
from pilot_flwr.features import FeatureCache
from pilot_flwr.model_settings import FeatureCacheConfig


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
        model, "encode_images", lambda pixels: (count.append(len(pixels)), encode(pixels))[1]
    )
    return model, count


def cache(tmp_path, where, namespace, max_gib=1.0):
    config = FeatureCacheConfig(where=where, max_gib=max_gib)
    return FeatureCache(config, namespace=namespace, folder=tmp_path)


@pytest.mark.parametrize(("where", "encoded"), [("memory", 4), ("disk", 4), ("off", 8)])
def test_each_image_is_encoded_once_if_kept(tmp_path, counted, processor, examples, where, encoded):
    model, count = counted
    kept = cache(tmp_path, where, f"once-{where}")
    first = kept.encode(model, processor.image_processor, examples)
    second = cache(tmp_path, where, f"once-{where}").encode(
        model, processor.image_processor, list(reversed(examples))
    )
    assert torch.equal(first.features, second.features.flip(0))
    assert sum(count) == encoded


def test_features_are_transformers_own(tmp_path, make_model, processor, examples):
    """The projector applied to our features is LLaVA's `get_image_features`."""
    model = make_model()
    features = cache(tmp_path, "off", "own").encode(model, processor.image_processor, examples)
    images = [example.images[0].read() for example in examples]
    pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
    projector = model.connector.task_adapter
    model.llava.model.multi_modal_projector = projector
    expected = torch.stack(list(model.llava.get_image_features(pixels).pooler_output))
    torch.testing.assert_close(projector(features.features), expected)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_the_bound_is_kept_and_the_rest_encoded_again(
    tmp_path, counted, processor, examples, where
):
    model, count = counted
    one = cache(tmp_path, "off", "size").encode(model, processor.image_processor, examples[:1])
    count.clear()
    from pilot_flwr import features as module

    used = module._used_memory if where == "memory" else 0
    bound = (used + 2.5 * (one.features.nbytes + (where == "disk") * 300)) / 2**30
    small = cache(tmp_path, where, f"bound-{where}", max_gib=bound)
    small.encode(model, processor.image_processor, examples)
    small.encode(model, processor.image_processor, examples)
    assert count == [4, 2]


def test_kept_files_are_not_flushed_and_leave_nothing_beside_them(
    tmp_path, counted, processor, examples, monkeypatch
):
    """They can be made anew; two flushes an image would take longer than encoding it."""

    def flush(descriptor):
        raise AssertionError("flushed")

    monkeypatch.setattr("os.fsync", flush)
    cache(tmp_path, "disk", "flush").encode(counted[0], processor.image_processor, examples)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"] * len(examples)


def test_a_torn_file_counts_as_absent(tmp_path, counted, processor, examples):
    model, count = counted
    expected = cache(tmp_path, "disk", "torn").encode(model, processor.image_processor, examples)
    empty, short, *_ = sorted(tmp_path.iterdir())
    empty.write_bytes(b"")
    short.write_bytes(short.read_bytes()[:-1])
    for _ in range(2):  # encoded again, then found
        again = cache(tmp_path, "disk", "torn").encode(model, processor.image_processor, examples)
        torch.testing.assert_close(again.features, expected.features)
    assert count == [4, 2]


def test_two_clients_with_equal_ids_do_not_share(tmp_path, counted, processor, examples):
    model, count = counted
    for name in ("a", "b"):
        cache(tmp_path, "memory", f"{name}/train").encode(
            model, processor.image_processor, examples
        )
    assert count == [4, 4]
