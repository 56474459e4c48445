"""Every way in gives the same pixels for the same file."""

import base64
import functools
import http.server
import io
import threading
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
import torch
from panorama_vlm import PanoramaImageProcessor
from panorama_vlm.tests.test_reading import crop_values, photo_sphere
from PIL import Image
from transformers import pipeline
from transformers.utils.chat_template_utils import Chat

FILES = ("grey16.png", "grey16.tif", "alpha.png", "palette.png", "partial.jpg", "turned.jpg", "cmyk.jpg", "float.tif")


def write(folder: Path, panorama: Image.Image) -> None:
    wide = np.array(panorama.convert("L")).astype(np.uint16) * 257
    wide[:, ::2] += 97  # what 8 bit cannot hold
    Image.fromarray(wide).save(folder / "grey16.png")
    Image.fromarray(wide).save(folder / "grey16.tif")
    see_through = panorama.convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize(panorama.size))
    see_through.save(folder / "alpha.png")
    panorama.quantize(32).save(folder / "palette.png")
    xmp = photo_sphere(**crop_values((1024, 512), panorama.size, 100, 200))
    panorama.save(folder / "partial.jpg", xmp=xmp)
    exif = Image.Exif()
    exif[0x0112] = 3
    panorama.save(folder / "turned.jpg", exif=exif)
    panorama.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(wide.astype(np.float32) / 65535).save(folder / "float.tif")


@pytest.fixture(scope="module")
def folder(panoramas, tmp_path_factory):
    made = tmp_path_factory.mktemp("ways")
    write(made, panoramas[0])
    return made


@pytest.fixture(scope="module")
def address(folder):
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def decoded(path):
    image = Image.open(path)
    image.load()
    return image


WAYS = {
    "bytes": lambda path, _: path.read_bytes(),
    "file object": lambda path, _: io.BytesIO(path.read_bytes()),
    "row of a column": lambda path, _: {"bytes": path.read_bytes(), "path": None},
    "data URL": lambda path, _: "data:image/any;base64," + base64.b64encode(path.read_bytes()).decode(),
    "data URL in percents": lambda path, _: "data:image/any," + urllib.parse.quote_from_bytes(path.read_bytes()),
    "base64": lambda path, _: base64.b64encode(path.read_bytes()).decode(),
    "URL": lambda path, address: f"{address}/{path.name}",
    "lazy PIL": lambda path, _: Image.open(path),
    "decoded PIL": lambda path, _: decoded(path),
    "array": lambda path, _: np.array(decoded(path)),
}
NO_ARRAY = ("palette.png", "partial.jpg", "turned.jpg", "cmyk.jpg")  # pixels alone do not say all that the file does


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", FILES)
def test_every_way_in_gives_the_same_pixels(folder, address, name, way):
    if way == "array" and name in NO_ARRAY:
        pytest.skip("the array of it is not all that the file says")
    processor = PanoramaImageProcessor(image_size=32)
    expected = processor(str(folder / name), return_tensors="pt")
    found = processor(WAYS[way](folder / name, address), return_tensors="pt")
    assert set(found) == set(expected)
    apart = (found["pixel_values"] - expected["pixel_values"]).abs()
    reduced = way == "decoded PIL" and name.endswith(".jpg")  # a JPEG is reduced by its decoder where that can be
    assert apart.mean() < 0.5 / 127.5 if reduced else apart.max() == 0


def test_sixteen_bit_in_a_data_url_is_not_white(folder):
    """The file of the report: `load_image` of transformers clips it to 255."""
    data = (Path(__file__).parent / "inputs" / "grey16.png").read_bytes()
    url = "data:image/png;base64," + base64.b64encode(data).decode()
    processor = PanoramaImageProcessor(image_size=16, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    shown = processor(url, return_tensors="pt")["pixel_values"]
    values = np.array(Image.open(io.BytesIO(data))) / 65535
    assert abs(float(shown[0, 0].mean()) - values.mean()) < 0.01 and values.mean() < 0.9


def test_a_pipeline_reads_what_is_in_a_chat_as_it_is(make, folder):
    """Outside of one it hands over 8-bit RGB that its own `load_image` made, as the docs say."""
    model, processor = make()
    answer = pipeline("image-text-to-text", model=model, processor=processor)
    path = str(folder / "grey16.png")
    expected = processor.image_processor(path, return_tensors="pt")["pixel_values"]
    content = [{"type": "image", "image": path}, {"type": "text", "text": "What?"}]
    found = answer.preprocess(Chat([{"role": "user", "content": content}]))["pixel_values"]
    assert torch.equal(found, expected)
    assert not torch.allclose(answer.preprocess({"images": [path], "text": ["<image>?"]})["pixel_values"], expected)


def test_what_a_url_does_not_give_is_named(address):
    with pytest.raises(ValueError, match=r"cannot read http://127.*/none\.png: .*404"):
        PanoramaImageProcessor(image_size=16)(f"{address}/none.png")
    with pytest.raises(FileNotFoundError):
        PanoramaImageProcessor(image_size=16)("a" * 80)
