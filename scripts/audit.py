"""Check every installed package for known vulnerabilities with pip-audit.

``python scripts/audit.py`` (``make security``) exits with 1 if it finds one. If the service cannot
be reached, it prints NOT AUDITED and exits with 0. A control query about a version known to be
vulnerable comes first: a service, or a proxy in its place, without an answer to it audits nothing.

The service is OSV, the source of PyPI's advisories.
"""

import argparse
import json
import subprocess
import sys
import urllib.request
from typing import Any

SERVICE = "https://api.osv.dev/v1/query"
CONTROL = {"package": {"name": "urllib3", "ecosystem": "PyPI"}, "version": "1.24.1"}
SECONDS = 20


class NothingAudited(Exception):
    """The service cannot be reached, or fails the control query."""


def main() -> int:
    """Audit; return 1 if a vulnerability was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--service", default=SERVICE, help="address of OSV's query API")
    service = parser.parse_args().service
    try:
        ask_control(service)
        packages = audit(service)
    except NothingAudited as error:
        print(f"NOT AUDITED for known vulnerabilities: {error}")
        return 0
    skipped = {p["name"]: p["skip_reason"] for p in packages if "skip_reason" in p}
    found = [(p, v) for p in packages for v in p.get("vulns", [])]
    for package, vulnerability in found:
        fixed = ", ".join(vulnerability["fix_versions"]) or "no version yet"
        name, version = package["name"], package["version"]
        print(f"{name} {version}: {vulnerability['id']}, fixed in {fixed}")
    for name, reason in skipped.items():
        print(f"not audited: {name}: {reason}")
    print(f"{len(packages) - len(skipped)} packages audited, known vulnerabilities: {len(found)}")
    return 1 if found else 0


def ask_control(service: str) -> None:
    """Query a version that is known to be vulnerable.

    Raises
    ------
    NothingAudited
        The service cannot be reached, or knows no vulnerability of it.
    SystemExit
        The service's address is not allowed.
    """
    if not service.startswith(("https://", "http://127.0.0.1:")):
        raise SystemExit(f"`--service` is {service!r} but must begin with https://.")
    request = urllib.request.Request(
        service, json.dumps(CONTROL).encode(), {"Content-Type": "application/json"}
    )
    try:
        # Only https, or this machine: checked above.
        with urllib.request.urlopen(request, timeout=SECONDS) as answer:  # nosec B310
            known = json.load(answer).get("vulns")
    except (OSError, ValueError, AttributeError) as error:
        raise NothingAudited(f"{service} cannot be reached ({error}).") from error
    if not known:
        raise NothingAudited(f"{service} knows nothing of a version known to be vulnerable.")


def audit(service: str) -> list[dict[str, Any]]:
    """Return pip-audit's row of every installed package.

    Raises
    ------
    NothingAudited
        The service could not be reached any more.
    SystemExit
        pip-audit failed otherwise.
    """
    command = [sys.executable, "-m", "pip_audit", "--local", "--skip-editable"]
    command += ["--progress-spinner", "off", "--format", "json"]
    command += ["--vulnerability-service", "osv", "--osv-url", service]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # nosec B603
    try:
        rows: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        if "requests.exceptions." in done.stderr:  # the network went away in between
            raise NothingAudited(done.stderr.strip().splitlines()[-1]) from None
        raise SystemExit(f"pip-audit failed ({done.returncode}):\n{done.stderr}") from None
    return rows


if __name__ == "__main__":
    sys.exit(main())
