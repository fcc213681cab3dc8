"""Downloads and archives: what arrives is the published file or nothing, against servers on loopback that misbehave"""
import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sadalib.data import download
from sadalib.data.download import expand, extract, fetch, recognise
from sadalib.runs import SadalibError

GOOD = gzip.compress(os.urandom(200_000), mtime=0)
SHA = hashlib.sha256(GOOD).hexdigest()
MD5 = hashlib.md5(GOOD).hexdigest()
PAGE = b"\n<!DOCTYPE html><html><body>Quota exceeded, sign in.</body></html>"


class Site:
    "A server on 127.0.0.1 that answers each path as it is told"

    def __init__(self, context=None):
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                site.asked.append((self.path, self.headers.get("Range")))
                with contextlib.suppress(ConnectionError, ssl.SSLError): site.answer(self)

            def log_message(self, *args): pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if context: self.server.socket = context.wrap_socket(self.server.socket, server_side=True)
        self.url = f"{'https' if context else 'http'}://127.0.0.1:{self.server.server_port}"
        self.asked, self.routes = [], {}
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler):
        told = self.routes.get(handler.path, {"status": 404})
        if "pace" in told: return self.drip(handler, told)
        body, start = told.get("body", b""), 0
        asked = handler.headers.get("Range")
        if told.get("ranges") and asked: start = int(asked.removeprefix("bytes=").rstrip("-"))
        handler.send_response(206 if start else told.get("status", 200))
        if start: handler.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if "location" in told: handler.send_header("Location", told["location"])
        if "type" in told: handler.send_header("Content-Type", told["type"])
        if told.get("length", True) is not None:
            handler.send_header("Content-Length", str(told.get("length", len(body)) - start))
        handler.end_headers()
        handler.wfile.write(body[start:start + told.get("cut", len(body))])
        handler.close_connection = True

    def drip(self, handler, told):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(told["body"])))
        handler.end_headers()
        for at in range(0, len(told["body"]), 65536):
            handler.wfile.write(told["body"][at:at + 65536])
            time.sleep(told["pace"])

    def close(self): self.server.shutdown(); self.server.server_close()


def certificate(folder):
    "Server and client contexts for a certificate made here; skips where there is no openssl"
    if not shutil.which("openssl"): pytest.skip("openssl is not on the PATH: the https tests need it for a certificate")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=127.0.0.1",
                    "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)],
                   check=True, capture_output=True)
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    return server, ssl.create_default_context(cafile=str(cert))


@pytest.fixture(autouse=True)
def direct(monkeypatch): monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture(scope="module")
def plain():
    site = Site()
    yield site
    site.close()


@pytest.fixture(scope="module")
def secure(tmp_path_factory):
    server, client = certificate(tmp_path_factory.mktemp("tls"))
    site = Site(server)
    site.client = client
    yield site
    site.close()


def refused(call, *says, folder, left=()):
    "Assert that `call` raises one line that says all of `says`, and that `folder` holds only `left`"
    with pytest.raises(SadalibError) as caught: call()
    message = str(caught.value)
    assert "\n" not in message and message.endswith("."), message
    for word in says: assert word in message, message
    assert sorted(p.name for p in folder.rglob("*") if p.is_file()) == sorted(left)


# --- what comes is what was published ---------------------------------------------------------------------------------

def test_https_fetch_is_whole_and_leaves_only_the_file(secure, tmp_path):
    secure.routes = {"/a.gz": {"body": GOOD}}
    got = fetch(f"{secure.url}/a.gz", tmp_path / "set" / "a.gz", sha256=SHA, size=len(GOOD), sniff="gzip",
                context=secure.client)
    assert got.read_bytes() == GOOD and [p.name for p in got.parent.iterdir()] == ["a.gz"]


