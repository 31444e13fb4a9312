"""A worker without torch; the request's ``overrides`` select its behaviour."""

import json
import os
import socket
import sys
import time
from pathlib import Path

from flwr.app import ConfigRecord, RecordDict

from pilot_flwr.errors import RunError
from pilot_flwr.run.provenance import code_hash
from pilot_flwr.site.transport import Memory, receive, send, send_message

control = socket.socket(fileno=int(sys.argv[1]))
send(control, {"code": os.environ.get("STUB_CODE", code_hash())})
while True:
    data, files, _, _ = socket.recv_fds(control, 1 << 16, 1)
    if not data:
        sys.exit()
    with socket.socket(fileno=files[0]) as connection:
        connection.settimeout(None)
        try:
            request, content = receive(connection)
        except RunError as error:
            send(connection, {"failed": str(error)})
            send(control, {"done": True, "warm": False})
            continue
        send(control, {"busy": f"{request['kind']}, exchange 3"})
        send(connection, {"log": 20, "text": "at work"})
        what = request["overrides"]
        if what == "die":
            os._exit(3)
        if what == "sleep":
            time.sleep(600)
        while what == "wait" and not Path(json.loads(data)["state-folder"], "end").exists():
            time.sleep(0.05)
        send(control, {"replying": True})
        if what == "fail":
            send(connection, {"error": 1001, "reason": "no"})
            send(control, {"done": True, "warm": True})
            continue
        echo = {name: list(record) for name, record in content.array_records.items()}
        with Memory() as memory:
            reply = RecordDict({"echo": ConfigRecord(echo | {"pid": os.getpid()})})
            send_message(connection, {}, reply, memory)
        if what == "slow":
            time.sleep(0.3)
        send(control, {"done": True, "warm": True})
