import pytest
from torch import nn

from pilot_flwr.algorithm.connector import is_reserved
from pilot_flwr.config.data import DataConfig
from pilot_flwr.data.federation import federation_clients
from pilot_flwr.errors import ConfigError


@pytest.mark.parametrize("task", ["keys", "training", "forward", "type", "pop", "dump_patches"])
def test_a_task_that_no_module_can_have_is_refused_with_its_field(task):
    with pytest.raises(KeyError):  # torch itself
        nn.ModuleDict({task: nn.Identity()})
    assert is_reserved(task)
    with pytest.raises(ConfigError, match=f"`data.tasks` names '{task}' but must not"):
        federation_clients(DataConfig(tasks=["vqa", task]))


def test_other_names_are_free():
    for task in ("vqa", "counting", "ocr-vqa", "Keys", "task_adapter"):
        nn.ModuleDict({task: nn.Identity()})
        assert not is_reserved(task)
