import gzip
import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest

from smelt.data import sources
from smelt.data.documents import Reading
from smelt.data.sources import identity, open_source, parse_hub_spec
from smelt.errors import DataError, MissingDependency, NotFound


def texts_of(spec, scratch):
    source = open_source(str(spec), scratch, lambda *_: None)
    return [piece.text for piece in source.read(Reading())]


def test_folders_are_read_in_the_order_of_their_paths(tmp_path):
    for name, text in {
        "b/z.txt": "3",
        "a.md": "1",
        "b/a.txt.gz": "2",
        ".hidden.txt": "x",
        ".git/a.txt": "x",
        "c.png": "x",
    }.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert texts_of(tmp_path / "in", tmp_path) == ["1", "2", "3"]
    source = open_source(str(tmp_path / "in"), tmp_path, lambda *_: None)
    reading = Reading()
    list(source.read(reading))
    assert reading.num_bytes == source.num_bytes


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(NotFound, match=r"nothing.txt does not exist; a source is a file, a folder"):
        open_source(str(tmp_path / "nothing.txt"), tmp_path, print)
    (tmp_path / "image.png").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no file that ends in .txt"):
        open_source(str(tmp_path), tmp_path, print)
    with pytest.raises(NotFound, match="there is builtin:pydoc"):
        open_source("builtin:bible", tmp_path, print)


def test_identity_changes_with_the_files(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = identity(str(path))
    assert identity(str(path)) == before
    path.write_text("three")
    assert identity(str(path)) != before
    assert identity("hf:a/b") == "hf:a/b"


# --- The web ---------------------------------------------------------------------------------------------

PAGES = {  # path: (status, headers, body)
    "/a.txt": (200, {}, b"hello"),
    "/a.jsonl.gz": (200, {}, gzip.compress(b'{"text": "packed"}')),
    "/query?file=a.csv": (200, {"Content-Type": "text/csv"}, b"text\nrow\n"),
    "/encoded.txt": (200, {"Content-Encoding": "gzip"}, gzip.compress(b"hello")),
    "/page": (200, {"Content-Type": "text/html; charset=utf-8"}, b"<html>"),
    "/missing.txt": (404, {}, b"not here"),
    "/short.txt": (200, {"Content-Length": "100"}, b"hello"),
    "/moved": (302, {"Location": "/a.txt"}, b""),
    "/file": (302, {"Location": "file:///etc/passwd"}, b""),
}


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        status, headers, body = PAGES[self.path]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        """Say nothing."""


@pytest.fixture(scope="module")
def server():
    with HTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{http_server.server_port}"
        http_server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/a.txt", "hello"),
        ("/a.jsonl.gz", "packed"),
        ("/query?file=a.csv", "row"),
        ("/encoded.txt", "hello"),
        ("/moved", "hello"),
    ],
)
def test_files_are_downloaded_and_read_by_name_or_type(server, path, text, tmp_path):
    assert texts_of(server + path, tmp_path) == [text]


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/page", "is a web page, not data"),
        ("/missing.txt", "missing.txt cannot be fetched: Not Found"),
        ("/short.txt", "broke off after 5 of 100 bytes|cannot be fetched"),
        ("/file", "cannot be fetched"),
    ],
)
def test_failed_downloads_are_named(server, path, message, tmp_path):
    with pytest.raises(DataError, match=message):
        texts_of(server + path, tmp_path)


def test_addresses_without_a_server_are_named(tmp_path):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        with pytest.raises(DataError, match=r"cannot be fetched: .*refused"):
            texts_of(f"http://127.0.0.1:{port}/a.txt", tmp_path)
    with pytest.raises(DataError, match="http:// is not an address|cannot be fetched"):
        texts_of("http://", tmp_path)


# --- The hub ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "parts"),
    [
        ("hf:org/name", ("org/name", None, "train")),
        ("hf:org/name:config", ("org/name", "config", "train")),
        ("hf:org/name:validation", ("org/name", None, "validation")),
        ("hf:org/name:config:test", ("org/name", "config", "test")),
        ("hf:org/name::other", ("org/name", None, "other")),
    ],
)
def test_hub_names_have_configs_and_splits(spec, parts):
    assert parse_hub_spec(spec) == parts


@pytest.mark.parametrize("spec", ["hf:", "hf:a:b:c:d"])
def test_other_hub_names_are_refused(spec):
    with pytest.raises(DataError, match="is not hf:ORG/NAME"):
        parse_hub_spec(spec)


def test_hub_rows_are_streamed(monkeypatch, tmp_path):
    calls = []

    def load_dataset(name, config, *, split, streaming):
        calls.append((name, config, split, streaming))
        return iter([{"text": "one"}, {"text": None}, {"text": "two"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    source = open_source("hf:org/name:sub:test", tmp_path, print)
    reading = Reading("skip")
    assert [piece.text for piece in source.read(reading)] == ["one", "two"]
    assert calls == [("org/name", "sub", "test", True)]
    assert reading.num_skipped == 1
    with pytest.raises(DataError, match="hf:org/name:sub:test, row 2: 'text' is not text"):
        list(source.read(Reading()))


def test_hub_failures_are_named(monkeypatch, tmp_path):
    def load_dataset(*arguments, **options):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError, match="hf:org/name cannot be read: offline mode is enabled .*HF_HOME"):
        texts_of("hf:org/name", tmp_path)


def test_without_the_library_the_remedy_is_said(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match=r"pip install 'smelt\[hub\]'"):
        open_source("hf:org/name", tmp_path, print)


def test_the_builtin_corpus_says_its_size(monkeypatch, tmp_path):
    monkeypatch.setitem(sources.BUILTINS, "pydoc", lambda: ["one", "twö"])
    source = open_source("builtin:pydoc", tmp_path, print)
    reading = Reading()
    assert [piece.text for piece in source.read(reading)] == ["one", "twö"]
    assert reading.num_bytes == source.num_bytes == 7