def test_a_file_that_is_there_is_verified_and_not_asked_for_again(plain, tmp_path):
    plain.routes, plain.asked[:] = {}, []
    (tmp_path / "a.gz").write_bytes(GOOD)
    fetch(f"{plain.url}/a.gz", tmp_path / "a.gz", sha256=SHA)
    assert not plain.asked
    refused(lambda: fetch(f"{plain.url}/a.gz", tmp_path / "a.gz", sha256="0" * 64), "a.gz", "move it away",
            folder=tmp_path, left=["a.gz"])


@pytest.mark.parametrize("told, known, says", [
    ({"body": PAGE}, {}, "a web page came"),
    ({"body": PAGE + b" " * 300_000, "type": "text/html"}, {"size": None}, "a web page came"),
    ({"body": b"{'error': 1}" + b" " * 999, "type": "text/html; charset=utf-8"}, {"size": None}, "a web page came"),
    ({"body": b"\x1f\x8c" + GOOD[2:]}, {}, "begins like nothing known, not like gzip"),
    ({"body": GOOD[:1000], "length": len(GOOD)}, {}, "the connection ended after 1000 of"),
    ({"body": GOOD[:1000], "length": None}, {}, "the connection ended after 1000 of"),
    ({"body": GOOD[:1000]}, {}, "the server offers 1000 bytes"),
    ({"body": GOOD + b"more"}, {}, f"the server offers {len(GOOD) + 4} bytes"),
    ({"body": GOOD + b"more" * 99_999, "length": None}, {}, "the server sends more than"),
    ({"body": GOOD[:-1] + b"x"}, {}, "has sha256"),
    ({"body": GOOD, "status": 404}, {}, "the server answers 404"),
    ({"body": GOOD, "status": 503}, {}, "the server answers 503"),
    ({"status": 302}, {}, "it redirects to itself"),
    ({"status": 302, "location": "ftp://127.0.0.1/a.gz"}, {}, "only https addresses"),
    ({"status": 302, "location": "file:///etc/passwd"}, {}, "only https addresses"),
], ids=lambda value: value if isinstance(value, str) else None)
def test_what_is_not_the_published_file_is_refused(plain, tmp_path, told, known, says):
    plain.routes = {"/a.gz": told}
    known = {"sha256": SHA, "size": len(GOOD), "sniff": "gzip"} | known
    refused(lambda: fetch(f"{plain.url}/a.gz", tmp_path / "a.gz", **known), "a.gz", says, "by hand", plain.url,
            folder=tmp_path)


def test_a_wrong_md5_is_refused_and_sha256_decides_where_both_are_known(secure, tmp_path):
    secure.routes = {"/a.gz": {"body": GOOD}}
    ask = lambda **known: fetch(f"{secure.url}/a.gz", tmp_path / "a.gz", context=secure.client, **known)  # noqa: E731
    refused(lambda: ask(md5="0" * 32), "has md5", folder=tmp_path)
    refused(lambda: ask(md5=MD5, sha256="0" * 64), "has sha256", folder=tmp_path)
    assert ask(md5="0" * 32, sha256=SHA).read_bytes() == GOOD


def test_plain_http_needs_a_sha256(plain, tmp_path):
    plain.routes, plain.asked[:] = {"/a.gz": {"body": GOOD}}, []
    refused(lambda: fetch(f"{plain.url}/a.gz", tmp_path / "a.gz", md5=MD5), "plain http", folder=tmp_path)
    refused(lambda: fetch("ftp://127.0.0.1/a.gz", tmp_path / "a.gz", sha256=SHA), "only https", folder=tmp_path)
    assert not plain.asked


def test_redirects_stay_on_https_and_are_counted(plain, secure, tmp_path):
    plain.routes, plain.asked[:] = {"/a.gz": {"body": GOOD}}, []
    secure.routes = {"/down": {"status": 302, "location": f"{plain.url}/a.gz"},
                     "/loop": {"status": 301, "location": "/pool"}, "/pool": {"status": 307, "location": "/loop"},
                     "/on": {"status": 308, "location": "/a.gz"}, "/a.gz": {"body": GOOD}}
    ask = lambda path: fetch(f"{secure.url}/{path}", tmp_path / path, sha256=SHA, context=secure.client)  # noqa: E731
    refused(lambda: ask("down"), "down", "from https to an address that is not https", folder=tmp_path)
    refused(lambda: ask("loop"), "loop", "redirects more than five times", folder=tmp_path)
    assert not plain.asked and ask("on").read_bytes() == GOOD


