"""The language loss: that of the plain form, in value and gradient, at the cost of what is supervised."""

import contextlib
import copy
import subprocess
import sys
import warnings

import pytest
import torch
from panorama_vlm import modeling_panorama
from panorama_vlm.language_loss_panorama import LogitTransform, chunked_cross_entropy
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

IGNORED = -100
BODY = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
# Attention with a soft cap is computed step by step, so that no kernel in float32 comes between.
LANGUAGES = {
    "qwen3": {"tie_word_embeddings": True},
    "llama": {"tie_word_embeddings": False},
    "gemma2": {"final_logit_softcapping": 2.0, "attn_implementation": "eager"},
    "gemma3_text": {"final_logit_softcapping": 2.0, "sliding_window": 8, "layer_types": ["full_attention"] * 2},
    "granite": {"logits_scaling": 8.0, "tie_word_embeddings": True},
    "cohere": {"logit_scale": 0.0625},
    "falcon_h1": {"lm_head_multiplier": 0.25, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "phi": {"tie_word_embeddings": False},  # its head has a bias
    "gpt_neox": {"tie_word_embeddings": False},  # its head is called embed_out
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 16, "max_position_embeddings": 512, "dropout": 0.0},
}


class Logits(TorchDispatchMode):
    """The most rows of any tensor [..., vocabulary] that is made while it is active."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.rows = vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            is_new = isinstance(tensor, torch.Tensor) and not func.is_view and func.overloadpacket.__name__ != "detach"
            if is_new and tensor.ndim and tensor.shape[-1] == self.vocab_size:
                self.rows = max(self.rows, tensor.numel() // self.vocab_size)
        return result


def plain_loss(logits, labels, num_items=None):
    """Mean cross-entropy of the next token, or the sum divided by `num_items`, from all logits."""
    logits, labels = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    if num_items is None:
        return F.cross_entropy(logits, labels, ignore_index=IGNORED)
    return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum") / num_items


def gradients(loss, model):
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    values = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True, retain_graph=True)
    return dict(zip(parameters, values, strict=True))


def assert_same_gradients(ours, plain, rtol=1e-10, atol=1e-12):
    assert ours.keys() == plain.keys()
    assert sum(value is not None for value in ours.values()) > 4
    for name, value in plain.items():
        assert (value is None) == (ours[name] is None), name
        if value is not None:
            torch.testing.assert_close(ours[name], value, rtol=rtol, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


@contextlib.contextmanager
def rows_at_a_time(monkeypatch, rows, vocab_size, itemsize=8):
    with monkeypatch.context() as patch:
        patch.setattr(modeling_panorama, "CHUNK_BYTES", rows * vocab_size * itemsize)
        yield


@pytest.fixture
def build(make, panoramas):
    """`build(language, dtype)` -> a model in training mode, a batch of two with padding, and its labels."""

    def built(language="qwen3", dtype=torch.float64, **options):
        config = {"model_type": language, **BODY, **LANGUAGES.get(language, {})}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            config[name] = None if language == "cohere" else 0
        options = {"use_lora": False, "lora_rank": 2, "lora_dropout": 0.0, "fov_deg": 120.0, **options}
        model, processor = make(language=config, **options)
        for name, parameter in model.named_parameters():  # so large that soft caps and scales show
            if parameter.ndim == 2 and ("head" in name or "embed" in name):
                nn.init.normal_(parameter, std=0.5)
        image = torch.full((1, model.config.num_image_tokens), model.config.image_token_id)
        words = torch.randint(2, 300, (2, 12), generator=torch.Generator().manual_seed(1))
        ids = torch.cat([image.repeat(2, 1), words], 1)
        mask = torch.ones_like(ids)
        mask[1, -3:] = 0
        labels = ids.masked_fill(ids == model.config.image_token_id, IGNORED)
        labels[:, : model.config.num_image_tokens + 4] = IGNORED
        labels[1, -3:] = IGNORED
        pixels = processor.image_processor(images=panoramas[:2], return_tensors="pt")["pixel_values"]
        model.to(dtype).set_stage("finetune")
        batch = {"pixel_values": pixels.to(dtype), "input_ids": ids, "attention_mask": mask, "labels": labels}
        return model.train(), batch

    return built


# The function


@pytest.mark.parametrize("rows", [1, 2, 7, 9, 10, 64])
@pytest.mark.parametrize("num_items", [None, 31, torch.tensor(31)])
def test_the_chunked_loss_is_the_plain_cross_entropy_whatever_the_chunk(rows, num_items):
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    head = nn.Linear(8, 17).double()
    labels = torch.randint(17, (3, 5))
    labels[0, 1], labels[2, 1:] = IGNORED, IGNORED  # 10 supervised
    transform = LogitTransform(scale=3.0, softcap=2.0)
    inputs = [hidden, *head.parameters()]

    loss = chunked_cross_entropy(hidden, head, labels, 17, num_items, transform, chunk_bytes=rows * 17 * 8)
    logits = 2.0 * torch.tanh(3.0 * head(hidden) / 2.0)
    expected = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / (num_items or 10)

    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for ours, plain in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-10, atol=1e-12)


def test_chunks_bound_the_logits_in_forward_and_backward():
    hidden, head = torch.randn(100, 8, requires_grad=True), nn.Linear(8, 50)
    with Logits(50) as seen:
        chunked_cross_entropy(hidden, head, torch.arange(100) % 50, 50, chunk_bytes=16 * 50 * 4).backward()
    assert seen.rows == 16


def test_one_chunk_calls_the_head_once():
    calls = []
    head = nn.Linear(8, 50)
    head.register_forward_hook(lambda *_: calls.append(1))
    hidden = torch.randn(100, 8, requires_grad=True)
    chunked_cross_entropy(hidden, head, torch.arange(100) % 50, 50, chunk_bytes=None).backward()
    assert len(calls) == 1


def test_dropout_in_the_head_is_the_same_when_its_logits_are_computed_again():
    """With a head that is nothing but dropout and a scale, the gradient shows which mask backward saw."""
    torch.manual_seed(0)
    hidden = torch.randn(20, 30, dtype=torch.float64, requires_grad=True)
    masks = []

    def head(x):
        masks.append(F.dropout(torch.ones_like(x), 0.5))
        return x * masks[-1]

    labels = torch.arange(20)
    loss = chunked_cross_entropy(hidden, head, labels, 30, chunk_bytes=7 * 30 * 8)
    mask = torch.cat(masks)
    expected = F.cross_entropy(hidden * mask, labels)
    torch.testing.assert_close(loss, expected)
    (ours,), (plain,) = torch.autograd.grad(loss, hidden), torch.autograd.grad(expected, hidden)
    torch.testing.assert_close(ours, plain)


def test_without_a_supervised_token_the_loss_is_zero_with_a_gradient_of_zeros():
    hidden, head = torch.randn(2, 5, 8, requires_grad=True), nn.Linear(8, 50)
    labels = torch.full((2, 5), IGNORED)
    with pytest.warns(UserWarning, match="no supervised token"):
        loss = chunked_cross_entropy(hidden, head, labels, 50)
    loss.backward()
    assert loss == 0 and not hidden.grad.any() and not head.weight.grad.any()
    for items in (0, 3, torch.tensor(0)):
        assert chunked_cross_entropy(hidden, head, labels, 50, num_items=items) == 0


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels must be \[2, 5\], one for each position, got \[2, 4\]"):
        chunked_cross_entropy(torch.zeros(2, 5, 8), nn.Linear(8, 50), torch.zeros(2, 4, dtype=torch.long), 50)


def test_half_precision_logits_are_compared_in_float32():
    torch.manual_seed(0)
    hidden, head = torch.randn(40, 8).bfloat16(), nn.Linear(8, 50).bfloat16()
    labels = torch.arange(40)
    loss = chunked_cross_entropy(hidden, head, labels, 50)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(head(hidden).float(), labels))


# The model


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
@pytest.mark.parametrize("language", LANGUAGES)
def test_loss_and_gradients_are_those_of_the_plain_form(build, monkeypatch, language, lora):
    targets = ["q_proj", "v_proj"] if language == "falcon_h1" else None  # peft cannot adapt its Mamba part
    model, batch = build(language, use_lora=lora, lora_target_modules=targets)
    if lora:  # adapters start at zero, and the gradient of one half with them
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.05)
    plain = plain_loss(model(**batch, return_logits=True).logits, batch["labels"])
    vocab_size = model.config.text_config.vocab_size
    with warnings.catch_warnings(), rows_at_a_time(monkeypatch, 3, vocab_size):
        warnings.simplefilter("error")  # no fallback
        output = model(**batch)
    assert output.logits is None
    torch.testing.assert_close(output.loss, plain, rtol=1e-10, atol=0)
    assert_same_gradients(gradients(output.loss, model), gradients(plain, model))


@pytest.mark.parametrize("language", LANGUAGES)
def test_training_makes_no_logits_of_more_positions_than_a_chunk(build, monkeypatch, language):
    model, batch = build(language, torch.float32)
    vocab_size = model.config.text_config.vocab_size
    with rows_at_a_time(monkeypatch, 4, vocab_size, itemsize=4), Logits(vocab_size) as seen:
        model(**batch).loss.backward()
    assert seen.rows == 4


@pytest.mark.parametrize("num_items", [7, torch.tensor(20)])
def test_the_sum_is_divided_by_the_number_of_items_that_is_given(build, num_items):
    model, batch = build()
    expected = plain_loss(model(**batch, return_logits=True).logits, batch["labels"], num_items)
    for with_logits in (False, True):
        output = model(**batch, num_items_in_batch=num_items, return_logits=with_logits)
        torch.testing.assert_close(output.loss.double(), expected, rtol=1e-10 if not with_logits else 1e-6, atol=0)


def test_micro_batches_add_up_to_the_batch_even_where_one_supervises_nothing(build):
    model, batch = build()
    batch["labels"][1] = IGNORED
    items = (batch["labels"][:, 1:] != IGNORED).sum()
    whole = model(**batch)
    parts = [
        model(**{name: value[i : i + 1] for name, value in batch.items()}, num_items_in_batch=items) for i in (0, 1)
    ]
    assert parts[1].loss == 0
    torch.testing.assert_close(parts[0].loss + parts[1].loss, whole.loss, rtol=1e-10, atol=0)
    assert_same_gradients(gradients(parts[0].loss + parts[1].loss, model), gradients(whole.loss, model))
    reached = gradients(parts[1].loss, model)
    assert all(value is not None and not value.any() for name, value in reached.items())


def test_padding_on_the_left_changes_nothing(build):
    model, batch = build()
    right = model(**batch).loss
    left = copy.deepcopy(batch)
    for name, fill in (("input_ids", 0), ("attention_mask", 0), ("labels", IGNORED)):
        left[name][1] = batch[name][1].roll(3)
        left[name][1, :3] = fill
    position_ids = (left["attention_mask"].cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(model(**left, position_ids=position_ids).loss, right, rtol=1e-10, atol=0)


def test_shifted_labels_may_be_given(build):
    model, batch = build()
    shifted = F.pad(batch["labels"], (0, 1), value=IGNORED)[:, 1:]
    torch.testing.assert_close(model(**batch, shift_labels=shifted).loss, model(**batch).loss)


def test_logits_come_outside_training_and_where_they_are_asked_for(build):
    model, batch = build("llama", torch.float32)
    shape = (2, batch["input_ids"].shape[1], model.config.text_config.vocab_size)
    assert model(**batch, return_logits=True).logits.shape == shape
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    assert model(**inputs).logits.shape == shape
    model.eval()
    with_logits, without = model(**batch), model(**batch, return_logits=False)
    assert with_logits.logits.shape == shape and without.logits is None
    torch.testing.assert_close(without.loss, with_logits.loss)


def test_a_loss_function_of_the_users_own_is_given_logits(build):
    model, batch = build("llama", torch.float32)
    model.loss_function = lambda logits, labels, **_: logits.square().mean()
    output = model(**batch)
    torch.testing.assert_close(output.loss, output.logits.square().mean())


def test_a_stage_that_is_set_trains_without_logits(build):
    model, batch = build("llama", torch.float32)
    model.eval().set_stage("resampler")
    output = model(**batch)
    assert output.logits is None and not model.model.language_model.training
    assert model.eval()(**batch).logits is not None


def test_the_overlap_loss_is_added_as_before(build):
    model, batch = build("llama", torch.float32, overlap_loss_weight_finetune=0.5)
    output = model(**batch)
    torch.testing.assert_close(output.loss, output.ar_loss + 0.5 * output.overlap_loss)
    torch.testing.assert_close(output.ar_loss, model(**batch, return_logits=True).ar_loss)


@pytest.mark.parametrize("modules", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}])
def test_adapters_on_the_head_are_used(build, monkeypatch, modules):
    from peft import LoraConfig, get_peft_model

    model, batch = build("llama")
    lora = LoraConfig(r=2, **{"target_modules": ["q_proj"], **modules}, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, lora)
    plain = plain_loss(model(**batch, return_logits=True).logits, batch["labels"])
    with rows_at_a_time(monkeypatch, 3, model.config.text_config.vocab_size):
        loss = model(**batch).loss
    torch.testing.assert_close(loss, plain, rtol=1e-10, atol=0)
    ours = gradients(loss, model)
    assert any("lm_head" in name and value is not None and value.any() for name, value in ours.items())
    assert_same_gradients(ours, gradients(plain, model))


def test_dropout_of_an_adapter_on_the_head_has_the_gradient_of_its_own_mask(build, monkeypatch):
    from peft import LoraConfig, get_peft_model

    model, batch = build("llama")
    lora = LoraConfig(r=2, target_modules=["lm_head"], lora_dropout=0.5, task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(model, lora)
    model(**batch)  # the head is found
    weight = next(p for name, p in model.named_parameters() if "lora_A" in name)
    direction = torch.randn_like(weight)

    def loss():
        torch.manual_seed(0)
        return model(**batch).loss

    with rows_at_a_time(monkeypatch, 3, model.config.text_config.vocab_size):
        (gradient,) = torch.autograd.grad(loss(), weight)
        with torch.no_grad():
            weight.add_(1e-6 * direction)
            above = loss()
            weight.sub_(2e-6 * direction)
            below = loss()
    torch.testing.assert_close((gradient * direction).sum(), (above - below) / 2e-6, rtol=1e-6, atol=1e-9)


def test_tied_embeddings_get_the_gradients_of_both_ends(build):
    model, batch = build("qwen3")
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert embeddings.weight is head.weight
    plain = plain_loss(model(**batch, return_logits=True).logits, batch["labels"])
    expected, ours = (torch.autograd.grad(loss, head.weight)[0] for loss in (plain, model(**batch).loss))
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_gradient_checkpointing_changes_nothing(build):
    model, batch = build("llama")
    expected = gradients(model(**batch).loss, model)
    model.gradient_checkpointing_enable()
    assert_same_gradients(gradients(model(**batch).loss, model), expected)


@pytest.mark.parametrize("lora", [False, True], ids=["whole", "lora"])
def test_the_first_step_under_autocast_has_every_gradient(build, lora):
    """Looking for the head happens in it, and must leave no copies of weights without gradient behind."""
    model, batch = build("llama", torch.float32, use_lora=lora)
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch)
        plain = model(**batch, return_logits=True).loss
    assert output.loss.dtype == torch.float32
    torch.testing.assert_close(output.loss, plain, rtol=1e-3, atol=1e-3)
    ours, expected = gradients(output.loss, model), gradients(plain, model)
    for name, value in expected.items():
        assert (value is None) == (ours[name] is None), name
        if value is not None:
            assert (ours[name] - value).norm() <= 0.05 * value.norm() + 1e-6, name


@pytest.mark.parametrize("language", ["gemma2", "granite", "cohere"])
def test_half_precision_weights_train_too(build, language):
    model, batch = build(language, torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss = model(**batch).loss
    torch.testing.assert_close(loss, model(**batch, return_logits=True).loss, rtol=0.02, atol=0.02)


def test_a_compiled_model_trains_to_the_same_gradients(build):
    model, batch = build("llama", torch.float32)
    expected_loss = model(**batch).loss
    expected = gradients(expected_loss, model)
    torch._dynamo.reset()
    loss = torch.compile(model, backend="eager")(**batch).loss
    torch.testing.assert_close(loss, expected_loss)
    assert_same_gradients(gradients(loss, model), expected, rtol=1e-4, atol=1e-6)


# Several processes

PROCESS = """
import sys
import torch
import torch.distributed as dist
from panorama_vlm import PanoramaConfig, PanoramaVLM, modeling_panorama
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

