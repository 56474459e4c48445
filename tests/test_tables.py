"""What tables and folders of panoramas hold in earnest: names, quotes, lists, and files that are none."""

import json
from pathlib import Path

import pytest
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.sources import DataSource
from panorama_vlm.evaluation.formats import read_items
from PIL import Image


def pictures(folder, *names):
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 8), (number, 0, 0)).save(folder / name, format="JPEG")


def rows(path, *lines):
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x, ensure_ascii=False) for x in lines) + "\n")
    return str(path)


def shown(sample):
    """The image of a sample, or what is wrong with it."""
    return sample.get("error") or sample["messages"][0]["content"][0]["image"]


@pytest.mark.parametrize(
    ("url", "name"),
    [
        ("https://x.org/my%20park.jpg", "my park.jpg"),
        ("https://x.org/my%20park.jpg", "my%20park.jpg"),  # as it stands there
        ("https://x.org/a/%231.jpg?s=%2F", "#1.jpg"),
        ("https://x.org/a%3Fb.jpg#top", "a?b.jpg"),
        ("https://x.org/100%25.jpg", "100%.jpg"),
        ("https://x.org/caf%C3%A9.jpg", "café.jpg"),
        ("https://x.org/park.jpg?size=2", "park.jpg?size=2"),  # as wget saves it
        ("https://x.org/room #2.jpg", "room #2.jpg"),
    ],
)
def test_a_url_names_the_file_that_lies_under_its_name_decoded_or_not(tmp_path, url, name):
    pictures(tmp_path / "images", name)
    table = rows(tmp_path / "t.csv", "url,query,annotation", f"{url},q,a")
    (sample,) = open_data([DataSource(table, images=str(tmp_path / "images"))], stage="finetune", seed=0)[0]
    assert shown(sample) == str(tmp_path / "images" / name)
    (item,) = read_items(table, images=tmp_path / "images").items
    assert item.image == str(tmp_path / "images" / name)


@pytest.mark.parametrize("url", ["https://x.org/..%2Fsecret.jpg", "https://x.org/", "https://x.org/a%2F..%2F.."])
def test_a_url_names_no_file_elsewhere(tmp_path, url):
    pictures(tmp_path, "secret.jpg", "images/p.jpg")
    table = rows(tmp_path / "t.csv", "url,query,annotation", "p.jpg,q,a", f"{url},q,a")
    _, sample = open_data([DataSource(table, images=str(tmp_path / "images"))], stage="finetune", seed=0)[0]
    assert not Path(shown(sample)).is_file()