def test_a_certificate_nobody_vouches_for_is_refused(secure, tmp_path):
    secure.routes = {"/a.gz": {"body": GOOD}}
    refused(lambda: fetch(f"{secure.url}/a.gz", tmp_path / "a.gz", sha256=SHA), "certificate", folder=tmp_path)


def test_mirrors_are_tried_in_turn_and_all_reasons_told(plain, tmp_path):
    plain.routes = {"/1": {"body": PAGE}, "/3": {"body": GOOD}}
    mirrors = (f"{plain.url}/2", f"{plain.url}/3")
    refused(lambda: fetch(f"{plain.url}/1", tmp_path / "a.gz", sha256=SHA, mirrors=mirrors[:1]), "a web page came",
            "answers 404", folder=tmp_path)
    assert fetch(f"{plain.url}/1", tmp_path / "a.gz", sha256=SHA, mirrors=mirrors).read_bytes() == GOOD


def test_an_unreachable_host_answers_within_seconds(tmp_path):
    began = time.monotonic()
    refused(lambda: fetch("https://127.0.0.1:9/a.gz", tmp_path / "a.gz", sha256=SHA), "no connection", folder=tmp_path)
    refused(lambda: fetch("https://no-such-host.invalid/a.gz", tmp_path / "a.gz"), "no connection", folder=tmp_path)
    assert time.monotonic() - began < 8


def test_a_silent_server_is_given_up(plain, tmp_path):
    plain.routes = {"/a.gz": {"body": GOOD, "pace": 3}}
    began = time.monotonic()
    refused(lambda: fetch(f"{plain.url}/a.gz", tmp_path / "a.gz", sha256=SHA, timeout=.3), "connection",
            folder=tmp_path)
    assert time.monotonic() - began < 3


# --- the digest of the first download ---------------------------------------------------------------------------------

def test_the_first_sha256_is_recorded_and_enforced(secure, tmp_path):
    record, other = tmp_path / "digests.json", gzip.compress(b"other pixels")
    ask = lambda: fetch(f"{secure.url}/a.gz", tmp_path / "a.gz", record=record, context=secure.client)  # noqa: E731
    secure.routes = {"/a.gz": {"body": GOOD}}
    ask().unlink()
    assert json.loads(record.read_text()) == {"a.gz": SHA}
    secure.routes = {"/a.gz": {"body": other}}
    refused(ask, "has sha256", "seen at the first download", folder=tmp_path, left=["digests.json"])
    secure.routes = {"/a.gz": {"body": GOOD}}
    assert ask().read_bytes() == GOOD
    record.write_text("{torn")
    refused(ask, "digests.json is damaged", "delete it", folder=tmp_path, left=["a.gz", "digests.json"])


# --- interruptions ----------------------------------------------------------------------------------------------------

def test_a_dropped_connection_is_continued(plain, tmp_path):
    plain.routes, plain.asked[:] = {"/a.gz": {"body": GOOD, "ranges": True, "cut": 90_000}}, []
    assert fetch(f"{plain.url}/a.gz", tmp_path / "a.gz", sha256=SHA, size=len(GOOD)).read_bytes() == GOOD
    assert [r for _, r in plain.asked] == [None, "bytes=90000-", "bytes=180000-"]


@pytest.mark.parametrize("leftover", [GOOD[:70_000], b"x" * 70_000, GOOD + b"too long", b""])
def test_the_leftover_of_a_killed_process_is_continued_or_replaced(plain, tmp_path, leftover):
    plain.routes = {"/a.gz": {"body": GOOD, "ranges": True}}
    (tmp_path / ".a.gz.part").write_bytes(leftover)
    assert fetch(f"{plain.url}/a.gz", tmp_path / "a.gz", sha256=SHA, size=len(GOOD)).read_bytes() == GOOD
    assert [p.name for p in tmp_path.iterdir()] == ["a.gz"]


