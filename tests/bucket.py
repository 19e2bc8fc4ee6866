"""A bucket on this machine: as much of Google Cloud Storage's JSON API as gcsfs and tensorstore call, in memory.

https://cloud.google.com/storage/docs/json_api/v1. Both are told where it is by the variables of `environment`. A write
with ifGenerationMatch is refused as there; listings are sorted, and come in pages. What is not known gives 501.
"""

from __future__ import annotations

import base64
import email
import email.policy
import itertools
import json
import sys
import threading
import time
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

PAGE = 1000


class Bucket:
    """One bucket; its objects are name -> (generation, bytes). Use as a context manager."""

    def __init__(self, name: str = "bucket"):
        self.name, self.objects = name, {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.unknown: list[str] = []  # requests that were answered with 501
        self.lock = threading.RLock()
        self._generations = itertools.count(1)
        handler = type("Handler", (_Handler,), {"bucket": self})
        self._server = _Server(("localhost", 0), handler)

    def __enter__(self) -> Bucket:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def environment(self) -> dict[str, str]:
        url = f"http://localhost:{self._server.server_port}"
        return {"STORAGE_EMULATOR_HOST": url, "TENSORSTORE_GCS_HTTP_URL": url}

    def put(self, name: str, content: bytes, wanted: str | None = None) -> dict | None:
        """Metadata of the new object; None where another generation than ``wanted`` is there."""
        with self.lock:
            now = self.objects.get(name, (0, b""))[0]
            if wanted is not None and int(wanted) != now:
                return None
            self.objects[name] = (next(self._generations), content)
            return self.metadata(name)

    def metadata(self, name: str) -> dict:
        generation, content = self.objects[name]
        changed = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime(1.7e9 + generation))
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": self.name,
            "generation": str(generation),
            "metageneration": "1",
            "size": str(len(content)),
            "updated": changed,
            "timeCreated": changed,
            "contentType": "application/octet-stream",
            "etag": str(generation),
            "crc32c": base64.b64encode(zlib.crc32(content).to_bytes(4, "big")).decode(),
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        """A client that went away is no error of the server's."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    bucket: Bucket

    def log_message(self, *_) -> None:
        pass

    def _answer(self, status: int, body: bytes | dict = b"", **headers: str) -> None:
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        headers = {
            "Content-Type": "application/json" if isinstance(body, dict) else "application/octet-stream",
            **headers,
        }
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def _refuse(self, status: int, said: str) -> None:
        self._answer(status, {"error": {"code": status, "message": said}})

    def _any(self) -> None:
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b""
        url = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(url.query, keep_blank_values=True).items()}
        if url.path == "/batch/storage/v1":
            return self._batch(body)
        status, content, headers = self._one(self.command, url.path, query, self.headers, body)
        self._answer(status, content, **headers)

    do_GET = do_POST = do_PUT = do_DELETE = _any

    def _one(self, method, path, query, headers, body) -> tuple[int, bytes | dict, dict]:
        kind, _, rest = path.partition("storage/v1/b/")
        words = [unquote(word) for word in rest.split("/")]
        bucket = self.bucket
        if not rest or words[0] != bucket.name:
            return _error(404, f"no bucket {words[0]!r}")
        with bucket.lock:
            if "upload/" in kind:
                return self._upload(method, query, headers, body)
            match method, words[1:]:
                case "GET", []:
                    return 200, {"kind": "storage#bucket", "name": bucket.name}, {}
                case "GET", ["o"]:
                    return 200, _listing(bucket, query), {}
                case method, ["o", name, *_] if name not in bucket.objects:
                    return _error(404, f"no object {name!r}")
                case "GET", ["o", name]:
                    return self._read(name, query, headers)
                case "DELETE", ["o", name]:
                    if query.get("ifGenerationMatch", "") not in ("", str(bucket.objects[name][0])):
                        return _error(412, "another generation")
                    del bucket.objects[name]
                    return 204, b"", {}
                case "POST", ["o", name, "moveTo", "o", target]:
                    found = bucket.put(target, bucket.objects.pop(name)[1])
                    return 200, found, {}
                case "POST", ["o", name, "rewriteTo", "b", _, "o", target]:
                    return 200, {"done": True, "resource": bucket.put(target, bucket.objects[name][1])}, {}
        bucket.unknown.append(f"{method} {path}")
        return _error(501, f"{method} {path} is not known")

    def _read(self, name, query, headers):
        bucket = self.bucket
        if query.get("alt") != "media":
            return 200, bucket.metadata(name), {}
        generation, content = bucket.objects[name]
        if query.get("ifGenerationNotMatch") == str(generation):
            return 304, b"", {}
        said = {"x-goog-generation": str(generation), "ETag": str(generation)}
        unit, _, span = headers.get("Range", "").partition("=")
        if not unit:
            return 200, content, said
        first, _, last = span.partition("-")
        begin = int(first) if first else max(len(content) - int(last), 0)
        end = min(int(last) + 1, len(content)) if first and last else len(content)
        if begin >= len(content):
            return _error(416, "no such range")
        return 206, content[begin:end], {**said, "Content-Range": f"bytes {begin}-{end - 1}/{len(content)}"}

    def _upload(self, method, query, headers, body):
        bucket = self.bucket
        kind, name = query.get("uploadType"), query.get("name")
        if method == "PUT" or "upload_id" in query:
            name, so_far = bucket.uploads[query["upload_id"]]
            so_far += body
            if headers.get("Content-Range", "").endswith("/*"):
                return 308, b"", {"Range": f"bytes=0-{len(so_far) - 1}"}
            return 200, bucket.put(name, bytes(so_far)), {}
        if kind == "resumable":
            number = str(len(bucket.uploads))
            bucket.uploads[number] = (name or json.loads(body)["name"], bytearray())
            place = (
                f"{bucket.environment['STORAGE_EMULATOR_HOST']}/upload/storage/v1/b/{bucket.name}/o?upload_id={number}"
            )
            return 200, {}, {"Location": place}
        if kind == "multipart":
            head = f"Content-Type: {headers['Content-Type']}\r\n\r\n".encode()
            said, content = email.message_from_bytes(head + body, policy=email.policy.HTTP).iter_parts()
            name, body = json.loads(said.get_content())["name"], content.get_payload(decode=True)
        found = bucket.put(name, body, query.get("ifGenerationMatch"))
        return (200, found, {}) if found else _error(412, "another generation")

    def _batch(self, body) -> None:
        """Several requests in one, each a part of a multipart message."""
        head = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n".encode()
        answers = []
        for part in email.message_from_bytes(head + body, policy=email.policy.HTTP).iter_parts():
            method, target, *_ = part.get_payload(decode=True).decode().split()
            status, _, _ = self._one(method, urlsplit(target).path, {}, {}, b"")
            number = part["Content-ID"].strip("<>")
            answers.append(
                f"--answers\r\nContent-Type: application/http\r\nContent-ID: <response-{number}>\r\n\r\n"
                f"HTTP/1.1 {status} said\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        content = ("".join(answers) + "--answers--\r\n").encode()
        self._answer(200, content, Content_Type="multipart/mixed; boundary=answers")


def _error(status: int, said: str) -> tuple[int, dict, dict]:
    return status, {"error": {"code": status, "message": said}}, {}


def _listing(bucket: Bucket, query: dict[str, str]) -> dict:
    prefix, cut = query.get("prefix", ""), query.get("delimiter", "")
    begin, end = query.get("startOffset", ""), query.get("endOffset", "")
    items, prefixes = [], set()
    for name in sorted(bucket.objects):
        if not name.startswith(prefix) or name < begin or (end and name >= end):
            continue
        inside, found, _ = name[len(prefix) :].partition(cut) if cut else (name, "", "")
        if found:
            prefixes.add(prefix + inside + cut)
        else:
            items.append(bucket.metadata(name))
    after = int(query.get("pageToken", 0))
    size = min(int(query.get("maxResults", PAGE)), PAGE)
    more = {"nextPageToken": str(after + size)} if len(items) > after + size else {}
    return {"kind": "storage#objects", "items": items[after : after + size], "prefixes": sorted(prefixes), **more}
