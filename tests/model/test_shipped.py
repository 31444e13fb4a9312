import base64
import json
import shutil

import pytest
from transformers import LlavaForConditionalGeneration

from pilot_flwr.model import checkpoints as shipped
from pilot_flwr.model.checkpoints import ASSETS, BUNDLE, checkpoint_path, write_bundle


@pytest.fixture
def as_bundled(tmp_path, monkeypatch):
    """The assets as Flower's app bundle carries them: text files only."""
    assets = tmp_path / "assets"
    shutil.copytree(ASSETS, assets, ignore=shutil.ignore_patterns("*.safetensors", "*.jinja"))
    monkeypatch.setattr(shipped, "ASSETS", assets)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return assets


def files(folder):
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_in_a_checkout_the_folder_itself_is_used():
    assert checkpoint_path("tiny-llava") == str(ASSETS / "tiny-llava")


def test_anything_else_is_left_to_transformers(tmp_path):
    assert checkpoint_path("llava-hf/llava-1.5-7b-hf") == "llava-hf/llava-1.5-7b-hf"
    assert checkpoint_path(str(tmp_path)) == str(tmp_path)


def test_the_bundle_is_the_other_files(tmp_path):
    bundle = json.loads((ASSETS / "tiny-llava" / BUNDLE).read_text())
    assert set(bundle) == {"model.safetensors", "chat_template.jinja"}
    for name, content in bundle.items():
        assert base64.b64decode(content) == (ASSETS / "tiny-llava" / name).read_bytes()
    copy = shutil.copytree(ASSETS / "tiny-llava", tmp_path / "copy")
    (copy / BUNDLE).unlink()
    write_bundle(copy)
    assert files(copy) == files(ASSETS / "tiny-llava")


def test_from_a_bundle_the_same_folder_is_put_together_once(as_bundled, tmp_path):
    folder = checkpoint_path("tiny-llava")
    assert folder.startswith(str(tmp_path / "cache"))
    from pathlib import Path

    assert files(Path(folder)) == files(ASSETS / "tiny-llava")
    stamp = Path(folder).stat().st_mtime_ns
    assert checkpoint_path("tiny-llava") == folder
    assert Path(folder).stat().st_mtime_ns == stamp
    assert len(list((tmp_path / "cache" / "pilot-flwr").iterdir())) == 1
    LlavaForConditionalGeneration.from_pretrained(folder)


def test_another_content_gets_another_folder(as_bundled):
    first = checkpoint_path("tiny-llava")
    (as_bundled / "tiny-llava" / "generation_config.json").write_text("{}")
    assert checkpoint_path("tiny-llava") != first
