"""What vLLM's and SGLang's Transformers backends ask of a model, one by one, and a loop written in their way.

Of vLLM: vllm/model_executor/models/transformers/{base,causal,multimodal}.py; of SGLang:
python/sglang/srt/models/transformers.py and multimodal/processors/transformers_auto.py.
"""

import copy
import re

import pytest
import torch
from panorama_vlm import PanoramaModel, PanoramaVLM
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

pytestmark = pytest.mark.filterwarnings("ignore:.*not 2.1, and has no Photo Sphere data")


def engine_attention(module, query, key, value, attention_mask, attention_instances, scaling=None, **kwargs):
    """The engine's: causal, of the layer's own instance, whatever mask it is given."""
    attention_instances[module.layer_idx] += 1
    return sdpa_attention_forward(module, query, key, value, None, is_causal=True, scaling=scaling)


@pytest.fixture(params=["vllm", "sglang"])
def engine(request, monkeypatch):
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, request.param, engine_attention)
    return request.param


class EngineLinear(nn.Module):
    """What takes the place of `nn.Linear`: no subclass of it, with weights of the same names."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(torch.full_like(linear.weight, torch.nan, device="cpu"))
        self.bias = None
        if linear.bias is not None:
            self.bias = nn.Parameter(torch.full_like(linear.bias, torch.nan, device="cpu"))

    def forward(self, given):
        return nn.functional.linear(given, self.weight, self.bias)


def replace_linear(module):
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, EngineLinear(child))
        else:
            replace_linear(child)


def materialise(module):
    for child in module.modules():
        for name, parameter in child.named_parameters(recurse=False):
            if parameter.is_meta:
                setattr(child, name, nn.Parameter(torch.full_like(parameter, torch.nan, device="cpu")))


class meta_without_buffers:
    """`init_on_device_without_buffers("meta")` of vLLM."""

    def __enter__(self):
        self.register = register = nn.Module.register_parameter

        def registered(module, name, parameter):
            register(module, name, parameter)
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

        nn.Module.register_parameter = registered

    def __exit__(self, *_):
        nn.Module.register_parameter = self.register


class Engine:
    """The model as the engines run it: no cache of transformers, one row of all tokens, their own table and head."""

    def __init__(self, folder, name):
        self.config = AutoConfig.from_pretrained(folder)
        text = self.text = self.config.get_text_config()
        assert self.config != text and PanoramaVLM.is_backend_compatible()
        text._attn_implementation = name
        with meta_without_buffers():
            self.model = AutoModel.from_config(self.config, dtype=torch.float32, trust_remote_code=True)
        assert type(self.model.get_decoder()) is type(self.model.language_model)
        replace_linear(self.model)
        assert not any(isinstance(module, nn.Linear) for module in self.model.modules())
        self.model.set_input_embeddings(nn.Embedding(text.vocab_size, text.hidden_size))
        materialise(self.model)
        self.head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.load(load_file(folder / "model.safetensors"))

    def load(self, weights):
        """By the rules of `_create_hf_to_vllm_mapper`."""
        ignored = [re.compile(key) for key in self.model._keys_to_ignore_on_load_unexpected]
        children = "|".join(name for name, _ in self.model.named_children())
        unloaded = {"model." + name for name, _ in self.model.named_parameters()} | {"lm_head.weight"}
        for name, weight in weights.items():
            if any(pattern.search(name) for pattern in ignored):
                continue
            name = re.sub(rf"^(?!model\.)(({children}).*)", r"model.\1", name)
            name = re.sub(rf"^(model\.)((?!{children}).+)", r"\2", name)
            target = self.head if name.startswith("lm_head.") else self.model
            target.get_parameter(name.partition(".")[2]).data.copy_(weight)
            unloaded.remove(name)
        if self.text.tie_word_embeddings or self.config.tie_word_embeddings:
            self.head.weight = self.model.get_input_embeddings().weight
            unloaded.remove("lm_head.weight")
        assert not unloaded

    def hidden(self, embeddings):
        """Hidden states [T, D] of embeddings [T, D]."""
        instances = dict.fromkeys(range(self.text.num_hidden_layers), 0)
        outputs = self.model(
            input_ids=None,
            inputs_embeds=embeddings[None],
            use_cache=False,
            position_ids=torch.arange(len(embeddings))[None],
            attention_instances=instances,
            return_dict=False,
        )
        assert set(instances.values()) == {1}  # every layer asked the engine
        return outputs[0][0]

    def embed_multimodal(self, items, patches):
        """As `MultiModalMixin.embed_multimodal`: items of several requests side by side -> one [tokens, D] each."""
        features = self.model.get_image_features(items.pop("pixel_values"), **items)
        features = features.pooler_output if isinstance(features, dict) else features[0]
        if not isinstance(features, torch.Tensor):
            return list(features)
        rows = features.reshape(-1, features.shape[-1])
        return list(rows.split([count * len(rows) // sum(patches) for count in patches]))

    @torch.no_grad()
    def generate(self, ids, ranges, features, new_tokens):
        for _ in range(new_tokens):
            embeddings = self.model.get_input_embeddings()(ids)
            for where, feature in zip(ranges, features, strict=True):
                embeddings[where] = feature
            ids = torch.cat([ids, self.head(self.hidden(embeddings)[-1:]).argmax(-1)])
        return ids


def processed(processor, text, images):
    """As vLLM's `MultiModalProcessor.apply`: ids, the places of each image, and what `get_image_features` is given."""
    inputs = processor(text=text, images=images, return_tensors="pt", return_mm_token_type_ids=True)
    inputs.pop("attention_mask")
    types = torch.as_tensor(inputs.pop("mm_token_type_ids"))
    (ids,) = inputs.pop("input_ids")
    sizes = processor._get_num_multimodal_tokens(image_sizes=[(image.height, image.width) for image in images])
    places = torch.where(types == 1)[1]
    assert (ids[places] == processor.image_token_id).all()
    return ids, torch.split(places, sizes["num_image_tokens"]), dict(inputs), sizes["num_image_patches"]


