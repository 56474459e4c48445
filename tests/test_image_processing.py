import json

import numpy as np
import py360convert
import pytest
import torch
from panorama_vlm import PanoramaImageProcessor, PanoramaProcessor, image_processing_panorama
from panorama_vlm.geometry_panorama import View, ViewOptions, ViewPlan, plan_rays
from panorama_vlm.reading_panorama import content_digest, to_erp_tensor
from panorama_vlm.sampling_panorama import erp_to_views, views_to_erp
from PIL import Image


def direction_image(height: int) -> torch.Tensor:
    """An ERP image whose colour is its direction, [3, height, 2 * height] in [-1, 1]."""
    return torch.tensor(View("erp").rays((height, 2 * height)), dtype=torch.float32).permute(2, 0, 1)


@pytest.mark.parametrize("pitch", [0.0, 30.0, -60.0])
def test_tiles_equal_py360convert_where_neither_aliases(panoramas, psnr, pitch):
    plan = ViewPlan(tuple(View("perspective", yaw, pitch, 90) for yaw in (0, 60, 180, 250)))
    # py360convert puts its first and last samples on the borders of the tile, we put ours half a pixel inside.
    fov = 2 * np.degrees(np.arctan(1 - 1 / 128))
    for panorama in panoramas:
        ours = erp_to_views(to_erp_tensor(panorama), plan, 128)
        for view, tile in zip(plan.views, ours, strict=True):
            yaw = (view.yaw + 180) % 360 - 180
            theirs = py360convert.e2p(np.array(panorama), fov, yaw, pitch, (128, 128), mode="bilinear")
            assert psnr(tile.permute(1, 2, 0), theirs / 255) > 35


@pytest.mark.parametrize("pitch_rows", [(0.0,), (-50.0, 0.0, 50.0)])
def test_an_image_whose_colour_is_its_direction_gives_each_pixel_and_token_the_colour_of_its_ray(pitch_rows):
    plan = ViewOptions("anyres_e2p", 90.0, 0.5, pitch_rows).plan
    size, tokens = 64, 8
    views = erp_to_views(direction_image(256), plan, size)  # [V, 3, 64, 64]
    rays = torch.tensor(plan_rays(plan, (size, size)), dtype=torch.float32)  # [V, S, 3]
    apart = (views.flatten(2).transpose(1, 2) - rays).norm(dim=-1)
    assert apart[list(plan.tiles)].mean() < 0.2 * np.radians(90 / size)  # a fifth of a pixel
    pooled = torch.nn.functional.adaptive_avg_pool2d(views, tokens).flatten(2).transpose(1, 2)
    token_rays = torch.tensor(plan_rays(plan, (tokens, tokens)), dtype=torch.float32)
    pooled = pooled / pooled.norm(dim=-1, keepdim=True)
    error = torch.rad2deg(2 * torch.asin((pooled - token_rays).norm(dim=-1) / 2))
    assert error[list(plan.tiles)].mean() < 0.5 * 90 / tokens
    assert error[0].mean() < 0.5 * 360 / tokens
    assert error.mean() < 1.0  # degrees; half a token is 5.6


