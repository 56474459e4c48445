"""Token labels: each token learns what its direction shows."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from panorama_vlm.data.collators import Labelled, VisionCollator
from panorama_vlm.data.label_maps import LabelColumn, read_label_maps
from panorama_vlm.data.rows import BadSample
from panorama_vlm.data.samples import open_data
from panorama_vlm.data.sources import DataSource
from panorama_vlm.geometry_panorama import ViewOptions, ray_angles
from panorama_vlm.places_panorama import BFoV, bfov_of_mask
from panorama_vlm.synthetic.write import World
from panorama_vlm.token_labels_panorama import LabelMaps, TokenLabelHead, count_labelled, token_labels
from panorama_vlm.train.labels import label_fields
from PIL import Image

GRID = (8, 8)
PLAN = ViewOptions(view_strategy="anyres_e2p", image_size=128, pole_caps=True).plan


def erp(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    yaw = ((np.arange(width) + 0.5) / width - 0.5) * 360
    pitch = (0.5 - (np.arange(height) + 0.5) / height) * 180
    return np.meshgrid(yaw, pitch)


def test_a_token_has_the_class_of_its_ray():
    yaw, pitch = erp(256, 512)
    sectors = (np.floor((yaw + 180) / 30) + 12 * (pitch > 0)).astype(int)
    classes, places = token_labels(PLAN, GRID, LabelMaps({"sector": sectors}), ("sector", "lacking"))
    assert classes.shape == (PLAN.num_views, 64, 2) and places.isnan().all()
    assert (classes[..., 1] == -100).all()
    sure = 0
    generator = np.random.default_rng(0)
    for view, labels in zip(PLAN.views, classes[..., 0].numpy(), strict=True):
        for token, label in enumerate(labels):
            row, column = divmod(token, 8)
            aside = generator.uniform(-0.5, 0.5, (2, 200))
            yaw, pitch = ray_angles(view.rays_at(row + aside[0], column + aside[1], GRID))
            shown = (np.floor((yaw + 180) / 30) % 12 + 12 * (pitch > 0)).astype(int)
            share = (shown == label).mean()
            most = np.bincount(shown).max() / 200
            assert share > most - 0.2
            sure += most > 0.9
    assert sure > 50


@pytest.mark.parametrize("offset", [0.0, 45.0, -90.0, 37.0])
def test_places_lie_where_the_token_says_by_brute_force(offset):
    """The token and its offset name the ray of the middle: through the view's own geometry, from cell to ray."""
    yaw, pitch = erp(360, 720)
    wanted = [BFoV(20, 10, 30, 20), BFoV(175, -30, 24, 30), BFoV(-100, 70, 60, 16)]
    things = np.full(yaw.shape, -1)
    for number, place in enumerate(wanted):
        inside = (abs((yaw - place.yaw + 180) % 360 - 180) < place.x_fov / 2) & (
            abs(pitch - place.pitch) < place.y_fov / 2
        )
        things[inside] = number
    places = [bfov_of_mask(things == number) for number in range(3)]
    maps = LabelMaps({"which": things}, things, places)
    classes, shifts = token_labels(PLAN, GRID, maps, ("which",), offset)
    seen = set()
    for view, labels, values in zip(PLAN.views, classes[..., 0], shifts, strict=True):
        for token in np.flatnonzero(values.isfinite().all(-1)):
            which = int(labels[token])
            row, column = divmod(token, 8)
            down, across, width, height = values[token].tolist()
            ray = view.rays_at(np.array(row + down), np.array(column + across), GRID)
            found_yaw, found_pitch = ray_angles(ray)
            place = places[which]
            assert abs((float(found_yaw) + offset - place.yaw + 180) % 360 - 180) < 0.01
            assert float(found_pitch) == pytest.approx(place.pitch, abs=0.01)
            assert 10 * math.exp(height) == pytest.approx(place.y_fov, abs=0.01)
            assert 10 * math.exp(width) == pytest.approx(place.x_fov * math.cos(math.radians(place.pitch)), abs=0.01)
            seen.add(which)
    assert seen == {0, 1, 2}


def test_a_thing_that_fills_an_eighth_wins_over_its_surroundings_and_less_does_not():
    things = np.full((256, 512), -1)
    maps = {"kind": np.zeros((256, 512), int)}
    yaw, pitch = erp(256, 512)
    for number, size in enumerate((9.0, 2.0)):
        middle = (0.0, 0.0) if number == 0 else (90.0, 0.0)
        inside = (abs(yaw - middle[0]) < size / 2) & (abs(pitch) < size / 2)
        things[inside], maps["kind"][inside] = number, number + 1
    classes, _ = token_labels(PLAN, GRID, LabelMaps(maps, things, [None, None]), ("kind",))
    tiles = [index for index, view in enumerate(PLAN.views) if not view.is_global]
    assert 1 in classes[tiles] and 2 not in classes


def test_maps_of_different_sizes_are_refused():
    maps = LabelMaps({"a": np.zeros((4, 8), int), "b": np.zeros((8, 16), int)})
    with pytest.raises(ValueError, match="one size"):
        token_labels(PLAN, GRID, maps, ("a", "b"))


