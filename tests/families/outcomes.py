"""Count the tests of every family by what they check, for the table in docs/reference/models.md.

`pytest -m family --families FILE` writes, as JSON, check → family → tests that ran and that passed.
A test takes part with ``@pytest.mark.family(CHECK)`` and a parameter that is a family's name.
"""

import json
from collections import defaultdict
from pathlib import Path

from families import WRITERS


class Outcomes:
    """A plugin of pytest; with xdist, the controller writes the file."""

    def __init__(self, path):
        self.path = Path(path)
        self.tests = defaultdict(dict)

    def pytest_itemcollected(self, item):
        """Attach family and check to a test, for its reports."""
        if mark := item.get_closest_marker("family"):
            (family,) = {v for v in item.callspec.params.values() if v in set(WRITERS)}
            item.user_properties.append(("family", [family, *mark.args]))

    def pytest_runtest_logreport(self, report):
        """Note a failure in any phase, and a pass of the call."""
        for name, value in report.user_properties:
            if name == "family" and (report.failed or report.when == "call"):
                found = self.tests[tuple(value)]
                found[report.nodeid] = report.passed and found.get(report.nodeid, True)

    def pytest_sessionfinish(self, session):
        """Write the file."""
        if hasattr(session.config, "workerinput"):
            return
        counts = defaultdict(dict)
        for (family, check), tests in sorted(self.tests.items()):
            counts[check][family] = {"ran": len(tests), "passed": sum(tests.values())}
        self.path.write_text(json.dumps(counts, indent=2) + "\n")
