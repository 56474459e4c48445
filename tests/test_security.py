"""What a folder, a checkpoint or a URL of somebody else can and cannot do."""

import contextlib
import json
import os
import pickle
import shutil
import socketserver
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from panorama_vlm import PanoramaImageProcessor, PanoramaVLM, image_processing_panorama
from panorama_vlm.checkpoint_panorama import STATE, checksum
from panorama_vlm.tests.launching import run_here
from panorama_vlm.train.checkpoint import newest_checkpoint


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def test_weights_in_a_pickle_are_not_read(make, tmp_path):
    model, _ = make()
    model.save_pretrained(tmp_path / "model")
    weights = model.state_dict()
    (tmp_path / "model/model.safetensors").unlink()
    file = tmp_path / "model/pytorch_model.bin"
    torch.save(weights, file)
    with pytest.raises(OSError, match="model.safetensors"):
        PanoramaVLM.from_pretrained(tmp_path / "model")
    loaded = PanoramaVLM.from_pretrained(tmp_path / "model", use_safetensors=False)  # asked for: tensors alone
    assert torch.equal(loaded.lm_head.weight, model.lm_head.weight)
    torch.save({"lm_head.weight": Harm(tmp_path / "harmed")}, file)
    for options in ({}, {"use_safetensors": False}):
        with pytest.raises((OSError, pickle.UnpicklingError)):
            PanoramaVLM.from_pretrained(tmp_path / "model", **options)
    assert not (tmp_path / "harmed").exists()
    torch.load(file, weights_only=False)  # it would have
    assert (tmp_path / "harmed").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optimizer.bin", pytest.param("random_states_0.pkl", marks=pytest.mark.soak)])
def test_what_a_checkpoint_keeps_as_pickle_is_read_as_tensors_alone(tmp_path, name):
    run_here(tmp_path / "run", "--stage", "resampler", "--save_every", 3, "--eval_samples", 0)
    shutil.rmtree(tmp_path / "run/resampler")
    checkpoint = newest_checkpoint(tmp_path / "run/checkpoints")
    torch.save({"state": Harm(tmp_path / "harmed"), "param_groups": []}, checkpoint / name)
    state = json.loads((checkpoint / STATE).read_text())  # whoever forges the one forges the other
    state["files"][name], state["checksums"][name] = (checkpoint / name).stat().st_size, checksum(checkpoint / name)
    (checkpoint / STATE).write_text(json.dumps(state))
    refused = pytest.raises(pickle.UnpicklingError, match="Weights only load failed")
    with refused if name == "optimizer.bin" else contextlib.nullcontext():  # accelerate goes on without random states
        run_here(tmp_path / "run", "--stage", "resampler", "--save_every", 3, "--eval_samples", 0)
    assert not (tmp_path / "harmed").exists()


class Endless(BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/away":
            self.send_response(302)
            self.send_header("Location", "file:///etc/hostname")
            return self.end_headers()
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(bytes(2**16))
        except (BrokenPipeError, ConnectionResetError):
            return None

    def log_message(self, *_):
        pass


class Server(socketserver.ThreadingMixIn, HTTPServer):
    daemon_threads = True


@pytest.mark.parametrize(("path", "message"), [("", "it has more than 1 MiB"), ("away", "HTTPError")])
def test_a_url_that_never_ends_or_leads_to_a_file_here_is_refused(monkeypatch, path, message):
    monkeypatch.setattr(image_processing_panorama, "LARGEST_DOWNLOAD", 2**20)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with Server(("127.0.0.1", 0), Endless) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with pytest.raises(ValueError, match=message):
            PanoramaImageProcessor(image_size=32).fetch_images(f"http://127.0.0.1:{server.server_port}/{path}")
        server.shutdown()


def test_entities_of_photo_sphere_data_are_not_expanded(panoramas):
    from panorama_vlm.reading_panorama import read_panorama
    from panorama_vlm.tests.test_reading import encoded

    bomb = "".join(f'<!ENTITY a{n} "{f"&a{n - 1};" * 10}">' for n in range(1, 12))
    xmp = f'<?xpacket?><!DOCTYPE x [<!ENTITY a0 "a">{bomb}]><x:xmpmeta xmlns:x="adobe:ns:meta/">&a11;GPano</x:xmpmeta>'
    xmp = xmp.replace("GPano", 'GPano <y xmlns:GPano="http://ns.google.com/photos/1.0/panorama/"/>')
    with pytest.warns(UserWarning, match="a document type is not allowed"):
        read_panorama(encoded(panoramas[0], "JPEG", xmp=xmp.encode()), 64)
