"""Optimizers and schedules against their formulas, written plainly in float64."""

import copy
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from panorama_vlm.train.checks import check_run
from panorama_vlm.train.config import SCHEDULES, StageConfig, load_config
from panorama_vlm.train.optimizers import MuonAndAdamW, hidden_matrices, make_optimizer, make_schedule


def orthogonalised(matrix):
    """Jordan et al. 2024: five steps of Newton-Schulz from the matrix divided by its Frobenius norm."""
    x = matrix / matrix.norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


def expected_by_muon(weight, gradients, rate, decay):
    """Momentum 0.95 with Nesterov's step, decoupled decay, 0.2 sqrt(max(A, B)) of Liu et al. 2025, equation 4."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient.double()
        update = orthogonalised(0.05 * gradient.double() + 0.95 * momentum)
        weight = (1 - rate * decay) * weight - rate * 0.2 * max(weight.shape) ** 0.5 * update
    return weight


def expected_by_adamw(weight, gradients, rate, decay):
    weight = weight.double()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        first = 0.9 * first + 0.1 * gradient.double()
        second = 0.999 * second + 0.001 * gradient.double() ** 2
        update = first / (1 - 0.9**step) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
        weight = (1 - rate * decay) * weight - rate * update
    return weight


def test_muon_and_adamw_make_the_steps_of_their_formulas_with_rates_and_decay_of_their_parts(make):
    model, _ = make(use_lora=False, finetune_vision_tower=True)
    trained = model.set_stage("finetune")
    options = StageConfig(
        optimizer="muon", learning_rate=1e-2, learning_rates={"language_model": 3e-3}, weight_decay=0.1
    )
    optimizer = make_optimizer(model, options)
    parameters = {name: parameter for name, parameter in model.named_parameters() if name in trained}
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    gradients = {name: [torch.randn_like(parameter) for _ in range(3)] for name, parameter in parameters.items()}
    for step in range(3):
        for name, parameter in parameters.items():
            parameter.grad = gradients[name][step]
        optimizer.step()
    by_muon = hidden_matrices(model)
    assert by_muon and set(trained) - by_muon
    for name, parameter in parameters.items():
        rate = 3e-3 if "language_model" in name else 1e-2
        decay = 0.1 if parameter.ndim > 1 else 0.0
        expected = expected_by_muon if name in by_muon else expected_by_adamw
        moved = expected(before[name], gradients[name], rate, decay) - before[name]
        error = (parameter.detach() - before[name] - moved).norm() / moved.norm()
        assert error < (0.03 if name in by_muon else 1e-4), name  # torch orthogonalises in bfloat16


def test_muon_is_for_matrices_between_the_first_and_the_last_layers(make):
    siglip2 = {"model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_patches": 16}
    siglip2 |= {"num_hidden_layers": 1, "num_attention_heads": 2, "patch_size": 16, "vision_use_head": False}
    language = {"model_type": "qwen3", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    language |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False}
    kinds = {"resampler_type": "perceiver", "resampler_queries": 4, "resampler_heads": 2, "resampler_depth": 1}
    model, _ = make(vision=siglip2, language=language, **kinds)
    by_muon = hidden_matrices(model)
    matrices = {name for name, parameter in model.named_parameters() if parameter.ndim > 1}
    assert matrices - by_muon == {
        "model.vision_tower.embeddings.patch_embedding.weight",  # a matrix here, a convolution in other towers
        "model.vision_tower.embeddings.position_embedding.weight",
        "model.resampler.queries.weight",
        "model.language_model.embed_tokens.weight",
        "lm_head.weight",
    }
    model.set_stage("finetune")  # with LoRA: matrices of the language model are frozen, their adapters are factors
    optimizer = make_optimizer(model, StageConfig(optimizer="muon"))
    lora = {parameter for name, parameter in model.named_parameters() if "lora_" in name}
    chosen = {parameter for group in optimizer.muon.param_groups for parameter in group["params"]}
    assert lora and not lora & chosen and all(parameter.ndim == 2 for parameter in chosen)
    every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert len(every) == len(set(every)) and set(every) == {p for p in model.parameters() if p.requires_grad}


def test_one_object_holds_the_state_of_both_and_goes_on_from_it(make):
    def steps(optimizer, count, seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(count):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step()

    def build():
        model, _ = make()
        model.set_stage("vision")
        return model, make_optimizer(model, StageConfig(optimizer="muon"))

    model, optimizer = build()
    steps(optimizer, 2, seed=1)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    saved = copy.deepcopy(optimizer.state_dict())
    again, other = build()
    again.load_state_dict(weights)
    other.load_state_dict(saved)
    assert isinstance(other, MuonAndAdamW) and len(other.state) == sum(p.requires_grad for p in model.parameters())
    for each in (optimizer, other):
        steps(each, 2, seed=2)
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_muon_without_matrices_is_an_error(make):
    model, _ = make()
    model.requires_grad_(False)
    model.model.resampler.layers[0].requires_grad_(True)  # a norm
    with pytest.raises(ValueError, match="no hidden matrix trains"):
        make_optimizer(model, StageConfig(optimizer="muon"))


def test_muon_with_deepspeed_is_refused_before_anything_is_loaded():
    deepspeed = SimpleNamespace(num_processes=2, gradient_accumulation_steps=1)
    deepspeed.distributed_type = DistributedType.DEEPSPEED
    with pytest.raises(ValueError, match="resampler.optimizer is 'muon'.*use data parallel or FSDP2"):
        check_run(load_config(["tiny.yaml", "--resampler.optimizer", "muon"]), deepspeed)


def rates(options, steps, peaks=(1.0,)):
    """Rates of each step, by the groups of an optimizer."""
    groups = [{"params": [torch.zeros(1, requires_grad=True)], "lr": peak} for peak in peaks]
    optimizer = torch.optim.AdamW(groups)
    schedule = make_schedule(optimizer, options, steps)
    found = []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize(
    ("steps", "warmup_ratio", "decay_ratio"), [(100, 0.05, None), (100, 0.0, 0.5), (37, 0.1, 0.2), (10, 0.5, 0.5)]
)
def test_a_rate_rises_stays_and_falls_in_a_line_over_the_last_share(steps, warmup_ratio, decay_ratio):
    options = StageConfig(schedule="warmup_stable_decay", warmup_ratio=warmup_ratio, decay_ratio=decay_ratio)
    rise, fall = int(steps * warmup_ratio), int(steps * (0.3 if decay_ratio is None else decay_ratio))
    expected = [min(1.0, step / rise if rise else 1.0, (steps - step) / fall) for step in range(steps)]
    for found, factor in zip(rates(options, steps, peaks=(2e-3, 5e-4)), expected, strict=True):
        assert found == pytest.approx([2e-3 * factor, 5e-4 * factor])
    assert 1.0 in expected and expected[-1] == pytest.approx(1 / fall)


def test_the_shortest_stages_have_a_schedule_too():
    options = StageConfig(schedule="warmup_stable_decay", warmup_ratio=0.1, decay_ratio=0.1)
    assert rates(options, 1) == [[1.0]] and rates(options, 2) == [[1.0], [1.0]]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_that_is_allowed_works(schedule):
    assert len(rates(StageConfig(schedule=schedule, warmup_ratio=0.1), 20)) == 20
