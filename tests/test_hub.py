"""Downloads by huggingface_hub itself, from a hub of our own on this machine."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import shardmerge

COMMIT = "a" * 40


class Hub(BaseHTTPRequestHandler):
    """The routes that a snapshot takes: what a revision holds, its tree, and each file with its ETag and commit."""

    folder: Path
    asked: list[str]

    def do_GET(self) -> None:
        if self.path.startswith("/api/models/org/name/tree"):
            rows = [{"type": "file", "path": path.name} for path in sorted(self.folder.iterdir())]
            rows = [row | {"size": (self.folder / row["path"]).stat().st_size, "oid": row["path"]} for row in rows]
            self.answer(json.dumps(rows).encode())
        elif self.path.startswith("/api/models/org/name"):
            names = [{"rfilename": path.name} for path in sorted(self.folder.iterdir())]
            body = {"_id": "1", "id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": names}
            self.answer(json.dumps(body | {"tags": [], "downloads": 0, "private": False}).encode())
        else:
            self.file()

    def do_HEAD(self) -> None:
        self.file()

    def file(self) -> None:
        path = self.folder / self.path.split("?")[0].rsplit("/", 1)[-1]
        if not path.is_file():
            self.send_error(404)
            return
        self.asked.append(path.name)
        self.answer(path.read_bytes())

    def answer(self, body: bytes) -> None:
        self.send_response(200)
        headers = {"ETag": f'"{hashlib.sha1(body).hexdigest()}"', "X-Repo-Commit": COMMIT}  # as git does
        for name, value in {**headers, "Content-Length": str(len(body)), "Content-Type": "application/json"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # the base's name
        """Stays quiet."""


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[tuple[Path, dict[str, str], list[str]]]:
    """A repository's folder, the environment that leads to it, and the files asked for."""
    folder = tmp_path / "repository"
    folder.mkdir()
    asked: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OurHub", (Hub,), {"folder": folder, "asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_address[1]}", "HF_HUB_CACHE": str(tmp_path / "hub")}
    yield folder, env | {"HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}, asked
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("left", [set(), {"model-00001-of-00002.safetensors"}])
def test_a_snapshot_without_its_weights_is_completed(
    left: set[str], hub: tuple[Path, dict[str, str], list[str]], tmp_path: Path
) -> None:
    """``AutoConfig.from_pretrained`` leaves a snapshot that holds config.json alone."""
    folder, env, asked = hub
    place = {f"w{number}": f"model-0000{number}-of-00002.safetensors" for number in (1, 2)}
    for name, shard in place.items():
        save_file({name: torch.ones(2)}, folder / shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": place}))
    (folder / "config.json").write_text('{"model_type": "x"}')
    (folder / "modeling_x.py").write_text("")
    (folder / "model.gguf").write_bytes(b"large")
    repo = tmp_path / "hub" / "models--org--name"
    snapshot = repo / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    for name in {"config.json", "model.safetensors.index.json", *left}:
        (snapshot / name).write_bytes((folder / name).read_bytes())
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    shardmerge("convert", "org/name", tmp_path / "out", code=1, env=env)
    assert asked == []
    shardmerge("convert", "org/name", tmp_path / "out", "--download", env=env)
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(place)
    assert (tmp_path / "out" / "modeling_x.py").is_file()
    assert "model.gguf" not in asked
    asked.clear()
    shardmerge("convert", "org/name", tmp_path / "out2", "--download", env=env)
    assert asked == []
