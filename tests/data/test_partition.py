"""Partitions are disjoint, complete, equal in every process, and as uneven as configured."""

import json
import socket
import subprocess
import sys
from itertools import combinations

import numpy as np
import pytest

from pilot_flwr.config.data import PartitionConfig
from pilot_flwr.data.client_files import column_codes, partition_rows, subsample
from pilot_flwr.data.json_rows import RowFile
from pilot_flwr.errors import ConfigError, DataError

KINDS = [
    PartitionConfig(),
    PartitionConfig("dirichlet", alpha=1.0, column="kind"),
    PartitionConfig("dirichlet", alpha=1.0),
]


@pytest.fixture
def files(tmp_path):
    """300 rows in two files, of three kinds in turn."""
    found = []
    for name, numbers in (("a", range(100)), ("b", range(100, 300))):
        lines = [json.dumps({"id": n, "kind": ["cat", "dog", 5][n % 3]}) for n in numbers]
        (tmp_path / name).write_text("\n".join(lines))
        found.append(RowFile(tmp_path / name))
    return found


@pytest.mark.parametrize("config", KINDS)
@pytest.mark.parametrize("clients", [1, 2, 7])
def test_shares_are_disjoint_and_complete(files, config, clients):
    shares = partition_rows(files, config, num_clients=clients, seed=[0])
    assert len(shares) == clients
    assert sorted(np.concatenate(shares)) == list(range(300))
    assert all(np.array_equal(share, np.sort(share)) for share in shares)
    assert all(not set(a) & set(b) for a, b in combinations(map(tuple, shares), 2))


@pytest.mark.parametrize("config", KINDS)
def test_the_seed_decides(files, config):
    one, again, other = (
        partition_rows(files, config, num_clients=3, seed=[5, s]) for s in (1, 1, 2)
    )
    assert all(map(np.array_equal, one, again))
    assert not all(map(np.array_equal, one, other))


def test_iid_shares_are_equal_and_the_first_clients_get_the_remainder(files):
    shares = partition_rows(files, PartitionConfig(), num_clients=7, seed=[0])
    assert [len(share) for share in shares] == [43] * 6 + [42]
    kinds = np.bincount(shares[0] % 3)
    assert kinds.min() > 5  # 14 expected of each: rows are shuffled before they are dealt


def test_a_small_alpha_divides_by_kind_and_a_large_one_evenly(files):
    """With alpha → ∞ every client has a third of each kind; with alpha → 0 it has few kinds."""

    def largest_kind(alpha):
        config = PartitionConfig("dirichlet", alpha=alpha, column="kind", min_examples=1)
        shares = partition_rows(files, config, num_clients=3, seed=[4])
        return [max(np.bincount(share % 3)) / len(share) for share in shares]

    assert max(largest_kind(1e6)) < 0.35
    assert np.mean(largest_kind(0.05)) > 0.6


def test_sizes_are_dirichlet_and_the_rows_in_them_are_not_chosen_by_kind(files):
    config = PartitionConfig("dirichlet", alpha=0.7, min_examples=5)
    sizes = [
        [len(s) for s in partition_rows(files, config, num_clients=3, seed=[n])] for n in range(40)
    ]
    shares = np.array(sizes) / 300
    assert min(map(min, sizes)) >= 5
    assert shares.mean(axis=0) == pytest.approx([1 / 3] * 3, abs=0.1)
    # Var of one share of Dirichlet(a, a, a) is (1/3)(2/3)/(3a + 1); cut off below by min_examples.
    assert 0.5 < shares.std() / np.sqrt(2 / 9 / (3 * 0.7 + 1)) < 1.2


def test_too_few_rows_name_the_setting(files):
    with pytest.raises(ConfigError, match="`data.clients_per_task` is 301 but .* 300 rows"):
        partition_rows(files, PartitionConfig(), num_clients=301, seed=[0])
    for column in ("", "kind"):
        config = PartitionConfig("dirichlet", alpha=0.01, column=column, min_examples=101)
        with pytest.raises(ConfigError, match="`data.partition.min_examples` is 101 but in 10"):
            partition_rows(files, config, num_clients=3, seed=[0])


def test_codes_tell_values_apart_as_python_does(tmp_path):
    values = ["a", 1, "1", True, "a", 1.5, 1]
    (tmp_path / "a").write_text("\n".join(json.dumps({"c": value}) for value in values))
    assert list(column_codes([RowFile(tmp_path / "a")], "c", allow_broken=False)) == [
        0,
        1,
        2,
        3,
        0,
        4,
        1,
    ]


@pytest.mark.parametrize("line", ["{}", '{"c": null}', '{"c": ["x"]}'])
def test_a_row_without_the_column_is_named(tmp_path, line):
    (tmp_path / "a").write_text('{"c": 1}\n' + line)
    config = PartitionConfig("dirichlet", column="c", min_examples=1)
    with pytest.raises(DataError, match="a, row 2 has no text or number in `c`"):
        partition_rows([RowFile(tmp_path / "a")], config, num_clients=2, seed=[0])


def test_a_broken_row_is_dealt_out_only_where_it_is_allowed(tmp_path):
    (tmp_path / "a").write_text('{"c": 1}\n{"c" 1}\n{"c": 1}\n{"c": 1}')
    config = PartitionConfig("dirichlet", column="c", alpha=1e6, min_examples=1)
    files = [RowFile(tmp_path / "a")]
    with pytest.raises(DataError, match="a, row 2 is broken"):
        partition_rows(files, config, num_clients=2, seed=[0])
    shares = partition_rows(files, config, num_clients=2, seed=[0], allow_broken=True)
    assert sorted(np.concatenate(shares)) == [0, 1, 2, 3]


def test_fewer_drawn_rows_are_among_more():
    rows = np.arange(10, 110)
    few, more = (subsample(rows, most, [3]) for most in (5, 50))
    assert len(few) == 5 and len(more) == 50 and set(few) <= set(more) <= set(rows)
    assert np.array_equal(few, np.sort(few))
    assert not np.array_equal(few, subsample(rows, 5, [4]))
    assert subsample(rows, 0, [3]) is rows and subsample(rows, 100, [3]) is rows


def test_dealing_is_quiet_and_uses_no_network(files, capfd, monkeypatch):
    def connect(*_):
        raise AssertionError("a network connection")

    monkeypatch.setattr(socket.socket, "connect", connect)
    for config in KINDS:
        partition_rows(files, config, num_clients=3, seed=[0])
    assert capfd.readouterr() == ("", "")


def test_another_process_deals_the_same(files):
    code = (
        "import sys; from pathlib import Path\n"
        "from pilot_flwr.data.client_files import partition_rows\n"
        "from pilot_flwr.data.json_rows import RowFile\n"
        "from pilot_flwr.config.data import PartitionConfig\n"
        "files = [RowFile(Path(name)) for name in sys.argv[1:]]\n"
        "config = PartitionConfig('dirichlet', alpha=1.0, column='kind')\n"
        "print([s.tolist() for s in partition_rows(files, config, num_clients=3, seed=[0])])"
    )
    command = [sys.executable, "-c", code, *(str(file.path) for file in files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    here = partition_rows(files, KINDS[1], num_clients=3, seed=[0])
    assert json.loads(done.stdout) == [share.tolist() for share in here]
