"""A federation file becomes overrides that Hydra reads back with the YAML's values."""

import shlex
from pathlib import Path

import pytest
import yaml

from pilot_flwr.config.loading import config_folder, load_config
from pilot_flwr.config.overrides import expand, with_folder
from pilot_flwr.errors import ConfigError

NASTY = [
    'it\'s "so"',
    "a, b: {c} [d] = $x ${y} \\${z}",
    "back\\slash\\",
    "line\nbreak",
    "é # no",
    " ",
    "What???",
    "????",
]


def written(path, content):
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def loaded(words):
    return load_config(shlex.join(expand(words)))


def test_the_example_is_read_from_wherever_it_was_copied_to(tmp_path, monkeypatch):
    text = (config_folder() / "data" / "example-llava.yaml").read_text()
    copy = written(tmp_path / "mine.yaml", text)
    monkeypatch.chdir(tmp_path.parent)
    for name in (str(copy), f"{tmp_path.name}/mine.yaml"):
        data = loaded([f"data={name}"]).data
        assert data.folder == str(tmp_path)
        expected = yaml.safe_load(text)
        for task, files in expected["files"].items():
            for key, value in files.items():
                assert getattr(data.files[task], key) == value
        assert data.tasks == expected["tasks"] and data.test_examples == 500
        assert (data.source, data.image_aspect_ratio) == ("llava", "pad")


def test_any_text_survives(tmp_path):
    tasks = {f"a-{number}": text for number, text in enumerate(NASTY)}
    files = {
        task: {"train": [text, "x"], "prompt_suffix": text, "images": text}
        for task, text in tasks.items()
    }
    path = written(tmp_path / "f.yml", {"tasks": list(tasks), "files": files})
    for task, found in loaded([f"data={path}"]).data.files.items():
        text = tasks[task]
        assert (found.train, found.prompt_suffix, found.images) == ([text, "x"], text, text)


def test_what_the_file_leaves_out(tmp_path):
    path = written(tmp_path / "f.yaml", {"tasks": ["a"], "files": {"a": {}}})
    data = loaded([f"data={path}"]).data
    assert (data.source, data.train_examples, data.test_examples) == ("llava", 0, 0)
    assert data.folder == str(tmp_path)


@pytest.mark.parametrize("folder", ["sub", "../other", "/data", "~/data"])
def test_the_folder_counts_from_the_file(tmp_path, folder):
    path = written(tmp_path / "f.yaml", {"tasks": ["a"], "files": {"a": {}}, "folder": folder})
    expected = {
        "sub": tmp_path / "sub",
        "../other": tmp_path.parent / "other",
        "/data": Path("/data"),
        "~/data": Path.home() / "data",
    }
    assert loaded([f"data={path}"]).data.folder == str(expected[folder])


def test_later_words_change_the_file_and_others_stay(tmp_path):
    path = written(tmp_path / "f.yaml", {"tasks": ["a"], "files": {"a": {"metric": "gqa"}}})
    words = ["seed=3", f"data={path}", "data.files.a.metric=vqav2", "data.clients_per_task=2"]
    config = loaded(words)
    assert (config.seed, config.data.clients_per_task) == (3, 2)
    assert config.data.files["a"].metric == "vqav2"
    assert expand(["data=digits", "seed=1"]) == ["data=digits", "seed=1"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("tasks: [a", "is not YAML"),
        ("[1]", "must have at least `tasks`"),
        ("folder: x", "must have at least `tasks`"),
        ("tasks: [a]\ntask: b", "f.yaml: `task` must be one of source, tasks"),
        ("tasks: [a]", "f.yaml: `data.tasks` names 'a' but `data.files` has none"),
        ("tasks: [a]\nfiles: {a: {trian: [x]}}", "(?s)f.yaml: .*trian.*"),
        ("tasks: [a]\nfiles: {a: {train: x}}", "(?s)f.yaml: .*data.files.a.train"),
        ("tasks: [a]\nfiles: {a: {}}\npartition: {kind: odd}", "f.yaml: `data.partition.kind`"),
        ("tasks: [a]\nfiles: {'a b': {}}", "f.yaml: 'a b' in `files` must be letters"),
        ("tasks: [a]\nfiles: {a: {}}\nfolder:", "f.yaml: `folder` is empty but must be a folder"),
        ("tasks: [a]\nfiles: {a: {}}\nfolder: ''", "f.yaml: `folder` is empty but must be"),
        ("tasks: [a]\nfiles: {a: {}}\nfolder: [x]", r"f.yaml: `folder` is \['x'\] but must be"),
        (
            "tasks: [a]\nfiles: {a: {}}\nfolder: ~nobody-here/x",
            "f.yaml: `folder` begins with '~' and the name of no user",
        ),
        ("tasks: [a]\nfiles:", "f.yaml: `files` is empty; give it a value, or leave it out"),
        ("tasks: [a]\nfiles: {a: {images: }}", "f.yaml: `files.a.images` is empty"),
        (
            "tasks: [a]\nfiles:\n  a: {metric: gqa}\n  a: {metric: anls}",
            "(?s)`data` is 'f.yaml', which is not YAML: the key 'a' comes twice.*line 4",
        ),
        ("tasks: [a]\ntasks: [b]\nfiles: {a: {}}", "(?s)the key 'tasks' comes twice.*line 2"),
        (
            "tasks: &a [*a]",
            "`data` is 'f.yaml', which is not YAML: it has more than 100,000 values",
        ),
        ("tasks: [{a: 1, a: 2}]", "(?s)the key 'a' comes twice.*line 1"),
        (
            "tasks: [a]\nfiles: {a: {prompt_suffix: '???'}}",
            r"f.yaml: `files.a.prompt_suffix` is '\?\?\?', which stands for a missing value",
        ),
        ("tasks: [a]\nfiles: {a: {}}\nclients_per_task: many", "(?s)f.yaml: .*clients_per_task"),
    ],
)
def test_errors_name_file_and_key(tmp_path, monkeypatch, content, message):
    written(tmp_path / "f.yaml", content)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=message):
        expand(["data=f.yaml"])


def test_a_file_that_is_not_there_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="`data` is 'no.yaml', which cannot be read: No such"):
        expand(["data=no.yaml"])


def test_a_relative_folder_counts_from_where_the_user_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["data=example-llava", "data.folder=sub"]
    config, changed = with_folder(load_config(shlex.join(words)), words)
    assert config.data.folder == load_config(shlex.join(changed)).data.folder == f"{tmp_path}/sub"
    config, changed = with_folder(load_config(), [])
    assert (config, changed) == (load_config(), [])


@pytest.mark.parametrize("words", ["data=~no-such-user-at-all/x.yaml", "data=FILE"])
def test_a_home_folder_that_nobody_has(tmp_path, words):
    path = tmp_path / "federation.yaml"
    path.write_text("tasks: [vqa]\nfolder: ~no-such-user-at-all/x\n")
    with pytest.raises(ConfigError, match="begins with '~' and the name of no user"):
        expand([words.replace("FILE", str(path))])
