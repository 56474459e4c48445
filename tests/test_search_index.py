"""The index of ray tokens: which panorama shows it, and which way to look."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from panorama_vlm.geometry_panorama import View, ViewPlan
from panorama_vlm.sampling_panorama import erp_to_views
from panorama_vlm.tests.conftest import TOWER
from panorama_vlm.tests.launching import ENVIRONMENT
from PIL import Image

pytestmark = pytest.mark.tools
pytest.importorskip("lancedb")

from panorama_vlm.search import PanoramaIndex, build  # noqa: E402
from panorama_vlm.search.__main__ import main  # noqa: E402
from panorama_vlm.search.index import view_of  # noqa: E402
from panorama_vlm.search.matching import TokenEncoder, Whitening  # noqa: E402

PAGE = Path(__file__).resolve().parent.parent / "docs/search.md"
VIEWS = {
    "vision": {**TOWER, "image_size": 128},
    "image_size": 128,
    "view_strategy": "e2p",
    "overlap_ratio": 0.25,
    "pole_caps": True,
}


def noise(seed, height=256):
    """A panorama of coloured patches, no two alike."""
    cells = np.random.default_rng(seed).integers(0, 256, (height // 32, height // 16, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize((2 * height, height), Image.Resampling.BICUBIC)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "in").mkdir()
    for seed in range(6):
        noise(seed).save(tmp_path / f"in/{seed}.png")
    return tmp_path / "in"


@pytest.fixture
def encoder(make):
    return TokenEncoder(*make(**VIEWS))


@pytest.fixture
def saved(make, tmp_path):
    model, processor = make(**VIEWS)
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def filled(encoder, where, count=5):
    """An index of so many made-up panoramas, and what is in it: vectors of length 1 [count, T, D]."""
    tokens = torch.randn(count, len(encoder.rays), 32, generator=torch.Generator().manual_seed(1))
    index = PanoramaIndex.create(where, encoder, Whitening.fit(tokens.flatten(0, 1)))
    names = [f"/o'dd/{number} ü\".jpg" for number in range(count)]
    index.add(names[:2], tokens[:2], torch.ones(2, tokens.shape[1], dtype=torch.bool))
    index.add(names[2:], tokens[2:], torch.ones(count - 2, tokens.shape[1], dtype=torch.bool))
    return index, names, index.whitening(tokens)


def test_whitened_tokens_are_uncorrelated():
    random = torch.Generator().manual_seed(0)
    mixing = torch.linalg.qr(torch.randn(8, 8, generator=random)).Q * torch.arange(1, 9)
    mixed = torch.randn(5000, 8, generator=random) @ mixing + 3
    whitening = Whitening.fit(mixed)
    plain = (mixed - whitening.mean) @ whitening.matrix
    np.testing.assert_allclose(np.cov(plain.numpy().T), np.eye(8), atol=0.1)
    torch.testing.assert_close(whitening(mixed).norm(dim=-1), torch.ones(5000))


@pytest.mark.parametrize("kept", [1, 7, 10**9])
def test_the_nearest_tokens_are_those_of_brute_force(encoder, tmp_path, kept, monkeypatch):
    index, names, vectors = filled(encoder, tmp_path / "index")
    monkeypatch.setattr("panorama_vlm.search.index._SCANNED", 50)
    sought = torch.nn.functional.normalize(torch.randn(9, 32), dim=-1)
    found = index.nearest(sought, kept)
    flat = vectors.half().float().flatten(0, 1).numpy()
    cosines = sought.numpy() @ flat.T
    order = np.argsort(-cosines, axis=1)[:, :kept]
    np.testing.assert_allclose(found.cosine.numpy(), np.take_along_axis(cosines, order, 1), atol=1e-5)
    per = vectors.shape[1]
    if kept < 10:
        assert found.panorama == [[names[row // per] for row in of_one] for of_one in order]
        assert np.array_equal(found.token.numpy(), order % per)


def test_tokens_come_back_as_they_went_in_with_their_directions(encoder, tmp_path):
    index, names, vectors = filled(encoder, tmp_path / "index")
    index.finish()
    assert index.panoramas() == set(names)
    torch.testing.assert_close(index.tokens_of([names[3], names[0]]), vectors[[3, 0]], atol=1e-3, rtol=0)
    row = index.table.search().where("token = 7").limit(1).to_list()[0]
    x, y, z = encoder.rays[7].tolist()
    assert row["yaw"] == pytest.approx(math.degrees(math.atan2(x, z)), abs=1e-3)
    assert row["pitch"] == pytest.approx(math.degrees(math.asin(y)), abs=1e-3)
    assert index.tokens_of([]).shape == (0, *vectors.shape[1:])


def test_merging_takes_over_what_is_new_once(encoder, tmp_path):
    index, names, vectors = filled(encoder, tmp_path / "one", 5)
    other = PanoramaIndex.create(tmp_path / "two", encoder, index.whitening)
    new = torch.randn(1, *vectors.shape[1:])
    everything = torch.ones(2, vectors.shape[1], dtype=torch.bool)
    other.add([names[4], "/new.jpg"], torch.cat([torch.zeros_like(new), new]), everything)
    assert [index.merge(tmp_path / "two"), index.merge(tmp_path / "two")] == [1, 0]
    assert len(index) == 6 * vectors.shape[1] and index.panoramas() == {*names, "/new.jpg"}
    torch.testing.assert_close(index.tokens_of([names[4]])[0], vectors[4], atol=1e-3, rtol=0)
    PanoramaIndex.create(tmp_path / "three", encoder, Whitening.fit(torch.randn(99, 32)))
    with pytest.raises(ValueError, match="another whitening"):
        index.merge(tmp_path / "three")


def test_a_painted_example_has_the_tokens_of_the_panorama(encoder, folder):
    """At the right place the middle of it is what the panorama's own views show."""
    views, _ = encoder.panorama(str(folder / "0.png"))
    direction = (0.0, 0.0, 90.0)
    example = encoder.example(Image.fromarray(view_of(folder / "0.png", direction, 512, encoder.images)), 90.0)
    cut = encoder._cut(example, direction, 0)
    inner = slice(cut.shape[-1] // 8, -(cut.shape[-1] // 8))
    assert (cut - views[0])[:, inner, inner].abs().mean() < 0.15
    (painted,) = encoder.painted(example, [direction])
    rays = encoder.rays[painted.places].numpy()
    everything = View("perspective", *direction).cells(encoder.rays.numpy(), (64, 64), margin=0.5)[2]
    assert sorted(painted.places.tolist()) == np.flatnonzero(everything).tolist()
    # One by one, each is what the tower makes of the tile that owns it; turned by a tile, the next tile says the same.
    step = encoder.plan.views[1].yaw
    turned, again = encoder.painted(example, [(step, 0.0, 90.0), direction])
    torch.testing.assert_close(again.tokens, painted.tokens)
    moved = torch.tensor(rays @ View("perspective", step, 0.0, 90.0).rotation.T, dtype=torch.float32)
    nearest = (moved @ encoder.rays[turned.places].T).max(1)
    level = nearest.values > 1 - 1e-5  # tokens of the caps do not turn into each other
    assert level.sum() > 4
    torch.testing.assert_close(turned.tokens[nearest.indices[level]], painted.tokens[level], atol=1e-4, rtol=0)


def test_an_example_is_found_and_the_way_to_look(encoder, folder, accelerator, tmp_path):
    build.index_folder(folder, encoder, tmp_path / "index", accelerator)
    index = PanoramaIndex(tmp_path / "index", encoder)
    erp = torch.from_numpy(np.asarray(Image.open(folder / "4.png")).copy()).permute(2, 0, 1)
    view = erp_to_views(erp, ViewPlan((View("perspective", 100, 12, 70),)), 200)[0].permute(1, 2, 0)
    best, *others = index.query(Image.fromarray((view * 0.9).byte().numpy()), 70.0)
    assert best.panorama == str(folder / "4.png") and len(others) == 5
    assert best.yaw == pytest.approx(100, abs=5) and best.pitch == pytest.approx(12, abs=5)
    assert best.score > others[0].score
    (like,) = index.query_like(folder / "2.png", -60.0, -10.0, 80.0, count=1)
    assert like.panorama == str(folder / "2.png") and like.yaw == pytest.approx(-60, abs=5)


def test_what_a_partial_panorama_does_not_show_is_not_in_it(encoder, tmp_path, accelerator):
    (tmp_path / "in").mkdir()
    noise(0).crop((0, 96, 512, 160)).save(tmp_path / "in/band.png")  # 45 degrees high
    build.index_folder(tmp_path / "in", encoder, tmp_path / "index", accelerator)
    rows = PanoramaIndex(tmp_path / "index", encoder).table.to_arrow()
    assert 0 < len(rows) < len(encoder.rays)
    assert np.abs(rows["pitch"].to_numpy()).max() <= 22.5 + 1e-3


def test_a_killed_run_goes_on_with_nothing_twice_or_missing(encoder, folder, accelerator, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    build.index_folder(folder, encoder, whole, accelerator)
    monkeypatch.setattr(build, "_TOGETHER", 1)
    for at in (0, 1, 3):  # stopped before the first, after the first, later
        output, add = tmp_path / f"stopped-{at}", PanoramaIndex.add
        calls: list[list[str]] = []

        def stop(self, *given, at=at, calls=calls, add=add):
            if len(calls) == at:
                raise KeyboardInterrupt
            calls.append(given[0])
            add(self, *given)

        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(PanoramaIndex, "add", stop)
            build.index_folder(folder, encoder, output, accelerator, batch_size=1)
        done = build.index_folder(folder, encoder, output, accelerator, batch_size=1)
        assert (done.added, done.held) == (6 - at, 6)
        same_rows(PanoramaIndex(whole, encoder), PanoramaIndex(output, encoder))


def same_rows(one, other):
    """Whether two indexes hold the same."""
    tables = [
        index.table.to_arrow().sort_by([("panorama", "ascending"), ("token", "ascending")]) for index in (one, other)
    ]
    assert tables[0].drop_columns("vector").equals(tables[1].drop_columns("vector"))
    first, second = (np.stack(table["vector"].to_pylist()).astype(np.float32) for table in tables)
    np.testing.assert_allclose(first, second, atol=2e-3)


@pytest.mark.slow
def test_two_shards_make_the_index_of_one_also_after_a_kill(encoder, saved, folder, tmp_path):
    launcher = [sys.executable, "-P", "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launcher += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = ["index", str(folder), "--model", str(saved), "--output"]
    main_of(*command, str(tmp_path / "one"))
    run = subprocess.run(
        [*launcher, "-m", "panorama_vlm.search", *command, str(tmp_path / "two"), "--device", "cpu"],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
    )
    assert run.returncode == 0, run.stderr
    assert "6 panoramas, 6 of them new" in run.stdout and not list((tmp_path / "two/shards").glob("*"))
    mark = json.loads((tmp_path / "two/index.json").read_text())
    assert mark == json.loads((tmp_path / "one/index.json").read_text())
    same_rows(PanoramaIndex(tmp_path / "one", encoder), PanoramaIndex(tmp_path / "two", encoder))
    # Killed between merging a shard and removing it, and before another one held anything.
    index = PanoramaIndex(tmp_path / "two", encoder)
    shard = PanoramaIndex.create(tmp_path / "two/shards/00000-of-00002", encoder, index.whitening)
    shard.merge(tmp_path / "one")
    (tmp_path / "two/shards/00001-of-00002").mkdir()
    assert main_of(*command, str(tmp_path / "two")) == 0
    same_rows(PanoramaIndex(tmp_path / "one", encoder), PanoramaIndex(tmp_path / "two", encoder))


def main_of(*arguments):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main([*arguments, *(["--device", "cpu"])])
    return ended.value.code


def test_the_command_names_what_it_skips_and_finds_what_is_there(saved, tmp_path, capsys):
    folder = tmp_path / 'it\'s "odd" ü\n%20 {x}'
    (folder / "deeper").mkdir(parents=True)
    noise(1).save(folder / "deeper/one 'a'.png")
    noise(2).save(folder / "two;DROP.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    (folder / "notes.txt").write_text("no panorama")
    noise(3).save(os.fsencode(folder) + b"/no\xfftext.png", format="PNG")
    index = str(tmp_path / "index")
    assert main_of("index", str(folder), "--model", str(saved), "--output", index) == 1
    printed = capsys.readouterr()
    assert "2 panoramas, 2 of them new, 2 skipped" in printed.out
    assert all(words in printed.err for words in ("broken.jpg: ", "is no UTF-8: rename the file", "notes.txt"))
    one = str(folder / "deeper/one 'a'.png")
    assert main_of("query", index, "--like", one, "--yaw", "30", "--fov", "70", "--count", "1", "--json") == 0
    (hit,) = json.loads(capsys.readouterr().out)
    assert hit["panorama"] == one and hit["yaw"] == pytest.approx(30, abs=5) and hit["pitch"] == pytest.approx(0, abs=5)
    Image.new("RGB", (50, 40), "red").save(tmp_path / "view.jpg")
    assert main_of("query", index, "--example", str(tmp_path / "view.jpg"), "--count", "1000000") == 0
    assert capsys.readouterr().out.count(": look ") == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--example", "view.png", "--count", "0"], "count must be"),
        (["--example", "view.png", "--fov", "190"], "a view must be"),
        (["--example", "nothing.png"], "nothing.png"),
        (["--like", "view.png", "--pitch", "95"], "a direction must be"),
        (["--example", "view.png", "--like", "view.png"], "name one thing to look for"),
        ([], "name one thing to look for"),
        (["a red cube"], "words are not in the same space"),
    ],
)
def test_what_cannot_be_asked_is_said(saved, folder, tmp_path, capsys, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    noise(9).crop((0, 0, 64, 64)).save("view.png")
    for number in range(1, 6):
        (folder / f"{number}.png").unlink()
    main_of("index", str(folder), "--model", str(saved), "--output", "index")
    assert main_of("query", "index", *arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and words in error


def test_what_cannot_be_indexed_is_said(encoder, make, folder, accelerator, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no panorama in"):
        build.index_folder(tmp_path / "empty", encoder, tmp_path / "index", accelerator)
    with pytest.raises(ValueError, match="there is no '"):
        build.index_folder(tmp_path / "nowhere", encoder, tmp_path / "index", accelerator)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/one.jpg").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"none of 1 panoramas can be read.*one\.jpg"):
        build.index_folder(tmp_path / "bad", encoder, tmp_path / "index", accelerator)
    with pytest.raises(ValueError, match="holds other files and no index"):
        build.index_folder(folder, encoder, folder, accelerator)
    with pytest.raises(FileNotFoundError, match="there is no index of panoramas in"):
        PanoramaIndex(tmp_path / "nowhere", encoder)
    build.index_folder(folder, encoder, tmp_path / "index", accelerator)
    other = TokenEncoder(*make(**VIEWS))
    with torch.no_grad():
        next(other.model.vision_tower.parameters()).add_(1e-3)
    for changed, word in ((other, "weights"), (TokenEncoder(*make(view_strategy="cubemap")), "views")):
        with pytest.raises(ValueError, match=f"made by another model; what differs: .*{word}"):
            PanoramaIndex(tmp_path / "index", changed)
    with pytest.raises(ValueError, match="kind must be"):
        TokenEncoder(encoder.model, encoder.images, "words")


@pytest.fixture
def accelerator():
    from accelerate import Accelerator

    return Accelerator(cpu=True)


def test_a_large_index_looks_neighbours_up(encoder, tmp_path, monkeypatch):
    """The nearest token is found as by brute force, from an index that does not read all of them."""
    monkeypatch.setattr("panorama_vlm.search.index._LARGE", 1000)
    index, names, vectors = filled(encoder, tmp_path / "index")
    index.finish()
    assert any(each.columns == ["vector"] for each in index.table.list_indices())
    sought = torch.nn.functional.normalize(vectors[:, :40].flatten(0, 1) + 0.02 * torch.randn(200, 32), dim=-1)
    found = index.nearest(sought, 5)
    exact = (sought @ vectors.flatten(0, 1).T).topk(5)
    per = vectors.shape[1]
    same = [
        name[0] == names[row // per] for name, row in zip(found.panorama, exact.indices[:, 0].tolist(), strict=True)
    ]
    assert np.mean(same) > 0.95
    torch.testing.assert_close(found.cosine[same, 0], exact.values[same, 0], atol=2e-3, rtol=0)


def test_the_lines_of_the_page_find_a_view(saved, folder, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for output in ("INDEX", "OTHER"):
        assert main_of("index", str(folder), "--model", str(saved), "--output", output) == 0
    Image.open(folder / "3.png").crop((192, 64, 320, 192)).save("view.jpg")
    capsys.readouterr()
    code = PAGE.read_text().partition("```python\n")[2].partition("```")[0]
    exec(code.replace('"MODEL"', repr(str(saved))), {})
    assert len(capsys.readouterr().out.splitlines()) == 3