def test_the_loss_is_the_mean_over_panoramas_in_float64():
    generator = torch.Generator().manual_seed(0)
    head = TokenLabelHead(12, {"kind": 4, "colour": 3}).double()
    tokens = torch.randn(3, 2, 5, 12, generator=generator, dtype=torch.float64)
    classes = torch.randint(0, 3, (3, 2, 5, 2), generator=generator)
    places = torch.randn(3, 2, 5, 4, generator=generator)
    classes[0, 0], places[0, 0] = -100, math.nan
    classes[1], places[1] = -100, math.nan
    places[2, :, 3:] = math.nan
    loss, figures = head(tokens, classes, places)
    output = head.layer(head.norm(tokens))
    total = 0.0
    for panorama in (0, 2):
        for field, part in ((0, slice(0, 4)), (1, slice(4, 7))):
            terms = {True: [], False: []}
            for view in range(2):
                for token in range(5):
                    if (wanted := int(classes[panorama, view, token, field])) >= 0:
                        scores = output[panorama, view, token, part]
                        shows_a_thing = not math.isnan(float(places[panorama, view, token, 0]))
                        terms[shows_a_thing].append(float(scores.logsumexp(0) - scores[wanted]))
            total += sum(sum(each) / len(each) for each in terms.values() if each)
        terms = []
        for away in (output[panorama, ..., 7:] - places[panorama]).reshape(-1, 4).tolist():
            if not math.isnan(away[0]):
                terms.append(sum(abs(a) - 0.05 if abs(a) > 0.1 else a * a / 0.2 for a in away))
        total += sum(terms) / len(terms)
    assert count_labelled(classes, places) == 2
    assert float(loss) == pytest.approx(total / 2, rel=1e-5)
    assert 0 <= float(figures["accuracy_kind"]) <= 1
    nothing, _ = head(tokens[1:2], classes[1:2], places[1:2])
    nothing.backward()
    assert float(nothing) == 0 and all((p.grad == 0).all() for p in head.parameters())


def test_scenes_label_what_they_show():
    """Against the place and name of each thing that the scene itself knows."""
    world = World(seed=3, width=512)
    scene = world.scene(0)
    _, maps = world.labelled_picture(scene)
    for number, thing in enumerate(scene.things):
        shown = maps.things == number
        if thing.seen < 0.5 or shown.sum() < 50:
            continue
        assert len(set(maps.classes["name"][shown])) == 1 and maps.classes["name"][shown][0] > 0
        if thing.colour is None:
            assert (maps.classes["colour"][shown] == -1).all()
        found = bfov_of_mask(shown)
        assert abs((found.yaw - thing.place.yaw + 180) % 360 - 180) < 1.5
        assert abs(found.pitch - thing.place.pitch) < 1.5


@pytest.fixture
def labelled_folder(tmp_path, panoramas):
    """Two panoramas with a class map and a map of things, which turn with them."""
    yaw, _ = erp(256, 512)
    semantic = (np.floor((yaw + 180) / 90)).astype(np.uint8)
    semantic[:20] = 255
    things = np.zeros((256, 512), np.uint8)
    things[100:140, 300:360] = 7
    rows = []
    for number in range(2):
        panoramas[number].save(tmp_path / f"{number}.png")
        Image.fromarray(semantic).save(tmp_path / f"semantic{number}.png")
        Image.fromarray(things).save(tmp_path / f"things{number}.png")
        rows.append({"file_name": f"{number}.png", "classes": f"semantic{number}.png", "things": f"things{number}.png"})
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def source_of(folder):
    return DataSource(str(folder), labels={"semantic": LabelColumn("classes", 4)}, things_column="things")


def test_a_folder_of_class_maps_labels_tokens(make, labelled_folder):
    model, processor = make()
    train, _ = open_data([source_of(labelled_folder)], stage="vision", seed=0)
    assert label_fields(train) == {"semantic": 4}
    grid = model.config.token_grid
    collate = VisionCollator(processor, seed=1, random_heading=True, labelled=Labelled(grid, ("semantic",)))
    batch = collate([train[0], train[1]])
    assert batch["token_classes"].shape == (2, 9, grid[0] * grid[1], 1)
    places = batch["token_places"].isfinite().all(-1)
    assert places.any(2).any(1).all()  # of both, in whatever way they were turned
    model.add_label_head({"semantic": 4})
    model.set_stage("vision")
    output = model(**batch, stage="vision")
    assert float(output.label_loss) > 0
    assert float(output.loss) == pytest.approx(float(output.vicreg_loss + output.label_loss), rel=1e-5)
    output.loss.backward()
    assert model.label_head.layer.weight.grad.abs().sum() > 0
    assert any(parameter.grad.abs().sum() > 0 for parameter in model.model.resampler.parameters())


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda folder: Image.new("L", (512, 256), 9).save(folder / "semantic0.png"),
            "the class 9, allowed are 0 to 3",
        ),
        (lambda folder: Image.new("RGB", (512, 256)).save(folder / "semantic0.png"), "mode RGB"),
        (lambda folder: Image.new("L", (512, 128)).save(folder / "semantic0.png"), "twice as wide"),
        (lambda folder: Image.new("RGB", (512, 200)).save(folder / "0.png"), "whole sphere"),
        (lambda folder: (folder / "semantic0.png").unlink(), "semantic0.png"),
        (lambda folder: _save_rotated(folder), "EXIF orientation"),
        (lambda folder: _save_too_many(folder), "at most 10000"),
    ],
)
def test_what_is_no_class_map_is_a_bad_sample(make, labelled_folder, spoil, words):
    model, processor = make()
    spoil(labelled_folder)
    train, _ = open_data([source_of(labelled_folder)], stage="vision", seed=0)
    first = next(sample for sample in train if sample["image"].endswith("0.png"))
    skipped = []
    labelled = Labelled(model.config.token_grid, ("semantic",))
    assert VisionCollator(processor, seed=1, labelled=labelled)([first], skipped) is None
    assert words in skipped[0]["reason"]
    assert VisionCollator(processor, seed=1)([first], skipped) is not None or "whole sphere" in words


