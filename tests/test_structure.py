"""The map of the package: imports go to the right only, and each library stays in its layer."""

import ast
import re
from pathlib import Path

import pytest

import pilot_flwr

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "pilot_flwr"

# Left to right; a module may import from its own row only what stands before it, and from the
# rows before. A module that is missing here, or that is gone, fails the test.
LAYERS = [
    [
        "errors",
        "checks",
        "wording",
        "settings.model",
        "settings.data",
        "settings.strategy",
        "settings.privacy",
        "settings.together",
        "settings.pilot",
        "config",
        "submission",
        "federation_file",
        "storage.run_identity",
        "storage.locks",
    ],
    [
        "losses",
        "connector",
        "arrays",
        "distances",
        "aggregation",
        "server_optimizer",
        "exact",
        "norms",
        "metrics.score",
        "metrics.text",
        "metrics.vqa",
        "metrics.grounding",
        "metrics.ptb",
        "metrics.captions",
        "metrics.table",
        "model.shipped",
    ],
    [
        "data.examples",
        "data.digit_questions",
        "data.digit_style",
        "data.digits",
        "data.rows",
        "data.image_files",
        "data.llava",
        "data.conversion",
        "data.from_vqa",
        "data.from_captions",
        "data.from_boxes",
        "data.convert",
        "data.partition",
        "data.files",
        "data.screening",
        "data.chat_template",
        "data.collator",
        "data.federation",
        "data.pooled",
        "data.check",
    ],
    [
        "model.parameters",
        "model.architectures",
        "model.base",
        "model.lora",
        "model.pilot_model",
        "model.warm",
        "model.initial",
        "storage.tensors",
        "storage.private_state",
        "storage.checkpoint_folders",
        "storage.checkpoint",
        "client.personal",
        "model.features",
        "storage.provenance",
        "storage.run_folder",
        "storage.interrupted",
    ],
    [
        "client.privacy",
        "client.privacy_account",
        "client.privacy_demands",
        "model.memory",
        "model.layout",
        "model.plan",
        "client.accumulation",
        "client.proximal",
        "client.training",
        "client.evaluation",
    ],
    [
        "client.kit",
        "client.ditto",
        "client.turn",
        "server.rules",
        "server.tensor_check",
        "server.state",
        "server.norm_check",
        "server.claims",
        "model.weights_sample",
        "flower.identity",
        "client.node_config",
        "client.readiness",
        "client.site",
        "server.tables",
        "launching.tail",
        "launching.progress",
        "server.announcements",
        "storage.resume",
    ],
    [
        "results.answering",
        "results.conversation",
        "results.changes",
        "results.runs",
        "results.questions",
        "results.scoring",
        "results.standalone.modeling_pilot",
        "results.standalone.modeling_wide",
        "results.exporting",
        "results.merging",
        "results.model_card",
        "report.live",
        "report.drawing",
        "report.fitting",
        "report.gather",
        "report.method",
        "report.curves",
        "report.diagram",
        "report.losses",
        "report.matrices",
        "report.traffic",
        "report.router",
        "report.page",
        "report.run_report",
    ],
    [
        "flower.codec",
        "flower.wire",
        "flower.replies",
        "flower.failures",
        "flower.in_process",
        "flower.grid",
        "server.roster",
        "server.trainers",
        "server.journal",
        "server.exchange_loop",
        "strategy",
        "client_app",
        "server_app",
    ],
    [
        "launching.outcome",
        "launching.processes",
        "launching.cluster",
        "launching.cluster_survey",
        "launching.cluster_nodes",
        "launching.simulation",
        "launching.restarts",
        "launching.preparation",
        "launching.in_process",
        "launching.execution",
        "sweeping.plan",
        "sweeping.folder",
        "sweeping.rows",
        "sweeping.job",
        "sweeping.statistics",
        "sweeping.table",
        "sweeping.writing",
        "sweeping.multirun",
        "launching.connections",
        "launching.remote",
        "commands.superlink",
        "commands.run",
        "commands.sweep",
        "commands.plan",
        "commands.arguments",
        "commands.table",
        "commands.evaluate",
        "commands.predict",
        "commands.chat",
        "commands.export",
        "report.sweep_labels",
        "report.sweep_dots",
        "report.sweep_curves",
        "report.sweep_report",
        "commands.report",
        "commands.convert",
        "commands.check",
        "commands.data",
        "cli",
    ],
]
ORDER = [module for layer in LAYERS for module in layer]

ALLOWED_IN = {
    "datasets": {"data.partition"},
    "flwr_datasets": {"data.partition"},
    "dp_accounting": {"client.privacy_account"},
    "flwr": set(LAYERS[7]),
    "hydra": {"config", "sweeping.plan", "sweeping.multirun"},
    "jinja2": {"report.page"},
    "matplotlib": {
        f"report.{name}"
        for name in (
            *("drawing", "fitting", "curves", "diagram", "losses", "matrices", "traffic", "router"),
            *("sweep_dots", "sweep_curves"),
        )
    },
    "omegaconf": {"config"},
    "peft": {
        "model.lora",
        "results.standalone.modeling_pilot",
        "results.exporting",
        "results.merging",
        "results.model_card",
    },
    "wandb": {"report.live"},
    "ray": {"launching.cluster_survey"},
    "scipy": {"sweeping.statistics"},
    "sklearn": {"data.digits"},
}
MOST_LINES = 300


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
        for path in PACKAGE.rglob("*.py")
        if path.name != "__init__.py"
    }


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def test_every_module_has_a_layer():
    assert sorted(modules()) == sorted(ORDER)


def test_the_packages_docstring_is_the_map():
    blocks = (pilot_flwr.__doc__ or "").split("\n\n")
    layers = [re.findall(r"^    ([a-z_.]+) {2,}\S", block, re.MULTILINE) for block in blocks]
    assert [layer for layer in layers if layer] == LAYERS


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_to_the_right_only(module):
    allowed = set(ORDER[: ORDER.index(module)])
    used = {
        name.removeprefix("pilot_flwr.")
        for name in imports(modules()[module])
        if name.removeprefix("pilot_flwr.") in ORDER and name.startswith("pilot_flwr.")
    }
    assert used <= allowed


@pytest.mark.parametrize("library", ALLOWED_IN)
def test_each_library_stays_in_its_layer(library):
    users = {
        module
        for module, path in modules().items()
        if any(name.split(".")[0] == library for name in imports(path))
    }
    assert users <= ALLOWED_IN[library]


def test_files_stay_readable():
    files = [*modules().values(), *ROOT.glob("scripts/*.py")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {m: n for m, n in lengths.items() if n > MOST_LINES} == {}


def test_no_pickle_and_no_unsafe_load():
    for module, path in modules().items():
        assert not {"pickle", "dill", "cloudpickle"} & imports(path), module
        assert "torch.load" not in path.read_text(), module
