"""No pickle, no code from outside: what the sources have, and what a base checkpoint can do."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
import transformers

from pilot_flwr.config.model import ModelConfig
from pilot_flwr.errors import ModelError
from pilot_flwr.model.architectures import read_config
from pilot_flwr.model.checkpoints import checkpoint_path
from pilot_flwr.model.loading import load_base, load_processor

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("pilot_flwr", "scripts", "benchmarks")
SOURCES = sorted(path for folder in FOLDERS for path in ROOT.glob(f"{folder}/**/*.py"))
UNPICKLING = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib"}
EVALUATING = {"eval", "exec", "compile", "__import__"}
LOADING = {"torch.load", "numpy.load", "np.load", "pandas.read_pickle", "torch.hub.load"}
HASHED = {"benchmarks/emoji/base.py": ["torch.load"]}
"""Calls that read one published file, tensors alone, after its hash is checked."""
SHELL = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput"}


def unsafe(source):
    """What in a source could run what it reads: (line, what) of everything found."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(node.lineno, n) for n in names if n.split(".")[0] in UNPICKLING]
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name in EVALUATING | LOADING | SHELL or name.startswith("yaml.") and not safe_yaml(node):
            found.append((node.lineno, name))
        for key, allowed in (("shell", False), ("trust_remote_code", False),
                             ("allow_pickle", False), ("weights_only", True),
                             ("use_safetensors", True)):  # fmt: skip
            if key in keywords and ast.unparse(keywords[key]) != str(allowed):
                found.append((node.lineno, f"{name}({key}={ast.unparse(keywords[key])})"))
    return found


def safe_yaml(call):
    """`yaml.safe_*`, errors, or a function with `Loader=yaml.SafeLoader`."""
    name = ast.unparse(call.func).removeprefix("yaml.")
    loader = [ast.unparse(k.value) for k in call.keywords if k.arg == "Loader"]
    return name.startswith("safe_") or name.endswith("Error") or loader == ["yaml.SafeLoader"]


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import torch, marshal",
        "from cloudpickle import loads",
        "import joblib.memory",
        "torch.load(path)",
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "f(allow_pickle=True)",
        "eval(text)",
        "exec(text)",
        "compile(text, 'x', 'exec')",
        "__import__(name)",
        "yaml.load(text)",
        "yaml.load(text, Loader=yaml.Loader)",
        "yaml.full_load(text)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=flag)",
        "os.system(text)",
        "AutoConfig.from_pretrained(path, trust_remote_code=True)",
        "model.from_pretrained(path, use_safetensors=False)",
    ],
)
def test_the_search_finds(line):
    assert unsafe(line)


@pytest.mark.parametrize(
    "line",
    [
        "yaml.safe_load(text)",
        "yaml.compose(text, Loader=yaml.SafeLoader)",
        "model.eval()",
        "re.compile(text)",
        "np.lib.format.read_magic(stream)",
        "json.load(file)",
        "subprocess.run(words)",
    ],
)
def test_the_search_passes(line):
    assert unsafe(line) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_source_can_run_what_it_reads(path):
    found = [name for _, name in unsafe(path.read_text())]
    assert found == HASHED.get(path.relative_to(ROOT).as_posix(), [])


TABLE = re.compile(r"^\| attack or fault \|.*?\n\n", re.DOTALL | re.MULTILINE)
NAMED = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")


def functions_of(path):
    names = ast.walk(ast.parse((ROOT / path).read_text()))
    return {node.name for node in names if isinstance(node, ast.FunctionDef)}


def test_every_attack_in_the_documentation_has_tests_that_exist():
    text = (ROOT / "docs" / "explanation" / "security.md").read_text()
    (table,) = TABLE.findall(text)
    rows = table.strip().splitlines()[2:]
    assert len(rows) > 30
    for row in rows:
        assert row.count(" | ") == 3, row  # four cells
        assert NAMED.search(row.split(" | ")[3]), row
    for path, name in set(NAMED.findall(text)):
        assert name in functions_of(path), (path, name)
        assert name.startswith("test_")


@pytest.fixture
def base(tmp_path):
    """A copy of the shipped base that a test may spoil."""
    folder = tmp_path / "base"
    folder.mkdir()
    for file in Path(checkpoint_path("tiny-llava")).iterdir():
        if file.is_file() and file.name != "bundle.json":  # which is for the shipped one
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


def load(folder):
    return load_base(ModelConfig(path=str(folder)), torch.device("cpu"))


def as_pickle(folder):
    """Replace the weights by the same ones in torch's own format, which is a pickle."""
    state = transformers.LlavaForConditionalGeneration.from_pretrained(folder).state_dict()
    for weights in folder.glob("*.safetensors*"):
        weights.unlink()
    torch.save(state, folder / "pytorch_model.bin")


def test_pickled_weights_are_refused(base):
    as_pickle(base)
    with pytest.raises(ModelError, match="model.safetensors"):
        load(base)


def test_pickled_weights_would_load_without_our_setting(base):
    """The test above shows something: transformers by itself takes such a folder."""
    as_pickle(base)
    transformers.LlavaForConditionalGeneration.from_pretrained(base)


def test_pickled_shards_are_refused(base):
    as_pickle(base)
    (base / "pytorch_model.bin").rename(base / "pytorch_model-00001-of-00001.bin")
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "pytorch_model-00001-of-00001.bin"}}
    (base / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match="safetensors"):
        load(base)


@pytest.mark.parametrize("how", ["named in the configuration", "an adapter beside the weights"])
def test_a_pickle_beside_the_weights_is_not_opened(base, how, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("torch.load was called"))
    torch.save({"x": torch.zeros(1)}, base / "adapter_model.bin")
    if how == "an adapter beside the weights":
        adapter = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
        (base / "adapter_config.json").write_text(json.dumps(adapter))
    else:
        config = json.loads((base / "config.json").read_text())
        config["transformers_weights"] = "adapter_model.bin"
        (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError):
        load(base)


@pytest.mark.parametrize("part", ["config.json", "processor_config.json", "tokenizer_config.json"])
def test_code_in_a_checkpoint_is_neither_run_nor_asked_about(base, part, tmp_path, monkeypatch):
    ran = tmp_path / "ran"
    (base / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    path = base / part
    values = json.loads(path.read_text()) if path.exists() else {}
    classes = ("AutoConfig", "AutoModel", "AutoProcessor", "AutoImageProcessor")
    values["auto_map"] = {name: "evil.Evil" for name in classes}
    values["auto_map"]["AutoTokenizer"] = ["evil.Evil", "evil.Evil"]
    if part == "config.json":
        values["model_type"] = "evil"
    for key in ("processor_class", "tokenizer_class", "image_processor_type"):
        values[key] = "Evil"
    path.write_text(json.dumps(values))
    try:
        if part == "config.json":
            with pytest.raises(ModelError, match="trust_remote_code"):
                read_config(ModelConfig(path=str(base)))
        else:
            load_processor(str(base))
    except ModelError:
        pass
    assert not ran.exists()


def test_a_chat_template_is_rendered_in_a_sandbox():
    """A checkpoint's template is Jinja, and cannot reach Python's own objects."""
    processor = load_processor("tiny-llava")
    escape = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
    with pytest.raises(Exception, match=re.compile("unsafe|not safely")):
        processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], chat_template=escape, tokenize=False
        )