torch.set_num_threads(1)
dist.init_process_group("gloo")
tower = {"model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
         "num_attention_heads": 2, "image_size": 64, "patch_size": 16, "vision_use_head": False}
text = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 301}
text["tie_word_embeddings"] = sys.argv[1] == "ddp"

def build():
    torch.manual_seed(0)
    model = PanoramaVLM(PanoramaConfig(tower, text, image_token_id=300, latent_dimension=32, use_lora=False,
                                       fov_deg=120.0, use_vicreg_projector=False))
    model.set_stage("finetune")
    return model

def batch(model, rank, supervised):
    generator = torch.Generator().manual_seed(rank)
    images = torch.full((1, model.config.num_image_tokens), 300)
    ids = torch.cat([images, torch.randint(0, 299, (1, 12), generator=generator)], 1)
    labels = ids.clone()
    labels[:, : ids.shape[1] - supervised] = -100
    pixels = torch.randn(1, model.model.view_plan.num_views, 3, 64, 64, generator=generator)
    return {"pixel_values": pixels, "input_ids": ids, "labels": labels, "num_items_in_batch": 20}

alone = build()
model = trained = build()
if sys.argv[1] == "ddp":
    trained = DistributedDataParallel(model)
else:
    mesh = init_device_mesh("cpu", (2,))
    for part in [*model.model.language_model.layers, model.lm_head, model]:
        fully_shard(part, mesh=mesh)