def _save_rotated(folder):
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.new("RGB", (512, 256)).save(folder / "0.png", exif=exif)


def _save_too_many(folder):
    ids = (np.arange(256 * 512) % 60_000).astype(np.uint16).reshape(256, 512)
    Image.fromarray(ids).save(folder / "things0.png")


def test_ids_of_things_may_be_any_numbers(labelled_folder):
    things = np.zeros((256, 512), np.int32)
    things[10:20, 10:40], things[100:140, 300:360] = 2_000_000_000, 5
    Image.fromarray(things).save(labelled_folder / "things0.tiff")
    maps = read_label_maps(str(labelled_folder / "0.png"), {}, str(labelled_folder / "things0.tiff"))
    assert len(maps.places) == 2 and set(np.unique(maps.things)) == {-1, 0, 1}
    for number, value in enumerate((5, 2_000_000_000)):
        assert maps.places[number] == bfov_of_mask(things == value)


def test_a_row_without_a_map_is_a_sample_of_which_nothing_is_known(make, labelled_folder):
    model, processor = make()
    rows = [json.loads(line) for line in (labelled_folder / "metadata.jsonl").read_text().splitlines()]
    rows[0] |= {"classes": None, "things": None}
    (labelled_folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    train, _ = open_data([source_of(labelled_folder)], stage="vision", seed=0)
    labelled = Labelled(model.config.token_grid, ("semantic",))
    batch = VisionCollator(processor, seed=1, labelled=labelled)([train[0], train[1]])
    known = (batch["token_classes"] != -100).flatten(1).any(1)
    assert sorted(known.tolist()) == [False, True]


def test_a_heading_or_pose_that_turns_the_panorama_is_not_followed_in_silence(tmp_path, labelled_folder):
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    xmp += b'<rdf:Description xmlns:GPano="http://ns.google.com/photos/1.0/panorama/" GPano:PoseHeadingDegrees="90"/>'
    Image.new("RGB", (512, 256)).save(tmp_path / "turned.jpg", xmp=xmp + b"</rdf:RDF></x:xmpmeta>")
    files = {"semantic": (str(labelled_folder / "semantic0.png"), LabelColumn("classes", 4))}
    assert read_label_maps(str(tmp_path / "turned.jpg"), files).classes["semantic"].shape == (256, 512)
    with pytest.raises(BadSample, match="align_heading"):
        read_label_maps(str(tmp_path / "turned.jpg"), files, align_heading=True)
    tilted = xmp.replace(b"PoseHeadingDegrees", b"PosePitchDegrees")
    Image.new("RGB", (512, 256)).save(tmp_path / "tilted.jpg", xmp=tilted + b"</rdf:RDF></x:xmpmeta>")
    assert read_label_maps(str(tmp_path / "tilted.jpg"), files, level=False).classes["semantic"].shape == (256, 512)
    with pytest.raises(BadSample, match="level"):
        read_label_maps(str(tmp_path / "tilted.jpg"), files)
    with pytest.raises(BadSample, match="not equirectangular"):
        read_label_maps(str(labelled_folder / "semantic0.png"), files, projection="vr180")


def test_things_without_names_are_refused(labelled_folder):
    with pytest.raises(ValueError, match="a things_column and no labels"):
        open_data([DataSource(str(labelled_folder), things_column="things")], stage="vision", seed=0)


def test_columns_that_are_not_there_are_named(labelled_folder):
    source = DataSource(str(labelled_folder), labels={"semantic": LabelColumn("depth", 4)})
    with pytest.raises(ValueError, match=r"no columns \['depth'\] of token labels"):
        open_data([source], stage="vision", seed=0)


def test_the_head_is_not_saved_and_goes_on_in_the_next_stage(make, tmp_path):
    model, _ = make()
    model.add_label_head({"a": 3})
    model.save_pretrained(tmp_path)
    assert model.label_head is not None
    again = type(model).from_pretrained(tmp_path)
    assert again.label_head is None
    with pytest.raises(ValueError, match="add_label_head"):
        again(torch.zeros(1, 9, 3, 64, 64), stage="vision", token_classes=torch.zeros(1), token_places=torch.zeros(1))