@pytest.fixture(params=["tied", "untied, with a projector"])
def folder(request, make, tmp_path):
    language = {"model_type": "llama", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    language |= {"num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": request.param == "tied"}
    model, processor = make(language=language, use_vicreg_projector=request.param != "tied")
    model.resize_token_embeddings(processor.image_token_id + 1)
    torch.manual_seed(0)
    with torch.no_grad():  # answers that depend on what is asked
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
        model.get_input_embeddings().weight *= 0.05
        model.get_output_embeddings().weight[processor.image_token_id] = 0
    model.generation_config.eos_token_id = None
    model.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def prompts(panoramas):
    part = panoramas[0].crop((0, 0, 128, 256))  # 90 degrees of 360
    return {
        "one": ("<image>What is this?", panoramas[:1]),
        "two": ("<image>or<image>?", panoramas[1:3]),
        "partial": ("see<image>!", [part]),
        "partial and whole": ("<image><image>Which?", [part, panoramas[3]]),
        "none": ("hello", None),
    }


def test_a_loop_written_as_the_engines_do_generates_what_generate_does(folder, engine, panoramas):
    processor = AutoProcessor.from_pretrained(folder)
    served, model = Engine(folder, engine), PanoramaVLM.from_pretrained(folder)
    assert type(served.model) is PanoramaModel
    answers = set()
    for text, images in prompts(panoramas).values():
        expected = model.generate(**processor(text=text, images=images, return_tensors="pt"), max_new_tokens=6)[0]
        if images is None:
            ids, ranges, features = processor(text=text, return_tensors="pt")["input_ids"][0], [], []
        else:
            ids, ranges, items, patches = processed(processor, text, images)
            with torch.no_grad():
                features = served.embed_multimodal(items, patches)
            assert [len(feature) for feature in features] == [len(where) for where in ranges]
        assert torch.equal(served.generate(ids, ranges, features, 6), expected)
        answers.add(tuple(expected[-6:].tolist()))
    assert len(answers) == len(prompts(panoramas))


def test_panoramas_of_several_requests_are_encoded_together(folder, engine, panoramas):
    served, processor = Engine(folder, engine), AutoProcessor.from_pretrained(folder)
    requests = [processed(processor, *prompts(panoramas)[name]) for name in ("partial", "partial and whole")]
    together = {key: torch.cat([items[key] for _, _, items, _ in requests]) for key in requests[0][2]}
    with torch.no_grad():
        features = served.embed_multimodal(together, [patch for *_, patches in requests for patch in patches])
        alone = [feature for _, _, items, patches in requests for feature in served.embed_multimodal(items, patches)]
    assert len({len(feature) for feature in features}) == 2
    torch.testing.assert_close(features, alone)


def test_ids_and_views_of_a_whole_batch_in_one_row_as_sglang_hands_them_over(folder, engine, panoramas):
    served, processor = Engine(folder, engine), AutoProcessor.from_pretrained(folder)
    ids, ranges, items, patches = processed(processor, *prompts(panoramas)["partial and whole"])
    instances = dict.fromkeys(range(2), 0)
    with torch.no_grad():
        outputs = served.model(input_ids=ids[None], use_cache=False, attention_instances=instances, **items)
        embeddings = served.model.get_input_embeddings()(ids)
        for where, feature in zip(ranges, served.embed_multimodal(items, patches), strict=True):
            embeddings[where] = feature
        torch.testing.assert_close(outputs.last_hidden_state[0], served.hidden(embeddings))


def test_the_plan_for_several_devices_reaches_the_language_model(folder, engine):
    plan = Engine(folder, engine).model.tp_plan
    assert plan["language_model.layers.*.self_attn.q_proj"] == "colwise"
    assert plan["language_model.layers.*.mlp.down_proj"] == "rowwise"


@pytest.mark.parametrize("width, height", [(512, 256), (511, 256), (400, 100), (300, 300), (200, 400), (1000, 450)])
@pytest.mark.parametrize("options", [{}, {"pole_caps": True, "pitch_rows": [-30.0, 30.0]}])
def test_the_size_of_a_panorama_says_what_it_costs(make, width, height, options):
    model, processor = make(**options)
    image = Image.new("RGB", (width, height), "red")
    inputs = processor(text="<image>?", images=image, return_tensors="pt")
    tokens = processor._get_num_multimodal_tokens(image_sizes=[(height, width), (256, 512)])
    assert tokens["num_image_tokens"][0] == (inputs["input_ids"] == processor.image_token_id).sum()
    assert tokens["num_image_tokens"][1] == model.config.num_image_tokens
    assert tokens["num_image_patches"] == [1, 1]


def test_the_cost_of_what_a_size_does_not_say_is_refused(make):
    _, processor = make()
    with pytest.raises(ValueError, match="further_views does not follow from its size"):
        processor._get_num_multimodal_tokens(image_sizes=[(256, 512)], further_views=[[(0, 0, 40)]])


def test_everybody_else_gets_the_whole_model(folder):
    assert type(AutoModel.from_config(AutoConfig.from_pretrained(folder))) is PanoramaVLM
    assert type(AutoModel.from_pretrained(folder, attn_implementation="eager")) is PanoramaVLM


def test_a_placeholder_without_a_row_is_refused_with_what_to_do(make, engine):
    model, processor = make()
    config = copy.deepcopy(model.config)
    config.text_config._attn_implementation = engine
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        AutoModel.from_config(config)
    model.resize_token_embeddings(processor.image_token_id + 1)
    config = copy.deepcopy(model.config)
    config.text_config._attn_implementation = engine
    assert type(AutoModel.from_config(config)) is PanoramaModel