def test_killed_while_downloading_then_again(plain, tmp_path):
    plain.routes = {"/a.gz": {"body": GOOD, "pace": .3}}
    code = ("import sys; from sadalib.data.download import fetch; "
            f"fetch(sys.argv[1], sys.argv[2], sha256='{SHA}', size={len(GOOD)})")
    child = subprocess.Popen([sys.executable, "-c", code, f"{plain.url}/a.gz", str(tmp_path / "a.gz")])
    deadline = time.monotonic() + 60
    while not (part := tmp_path / ".a.gz.part").exists() or not part.stat().st_size:
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(.02)
    refused(lambda: fetch(f"{plain.url}/a.gz", tmp_path / "a.gz", sha256=SHA), "another process", folder=tmp_path,
            left=[".a.gz.part"])
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert sorted(p.name for p in tmp_path.iterdir()) == [".a.gz.part"]
    plain.routes = {"/a.gz": {"body": GOOD}}
    fetch(f"{plain.url}/a.gz", tmp_path / "a.gz", sha256=SHA, size=len(GOOD))
    assert [p.name for p in tmp_path.iterdir()] == ["a.gz"]


def test_an_interrupt_leaves_nothing(plain, tmp_path, monkeypatch):
    plain.routes = {"/a.gz": {"body": GOOD}}
    def interrupt(*args): raise KeyboardInterrupt
    monkeypatch.setattr(download.Progress, "update", interrupt)
    with pytest.raises(KeyboardInterrupt): fetch(f"{plain.url}/a.gz", tmp_path / "a.gz", sha256=SHA)
    assert not list(tmp_path.iterdir())


# --- the disk ---------------------------------------------------------------------------------------------------------

def test_a_full_disk_is_one_sentence(plain, tmp_path, monkeypatch):
    plain.routes, plain.asked[:] = {"/a.gz": {"body": GOOD}}, []
    ask = lambda **known: fetch(f"{plain.url}/a.gz", tmp_path / "a.gz", sha256=SHA, **known)  # noqa: E731
    refused(lambda: ask(size=10**18), str(tmp_path), "MB are needed", "free some space", folder=tmp_path)
    assert not plain.asked
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(download, "_save", full)
    refused(ask, str(tmp_path), "full", folder=tmp_path)


def test_a_folder_that_cannot_be_made_is_one_sentence(plain, tmp_path):
    (tmp_path / "file").write_text("in the way")
    refused(lambda: fetch(f"{plain.url}/a.gz", tmp_path / "file" / "a.gz", sha256=SHA), "a.gz", folder=tmp_path,
            left=["file"])


# --- what content looks like ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_tar_is_recognised(tmp_path, form):
    with tarfile.open(tmp_path / "a", "w", format=form) as tar: tar.add(__file__, "x" * 99)
    assert recognise((tmp_path / "a").read_bytes()[:1024]) == "tar"


@pytest.mark.parametrize("head", [b"", b"\0" * 1024, b"label 1:2", b"<notahtml", b"\x1f"])
def test_nothing_else_is_recognised(head): assert recognise(head) == "unknown"


# --- archives ---------------------------------------------------------------------------------------------------------

def tar_with(path, *members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, kind, target in (("fine.txt", tarfile.REGTYPE, ""), *members):
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(b"data") if info.size else None)
    return path


EVIL = {"up": ("../up.txt", tarfile.REGTYPE, ""), "deep": ("a/../../up.txt", tarfile.REGTYPE, ""),
        "absolute": ("/tmp/up.txt", tarfile.REGTYPE, ""), "drive": ("C:/up.txt", tarfile.REGTYPE, ""),
        "backslash": ("..\\up.txt", tarfile.REGTYPE, ""), "symlink": ("link", tarfile.SYMTYPE, "/etc/passwd"),
        "inner symlink": ("link", tarfile.SYMTYPE, "fine.txt"), "hardlink": ("link", tarfile.LNKTYPE, "fine.txt"),
        "device": ("null", tarfile.CHRTYPE, ""), "fifo": ("pipe", tarfile.FIFOTYPE, ""),
        "twice": ("./fine.txt", tarfile.REGTYPE, "")}


