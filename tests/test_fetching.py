"""Images by URL, from a server that does what servers on the internet do."""

import io
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from panorama_vlm import PanoramaImageProcessor, image_processing_panorama
from panorama_vlm.data import fetching
from panorama_vlm.data.collators import VisionCollator
from panorama_vlm.data.fetching import fetch
from panorama_vlm.data.rows import BadSample
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.sources import DataSource
from panorama_vlm.tests.tables import folder
from PIL import Image


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append((self.path, self.headers["Host"]))
        name, _, rest = self.path[1:].partition("/")
        if name == "redirect":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
            return
        self.send_response(404 if name == "gone" else 200)
        if name == "torn":
            self.send_header("Content-Length", str(len(self.server.picture) + 1))
        self.end_headers()
        if name == "endless":
            while not self.server.over:
                self.wfile.write(b"x" * 1000)
        elif name == "slow":
            while not self.server.over:
                self.wfile.write(b"x")
                self.wfile.flush()
                time.sleep(0.05)
        else:
            self.wfile.write(self.server.picture)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.daemon_threads = True
    picture = io.BytesIO()
    Image.new("RGB", (64, 32), "teal").save(picture, "JPEG")
    made.asked, made.over, made.picture = [], False, picture.getvalue()
    made.local = f"http://localhost:{made.server_port}"
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield made
    made.over = True
    made.shutdown()
    made.server_close()


def test_what_is_fetched_lies_in_the_cache_afterwards(server):
    assert fetch(f"{server.local}/a.jpg?size=2", ["localhost"]) == server.picture
    assert fetch(f"{server.local}/a.jpg?size=2", ["localhost"]) == server.picture
    assert server.asked == [("/a.jpg?size=2", f"localhost:{server.server_port}")]
    assert fetch(f"{server.local}/redirect//b.jpg", ["localhost"]) == server.picture


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("gone", "status 404"),
        ("endless", "more than 1 MiB"),
        ("slow", "took more than 0 s"),
        ("redirect/http://127.0.0.1:1/x", "127.0.0.1 has the address 127.0.0.1, which is not public"),
        ("redirect/file:///etc/hostname", "is no http or https URL"),
        ("redirect/ftp://localhost/x", "is no http or https URL"),
    ],
)
def test_what_cannot_be_had_is_a_bad_sample(server, monkeypatch, path, reason):
    monkeypatch.setattr(fetching, "LARGEST", 2**20)
    monkeypatch.setattr(fetching, "LONGEST_S", 0.3)
    begun = time.monotonic()
    with pytest.raises(BadSample, match=f"not fetched: .*{reason}"):
        fetch(f"{server.local}/{path}", ["localhost"])
    assert time.monotonic() - begun < 10


def test_redirects_without_end_are_given_up(server):
    server.asked.clear()
    url = f"{server.local}/redirect/" * 8
    with pytest.raises(BadSample, match="more than 5 redirects"):
        fetch(url, ["localhost"])
    assert len(server.asked) == 6


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "[::1]", "0.0.0.0", "2130706433", "127.1"])
def test_addresses_of_this_machine_are_not_asked(server, host):
    with pytest.raises(BadSample, match="not fetched"):
        fetch(f"http://{host}:{server.server_port}/a.jpg")
    assert server.asked == []


@pytest.mark.parametrize("second", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "fe80::1%eth0", "::ffff:127.0.0.1"])
def test_a_name_that_also_means_a_private_address_is_refused(server, monkeypatch, second):
    found = [(socket.AF_INET, 1, 6, "", (address, 80)) for address in ("93.184.216.34", second)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
    with pytest.raises(BadSample, match="which is not public"):
        fetch("http://panoramas.example/a.jpg")
    assert server.asked == []


def test_a_source_fetches_where_it_says_so(server, make, tmp_path):
    _, processor = make()
    rows = [{"file_name": f"{server.local}/{name}.jpg"} for name in ("a", "b")]
    path = folder(tmp_path / "rows", rows)
    for options, count in (({}, 0), ({"fetch": True}, 0), ({"fetch": True, "private_hosts": ["localhost"]}, 2)):
        samples, _ = open_data([DataSource(path, **options)], stage="vision", seed=0)
        skipped = []
        batch = VisionCollator(processor, 0)(list(samples), skipped)
        assert (0 if batch is None else len(batch["pixel_values"])) == count == 2 - len(skipped)
        words = "not public" if options else "fetch: true"
        assert all(words in record["reason"] for record in skipped)


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("gone", "404"),
        ("endless", "it has more than 1 MiB; fetch it, and give the file"),
        ("slow", "it took more than 0.3 s"),
        ("torn", "it ends 1 bytes early"),
        ("redirect/file:///etc/hostname", "Redirection to url 'file:"),
        ("redirect/ftp://localhost:1/x", "it leads to an ftp URL"),
    ],
)
def test_the_image_processor_bounds_what_a_url_gives(server, monkeypatch, path, reason):
    monkeypatch.setattr(image_processing_panorama, "LARGEST_DOWNLOAD", 2**20)
    monkeypatch.setattr(image_processing_panorama, "LONGEST_DOWNLOAD_S", 0.3)
    processor = PanoramaImageProcessor(image_size=16)
    assert processor.fetch_images([f"{server.local}/redirect//a.jpg"]) == [server.picture]
    begun = time.monotonic()
    with pytest.raises(ValueError, match=f"cannot read {server.local}/{path}: .*{reason}"):
        processor(f"{server.local}/{path}")
    assert time.monotonic() - begun < 10
