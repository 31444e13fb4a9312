"""No private byte passes the wire: all traffic between sites and server is recorded.

The deployment is without TLS, so the proxies record what Flower sends: HTTP/1.1 with uncompressed
bodies, in which an array's bytes are contiguous. The search that finds no private byte in the
recording does find what is sent.
"""

import json
import socket
from pathlib import Path

import numpy as np
import pytest
from guide import wait_for, wait_until
from lab import SITES, SMALL, Lab
from PIL import Image
from recorder import Recorder, Windows
from safetensors.torch import load_file

from pilot_flwr.model.loading import load_processor
from pilot_flwr.run.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

SUPERLINK = """
mkdir -p "$FLWR_HOME"; cd "$SERVER"
printf '[superlink.pilot]\\naddress = "127.0.0.1:%s"\\ninsecure = true\\n' "$LINK_PORT" \\
    > "$FLWR_HOME/config.toml"
flower-superlink --insecure --host 127.0.0.1 --port "$LINK_PORT" \\
    --disable-runtime-dependency-installation
"""
SUPERNODE = """
mkdir -p "$SITE/state" "$FLWR_HOME"; cd "$SITE"
flower-supernode --insecure --superlink "127.0.0.1:$PORT" --port "$NODE_PORT" \\
    --node-config site.toml
"""


def mark_texts(folder: Path, client: str) -> list[str]:
    """Give every row texts and file names that occur nowhere else; return them."""
    marks = []
    for split in ("train", "test"):
        path = folder / f"{split}.json"
        text = path.read_text()
        rows = json.loads(text) if text[0] == "[" else [json.loads(x) for x in text.splitlines()]
        for number, row in enumerate(rows):
            mark = f"{client[0]}{split}{number}"
            for turn, entry in enumerate(row["conversations"]):
                entry["value"] += f" zq{mark}x{turn}"
                marks.append(f"zq{mark}x{turn}")
            if "image" in row:
                row["image"] = rename(folder / "images", row["image"], f"patient-{mark}", number)
                marks.append(f"patient-{mark}")
        path.write_text(json.dumps(rows))
    return marks


def rename(folder: Path, old: str, stem: str, number: int) -> str:
    """Give an image another name, every other one as JPEG; return it."""
    name = f"{stem}.{'jpg' if number % 2 else 'png'}"
    with Image.open(folder / old) as image:
        image.convert("RGB").save(folder / name)
    (folder / old).unlink()
    return name


def tensors(folder: Path, pattern: str) -> dict[str, bytes]:
    """Return the bytes of every tensor of the safetensors files below `folder`."""
    found = {}
    for file in sorted(folder.rglob(pattern)):
        for name, tensor in load_file(file).items():
            found[f"{file.name}: {name}"] = tensor.contiguous().numpy().tobytes()
    return found


def images(folder: Path) -> dict[str, bytes]:
    """Return every image as its file, its pixels, numbers from 0 to 1, and as the model sees it."""
    found = {}
    prepare = load_processor("tiny-llava").image_processor
    for file in sorted(folder.iterdir()):
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        values = np.asarray(prepare(Image.fromarray(pixels), return_tensors="np")["pixel_values"])
        found[f"{file.name}: prepared"] = values.astype(np.float32).tobytes()
        found[f"{file.name}: file"] = file.read_bytes()
        found[f"{file.name}: pixels"] = pixels.tobytes()
        found[f"{file.name}: numbers"] = (pixels.astype(np.float32) / 255).tobytes()
        found[f"{file.name}: channels first"] = pixels.transpose(2, 0, 1).tobytes()
    return found


def pieces_found(secrets: dict[str, bytes], recording: bytes) -> dict[str, int]:
    windows = {name: Windows(secret) for name, secret in secrets.items()}
    return {name: pieces.found_in(recording) for name, pieces in windows.items() if pieces}


