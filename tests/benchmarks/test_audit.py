"""scripts/audit.py with pip-audit itself, and a service of our own in place of OSV."""

import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "audit.py"


def vulnerability(package):
    fixed = {"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.1"}]}
    affected = {"package": {"name": package, "ecosystem": "PyPI"}, "ranges": [fixed]}
    return {
        "id": "GHSA-of-a-test",
        "aliases": [],
        "affected": [affected],
        "summary": "",
        "details": "",
    }


@pytest.fixture
def service():
    """Serve OSV's answers; `vulnerable` has (package, version or None for all)."""

    class Answers(BaseHTTPRequestHandler):
        def do_POST(self):
            query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            name, version = query["package"]["name"], query["version"]
            hit = {(name, version), (name, None)} & self.server.vulnerable
            body = json.dumps({"vulns": [vulnerability(name)]} if hit else {}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.vulnerable = {("urllib3", "1.24.1")}
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def audit(server):
    port = server if isinstance(server, int) else server.server_port
    address = f"http://127.0.0.1:{port}/v1/query"
    command = [sys.executable, str(SCRIPT), "--service", address]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_no_known_vulnerability(service):
    done = audit(service)
    assert (done.returncode, done.stderr) == (0, "")
    assert "known vulnerabilities: 0" in done.stdout


def test_a_known_vulnerability_fails_the_check(service):
    service.vulnerable.add(("numpy", None))
    done = audit(service)
    assert done.returncode == 1
    assert "GHSA-of-a-test, fixed in 99.1" in done.stdout and "numpy" in done.stdout


def test_a_service_out_of_reach_is_said_and_fails_nothing():
    done = audit(9)  # nobody listens there
    assert done.returncode == 0 and done.stdout.startswith("NOT AUDITED")


def test_a_service_that_knows_nothing_has_audited_nothing(service):
    service.vulnerable.clear()
    done = audit(service)
    assert done.returncode == 0 and "knows nothing of a version known to be" in done.stdout


def test_another_address_is_refused():
    command = [sys.executable, str(SCRIPT), "--service", "file:///etc/passwd"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "must begin with https" in done.stderr