def test_turning_the_panorama_by_the_stride_permutes_the_tiles_exactly(panoramas):
    plan = ViewOptions("anyres_e2p", 90.0, 0.5).plan
    erp = to_erp_tensor(panoramas[0])
    views = erp_to_views(erp, plan, 96)
    turned = erp_to_views(erp.roll(-erp.shape[-1] // 8, -1), plan, 96)  # what was 45 degrees right is now the front
    torch.testing.assert_close(turned[1:], views[1:].roll(-1, 0), rtol=0, atol=1e-4)


@pytest.mark.parametrize("size", [48, 96, 300])
def test_the_seam_shows_in_no_view(panoramas, size):
    plan = ViewOptions("anyres_e2p", 90.0, 0.5).plan
    for panorama in panoramas[:3]:
        erp = to_erp_tensor(panorama)
        views = erp_to_views(erp, plan, size)
        rolled = erp_to_views(erp.roll(erp.shape[-1] // 2, -1), plan, size)
        torch.testing.assert_close(rolled[1:], views[1:].roll(4, 0), rtol=0, atol=1e-4)
        torch.testing.assert_close(rolled[0], views[0].roll(size // 2, -1), rtol=0, atol=1e-4)


def test_a_large_panorama_is_reduced_before_it_is_sampled_so_that_it_does_not_alias():
    rng = np.random.default_rng(0)
    noise = torch.tensor(rng.random((3, 1024, 2048)), dtype=torch.float32)
    views = erp_to_views(noise, ViewOptions("anyres_e2p", 90.0, 0.5).plan, 64)
    assert views[1:].std() < 0.15  # bilinear sampling alone would leave about 0.2


@pytest.mark.parametrize("strategy", ["anyres_e2p", "anyres_tiles", "cubemap", "sliding_window", "resize"])
@pytest.mark.parametrize("width", [4096, 2048, 1502, 512])
def test_opencv_and_torch_give_the_same_views_to_half_a_grey_level(mosaic, strategy, width):
    pytest.importorskip("cv2")
    erp = torch.from_numpy(np.array(mosaic.resize((width, width // 2)))).permute(2, 0, 1)
    plan = ViewOptions(strategy, 90.0, 0.5).plan
    for size in (64, 256):
        by_opencv, by_torch = (erp_to_views(erp, plan, size, backend) for backend in ("opencv", "torch"))
        assert by_opencv.std() > 20
        assert (by_opencv - by_torch).abs().max() < 0.52  # two hundredths for float32


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU here")
@pytest.mark.parametrize("strategy", ["anyres_e2p", "anyres_tiles", "cubemap", "sliding_window", "resize"])
def test_a_gpu_gives_the_same_views_to_half_a_grey_level(mosaic, strategy):
    erp = torch.from_numpy(np.array(mosaic)).permute(2, 0, 1)
    plan = ViewOptions(strategy, 90.0, 0.5).plan
    on_gpu = erp_to_views(erp.cuda(), plan, 256)
    assert on_gpu.is_cuda
    assert (on_gpu.cpu() - erp_to_views(erp, plan, 256)).abs().max() < 0.52


@pytest.mark.parametrize(("size", "least"), [(256, 40), (384, 42)])
def test_views_are_close_to_a_supersampled_reference(mosaic, psnr, tmp_path, size, least):
    """Each pixel of the reference is the mean of 8 x 8 places in the panorama at full size."""
    mosaic.save(tmp_path / "a.jpg", quality=92)
    full = torch.from_numpy(np.array(Image.open(tmp_path / "a.jpg"))).permute(2, 0, 1)[None].float()
    plan = ViewOptions("anyres_e2p", 90.0, 0.5).plan
    plain = PanoramaImageProcessor(image_size=size, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    views = plain(tmp_path / "a.jpg", return_tensors="pt")["pixel_values"][0] * 255
    for index in (1, 3, 5):
        row, column, _ = View("erp").cells(plan.views[index].rays((8 * size, 8 * size)), (2048, 4096))
        place = np.stack([(2 * column + 1) / 4096 - 1, (2 * row + 1) / 2048 - 1], -1).astype(np.float32)
        dense = torch.nn.functional.grid_sample(
            full, torch.from_numpy(place)[None], padding_mode="border", align_corners=False
        )
        reference = torch.nn.functional.avg_pool2d(dense, 8)[0]
        assert psnr(views[index], reference, 255) > least


def test_prepared_views_are_kept_and_used_again(mosaic, tmp_path, monkeypatch):
    mosaic.resize((1024, 512)).save(tmp_path / "a.png")
    processor, kept = PanoramaImageProcessor(image_size=32), tmp_path / "kept"
    fresh = processor(tmp_path / "a.png", return_tensors="pt")["pixel_values"]
    first = processor(tmp_path / "a.png", cache_dir=kept, return_tensors="pt")["pixel_values"]
    assert (first - fresh).abs().max() <= 0.5 / 127.5 + 1e-6
    other_options = [{"image_size": 48}, {"fov_deg": 80.0}, {"yaw_offsets": [10.0]}, {"align_heading": True}]
    for options in other_options:
        processor(tmp_path / "a.png", cache_dir=kept, return_tensors="pt", **options)
    assert len(list(kept.rglob("*.safetensors"))) == 1 + len(other_options)

    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())  # the same content under another name
    monkeypatch.setattr("panorama_vlm.image_processing_panorama.read_panorama", None)  # nothing is decoded any more
    for source in (tmp_path / "a.png", str(tmp_path / "b.png"), (tmp_path / "b.png").read_bytes()):
        again = processor(source, cache_dir=kept, return_tensors="pt")["pixel_values"]
        assert torch.equal(again, first)
    # Mean and standard deviation are applied to what is kept.
    scaled = processor(tmp_path / "a.png", cache_dir=kept, image_std=(1, 1, 1), return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(scaled, first / 2)


def test_prepared_views_are_those_of_the_colours_of_a_palette(panoramas, tmp_path):
    """Equal indices under another palette, or with another colour transparent, are another image."""
    processor = PanoramaImageProcessor(image_size=32, cache_dir=tmp_path)
    first, second, third = (panoramas[0].quantize(16) for _ in range(3))
    second.putpalette(bytes(255 - value for value in first.getpalette()))
    third.info["transparency"] = 3
    for image in (first, second, third):
        found = processor(image, return_tensors="pt")["pixel_values"]
        wanted = processor(image.convert("RGBA"), return_tensors="pt")["pixel_values"]
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)
    assert len({content_digest(image) for image in (first, second, third, first.copy())}) == 3
    grey, other = (panoramas[0].convert("L") for _ in range(2))
    other.info["transparency"] = 7
    assert content_digest(grey) != content_digest(other)


def test_a_torn_file_in_the_cache_is_made_again_and_the_folder_is_not_saved_with_the_processor(
    panoramas, tmp_path, caplog
):
    processor = PanoramaImageProcessor(image_size=32, cache_dir=tmp_path / "kept")
    first = processor(panoramas[0], return_tensors="pt")["pixel_values"]
    (file,) = (tmp_path / "kept").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:100])
    again = processor(panoramas[0], return_tensors="pt")["pixel_values"]
    assert torch.equal(again, first)
    assert "cannot be read and are made again" in caplog.text
    assert [path.suffix for path in (tmp_path / "kept").rglob("*.*")] == [".safetensors"]
    processor.save_pretrained(tmp_path / "saved")
    assert "kept" not in (tmp_path / "saved" / "preprocessor_config.json").read_text()


def test_workers_of_a_data_loader_make_the_same_views(mosaic, tmp_path):
    processor = PanoramaImageProcessor(image_size=64)
    mosaic.save(tmp_path / "a.jpg")
    here = processor(tmp_path / "a.jpg", return_tensors="pt")["pixel_values"]  # OpenCV's threads run before the fork
    loader = torch.utils.data.DataLoader(
        [tmp_path / "a.jpg"] * 4,
        batch_size=2,
        num_workers=2,
        collate_fn=lambda batch: processor(batch, return_tensors="pt"),
    )
    for batch in loader:
        torch.testing.assert_close(batch["pixel_values"], here.expand(2, -1, -1, -1, -1))


def test_values_are_normalised_with_mean_and_std(panoramas):
    plain = PanoramaImageProcessor(image_size=32, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    other = PanoramaImageProcessor(image_size=32, image_mean=(0.1, 0.2, 0.3), image_std=(0.5, 0.6, 0.7))
    a, b = (p(panoramas[0], return_tensors="pt")["pixel_values"] for p in (plain, other))
    expected = (a - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.5, 0.6, 0.7]).view(3, 1, 1)
    torch.testing.assert_close(b, expected)


def test_options_of_a_call_hold_for_that_call(panoramas):
    processor = PanoramaImageProcessor(image_size=32)
    assert processor(panoramas[0], view_strategy="resize", return_tensors="pt")["pixel_values"].shape[1] == 1
    assert processor(panoramas[0], image_size=48, return_tensors="np")["pixel_values"].shape == (1, 9, 3, 48, 48)
    assert processor(panoramas[0], return_tensors="pt")["pixel_values"].shape == (1, 9, 3, 32, 32)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (42, TypeError, "got int"),
        (np.zeros((5, 8, 7), np.uint8), ValueError, r"got \[5, 8, 7\]"),
        (np.full((4, 8, 3), np.nan), ValueError, r"values in \[0, 1\]"),
        (np.full((4, 8, 3), 200.0), ValueError, r"values in \[0, 1\]"),
        (np.zeros((4, 8, 3), np.int64), ValueError, "uint8, uint16 or float"),
    ],
)
def test_what_is_no_panorama_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        PanoramaImageProcessor(image_size=32)(image, return_tensors="pt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlap_ratio": 1.5}, "overlap_ratio must be in"),
        ({"fov_deg": 180}, "fov_deg must be in"),
        ({"view_strategy": "fisheye"}, "view_strategy must be one of"),
        ({"image_size": 0}, "image_size must be positive"),
        ({"image_std": (0, 1, 1)}, "image_std must be positive"),
    ],
)
def test_options_are_checked_on_construction(options, message):
    with pytest.raises(ValueError, match=message):
        PanoramaImageProcessor(**options)


def test_names_and_defaults_are_those_of_the_config(tokenizer):
    from panorama_vlm import PanoramaConfig

    config, alone = PanoramaConfig(), PanoramaImageProcessor()
    fitting = PanoramaProcessor.from_config(config, tokenizer).image_processor
    for name in ("image_size", "view_strategy", "fov_deg", "overlap_ratio", "pitch_rows"):
        assert getattr(alone, name) == getattr(fitting, name) == getattr(config, name)


@pytest.mark.parametrize(
    ("strategy", "options"),
    [
        ("anyres_e2p", {}),
        ("e2p", {"pitch_rows": (-60.0, 0.0, 60.0), "pole_caps": True}),
        ("e2p", {"fov_deg": 65.0, "pitch_rows": (20.0,)}),
        ("cubemap", {}),
        ("sliding_window", {}),
        ("resize", {}),
    ],
)
def test_every_pixel_of_every_strategy_looks_where_its_ray_says(strategy, options):
    """An analytic panorama, whose colour is its direction: right to 0.05 of a pixel, seam and poles included."""
    options = {"fov_deg": 90.0, "overlap_ratio": 0.5, **options}
    plan, size = ViewOptions(strategy, **options).plan, 64
    views = erp_to_views(direction_image(1024), plan, size).double()  # [V, 3, 64, 64]
    rays = torch.nn.functional.normalize(views, dim=1).permute(0, 2, 3, 1).numpy()  # [V, H, W, 3]
    for view, colours in zip(plan.views, rays, strict=True):
        row, column, _ = view.cells(colours, (size, size))
        expected_row, expected_column = np.mgrid[:size, :size]
        assert np.abs(row - expected_row).max() < 0.05
        turn = (column - expected_column + size / 2) % size - size / 2 if view.is_global else column - expected_column
        assert np.abs(turn).max() < 0.05


@pytest.mark.parametrize(
    ("strategy", "options", "share"),
    [
        ("anyres_e2p", {"pitch_rows": (-45.0, 0.0, 45.0)}, 1.0),
        ("e2p", {"pitch_rows": (-45.0, 0.0, 45.0), "pole_caps": True}, 1.0),
        ("e2p", {}, 0.49),
        ("cubemap", {}, 1.0),
        ("sliding_window", {}, 1.0),
    ],
)
def test_views_painted_back_onto_the_sphere_give_a_smooth_panorama(strategy, options, share, psnr):
    smooth = direction_image(256)
    smooth = 0.5 + 0.25 * torch.sin(3 * smooth) + 0.25 * smooth.roll(1, 0)
    plan = ViewOptions(strategy, **{"fov_deg": 90.0, "overlap_ratio": 0.5, **options}).plan
    painted, shown = views_to_erp(erp_to_views(smooth, plan, 256), plan, 256)
    assert shown.float().mean() >= share - 1e-6
    assert psnr(painted[:, shown], smooth[:, shown]) > 40
    assert (painted[:, ~shown] == 0).all()


def test_values_of_tokens_are_painted_too_and_a_wrong_number_of_views_is_refused():
    plan = ViewOptions("e2p", 90.0, 0.5).plan
    values = torch.arange(8.0).view(8, 1, 1, 1).expand(8, 1, 4, 4)
    painted, shown = views_to_erp(values, plan, 64)
    assert painted[0, 32, 64] == pytest.approx(0, abs=1e-2)  # the middle of the front tile
    assert painted[0, 32, 96] == pytest.approx(2, abs=1e-2)  # the middle of the tile to the right
    assert not shown[0].any()
    with pytest.raises(ValueError, match=r"the plan's 8 views, got \[9, 1, 4, 4\]"):
        views_to_erp(torch.zeros(9, 1, 4, 4), plan, 64)


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("fov_degree", "fov_deg"), ("fov", "fov_deg"), ("overlap", "overlap_ratio"), ("pitch", "pitch_rows")],
)
def test_an_option_that_does_not_exist_is_answered_with_the_one_that_was_meant(panoramas, tmp_path, wrong, meant):
    message = f"unknown option '{wrong}' of PanoramaImageProcessor, did you mean '{meant}'"
    with pytest.raises(ValueError, match=message):
        PanoramaImageProcessor(**{wrong: 60})
    with pytest.raises(ValueError, match=message):
        PanoramaImageProcessor(image_size=32)(panoramas[0], **{wrong: 60})
    PanoramaImageProcessor(image_size=32).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        PanoramaImageProcessor.from_pretrained(tmp_path, **{wrong: 60})


def test_options_beside_a_file_are_honoured_and_checked(tmp_path):
    PanoramaImageProcessor(image_size=32).save_pretrained(tmp_path)
    assert len(PanoramaImageProcessor.from_pretrained(tmp_path, fov_deg=60).view_plan.views) == 13
    with pytest.raises(ValueError, match=r"overlap_ratio must be in \(0, 1\), got 1.5"):
        PanoramaImageProcessor.from_pretrained(tmp_path, overlap_ratio=1.5)


def test_a_file_with_keys_of_others_is_read_with_a_warning_and_keeps_them(tmp_path):
    PanoramaImageProcessor(image_size=32).save_pretrained(tmp_path)
    file = next(tmp_path.glob("*processor_config.json"))
    file.write_text(json.dumps({**json.loads(file.read_text()), "newer_option": [1]}))
    with pytest.warns(UserWarning, match="holds newer_option, not known here"):
        loaded = PanoramaImageProcessor.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path)
    assert json.loads(file.read_text())["newer_option"] == [1]
    assert json.loads(PanoramaImageProcessor.from_json_file(file).to_json_string())["newer_option"] == [1]


