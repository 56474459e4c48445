"""`python -m panorama_vlm.data check` agrees with what training then does."""

import json
import shutil
import warnings
from pathlib import Path

import datasets
import pytest
from panorama_vlm.data.__main__ import main
from panorama_vlm.data.check import check_source
from panorama_vlm.data.collators import ConversationCollator, VisionCollator
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.sources import DataSource
from PIL import Image

SAMPLES = Path(__file__).resolve().parent.parent / "samples"
GPANO = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" GPano:FullPanoWidthPixels="64" '
    'GPano:FullPanoHeightPixels="32" GPano:CroppedAreaImageWidthPixels="32" GPano:CroppedAreaImageHeightPixels="16" '
    'GPano:CroppedAreaLeftPixels="16" GPano:CroppedAreaTopPixels="8"/></rdf:RDF></x:xmpmeta>'
)


@pytest.fixture
def mixed(tmp_path):
    """A folder with every kind of good and bad rows."""
    for name in ("a.jpg", "b.jpg", "unnamed.jpg"):
        Image.new("RGB", (64, 32)).save(tmp_path / name)
    Image.new("RGB", (32, 16)).save(tmp_path / "part.jpg", xmp=GPANO.encode())
    Image.new("RGB", (60, 20)).save(tmp_path / "band.jpg")
    (tmp_path / "torn.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:40])
    (tmp_path / "page.jpg").write_text("<html>not found</html>")
    asked = [("a.jpg", "Q", "A"), ("a.jpg", "Q2", ["A2", "A3"]), ("b.jpg", "Q", "A"), ("part.jpg", "Q", "A")]
    asked += [("band.jpg", "Q", "A"), ("torn.jpg", "Q", "A"), ("page.jpg", "Q", "A"), ("gone.jpg", "Q", "A")]
    asked += [("a.jpg", "", "A"), ("a.jpg", "Q", " "), ("../x.jpg", "Q", "A"), ("https://x.org/x.jpg", "Q", "A")]
    lines = [json.dumps(dict(zip(("file_name", "query", "annotation"), row, strict=True))) for row in asked]
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, '{"file_name":', ""]))
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*not 2")
@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("stage", ["vision", "finetune"])
def test_the_check_counts_what_training_then_skips(mixed, make, stage, streaming):
    _, processor = make()
    samples, _ = open_data([DataSource(str(mixed))], stage=stage, seed=0)
    collate = VisionCollator(processor, 0) if stage == "vision" else ConversationCollator(processor)
    skipped = []
    for sample in samples:
        collate([sample], skipped)
    report = check_source(DataSource(str(mixed), streaming=streaming), stage)
    assert report.samples == len(samples)
    kinds = [record["reason"].split(":")[0] for record in skipped]
    assert {kind: count for kind, (_, count) in report.bad.items()} == {kind: kinds.count(kind) for kind in kinds}
    assert report.failure is not None and f"{len(skipped)} of {len(samples)} samples" in report.failure


def test_the_report_says_what_a_source_is(mixed, capsys):
    with pytest.raises(SystemExit, match="1"):
        main(["check", str(mixed)])
    said = capsys.readouterr()
    for words in (
        f"folder with metadata {mixed}; image: 'file_name', question: 'query', answer: 'annotation'",
        "stage finetune: 13 samples in 13 rows, 4 panoramas; 8 cannot be used",
        "broken row: line 13 is not JSON",
        f"missing image: {mixed}/gone.jpg does not exist (row 7)",
        "2 of unreadable image: ",
        "left out: 1 panoramas that no row names, such as 'unnamed.jpg'",
        "panoramas: 2 whole spheres, by their size of 2:1",
        "panoramas: 1 parts of the sphere, by their Photo Sphere data",
        "panoramas: 1 guessed to be a band of the sphere",
        "64 x 32 (2)",
        "row 1: a.jpg (64 x 32)\n  user: <image> Q2\n  assistant: A2\n  … or one of 1 other answers",
    ):
        assert words in said.out
    assert "training would fail: 8 of 13 samples cannot be used, more than the allowed share of 0.1" in said.err
    main(["check", str(mixed), "--max-bad-share", "0.7"])


