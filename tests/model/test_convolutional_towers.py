"""FastVLM's tower returns a feature map and may be of any class: here EfficientNet and ResNet.

The reference is the tower itself, by transformers alone.
"""

import functools
import json

import families
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.utils import import_utils
from visuals import encoded

from pilot_flwr.config.loading import load_config
from pilot_flwr.config.model import FeatureCacheConfig, ModelConfig
from pilot_flwr.data.examples import Example, KeptImage, Turn
from pilot_flwr.errors import ModelError
from pilot_flwr.flower import compatibility
from pilot_flwr.flower.compatibility import identity_of
from pilot_flwr.model.architectures import feature_shape, known_config
from pilot_flwr.model.feature_cache import FeatureCache
from pilot_flwr.model.loading import load_base, load_processor, make_collator
from pilot_flwr.model.pilot_model import PilotModel
from pilot_flwr.model.resource_plan import make_plan
from pilot_flwr.model.shapes import group_shapes

CPU = torch.device("cpu")
SIZES = [(32, 32), (28, 90), (7, 100), (150, 97)]


def resnet():
    """Another class of tower, also of stride 8."""
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    return transformers.ResNetConfig(layer_type="basic", hidden_size=16, **sizes)


@pytest.fixture(scope="module", params=["efficientnet", "resnet"])
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "resnet":
            family = functools.partial(families.fast_vlm, vision=resnet())
            patch.setitem(families._FAMILIES, "fastvlm", family)
        return families.write("fastvlm", folder)


@pytest.fixture
def model(path):
    model = PilotModel(load_base(ModelConfig(path=path), CPU), ModelConfig(path=path))
    model.enter_stage1("vqa")
    return model.eval()


def example(height, width):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width, 3))
    turns = (Turn("user", "<image>\nWhat is it?"), Turn("assistant", "two zebras"))
    picture = KeptImage(Image.fromarray(pixels.astype(np.uint8)))
    return Example(f"{height} x {width}", (picture,), turns)


EXAMPLES = [example(*size) for size in SIZES]


def kit(path):
    processor = load_processor(path)
    collator = make_collator(ModelConfig(path=path), processor, max_length=2048)
    return processor, collator, FeatureCache(FeatureCacheConfig(where="off"))


def pixels_of(processor):
    images = [one.images[0].read() for one in EXAMPLES]
    return processor.image_processor(images=images, return_tensors="pt")["pixel_values"]


