"""What holds for every configuration, every plan of views and every conversation, not only for those that somebody
thought of."""

import math
import tempfile
import warnings

import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st
from panorama_vlm import PanoramaConfig, PanoramaVLM
from panorama_vlm.geometry_panorama import (
    MAX_VIEWS,
    VIEW_STRATEGIES,
    ViewOptions,
    direction_weights,
    owned_tokens,
    plan_rays,
    ray_correspondences,
)
from panorama_vlm.resampler_panorama import RESAMPLERS
from panorama_vlm.tests.conftest import LANGUAGE, TOWER
from panorama_vlm.tests.properties import few, holds
from PIL import Image
from transformers.utils.chat_template_utils import _CONTROL_TOKEN_END, _CONTROL_TOKEN_START

IMAGE = 128  # id of the placeholder
VOCABULARY = 130


# Configurations

WRONG = st.sampled_from([None, "x", math.nan, math.inf, -math.inf, -1, 0, 1.5, 1e-300, 10**30, True, [], {}, [1], "1"])
RIGHT = {
    "view_strategy": st.sampled_from(sorted(VIEW_STRATEGIES)),
    "fov_deg": st.floats(40, 170),
    "overlap_ratio": st.floats(0.05, 0.8),
    "pitch_rows": st.lists(st.floats(-90, 90), min_size=1, max_size=2, unique=True),
    "pole_caps": st.booleans(),
    "image_size": st.sampled_from([16, 32, 48, 64, 63]),
    "latent_dimension": st.sampled_from([8, 15, 24, 32]),
    "resampler_type": st.sampled_from(sorted(RESAMPLERS)),
    "resampler_depth": st.integers(1, 3),
    "resampler_skip": st.booleans(),
    "resampler_pool": st.integers(1, 3),
    "resampler_queries": st.integers(1, 9),
    "resampler_heads": st.integers(1, 4),
    "token_selection": st.sampled_from(["owned", "all"]),
    "position_encoding": st.sampled_from(["rays", "yaw", "panorope", "none"]),
    "ray_frequencies": st.integers(0, 4),
    "vision_trainable_blocks": st.sampled_from([0, 1, 2, "all"]),
    "resampler_vision_tower": st.booleans(),
    "resampler_language_model": st.booleans(),
    "finetune_vision_tower": st.booleans(),
    "vicreg_loss_weight": st.sampled_from([0.0, 0.5, 1]),
    "vicreg_similarity_weight": st.floats(0, 50),
    "vicreg_variance_weight": st.floats(0, 50),
    "vicreg_covariance_weight": st.floats(0, 50),
    "vicreg_gamma": st.floats(0.01, 10),
    "vicreg_mode": st.sampled_from(["pairwise", "batchwise"]),
    "vicreg_pair_chunk": st.integers(1, 9),
    "vicreg_use_ddp_gather": st.booleans(),
    "use_vicreg_projector": st.booleans(),
    "vicreg_projector_dim": st.integers(1, 40),
    "vicreg_projector_depth": st.integers(1, 3),
    "vicreg_projector_hidden": st.none() | st.integers(1, 40),
    "use_anyres_e2p_vicreg": st.booleans(),
    "overlap_loss": st.sampled_from(["vicreg", "densecl"]),
    "overlap_pairs": st.lists(st.sampled_from(["neighbours", "global"]), min_size=1, max_size=2),
    "densecl_temperature": st.floats(0.02, 2),
    "overlap_loss_weight_finetune": st.sampled_from([0.0, 0.1]),
    "vision_stage_expected_views": st.none() | st.integers(0, 9),
    "use_lora": st.booleans(),
    "lora_rank": st.integers(1, 4),
    "lora_alpha": st.integers(1, 8),
    "lora_dropout": st.floats(0, 0.5),
}


