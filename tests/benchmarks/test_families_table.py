"""The table of the families has every family that is tested, and all of it passes."""

import json
from pathlib import Path

from families import WRITERS

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]
CHECKS = {"logits", "generate", "labels", "training", "federation", "export", "plan"}


def test_every_family_is_in_the_table_and_passes():
    record = json.loads((ROOT / "benchmarks" / "results" / "families.json").read_text())
    tests = record["results"]["tests"]
    assert set(tests) == CHECKS
    for check, families in tests.items():
        assert set(families) == set(WRITERS), check
        assert all(0 < one["ran"] == one["passed"] for one in families.values()), (check, families)


def test_tests_are_counted_by_family_and_check(pytester):
    """A failure and an error are no pass; a test without the marker is not counted."""
    pytester.makeconftest(
        """
        from families.outcomes import Outcomes

        def pytest_configure(config):
            config.addinivalue_line("markers", "family(check): x")
            config.pluginmanager.register(Outcomes("out.json"))
        """
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.fixture
        def broken():
            raise ValueError

        @pytest.mark.family("labels")
        @pytest.mark.parametrize("name", ["smolvlm", "gemma3"])
        def test_one(name):
            assert name == "gemma3"

        @pytest.mark.family("labels")
        @pytest.mark.parametrize("name", ["gemma3"])
        def test_two(name, broken):
            pass

        @pytest.mark.parametrize("name", ["gemma3"])
        def test_three(name):
            pass
        """
    )
    pytester.runpytest_inprocess("-p", "no:cacheprovider")
    found = json.loads((pytester.path / "out.json").read_text())
    assert found == {
        "labels": {"smolvlm": {"ran": 1, "passed": 0}, "gemma3": {"ran": 2, "passed": 1}}
    }
