import copy

import hypothesis
import pytest
import torch
from transformers.utils import logging as transformers_logging

from pilot_flwr.config.model import ModelConfig
from pilot_flwr.model.loading import load_base, load_processor
from pilot_flwr.model.pilot_model import PilotModel

transformers_logging.disable_progress_bar()
# An example's time depends on what else the machine does; pytest-timeout bounds the whole test.
hypothesis.settings.register_profile("no-deadline", deadline=None)
hypothesis.settings.load_profile("no-deadline")
torch.set_num_threads(1)  # the models are tiny: more threads only wait for each other


def pytest_addoption(parser):
    """Let the tests of the model families be counted."""
    parser.addoption("--families", metavar="FILE", help="write how each family's tests end")


def pytest_configure(config):
    """Count them if asked."""
    if path := config.getoption("--families"):
        from families.outcomes import Outcomes

        config.pluginmanager.register(Outcomes(path), "family-outcomes")


def pytest_collection_modifyitems(items):
    """Skip what is marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def processor():
    return load_processor("tiny-llava")


@pytest.fixture
def llava():
    """A fresh copy of the shipped base model, as transformers loads it."""
    return load_base(ModelConfig(), torch.device("cpu")).eval()


@pytest.fixture(scope="session")
def make_model():
    """Build a `PilotModel` on a base of its own; keyword arguments go to `ModelConfig`."""
    built: dict[str, PilotModel] = {}

    def make(task: str = "vqa", **config) -> PilotModel:
        settings = ModelConfig(**config)
        if settings.compile:  # not kept by a copy
            model = PilotModel(load_base(ModelConfig(), torch.device("cpu")), settings)
        else:
            if repr(settings) not in built:
                base = load_base(ModelConfig(), torch.device("cpu"))
                built[repr(settings)] = PilotModel(base, settings)
            model = copy.deepcopy(built[repr(settings)])
        model.enter_stage1(task)
        return model.eval()

    return make


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def padded(tmp_path_factory):
    """A finished run over files, in which what a command might forget makes a difference.

    Its images are oblong and padded, its seed is not the default, it draws some of the rows, and
    of those it left some out as broken.
    """
    from inprocess import finish
    from llava_files import write_oblong_federation

    folder = tmp_path_factory.mktemp("padded")
    return finish(folder / "run", write_oblong_federation(folder))


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of two tasks and four clients that went through both stages; only read from it."""
    from inprocess import TWO_TASKS, finish  # imports Flower, which takes seconds

    more = "data.train_examples=16 data.test_examples=6 evaluation.max_new_tokens=4"
    return finish(tmp_path_factory.mktemp("finished") / "run", f"{TWO_TASKS} {more}")