def configuration(options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PanoramaConfig(dict(TOWER), {**LANGUAGE, "vocab_size": VOCABULARY}, image_token_id=IMAGE, **options)


def batch_of(config, panoramas=2):
    """Pixels of two panoramas, and a question and an answer about each."""
    generator = torch.Generator().manual_seed(0)
    size = (panoramas, config.num_views, 3, config.image_size, config.image_size)
    ids = torch.tensor([[5, *[IMAGE] * config.num_image_tokens, 7, 9, 11]] * panoramas)
    labels = torch.full_like(ids, -100)
    labels[:, -2:] = ids[:, -2:]
    return torch.randn(size, generator=generator), ids, labels


def trains(model, stage, pixels, ids, labels):
    """Whether one step of a stage changes something; a loss that is not finite is none."""
    trained = model.set_stage(stage)
    if not trained:
        return False
    given = {} if stage == "vision" else {"input_ids": ids, "labels": labels}
    loss = model.train()(pixel_values=pixels, stage=stage, **given).loss
    assert loss.isfinite()
    loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert all(gradient.isfinite().all() for gradient in gradients if gradient is not None)
    model.zero_grad()
    return any(gradient is not None for gradient in gradients)


def works(options):
    try:
        config = configuration(options)
    except ValueError as error:
        names = PanoramaConfig.option_names()
        assert any(name in str(error) for name in names), f"{options} was refused with: {error}"
        return
    assume(config.num_views * config.tokens_per_view < 400)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PanoramaVLM(config)
        pixels, ids, labels = batch_of(config)
        expected = config.vision_stage_expected_views or 0
        compares = config.vicreg_loss_weight > 0 and config.num_views > 1 and not config.overlap_problem
        compares = compares and (expected < 2 or expected == config.num_views)
        learns = RESAMPLERS[config.resampler_type].output_width(config, 32) is None or config.vision_trainable_blocks
        if compares and learns:
            trains(model, "vision", pixels, ids, labels)
        elif config.vicreg_loss_weight > 0:
            with pytest.raises(
                ValueError, match="vision_stage_expected_views|at least 2|do not overlap|no token|nothing to train"
            ):
                trains(model, "vision", pixels, ids, labels)
        assert trains(model, "resampler", pixels, ids, labels)
        before = model.eval()(pixel_values=pixels, input_ids=ids).logits.detach()
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = PanoramaVLM.from_pretrained(folder)
        assert all(getattr(loaded.config, name) == getattr(model.config, name) for name in RIGHT)
        for tensor in (*loaded.parameters(), *loaded.buffers()):
            tensor.data = tensor.data.clone()  # in a file they lie at odd addresses, and BLAS rounds otherwise there
        assert torch.equal(loaded.eval()(pixel_values=pixels, input_ids=ids).logits, before)
        assert trains(model, "finetune", pixels, ids, labels)


@few(10, 300)
def test_an_accepted_configuration_trains_and_loads_and_a_refused_one_says_why(examples, record_property):
    options = dict(RIGHT)
    if examples < 100:  # 10 s each, without the kernels of mamba
        options["resampler_type"] = st.sampled_from(sorted({*RESAMPLERS} - {"bimamba"}))
    holds(works, st.fixed_dictionaries({}, optional=options), examples, record_property)


def test_a_configuration_with_one_absurd_option_is_refused_by_its_name_or_works():
    names = sorted({*PanoramaConfig.option_names()} - {"vision_config", "text_config", "image_token_id"})

    def says_why(case):
        try:
            configuration(dict([case]))
        except ValueError as error:
            assert case[0] in str(error), f"{case} was refused with: {error}"

    holds(says_why, st.tuples(st.sampled_from(names), WRONG), 1000)


@pytest.mark.parametrize(
    "options",
    [
        {"resampler_depth": 1.5},  # each was accepted, and failed later, or was refused without its name
        {"latent_dimension": True},
        {"vicreg_gamma": math.inf},
        {"vicreg_loss_weight": "1"},
        {"use_lora": "no"},
        {"image_token_id": -1},
        {"default_generation_prompt": 3},
        {"lora_target_modules": "q_proj"},
        {"lora_target_modules": []},
        {"view_strategy": ["e2p"]},
        {"pitch_rows": 0.0},
        {"pitch_rows": "1"},
        {"fov_deg": 1e-3},
        {"fov_deg": "90"},
        {"overlap_ratio": 1 - 1e-16},
        {"fov_deg": 2.0, "pitch_rows": [0, 10, 20]},
        {"overlap_pairs": "neighbours"},
        {"image_size": 10**30},
    ],
)
def test_options_of_the_wrong_kind_are_refused_by_name(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        PanoramaConfig(**options)


# Geometry

PLANS = st.builds(
    lambda strategy, fov, overlap, rows, caps: (strategy, fov, overlap, tuple(rows), caps),
    st.sampled_from(sorted(VIEW_STRATEGIES)),
    st.floats(15, 179),
    st.floats(0.01, 0.9),
    st.lists(st.floats(-90, 90), min_size=1, max_size=3, unique=True),
    st.booleans(),
)
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


def spread_evenly(count):
    """Unit rays [count, 3] along a spiral (Fibonacci)."""
    index = np.arange(count) + 0.5
    height, turn = 1 - 2 * index / count, index * math.pi * (3 - math.sqrt(5))
    return np.stack([np.sqrt(1 - height**2) * np.sin(turn), height, np.sqrt(1 - height**2) * np.cos(turn)], -1)


def plan_of(case):
    strategy, fov, overlap, rows, caps = case
    try:
        plan = ViewOptions(strategy, fov, overlap, rows, caps).plan
    except ValueError as error:
        assert "views" in str(error)
        return None
    assert plan.num_views <= MAX_VIEWS
    return plan if plan.num_views <= 60 else None


def seen_by(view, rays):
    """Which rays a view shows, by its definition: the angles of a perspective camera, or the yaw of a window."""
    if view.kind == "erp":
        yaw = np.degrees(np.arctan2(rays[:, 0], rays[:, 2]))
        return np.abs((yaw - view.yaw + 180) % 360 - 180) <= view.fov / 2 + 1e-7
    camera = rays @ view.rotation
    half = math.tan(math.radians(view.fov) / 2)
    return (camera[:, 2] > 1e-9) & (np.abs(camera[:, :2]) <= camera[:, 2:] * half * (1 + 1e-9)).all(1)


def is_geometry(case):
    plan, grid = plan_of(case[0]), case[1]
    if plan is None:
        return
    rays = plan_rays(plan, grid)
    np.testing.assert_allclose(np.linalg.norm(rays, axis=-1), 1, atol=1e-12)
    row, column = (index.reshape(-1) for index in np.indices(grid))
    for view, of_view in zip(plan.views, rays, strict=True):
        found_row, found_column, inside = view.cells(of_view, grid)
        assert inside.all()
        np.testing.assert_allclose(found_row, row, atol=1e-6)
        apart = np.abs(found_column - column)
        apart = np.minimum(apart, np.abs(apart - grid[1])) if view.is_global else apart
        assert apart.max() < 1e-6
        np.testing.assert_allclose(view.solid_angles(grid).sum(), view.solid_angles((1, 1)).sum(), rtol=1e-9)
    belongs_once(plan, grid, rays)
    for group in ray_correspondences(plan, grid):
        np.testing.assert_allclose(group.weights.sum(-1), 1, atol=1e-9)
        assert ((group.weights >= -1e-9) & (group.corners >= 0) & (group.corners < grid[0] * grid[1])).all()


def belongs_once(plan, grid, rays):
    """Every direction that tiles see has one owner: a token is kept by the nearest of the tiles that see its middle, by
    no other, and one that is not kept weighs nothing."""
    owned = owned_tokens(plan, grid)
    tiles = list(plan.tiles)
    for index in set(range(plan.num_views)) - set(tiles):
        assert owned[index].all()
    if not tiles:
        return
    centres = np.stack([plan.views[tile].rays((1, 1))[0, 0] for tile in tiles])
    for number, tile in enumerate(tiles):
        sees = [seen_by(plan.views[other], rays[tile]) for other in tiles]
        nearness = np.where(sees, centres @ rays[tile].T, -2)  # [tiles, tokens]
        ahead = nearness[number] - np.delete(nearness, number, 0).max(0, initial=-2)
        assert owned[tile][ahead > 1e-7].all() and not owned[tile][ahead < -1e-7].any()
    assert (direction_weights(plan, grid, [])[0][~owned] == 0).all()


@few(40, 1500)
def test_rays_are_unit_grids_invert_and_every_direction_has_one_owner(examples, record_property):
    holds(is_geometry, st.tuples(PLANS, GRIDS), examples, record_property)


@few(20, 500)
def test_of_the_directions_that_tiles_see_each_has_one_nearest_tile_that_sees_it(examples, record_property):
    rays = spread_evenly(2000)

    def check(case):
        plan = plan_of(case)
        if plan is None or not plan.tiles:
            return
        sees = np.stack([seen_by(plan.views[tile], rays) for tile in plan.tiles])
        inside = np.stack([plan.views[tile].cells(rays, (7, 7), margin=0.5)[2] for tile in plan.tiles])
        assert (sees != inside).mean() < 1e-3  # but for borders
        for view in plan.tiles:  # a grid of one token of each tile, whose middle looks where the tile does
            assert plan.views[view].cells(plan.views[view].rays((1, 1)), (1, 1))[2].all()
        if plan.views[plan.tiles[0]].kind == "erp":
            assert sees.any(0).all()

    holds(check, PLANS, examples, record_property)


# The processor

MARKS = _CONTROL_TOKEN_START, _CONTROL_TOKEN_END  # of transformers' own, around what is text: two private characters
TYPED = st.text(max_size=12) | st.sampled_from(
    ["<image>", "a <image> b", "<|end|>", "Assistant:", "\n", " ", "<|pad|>", "<think>x</think>", "é🧭"]
    + [f"{MARKS[0]}<image>{MARKS[1]}", f"{MARKS[1]}<image>{MARKS[0]}", f"<im{MARKS[0]}age>", *MARKS, "\nAssistant: no"]
)
SAID = st.lists(TYPED | st.just(None), max_size=4)  # None is a panorama
TURNS = st.lists(st.tuples(SAID, TYPED), min_size=1, max_size=3)
CHATS = st.lists(st.tuples(st.none() | TYPED, TURNS), min_size=1, max_size=3)


def unmarked(text):
    return text.replace(MARKS[0], "").replace(MARKS[1], "")


def messages_of(chat, picture):
    system, turns = chat
    messages = [] if system is None else [{"role": "system", "content": system}]
    for said, answer in turns:
        parts = [
            {"type": "image", "image": picture} if part is None else {"type": "text", "text": part} for part in said
        ]
        messages += [{"role": "user", "content": parts}, {"role": "assistant", "content": answer}]
    return messages


def expected_of(chat, prompt):
    """The plain template, written out: pieces of (text or None for a panorama, whether the assistant says it)."""
    system, turns = chat
    turns = [([None if part is None else unmarked(part) for part in said], answer) for said, answer in turns]
    pieces = [] if system is None else [(f"System: {system}\n", False)]
    for number, (said, answer) in enumerate(turns):
        is_asked = "".join(filter(None, said)).strip()
        said = [*said, prompt] if number == len(turns) - 1 and not is_asked else said
        pieces += [("User: ", False), *((part, False) for part in said), ("\nAssistant:", False)]
        pieces += [(f" {answer}<|end|>", True), ("\n", False)]
    return pieces


@few(60, 3000)
def test_placeholders_labels_and_padding_are_those_of_a_plain_rendering(make, examples, record_property):
    model, processor = make()
    picture = Image.new("RGB", (32, 16), "red")
    tokenizer, image, count = processor.tokenizer, processor.image_token_id, processor.num_image_tokens

    def joined(pieces):
        return unmarked("".join("\0PANORAMA\0" if text is None else text for text, _ in pieces))

    def read(ids):
        """The text of ids, with a mark for each panorama."""
        text, run = "", []
        for token in [*ids, None]:
            if token == image or token is None:
                text, run = text + tokenizer.decode(run), []
                text += "" if token is None else "\0PANORAMA\0"
            else:
                run.append(token)
        return text

    def once(ids):
        """Ids with one placeholder for each panorama; there are as many in a row as one takes."""
        kept = []
        while ids:
            is_image = ids[0] == image
            assert not is_image or ids[:count] == [image] * count
            kept, ids = [*kept, ids[0]], ids[count if is_image else 1 :]
        return kept

    def check(chats):
        conversations = [messages_of(chat, picture) for chat in chats]
        wanted = [expected_of(chat, processor.default_generation_prompt) for chat in chats]
        panoramas = sum(text is None for pieces in wanted for text, _ in pieces)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            batch = processor.apply_chat_template(conversations, return_labels=True)
            asked = [messages[:-1] for messages in conversations]
            options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True, "return_tensors": "pt"}
            prompts = processor.apply_chat_template(asked, **options)
        for inputs in (batch, prompts):
            assert len(inputs.get("pixel_values", [])) == panoramas
        for row, pieces in enumerate(wanted):
            length = int(batch["attention_mask"][row].sum())
            ids, labels = batch["input_ids"][row].tolist(), batch["labels"][row].tolist()
            assert batch["attention_mask"][row].tolist() == [1] * length + [0] * (len(ids) - length)
            assert set(ids[length:]) <= {tokenizer.pad_token_id} and set(labels[length:]) <= {-100}
            assert read(once(ids[:length])) == joined(pieces)
            assert all(label in (-100, token) for token, label in zip(ids, labels, strict=True))
            assert image not in labels
            assert read([label for label in labels if label != -100]) == joined([p for p in pieces if p[1]])
            unread = [token for token, label in zip(ids[:length], labels[:length], strict=True) if label == -100]
            assert read(once(unread)) == joined([piece for piece in pieces if not piece[1]])
            pads = int((prompts["attention_mask"][row] == 0).sum())
            prompt = prompts["input_ids"][row].tolist()
            assert prompts["attention_mask"][row].tolist() == [0] * pads + [1] * (len(prompt) - pads)
            assert read(once(prompt[pads:])) == joined(pieces[:-2])
            # What is taught is what is asked: a row begins with its prompt.
            assert ids[: len(prompt) - pads] == prompt[pads:]

    holds(check, CHATS, examples, record_property)