@pytest.fixture(scope="module")
def wire(tmp_path_factory):
    """A run of two paper rounds, and for each site what passed its wire."""
    lab = Lab(tmp_path_factory.mktemp("wire"), gateway=False)
    recorders = {client: Recorder(lab.port) for client in SITES}
    marks, keys = {}, []
    try:
        log = lab.server.start("superlink", script=lab.server.own_script(SUPERLINK))
        wait_for(log, "Uvicorn running", lab.server)
        for client, task in SITES.items():
            marks[client] = mark_texts(lab.folder / "data" / task, client)
            lab.sites[client] = site = lab.site(client, task, port=recorders[client].port)
            site.run("key")
            site.run("node")
            keys.append(f"{client} {(site.folder / 'node-key.pub').read_text()}")
            log = site.start("supernode", script=site.own_script(SUPERNODE))
            wait_for(log, "SuperNode ID", site)
        (lab.server.folder / "client-keys").write_text("".join(keys))
        lab.server.run("federation")
        more = f"{SMALL} train.batch_size=2 model.feature_cache.where=disk"
        lab.server.run("run", timeout=1200, add=more)
        yield lab, recorders, marks
    finally:
        lab.__exit__()
        for recorder in recorders.values():
            recorder.__exit__()


def test_what_is_sent_is_found(wire):
    """The positive control: with the same search, in the bytes of the same run."""
    lab, recorders, _ = wire
    checkpoint = max((lab.server.folder / "runs" / "first" / "checkpoint").glob("round-*"))
    for client, task in SITES.items():
        adapter = tensors(checkpoint / "task_adapters", f"{task}.safetensors")
        up, down = recorders[client].bytes("up"), recorders[client].bytes("down")
        # With one client a task, the task's average is what that client has sent.
        assert adapter and all(n > 0 for n in pieces_found(adapter, up).values())
        assert all(n > 0 for n in pieces_found(adapter, down).values())
        owner = load_checkpoint(checkpoint).lora_of[client]  # clients may share a file
        lora = pieces_found(tensors(checkpoint / "lora", f"{owner}.safetensors"), down)
        assert len(lora) > 4 and all(n > 0 for n in lora.values())
        assert client.encode() in up and task.encode() in up


def test_nothing_private_passes_the_wire(wire):
    lab, recorders, marks = wire
    everything = {c: r.bytes("up") + r.bytes("down") for c, r in recorders.items()}
    recording = b"\0\0\0\0".join(everything.values())
    for client, task in SITES.items():
        site = lab.sites[client].folder
        private = tensors(site / "state", "private-*.safetensors")
        assert len(private) > 3 and len(list((site / "state").rglob("private-*"))) == 3
        features = tensors(site / "state", "features/*.safetensors")
        features |= tensors(site / "state", "*/features/**/*.safetensors")
        pictures = images(lab.folder / "data" / task / "images")
        assert features and len(pictures) == 5 * 16
        for secrets in (private, features, pictures):
            counts = pieces_found(secrets, recording)
            assert len(counts) > len(secrets) / 3, "too little of it can be looked for"
            assert not any(counts.values()), {n: k for n, k in counts.items() if k}
        assert len(marks[client]) > 40
        assert not [mark for mark in marks[client] if mark.encode() in recording]
        key = (site / "node-key").read_text().splitlines()[2:-2]  # all that is private of it
        assert len(key) > 2 and not [line for line in key if line.encode() in recording]
        for path in (site, lab.folder / "data"):
            assert str(path).encode() not in recording


def test_a_leak_would_be_found(wire):
    """Private bytes that do pass the wire, planted after the run, are found by the search."""
    lab, recorders, marks = wire
    client, task = next(iter(SITES.items()))
    private = tensors(lab.sites[client].folder / "state", "private-*.safetensors")
    pictures = images(lab.folder / "data" / task / "images")
    with socket.create_connection(("127.0.0.1", recorders[client].port)) as stream:
        body = b"".join(private.values()) + b"".join(pictures.values()) + marks[client][0].encode()
        head = f"POST /v1/fleet/leak HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        stream.sendall(head.encode() + body)
        stream.shutdown(socket.SHUT_WR)
        wait_until(lambda: body in recorders[client].bytes("up"), seconds=60)
    recording = recorders[client].bytes("up")
    for secrets in (private, pictures):
        counts = pieces_found(secrets, recording)
        assert counts and all(counts.values())
    assert marks[client][0].encode() in recording