modeling_panorama.CHUNK_BYTES = 2 * 301 * 4
for supervised in ((3, 9), (11, 0)):  # other numbers of chunks; none at all
    alone.zero_grad(), model.zero_grad()
    sum(alone(**batch(alone, rank, n), return_logits=True).loss for rank, n in enumerate(supervised)).backward()
    output = trained(**batch(model, dist.get_rank(), supervised[dist.get_rank()]))
    (2 * output.loss).backward()  # gradients are averaged over processes
    for (name, parameter), other in zip(model.named_parameters(), alone.parameters(), strict=True):
        if parameter.requires_grad:
            gradient = parameter.grad if sys.argv[1] == "ddp" else parameter.grad.full_tensor()
            torch.testing.assert_close(gradient, other.grad, rtol=1e-4, atol=1e-6, msg=lambda text: name + text)
del trained, output  # its reducer must not outlive the group: gloo's threads would end the process with SIGABRT
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_processes_with_other_numbers_of_supervised_tokens_get_the_gradients_of_one(kind, tmp_path):
    script = tmp_path / "process.py"
    script.write_text(PROCESS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*command, script, kind], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]


# The benchmark


@pytest.mark.soak
@pytest.mark.slow
def test_the_benchmark_runs_and_finds_equal_losses():
    command = [sys.executable, "-m", "panorama_vlm.benchmarks.train_step", "--smoke", "--threads", "1"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "all within 0.0001" in result.stdout and "times as fast as (b)" in result.stdout
