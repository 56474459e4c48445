import json
import math
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from panorama_vlm import pictures
from panorama_vlm.evaluation.bootstrap import SEED
from panorama_vlm.geometry_panorama import View, ViewOptions, owned_tokens, plan_rays, ray_angles
from panorama_vlm.pictures import (
    Features,
    Saliency,
    accuracy_by_direction,
    draw_curves,
    draw_directions,
    draw_features,
    draw_matches,
    draw_saliency,
    draw_views,
    heat_map,
    hottest,
    new_figure,
    outline,
    paint_tokens,
    principal_components,
    read_run,
    saliency,
    to_image,
    token_features,
)
from panorama_vlm.pictures.__main__ import main, make_parser
from panorama_vlm.pictures.runs import STYLES
from panorama_vlm.pipeline_panorama import PanoramaPipeline
from panorama_vlm.places_panorama import SECTORS
from panorama_vlm.train.card import COLOURS, smooth
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
PLANS = [
    ViewOptions(),
    ViewOptions("e2p", pole_caps=True),
    ViewOptions("cubemap"),
    ViewOptions("anyres_e2p", pitch_rows=(-45, 0, 45)),
    ViewOptions("sliding_window"),
    ViewOptions("resize"),
]


def run(*arguments):
    main([str(each) for each in arguments])