@pytest.mark.parametrize("mode", ["w", "w:gz"])
@pytest.mark.parametrize("case", EVIL)
def test_a_tar_that_reaches_outside_or_links_is_refused(tmp_path, case, mode):
    archive = tar_with(tmp_path / "a.tar", EVIL[case], mode=mode)
    refused(lambda: extract(archive, tmp_path / "in" / "out"), "a.tar", "its member", "fetch it again", folder=tmp_path,
            left=["a.tar"])
    assert not list((tmp_path / "in").iterdir())


@pytest.mark.parametrize("name", ["../up.txt", "/tmp/up.txt", "a/../../up.txt", "C:/up.txt"])
def test_a_zip_that_reaches_outside_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed:
        packed.writestr("fine.txt", "data")
        packed.writestr(name, "data")
    refused(lambda: extract(tmp_path / "a.zip", tmp_path / "out"), "a.zip", "its member", folder=tmp_path,
            left=["a.zip"])


def test_a_zip_with_a_link_is_refused(tmp_path):
    info = zipfile.ZipInfo("link")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as packed: packed.writestr(info, "/etc/passwd")
    refused(lambda: extract(tmp_path / "a.zip", tmp_path / "out"), "link or a device", folder=tmp_path, left=["a.zip"])


def test_archives_that_unpack_to_too_much_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as packed: packed.writestr("zero", bytes(10**6))
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        info = tarfile.TarInfo("zero")
        info.size = 10**6
        tar.addfile(info, io.BytesIO(bytes(10**6)))
    (tmp_path / "zero.gz").write_bytes(gzip.compress(bytes(10**6)))
    left = ["a.zip", "a.tar.gz", "zero.gz"]
    for name in left[:2]:
        refused(lambda name=name: extract(tmp_path / name, tmp_path / "out", limit=10**5), name, "more than was",
                folder=tmp_path, left=left)
    refused(lambda: expand(tmp_path / "zero.gz", 10**5), "zero.gz", "more than was", folder=tmp_path, left=left)


@pytest.mark.parametrize("content", [b"no archive at all", b"", GOOD, b"PK\x03\x04" + b"x" * 600, PAGE])
def test_a_damaged_archive_is_refused(tmp_path, content):
    (tmp_path / "a.tar").write_bytes(content)
    refused(lambda: extract(tmp_path / "a.tar", tmp_path / "out"), "a.tar was not unpacked", folder=tmp_path,
            left=["a.tar"])


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_a_truncated_tar_is_refused_and_a_whole_one_unpacks(tmp_path, mode):
    with tarfile.open(tmp_path / "a.tar", mode) as tar:
        info = tarfile.TarInfo("inner/data")
        info.size = 50_000
        tar.addfile(info, io.BytesIO(body := os.urandom(50_000)))
    whole = (tmp_path / "a.tar").read_bytes()
    assert (extract(tmp_path / "a.tar", tmp_path / "out") / "inner" / "data").read_bytes() == body
    refused(lambda: extract(tmp_path / "a.tar", tmp_path / "out"), "exists", folder=tmp_path, left=["a.tar", "data"])
    shutil.rmtree(tmp_path / "out")
    (tmp_path / "a.tar").write_bytes(whole[:30_000])
    refused(lambda: extract(tmp_path / "a.tar", tmp_path / "out"), "a.tar", "damaged", folder=tmp_path, left=["a.tar"])


def test_a_failing_extraction_replaces_a_stale_workplace(tmp_path):
    (tmp_path / ".out.unpacking" / "old").mkdir(parents=True)
    assert [p.name for p in extract(tar_with(tmp_path / "a.tar"), tmp_path / "out").iterdir()] == ["fine.txt"]
    assert not (tmp_path / ".out.unpacking").exists()