NO_EFFECT = {
    "do_resize": True,
    "do_rescale": False,
    "do_convert_rgb": True,
    "size": {"height": 8, "width": 8},
    "resample": 2,
    "data_format": "channels_first",
    "input_data_format": "channels_last",
    "disable_grouping": True,
}


@pytest.mark.parametrize("name", NO_EFFECT)
def test_an_option_of_other_image_processors_is_no_error_and_says_that_it_changes_nothing(panoramas, tmp_path, name):
    processor, given = PanoramaImageProcessor(image_size=32), {name: NO_EFFECT[name]}
    expected = processor(panoramas[0], return_tensors="pt")["pixel_values"]
    processor.save_pretrained(tmp_path)
    makers = (
        lambda: PanoramaImageProcessor(image_size=32, **given)(panoramas[0], return_tensors="pt"),
        lambda: PanoramaImageProcessor.from_pretrained(tmp_path, **given)(panoramas[0], return_tensors="pt"),
        lambda: processor(panoramas[0], return_tensors="pt", **given),
    )
    for make_views in makers:
        with pytest.warns(UserWarning, match=f"{name} has no effect on PanoramaImageProcessor"):
            views = make_views()["pixel_values"]
        assert torch.equal(views, expected)


def test_what_transformers_hands_over_passes_without_a_word(panoramas, tmp_path, recwarn):
    processor = PanoramaImageProcessor(image_size=32, processor_class="PanoramaProcessor", feature_extractor_type="x")
    processor(panoramas[0], return_tensors="np", device="cpu", data_format=None, do_resize=None)
    processor.save_pretrained(tmp_path)
    names = {"trust_remote_code": True, "image_token": "<image>", "padding_side": "left", "code_revision": "main"}
    PanoramaImageProcessor.from_pretrained(tmp_path, _from_auto=True, **names)
    assert not [str(warning.message) for warning in recwarn]