@torch.no_grad()
def test_features_are_the_places_of_the_feature_map_row_by_row(path, model):
    """Images of any size are resized and cropped to one size first."""
    processor, _, cache = kit(path)
    tower = load_base(ModelConfig(path=path), CPU).eval().model.vision_tower
    maps = tower(pixels_of(processor)).last_hidden_state
    features = cache.encode(model, processor, EXAMPLES).features
    assert maps.shape[-2:] == (4, 4) and features.shape == (4, 16, maps.shape[1])
    assert features.std(0).max() > 0.1  # of different images
    for image in range(4):
        for place in range(16):
            expected = maps[image, :, place // 4, place % 4]
            torch.testing.assert_close(features[image, place], expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_logits_are_those_of_the_untouched_model(path, model):
    processor, collator, cache = kit(path)
    base = load_base(ModelConfig(path=path), CPU).eval()
    for one in EXAMPLES:
        batch = collator.train_batch([one])
        expected = base(**encoded(processor, collator, one)).logits[:, :-1]
        got = model(batch, cache.encode(model, processor, [one])).logits
        expected = expected[batch.labels[:, 1:] != -100]
        torch.testing.assert_close(got, expected, atol=2e-5, rtol=1e-4)


def test_no_module_of_the_tower_runs_on_kept_features(path, model):
    """Neither in training, nor in its backward pass, nor in generation."""
    processor, collator, cache = kit(path)
    visual = cache.encode(model, processor, EXAMPLES)
    ran = []
    for module in model.tower.modules():
        if module is not model.tower:
            module.register_forward_hook(lambda module, *_: ran.append(module))
    output = model.train()(collator.train_batch(EXAMPLES), visual)
    output.logits.sum().backward()
    model.eval().generate(collator.prompt_batch(EXAMPLES), visual, max_new_tokens=2)
    assert ran == []
    cache.encode(model, processor, EXAMPLES)
    assert len(ran) > 10


def test_training_leaves_the_statistics_of_batch_normalization(path, model):
    processor, _, cache = kit(path)
    before = {name: tensor.clone() for name, tensor in model.tower.state_dict().items()}
    expected = cache.encode(model, processor, EXAMPLES).features
    features = cache.encode(model.train(), processor, EXAMPLES).features
    assert torch.equal(features, expected)
    assert any("running_" in name for name in before)
    assert all(torch.equal(t, before[n]) for n, t in model.tower.state_dict().items())


def test_other_statistics_of_batch_normalization_are_another_tower(path, model):
    """Else features that another tower made could be found in the cache."""
    identity = model.vision_identity
    statistics = (t for n, t in model.tower.state_dict().items() if n.endswith("running_mean"))
    next(statistics)[0] += 1
    del model.vision_identity
    assert model.vision_identity != identity


@torch.no_grad()
@pytest.mark.parametrize("size", [(32, 32), (45, 70), (33, 64)], ids=str)
def test_the_shape_of_features_is_asked_of_the_tower(path, model, size):
    """For pixels that no multiple of the stride, and no square, limits."""
    shape = (2, 3, *size)
    features, *_ = model.encode_images({"pixel_values": torch.rand(shape)})
    assert feature_shape(known_config(ModelConfig(path=path)), shape) == tuple(features.shape)


def test_squeeze_and_excitation_can_be_made_the_identity(tmp_path):
    """By a gate of sigmoid(100), which is 1: EfficientNet-Lite's blocks have no such layer."""
    tower = load_base(ModelConfig(path=families.write("fastvlm", tmp_path)), CPU).model.vision_tower
    layers = [m for n, m in tower.named_modules() if n.endswith("squeeze_excite")]
    pixels = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        gated = tower(pixels).last_hidden_state
        for layer in layers:
            layer.reduce.weight.zero_(), layer.reduce.bias.zero_()
            layer.expand.weight.zero_(), layer.expand.bias.fill_(100)
        found = tower(pixels).last_hidden_state
        for layer in layers:
            layer.forward = lambda hidden: hidden
        expected = tower(pixels).last_hidden_state
    assert len(layers) == 4
    assert torch.equal(found, expected) and not torch.allclose(found, gated)


def with_tower(folder, **settings):
    """Change settings of the tower in a checkpoint's configuration."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    config["vision_config"] |= settings
    file.write_text(json.dumps(config))
    compatibility._KNOWN.clear()
    return load_config(f"model.path={folder}")


def test_sites_with_other_settings_of_the_tower_have_another_base(tmp_path):
    """The activation shows in no tensor, so every setting that is not a default counts."""
    families.write("fastvlm", tmp_path)
    own = identity_of(with_tower(tmp_path))
    origin = {"transformers_version": "5.0.0", "architectures": ["X"], "dtype": "bfloat16"}
    labels = {str(number): f"class {number}" for number in range(12)}
    assert identity_of(with_tower(tmp_path, id2label=labels, **origin)) == own
    other = identity_of(with_tower(tmp_path, hidden_act="swish"))
    assert {key for key in own if own[key] != other[key]} == {"base.config"}


def vit():
    """A tower without a feature map."""
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.CLIPVisionConfig(hidden_size=32, image_size=32, patch_size=8, **layers)


@pytest.mark.parametrize(
    ("vision", "size", "shape"), [(vit(), 32, r"\(1, 17, 32\)"), (resnet(), 40, r"\(1, 16, 4, 4\)")]
)
def test_a_tower_must_return_a_map_of_its_declared_width(vision, size, shape, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        family = functools.partial(families.fast_vlm, vision=vision)
        patch.setitem(families._FAMILIES, "fastvlm", family)
        families.write("fastvlm", tmp_path)
    config = with_tower(tmp_path, hidden_size=size)
    with pytest.raises(ModelError, match=f"features of shape {shape} but must .* D = {size} "):
        make_plan(config)


def test_a_tower_of_timm_needs_timm(tmp_path, monkeypatch):
    """FastVLM's own towers are timm's."""
    missing = (lambda: False, import_utils.TIMM_IMPORT_ERROR)
    monkeypatch.setitem(import_utils.BACKENDS_MAPPING, "timm", missing)
    families.write("fastvlm", tmp_path)
    tower = {"model_type": "timm_wrapper", "architecture": "fastvit_mci3", "label_names": []}
    config = with_tower(tmp_path, **tower)
    needs = r"The base model in `model.path` needs a package: .*pip install timm"
    with pytest.raises(ModelError, match=needs):
        make_plan(config)
    with pytest.raises(ModelError, match=needs):
        group_shapes(config.model, tasks=("vqa",), stage=1)
    with pytest.raises(
        ModelError, match=r"cannot be loaded: \s*TimmWrapperModel requires the timm"
    ):
        load_base(config.model, CPU)
