"""What tables and folders of panoramas hold in earnest: names, quotes, lists, and files that are none."""

import itertools
import json
import unicodedata
from collections import Counter
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from panorama_vlm.data.collators import ConversationCollator
from panorama_vlm.data.files import PANORAMAS, is_panorama
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.sources import DataSource
from panorama_vlm.evaluation.formats import read_items
from panorama_vlm.train.config import load_config
from PIL import Image

QA = {"query": "q", "annotation": "a"}


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


def answers(table, **options):
    """What each sample of a table answers, or what is wrong with it."""
    samples, _ = open_data([DataSource(str(table), **options)], stage="finetune", seed=0)
    rows = samples if not options.get("streaming") else itertools.islice(samples, 20)
    return [each.get("error") or each["messages"][-1]["content"][0]["text"] for each in rows]


BROKEN = {  # what a table holds -> the answers of good rows and, in their place, where bad ones stand
    "never closed": ('p.jpg,q,"open\np.jpg,q,b\np.jpg,q,c\n', ["lines 2 to 4", "b", "c"]),
    "closed in a later row": ('p.jpg,q,"open\np.jpg,q,"b"\np.jpg,q,c\n', ["lines 2 to 3", "b", "c"]),
    "closed at the end of a later row": ('p.jpg,q,"open\np.jpg,q,b"\np.jpg,q,c\np.jpg,q,d"\n', None),
    "closed at the end of a later row, of URLs": (
        'https://x/p.jpg?s,q,"open\nhttps://x/p.jpg?s,q,b"\n',
        ["lines 2 to 3", 'b"'],
    ),
    "inside of quotes": ('p.jpg,q,"a "word" inside"\np.jpg,q,b\n', ["line 2", "b"]),
    "before a comma": ('p.jpg,q,a\np.jpg,"q" x,b\np.jpg,q,"c\nc"\n', ["a", "line 3", "c\nc"]),
    "a literal one": ('p.jpg,q,5" wide\np.jpg,q,"5"" wide"\n', ['5" wide', '5" wide']),
    "lines that are no rows": ('p.jpg,q,"Trees, grass, sky.\nA bench, a path, a dog."\n', None),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.parametrize("mark", [",", "\t", ";"])
def test_a_stray_quote_costs_the_row_it_stands_in_and_no_other(tmp_path, kind, mark):
    pictures(tmp_path, "p.jpg")
    lines, expected = BROKEN[kind]
    if kind == "closed at the end of a later row":
        expected = ["lines 2 to 3", 'b"', "c", 'd"']
    if kind == "lines that are no rows":
        expected = ["Trees, grass, sky.\nA bench, a path, a dog.".replace(",", mark)]
    table = tmp_path / ("t.tsv" if mark == "\t" else "t.csv")
    table.write_text(("url,query,annotation\n" + lines).replace(",", mark))
    for found, wanted in zip(answers(table, images=str(tmp_path)), expected, strict=True):
        assert found.startswith(f"broken row: {wanted}: ") if wanted.startswith("line") else found == wanted


def test_a_list_of_answers_is_several_that_are_right(tmp_path, make):
    _, processor = make()
    pictures(tmp_path, "p.jpg")
    lists = [["a1", "a2", "a3"], ["only"], '["text"]', [10, 0, 30, 40], ["a", 3], []]
    table = rows(tmp_path / "t.jsonl", *({"file_name": "p.jpg", "query": "q", "annotation": a} for a in lists))
    wanted = ["a1", "only", '["text"]', "[10, 0, 30, 40]", "broken row: a list", "broken row: a list"]
    assert [found[: len(word)] for found, word in zip(answers(table), wanted, strict=True)] == wanted
    assert [len(item.references) for item in read_items(table).items] == [3, 1, 1, 1]
    sample = open_data([DataSource(table)], stage="finetune", seed=0)[0][0]
    collate = ConversationCollator(processor, seed=1)
    drawn = Counter()
    for epoch in range(60):
        labels = collate([{**sample, "epoch": epoch}])["labels"][0]
        assert torch.equal(labels, collate([{**sample, "epoch": epoch}])["labels"][0])  # a run goes on with the same
        drawn[processor.tokenizer.decode(labels[labels >= 0], skip_special_tokens=True).replace(" ", "")] += 1
    assert sum(drawn[answer] for answer in lists[0]) == 60 and min(drawn[answer] for answer in lists[0]) > 8


@pytest.mark.parametrize("streaming", [False, True])
def test_lists_of_answers_in_tables_that_keep_them(tmp_path, streaming):
    pictures(tmp_path, "p.jpg")
    table = {"image": [str(tmp_path / "p.jpg")], "question": ["q"], "answer": [["a1", "a2"]]}
    Dataset.from_dict(table).to_parquet(tmp_path / "t.parquet")
    samples, _ = open_data([DataSource(str(tmp_path / "t.parquet"), streaming=streaming)], stage="finetune", seed=0)
    said = next(iter(samples))["answers"]
    assert [message["content"][0]["text"] for message in said] == ["a1", "a2"]


def test_of_a_folder_what_is_a_panorama_is_taken_and_what_is_not_is_said_once(tmp_path, caplog):
    taken = ["a.jpg", "b/c.JPG", "d.heic", "e.insp", "f.exr", "g.hdr", "h.tif", "i.avif"]
    others = ["._a.jpg", "b/.ipynb_checkpoints/c-checkpoint.jpg", "__MACOSX/._a.jpg", "__MACOSX/a.jpg", "Thumbs.db"]
    others += [".DS_Store", "@eaDir/a.jpg", "notes.pdf", "features.h5", "b/notes.txt", "moving.gif", ".cache/t.parquet"]
    pictures(tmp_path / "data", *taken, *others)
    pictures(tmp_path / "elsewhere", "z.jpg")
    (tmp_path / "data/link").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        samples, _ = open_data([DataSource(str(tmp_path / "data"))], stage="vision", seed=0)
        assert [sample["image"] for sample in samples] == sorted(str(tmp_path / "data" / name) for name in taken)
    (said,) = [record.message for record in caplog.records if "left out" in record.message]
    assert said.startswith(f"{tmp_path / 'data'}: 8 panoramas; left out are 7 hidden or of the system, such as '")
    for words in (
        "1 links to folders, such as 'link'",
        "1 no panoramas (.pdf), such as 'notes.pdf'",
        "(.h5)",
        "(.gif)",
    ):
        assert words in said


def test_a_folder_without_panoramas_says_what_it_holds(tmp_path):
    pictures(tmp_path, "a.pdf", "._a.jpg")
    with pytest.raises(ValueError, match=r"it holds .*1 hidden or of the system.*1 no panoramas \(.pdf\)"):
        open_data([DataSource(str(tmp_path))], stage="vision", seed=0)


def test_the_picture_beside_an_annotation_is_not_the_one_that_a_system_put_there(tmp_path):
    pictures(tmp_path / "scene", "rgb.png", "._rgb.png")
    turn = {"task": "find the door", "target_yaw": [10, 20], "target_pitch": [0, 10]}
    rows(tmp_path / "scene/annotation.json", [turn])
    (tmp_path / "scene/._annotation.json").write_bytes(b"\0\5\x16\7")
    read = read_items(tmp_path)
    assert [item.panorama for item in read.items] == ["scene/rgb.png"] and not read.dropped


def test_a_tilde_is_the_home_folder_wherever_a_path_is_given(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pictures(tmp_path / "images", "p.jpg")
    rows(tmp_path / "t.csv", "url,query,annotation", "https://x.org/p.jpg,q,a")
    (sample,) = open_data([DataSource("~/t.csv", images="~/images")], stage="finetune", seed=0)[0]
    assert shown(sample) == str(tmp_path / "images/p.jpg")
    (item,) = read_items("~/t.csv", images="~/images").items
    assert item.image == str(tmp_path / "images/p.jpg")
    config = load_config(["tiny.yaml", "--output", "~/run", "--cache_dir", "~/cache", "--compose.vision", "~/tower"])
    assert (config.output, config.cache_dir) == (str(tmp_path / "run"), str(tmp_path / "cache"))
    assert config.compose.vision == str(tmp_path / "tower")


@pytest.mark.parametrize("name", ["[360] park.jpg", "[360]", "[].jpg", '["p.jpg", 3]', "[[p].jpg"])
@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_brackets_in_a_name_are_no_list(tmp_path, name, ending):
    pictures(tmp_path, name, "p.jpg")
    quoted = '"' + name.replace('"', '""') + '"'
    lines = ["file_name,query,annotation", f"{quoted},q,a"] if ending == "csv" else [{"file_name": name, **QA}]
    (sample,) = open_data([DataSource(rows(tmp_path / f"t.{ending}", *lines))], stage="finetune", seed=0)[0]
    assert shown(sample) == str(tmp_path / name)


def test_a_list_of_names_in_a_table_is_one(tmp_path):
    pictures(tmp_path, "p.jpg", "q.jpg")
    table = rows(tmp_path / "t.csv", "images,query,annotation", '"[""p.jpg"", ""q.jpg""]",q,a')
    samples, _ = open_data([DataSource(table)], stage="vision", seed=0)
    assert [sample["image"] for sample in samples] == [str(tmp_path / name) for name in ("p.jpg", "q.jpg")]


@pytest.mark.parametrize(("on_disk", "in_table"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_name_finds_its_file_in_either_form_of_unicode(tmp_path, on_disk, in_table):
    written, asked = (unicodedata.normalize(form, "Grüße/café 전경.jpg") for form in (on_disk, in_table))
    pictures(tmp_path / unicodedata.normalize(on_disk, "Bücher"), written)
    table = rows(tmp_path / "t.jsonl", {"file_name": asked, **QA})
    images = str(tmp_path / unicodedata.normalize(in_table, "Bücher"))
    (sample,) = open_data([DataSource(table, images=images)], stage="finetune", seed=0)[0]
    assert Path(shown(sample)).is_file()
    (item,) = read_items(table, images=images).items
    assert Path(item.image).is_file()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ('{"file_name": "p.jpg",\n "query": "q"}\n', r"t.jsonl': none of its rows can be read: line 1 is not JSON: .*"),
        ('"p.jpg"\n', "none of its rows can be read: it must be a JSON object, got 'p.jpg'"),
        ('{"a": 1}\n{"b":\n', r"has the columns \['a'\] and lacks .*cannot be read are left out: line 2 is not JSON: "),
    ],
)
def test_a_file_of_broken_rows_says_what_is_wrong_with_them(tmp_path, content, reason, streaming):
    (tmp_path / "t.jsonl").write_text(content)
    with pytest.raises(ValueError, match=reason):
        open_data([DataSource(str(tmp_path / "t.jsonl"), streaming=streaming)], stage="finetune", seed=0)


def test_the_endings_are_those_of_the_docs():
    text = (Path(__file__).resolve().parent.parent / "docs/data.md").read_text().split("by its ending:")[1]
    assert set(text.split("Left out")[0].replace("`", "").rstrip(" .\n").split()) == set(PANORAMAS)
    assert all(is_panorama(f"a{ending.upper()}") for ending in PANORAMAS)