def test_projections_are_what_the_file_or_the_source_says(tmp_path, make):
    Image.new("RGB", (96, 16)).save(tmp_path / "faces.png")
    for name in ("cylindrical", "fisheye"):
        xmp = GPANO.replace("GPano:FullPanoWidth", f'GPano:ProjectionType="{name}" GPano:FullPanoWidth')
        Image.new("RGB", (32, 16)).save(tmp_path / f"{name}.jpg", xmp=xmp.encode())
    _, processor = make()
    for projection, kinds, bad in (
        (None, {"cylindrical, by their Photo Sphere data": 1, "guessed to be a band of the sphere": 1}, "'fisheye'"),
        ("cubemap_6x1", {"cubemap_6x1, as the source says": 1}, "a cubemap_6x1 is 6:1"),
    ):
        source = DataSource(str(tmp_path), projection=projection)
        report = check_source(source, "vision")
        assert {kind.split(": ")[0]: count for kind, count in report.kinds.items()} == kinds
        samples, skipped = open_data([source], stage="vision", seed=0)[0], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            VisionCollator(processor, 0)(list(samples), skipped)
        unreadable = [record for record in skipped if "unreadable" in record["reason"]]
        ((words, count),) = report.bad.values()
        assert bad in words and count == len(unreadable) and all(bad in each["reason"] for each in unreadable)


def test_the_command_line_takes_a_projection(tmp_path, capsys):
    Image.new("RGB", (96, 16)).save(tmp_path / "faces.png")
    main(["check", str(tmp_path), "--projection", "cubemap_6x1"])
    assert "panoramas: 1 cubemap_6x1, as the source says" in capsys.readouterr().out


def test_a_good_source_passes_and_a_folder_of_images_serves_stage_vision(tmp_path, capsys):
    main(["check", str(SAMPLES)])
    assert "stage finetune: 48 samples in 48 rows, 12 panoramas; 0 cannot be used" in capsys.readouterr().out
    shutil.copy(SAMPLES / "dawn.jpg", tmp_path)
    (tmp_path / "._dawn.jpg").write_bytes(b"\0\5\x16\7")
    main(["check", str(tmp_path)])
    said = capsys.readouterr().out
    assert "stage vision: 1 samples" in said and "it serves stage vision alone: " in said
    assert "left out: 1 hidden or of the system, such as '._dawn.jpg'" in said
    with pytest.raises(SystemExit, match="2"):
        main(["check", str(tmp_path), "--stage", "finetune"])
    assert "lacks ['question', 'answer']" in capsys.readouterr().err


def test_what_the_trainer_refuses_is_an_error(tmp_path, capsys):
    for arguments, words in (
        ([str(tmp_path / "none")], "no such file or folder"),
        ([str(tmp_path)], "the folder has no metadata.jsonl"),
        ([str(SAMPLES), "--rows", "0"], "rows must be at least 1, got 0"),
        ([str(SAMPLES), "--images", str(tmp_path)], "none of the first 48 images"),
        ([str(SAMPLES), "--max-bad-share", "2"], r"max_bad_share must be in [0, 1], got 2.0"),
    ):
        with pytest.raises(SystemExit, match="2"):
            main(["check", *arguments])
        assert words in capsys.readouterr().err


def test_images_inside_a_table_and_part_of_its_rows(tmp_path):
    data = [{"bytes": (SAMPLES / name).read_bytes(), "path": None} for name in ("dawn.jpg", "park.jpg")] * 50
    rows = datasets.Dataset.from_dict({"image": data, "question": ["Q"] * 100, "answer": ["A"] * 100})
    rows.cast_column("image", datasets.Image()).to_parquet(tmp_path / "t.parquet")
    source = DataSource(str(tmp_path / "t.parquet"))
    report = check_source(source)
    assert (report.samples, report.kinds.total(), report.rows) == (100, 2, (100, 100))
    report = check_source(source, rows=4)
    assert (report.samples, report.rows) == (4, (4, 100))
    assert [example.split(":")[0] for example in report.examples] == ["row 0", "row 25", "row 50"]
    assert check_source(source, "vision").samples == 2


def test_no_image_is_decoded(monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda *_: pytest.fail("an image was decoded"))
    assert check_source(DataSource(str(SAMPLES))).failure is None


def test_scenes_are_rendered_for_it():
    report = check_source(DataSource("synthetic://?scenes=100&seed=1&width=128"), rows=2)
    assert report.rows == (2, 100) and report.sizes == {(128, 64): 2} and report.failure is None