def refused(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        run(*arguments)
    assert exit.value.code == 2
    return capsys.readouterr().err


# Views and matches


def test_the_picture_shows_each_tile_in_its_colour_on_the_panorama_and_below_it(panoramas):
    plan = ViewOptions("anyres_e2p", 90.0, 0.5).plan
    figure = draw_views(panoramas[0], plan, view_size=96)
    above, *below = figure.axes
    assert len(above.lines) == len(plan.tiles) == 8
    assert [text.get_text() for text in above.texts] == [str(index) for index in plan.tiles]
    pixels = np.array(to_image(figure), float)
    for index, line in zip(plan.tiles, above.lines, strict=True):
        frame = below[index].spines["left"].get_edgecolor()[:3]
        assert to_rgb(line.get_color()) == pytest.approx(frame)
        assert below[index].get_title().startswith(f"{index}: yaw")
        is_colour = np.abs(pixels - 255 * np.array(frame)).max(-1) < 8
        assert is_colour.sum() > 500  # it is really drawn
    assert not below[9].axison  # no tenth view


def test_an_outline_is_where_the_tile_ends_and_is_cut_at_the_seam():
    front = outline(View("perspective", 0, 0, 90))
    assert (np.nanmin(front[:, 0]), np.nanmax(front[:, 0])) == pytest.approx((-45, 45), abs=1)
    assert np.isfinite(front).all()
    behind = outline(View("perspective", 180, 0, 90))
    assert np.isnan(behind).any(-1).sum() >= 2
    assert np.nanmax(np.abs(np.diff(behind[:, 0]))) < 180


def test_matches_by_rays_look_the_same_way_and_strips_do_not(panoramas):
    figure = draw_matches(panoramas[0], ViewOptions("anyres_e2p", 90.0, 0.5).plan, 0.5, view_size=64)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles[0].startswith("matched by rays: 0.00°")
    assert titles[1].startswith("matched as strips: 6.65°")  # docs: README
    for axes in figure.axes:
        (dots,) = axes.collections
        shades = dots.get_array()
        assert (shades[: len(shades) // 2] == shades[len(shades) // 2 :]).all()
    draw_matches(panoramas[0], ViewOptions("anyres_e2p", 110.0, 0.3).plan, 0.3, (8, 8), view_size=64)
    with pytest.raises(ValueError, match="take views that overlap"):
        draw_matches(panoramas[0], ViewOptions("tiles").plan, 0.5)


def test_the_command_draws_the_views_of_a_model_and_of_options(make, panoramas, tmp_path, capsys):
    _, processor = parts = make(fov_deg=110.0, pole_caps=True)
    for part in parts:
        part.save_pretrained(tmp_path / "model")
    panoramas[0].save(tmp_path / "panorama.png")
    for name in ("views", "matches"):
        for number, options in enumerate(([], ["--model", tmp_path / "model"], ["--fov-deg", 110, "--pole-caps"])):
            run(name, tmp_path / "panorama.png", "--output", tmp_path / f"{name}{number}.png", *options)
        pictures = [Image.open(tmp_path / f"{name}{number}.png") for number in range(3)]
        assert min(each.height for each in pictures) > 400
        if name == "views":
            assert np.array_equal(*(np.array(each) for each in pictures[1:]))
            assert not np.array_equal(*(np.array(each) for each in pictures[:2]))
    assert capsys.readouterr().out.count("picture: ") == 6


def test_what_is_not_there_is_named(tmp_path, capsys, panoramas):
    panoramas[0].save(tmp_path / "panorama.png")
    picture = tmp_path / "panorama.png"
    assert "nowhere.jpg" in refused(capsys, "views", tmp_path / "nowhere.jpg")
    assert "cannot load the processor of" in refused(capsys, "views", picture, "--model", tmp_path)
    assert "cannot load the model" in refused(capsys, "features", picture, tmp_path / "no-model")
    assert "cannot load the model" in refused(capsys, "saliency", tmp_path, picture, "What?")
    assert "is not there" in refused(capsys, "curves", tmp_path / "run")
    assert "holds no log" in refused(capsys, "curves", tmp_path)
    assert "holds no predictions.jsonl" in refused(capsys, "directions", tmp_path)
    assert "is no folder" in refused(capsys, "directions", tmp_path / "results")
    (tmp_path / "predictions.jsonl").write_text(json.dumps({"yaw": None, "right": True}) + "\n")
    assert "none of the 1 answers" in refused(capsys, "directions", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    assert "nothing yet" in refused(capsys, "curves", tmp_path)
    (tmp_path / "metrics.jsonl").write_text("loss\n{}\n")
    assert "line 1 of" in refused(capsys, "curves", tmp_path)
    with pytest.raises(ValueError, match="named twice"):
        draw_curves([tmp_path, tmp_path])


# Painted onto the sphere


@pytest.mark.parametrize("options", PLANS, ids=lambda options: options.view_strategy)
def test_each_direction_is_painted_by_a_token_that_shows_it_and_is_owned(options):
    plan, grid, height = options.plan, (6, 6), 48
    values = plan_rays(plan, grid).reshape(-1, 3)  # each token says which way it looks
    painted = paint_tokens(values, plan, grid, height=height)
    rays = View("erp").rays((height, 2 * height))
    seen = np.zeros(rays.shape[:2], bool)
    for view in plan.views:
        seen |= view.cells(rays, grid, margin=0.5)[2]
    assert (np.isfinite(painted).all(-1) == seen).all()
    # By brute force: no direction is painted by a token further away than the widest cell, none by one not owned.
    apart = np.degrees(np.arccos(np.clip((painted * rays).sum(-1)[seen], -1, 1)))
    cell = max(np.sqrt(view.solid_angles(grid).max() * 2) for view in plan.views)
    assert apart.max() < np.degrees(cell)
    owned = plan_rays(plan, grid)[owned_tokens(plan, grid)]
    assert (np.abs(painted[seen][:, None] - owned[None]).sum(-1).min(1) < 1e-9).all()


def test_the_owner_is_the_tile_whose_centre_is_nearest():
    plan, grid = ViewOptions("e2p").plan, (6, 6)
    values = np.repeat(np.arange(plan.num_views), 36)[:, None].astype(float)
    painted = paint_tokens(values, plan, grid, height=90)[45, :, 0]  # at the horizon
    yaws, _ = ray_angles(View("erp").rays((90, 180))[45])
    assert (painted == np.round(yaws / 45) % 8).all()


def test_principal_components_are_those_of_the_singular_value_decomposition():
    random = np.random.default_rng(0)
    sets = [random.normal(size=(n, 8)) @ random.normal(size=(8, 8)) + 5 for n in (40, 70)]
    scores, shares = principal_components(sets)
    joined = []
    for each in sets:
        centred = each - each.mean(0)
        joined.append(centred / np.linalg.norm(centred) * math.sqrt(len(centred)))
    u, s, _ = np.linalg.svd(np.concatenate(joined), full_matrices=False)
    expected = (u * s)[:, :3]
    found = np.concatenate(scores)
    assert np.abs(found) == pytest.approx(np.abs(expected), abs=1e-9)
    assert shares == pytest.approx((s**2 / (s**2).sum())[:3])
    assert scores[0].shape == (40, 3)
    with pytest.raises(ValueError, match="3 components take at least"):
        principal_components([np.zeros((5, 2))])


def test_features_of_one_kind_share_their_components_and_the_titles_say_so(make, panoramas):
    found = []
    for number in range(2):
        torch.manual_seed(number)
        model, processor = make()
        found += [token_features(model.eval(), processor, panoramas[0], kind) for kind in ("tower", "resampler")]
    pixels = processor.image_processor(panoramas[0], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model.get_image_features(pixels).last_hidden_state[0].flatten(0, 1)
    assert found[3].tokens == pytest.approx(expected.numpy(), abs=1e-5)
    titles = [axes.get_title(loc="left") for axes in draw_features(panoramas[0], found[:3], height=32).axes]
    assert titles[0] == ""
    assert ["shared" in title for title in titles[1:]] == [True, False, True]
    with pytest.raises(ValueError, match="'tower' or 'resampler', got 'projection'"):
        token_features(model, processor, panoramas[0], "projection")


def test_a_marked_direction_has_a_colour_of_its_own(panoramas):
    plan, grid = ViewOptions("e2p").plan, (6, 6)
    rays = plan_rays(plan, grid).reshape(-1, 3)
    marked = rays @ View("perspective", 90).rays((1, 1))[0, 0] > 0.95
    tokens = np.random.default_rng(0).normal(size=(len(rays), 4)) * 0.01 + marked[:, None] * [0, 0, 9, 0]
    axes = draw_features(panoramas[0], [Features("one", "tower", tokens, plan, grid)], height=90).axes[1]
    lightness = np.array(Image.fromarray(np.asarray(axes.images[0].get_array())).convert("L"), float)
    bright = lightness > (lightness.min() + lightness.max()) / 2 + 20
    rows, columns = np.nonzero(bright)
    assert (columns.mean() + 0.5) / 180 * 360 - 180 == pytest.approx(90, abs=6)
    assert 90 - (rows.mean() + 0.5) / 90 * 180 == pytest.approx(0, abs=6)


@pytest.mark.slow
def test_the_command_paints_features_and_heat_maps(make, panoramas, tmp_path, capsys):
    panoramas[0].save(tmp_path / "panorama.png")
    for name in ("before", "after"):
        for part in make():
            part.save_pretrained(tmp_path / name)
    out = tmp_path / "out.jpg"
    run("features", tmp_path / "panorama.png", tmp_path / "before", tmp_path / "after", "--output", out)
    assert Image.open(out).height > 1000
    run("saliency", tmp_path / "before", tmp_path / "panorama.png", "What?", "--answer", "a road", "--output", out)
    assert "a road" in capsys.readouterr().out and Image.open(out).width > 900


# Where an answer looked


def asked(panorama, words="What is behind me?"):
    return {"panorama": panorama, "question": words}


def test_the_heat_map_is_at_the_direction_that_the_answer_depends_on(make, panoramas, monkeypatch):
    """A model whose answer depends on the tokens of one direction alone: on the norm of what looks there."""
    model, processor = make()
    pipe = PanoramaPipeline(model.eval(), processor=processor)
    wanted = View("perspective", 100, 0).rays((1, 1))[0, 0]
    body = model.model
    rays = torch.tensor(plan_rays(body.view_plan, body.token_grid)[owned_tokens(body.view_plan, body.token_grid)])
    looks = rays @ torch.tensor(wanted) > math.cos(math.radians(15))

    def forward(input_ids, mm_encoder_outputs, logits_to_keep, **_):
        (tokens,) = mm_encoder_outputs["image"].pooler_output
        logits = torch.zeros(1, logits_to_keep, len(processor.tokenizer))
        logits[..., int(input_ids[0, -1])] = (tokens[looks] ** 2).sum()
        return type("Output", (), {"logits": logits})

    monkeypatch.setattr(model, "forward", forward)
    found = saliency(pipe, asked(panoramas[0]), "road", height=90)
    row, column = np.unravel_index(found.heat.argmax(), found.heat.shape)
    peak = View("erp").rays((90, 180))[row, column]
    assert math.degrees(math.acos(min(1.0, float(peak @ wanted)))) < 30  # cells are 22 degrees wide
    far = View("erp").rays((90, 180)) @ wanted < math.cos(math.radians(60))
    assert found.heat[far].max() == 0
    areas = View("erp").solid_angles((90, 180))
    assert (found.heat * areas).sum() / areas.sum() == pytest.approx(1)


@pytest.mark.parametrize("options", [{}, {"position_encoding": "panorope"}, {"token_selection": "all"}], ids=str)
def test_the_scores_are_gradients_of_the_whole_model_which_stays_as_it_was(make, panoramas, options, monkeypatch):
    model, processor = make(**options)
    pipe = PanoramaPipeline(model.eval(), processor=processor)
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    held = {}

    def watched(model, scores, given, height):
        held["scores"] = scores
        return heat_map(model, scores, given, height)

    monkeypatch.setattr("panorama_vlm.pictures.heat.heat_map", watched)
    with torch.inference_mode():
        found = saliency(pipe, asked(panoramas[0]), "a long road", height=16)
    assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters()) and not model.training
    assert model.config.text_config._attn_implementation == "sdpa"
    # The loss that training has, from pixels on, with the gradient kept where the projection ends.
    inputs = pipe.preprocess(asked(panoramas[0]))["inputs"]
    ids = processor.tokenizer(found.answer, return_tensors="pt")["input_ids"]
    labels = torch.cat([torch.full_like(inputs["input_ids"], -100), ids], 1)
    given = {**inputs, "input_ids": torch.cat([inputs["input_ids"], ids], 1)}
    model.model.projection.register_forward_hook(
        lambda module, _, output: held.update(out=output) or output.retain_grad()
    )
    given["attention_mask"] = torch.ones_like(labels)
    (model(**given, labels=labels).ar_loss * ids.shape[1]).backward()
    assert held["scores"] == pytest.approx(held["out"].grad[0].norm(dim=-1).numpy(), rel=1e-3, abs=1e-7)


def test_a_heat_map_adds_up_to_the_scores_of_the_tokens(make):
    """What a token shows gets its score: of a plan that shows each direction once, the integral over its cell."""
    model, _ = make(view_strategy="cubemap")
    plan, grid = model.model.view_plan, model.model.token_grid
    scores = np.random.default_rng(0).random(plan.num_views * grid[0] * grid[1])
    heat = heat_map(model, scores, {}, 180)
    areas = View("erp").solid_angles((180, 360)) / (4 * math.pi)
    rays = View("erp").rays((180, 360))
    for index in (0, 7, len(scores) - 1):
        view, cell = divmod(index, grid[0] * grid[1])
        row, column, inside = plan.views[view].cells(rays, grid, margin=0.5)
        own = inside & (np.rint(row) == cell // grid[1]) & (np.rint(column) == cell % grid[1])
        assert (heat * areas)[own].sum() == pytest.approx(scores[index] / scores.sum(), rel=0.05)


def test_what_the_model_says_is_looked_into_with_further_and_without_unseen_views(make, panoramas):
    model, processor = make()
    pipe = PanoramaPipeline(model.eval(), processor=processor)
    words = {"type": "text", "text": "What?"}
    image = {"type": "image", "image": panoramas[0], "further_views": [(100.0, 20.0, 40.0)]}
    found = saliency(pipe, {"messages": [{"role": "user", "content": [image, words]}]}, height=32, max_new_tokens=3)
    assert found.answer and found.heat.shape == (32, 64) and (found.heat >= 0).all()
    narrow = Image.new("RGBA", (128, 64), (90, 90, 90, 0))
    narrow.paste((200, 30, 30, 255), (40, 16, 88, 48))
    partial = saliency(pipe, asked(narrow), "red", height=32)
    assert partial.heat[:, :8].max() == 0 or model.config.view_plan.views[0].is_global
    with pytest.raises(ValueError, match="of one panorama, got 2"):
        saliency(pipe, {"messages": [{"role": "user", "content": [image, image, words]}]}, "a")
    with pytest.raises(ValueError, match="empty answer"):
        saliency(pipe, asked(panoramas[0]), "")


def test_the_hottest_tenth_is_a_tenth_of_the_sphere_and_a_line_is_around_it(panoramas):
    heat = np.random.default_rng(0).random((64, 128))
    inside = hottest(heat)
    areas = View("erp").solid_angles((64, 128))
    assert areas[inside].sum() / areas.sum() == pytest.approx(0.1, abs=1e-3)
    assert heat[inside].min() >= heat[~inside].max()
    figure = draw_saliency(panoramas[0], Saliency("yes, $5", heat), "Is it?")
    assert figure.axes[0].get_title(loc="left") == "Is it?\nyes, \\$5" and len(figure.axes) == 2
    assert len(draw_saliency(panoramas[0], Saliency("yes", heat), bar=False).axes) == 1


# Curves and directions


def test_curves_show_what_was_logged(tmp_path):
    for name in ("a", "b"):
        for stage in ("vision", "finetune"):
            log = tmp_path / name / "logs" / stage / "metrics.jsonl"
            log.parent.mkdir(parents=True)
            lines = [
                {"stage": stage, "step": step, "loss": 2 / step, "learning_rate/resampler": 1e-3}
                | {"learning_rate/projection": 1e-3 if stage == "vision" else 2e-3}
                | ({"retrieval": 0.5} if stage == "vision" else {})
                for step in range(1, 21)
            ]
            lines.append({"stage": stage, "step": 20, "eval_loss": 0.3, "eval_perplexity": 1.4})
            log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    history = read_run(tmp_path / "a")
    assert list(history) == ["finetune", "vision"] and history["vision"][-1]["eval_loss"] == 0.3
    assert history["vision"][-1]["loss"] == 0.1  # the evaluation took nothing from the step
    one = draw_curves([tmp_path / "a"])
    loss = one.axes[0]
    assert [axes.get_title() for axes in one.axes[:2]] == ["vision", "finetune"]
    assert loss.lines[0].get_ydata() == pytest.approx(2 / np.arange(1, 21))
    assert loss.lines[1].get_ydata() == pytest.approx(smooth(2 / np.arange(1, 21)))
    assert loss.lines[2].get_ydata() == [0.3]
    rates = [[text.get_text() for text in legend.get_texts()] for axes in one.axes if (legend := axes.get_legend())]
    assert ["projection", "resampler"] in rates  # different ones; of stage vision they are one line
    assert len(one.axes[2].lines) == 1 and not one.axes[5].axison  # retrieval of stage finetune
    two = draw_curves([tmp_path / "a", tmp_path / "b"])
    assert [text.get_text() for text in two.legends[0].get_texts()] == ["a", "b"]
    assert {line.get_color() for line in two.axes[3].lines if len(line.get_xdata())} == set(COLOURS[:2])
    assert len(set(map(str, STYLES))) == 4
    (tmp_path / "c").mkdir()
    (tmp_path / "b" / "logs").rename(tmp_path / "c" / "logs")
    assert read_run(tmp_path / "c" / "logs" / "vision") == {"vision": read_run(tmp_path / "c")["vision"]}


def test_accuracy_by_direction_is_what_is_counted_by_hand(tmp_path):
    random = np.random.default_rng(1)
    rows = [
        {
            "variant": "0",
            "panorama": f"p{index % 9}",
            "yaw": float(random.uniform(-180, 180)),
            "right": bool(random.random() < 0.6),
        }
        for index in range(200)
    ]
    rows += [{"variant": "90", "panorama": "p0", "yaw": 0.0, "right": True}] * 50  # of a panorama that was turned
    rows += [{"variant": "0", "panorama": "p0", "yaw": None, "right": True}, {**rows[0], "right": None}]
    (tmp_path / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = accuracy_by_direction(tmp_path)
    assert [each.name for each in found] == list(SECTORS)
    panoramas = sorted({row["panorama"] for row in rows[:200]})
    draws = np.random.default_rng(SEED).integers(9, size=(1000, 9))
    for index, each in enumerate(found):
        low, high = 45 * index - 22.5, 45 * index + 22.5
        own = [row for row in rows[:200] if low <= row["yaw"] < high or low <= row["yaw"] + 360 < high]
        assert each.questions == len(own)
        assert each.accuracy == pytest.approx(sum(row["right"] for row in own) / len(own))
        means = []
        for draw in draws:
            drawn = [row["right"] for place in draw for row in own if row["panorama"] == panoramas[place]]
            means.append(np.mean(drawn) if drawn else np.nan)
        assert each.interval == pytest.approx(np.nanquantile(means, (0.025, 0.975)), abs=1e-9)
    axes = draw_directions([tmp_path]).axes[0]
    assert [bar.get_height() for bar in axes.patches] == pytest.approx([100 * each.accuracy for each in found])
    assert [bar.get_x() + bar.get_width() / 2 for bar in axes.patches] == pytest.approx(np.radians(45 * np.arange(8)))
    assert axes.get_theta_direction() == -1 and axes.get_theta_offset() == pytest.approx(math.pi / 2)  # front up


def test_two_evaluations_stand_side_by_side_and_an_empty_direction_is_empty(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        row = {"panorama": "p", "yaw": 3.0, "right": name == "one"}
        (tmp_path / name / "predictions.jsonl").write_text(json.dumps(row) + "\n")
    back = accuracy_by_direction(tmp_path / "one")[4]
    assert (back.name, back.questions, back.interval) == ("back", 0, None) and math.isnan(back.accuracy)
    figure = draw_directions([tmp_path / "one", tmp_path / "two"])
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["one", "two"]
    bars = figure.axes[0].patches
    assert len(bars) == 2 and bars[0].get_x() != bars[1].get_x() and bars[0].get_hatch() != bars[1].get_hatch()


def test_the_page_has_each_command_and_its_pictures_are_there_and_small():
    text = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
    commands = [line.split(None, 3)[3] for line in text.splitlines() if line.startswith("python -m panorama_vlm.pict")]
    for command in commands:
        make_parser().parse_args(shlex.split(command))
    listed = re.findall(r"^\| `(\w+)` \| `draw_\w+` \|", text, re.M)
    assert {command.split()[0] for command in commands} == {*listed} and len(listed) == 6
    assert all(hasattr(pictures, f"draw_{name}") for name in listed)
    for name in re.findall(r"\]\((\w+\.jpg)\)", text):
        assert (ROOT / "docs" / name).stat().st_size < 150_000


def test_a_figure_is_a_picture_of_its_size():
    assert to_image(new_figure(3, 2)).size == (360, 240)