def test_what_is_neither_images_nor_a_named_option_is_an_error(panoramas):
    with pytest.raises(TypeError, match="positional argument"):
        PanoramaImageProcessor(image_size=32)(panoramas[0], 60.0)


def test_a_file_named_again_in_a_batch_is_read_once_for_each_way_it_is_shown(tmp_path, monkeypatch):
    processor = PanoramaImageProcessor(image_size=32)
    paths = []
    for seed in range(2):
        pixels = np.random.default_rng(seed).integers(0, 256, (64, 128 - 32 * seed, 3), dtype=np.uint8)
        paths.append(str(tmp_path / f"{seed}.png"))
        Image.fromarray(pixels).save(paths[-1])
    read = []
    own = image_processing_panorama.read_panorama
    monkeypatch.setattr(image_processing_panorama, "read_panorama", lambda *a, **k: read.append(a) or own(*a, **k))
    named, offsets = [paths[0], paths[1], paths[0], paths[1], paths[0]], [0, 0, 90, 0, 0]
    together = processor(named, yaw_offsets=offsets, return_tensors="pt")
    assert len(read) == 3
    for number, (path, offset) in enumerate(zip(named, offsets, strict=True)):
        alone = processor([path], yaw_offsets=[offset], return_tensors="pt")
        assert torch.equal(together["pixel_values"][number], alone["pixel_values"][0])
        if "view_mask" in together:
            mask = alone.get("view_mask", torch.ones_like(together["view_mask"][:1]))
            assert torch.equal(together["view_mask"][number], mask[0])
