"""The tests that transformers runs on its own models, run on ours as it runs them on LLaVA.

What it skips by itself needs what we do not have (a GPU, flash attention, kernels, deepspeed, torchvision) or what we
are not (an encoder with a decoder, experts, audio, video, other pipelines). What cannot apply otherwise stands below
with its reason, beside what is done instead. The source distribution has no tests of generation and of exporters.
"""

import tempfile
import unittest
from pathlib import Path
from unittest import mock

import pytest
import torch
import transformers
from panorama_vlm import PanoramaConfig, PanoramaImageProcessor, PanoramaProcessor, PanoramaVLM, checkpoint_panorama
from panorama_vlm.modeling_panorama import PanoramaModel
from panorama_vlm.tests import transformers_tests
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, pipeline
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, MODEL_MAPPING_NAMES

pytestmark = [pytest.mark.tools, pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]
pytest.importorskip("parameterized")
if not transformers_tests.FOLDER.is_dir():
    pytest.skip(
        f"the tests of {transformers_tests.NAME} are not in {transformers_tests.FOLDER}: make test-tools fetches them "
        "from the package index",
        allow_module_level=True,
    )
modeling, configuration, images, processing, pipelines = transformers_tests.load(
    "test_modeling_common",
    "test_configuration_common",
    "test_image_processing_common",
    "test_processing_common",
    "test_pipeline_mixin",
)


class PanoramaModelTester:
    """A tiny model and its inputs, in the numbers of LLaVA's own tester."""

    batch_size = 7  # as many as some tests fill the inputs up to, with ids that have no panorama
    base_model_class = PanoramaModel
    text_config = {
        "model_type": "llama",
        "vocab_size": 99,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "intermediate_size": 37,
        "max_position_embeddings": 512,
        "pad_token_id": 1,
    }
    vision_config = {
        "model_type": "siglip_vision_model",
        "image_size": 16,
        "patch_size": 4,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 37,
        "vision_use_head": False,
    }
    num_hidden_layers, num_attention_heads, hidden_size = 2, 4, 32
    vocab_size, pad_token_id, image_token_id = 99, 1, 0
    is_training = shows_panoramas = True

    def __init__(self, parent):
        self.parent = parent
        self.num_image_tokens = self.get_config().num_image_tokens
        self.seq_length = self.encoder_seq_length = self.num_image_tokens + 7

    def get_config(self):
        return PanoramaConfig(
            dict(self.vision_config),
            dict(self.text_config),
            latent_dimension=32,
            image_token_id=self.image_token_id,
        )

    def prepare_config_and_inputs_for_common(self):
        config = self.get_config()
        if not self.shows_panoramas:
            input_ids = modeling.ids_tensor([self.batch_size, 7], self.vocab_size - 2) + 2
            return config, {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        input_ids = modeling.ids_tensor([self.batch_size, self.seq_length], self.vocab_size - 2) + 2
        input_ids[:, : self.num_image_tokens] = self.image_token_id
        size = config.image_size
        return config, {
            "pixel_values": modeling.floats_tensor([self.batch_size, config.num_views, 3, size, size]),
            "input_ids": input_ids,
            "attention_mask": torch.ones_like(input_ids),
        }


# Of these, what is asked is which weights are missing and how they start. A folder that lacks weights is refused here,
# so they look past that.
LACKS_WEIGHTS = (
    "test_base_model_prefix_loads_base_weights",
    "test_can_init_all_missing_weights",
    "test_correct_missing_keys",
    "test_model_weights_reload_no_missing_tied_weights",
)


class TestModels(modeling.ModelTesterMixin, modeling.GenerationTesterMixin, unittest.TestCase):
    all_model_classes = (PanoramaModel, PanoramaVLM)
    _is_composite = True
    additional_model_inputs = ["pixel_values"]
    test_can_init_all_missing_weights_before_2023 = True  # it runs from the year of a copyright line on

    def setUp(self):
        self.enterContext(mock.patch.dict(MODEL_MAPPING_NAMES, {"panorama_vlm": "PanoramaModel"}))
        multimodal = {"panorama_vlm": "PanoramaVLM"}
        self.enterContext(mock.patch.dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, multimodal))
        if self._testMethodName in LACKS_WEIGHTS:
            self.enterContext(mock.patch.object(checkpoint_panorama, "_check_loaded"))
        self.model_tester = PanoramaModelTester(self)
        self.config_tester = configuration.ConfigTester(
            self, config_class=PanoramaConfig, has_text_modality=False, common_properties=["image_token_id"]
        )
        if "rope_scaling" in self._testMethodName:  # it draws ids of the whole vocabulary, and shows no panorama
            self.model_tester.image_token_id = self.model_tester.vocab_size
        if "inputs_embeds" in self._testMethodName:  # placeholders have no embedding
            self.model_tester.shows_panoramas = False

    def test_config(self):
        self.config_tester.run_common_tests()

    def test_can_init_all_missing_weights(self):
        """Of foreign code transformers leaves out modules without parameters of their own, as SigLIP's attention."""
        with mock.patch.object(PreTrainedModel, "is_custom_code", classmethod(lambda cls: False)):
            super().test_can_init_all_missing_weights()

    def test_bc_cache_name_forward(self):
        """Both names of the cache are taken, and neither is warned of."""
        if not hasattr(modeling.ModelTesterMixin, "test_bc_cache_name_forward"):
            self.skipTest("before transformers 5.24 there was one name")
        with mock.patch.object(self, "assertTrue", lambda _: None):
            super().test_bc_cache_name_forward()

    def test_model_main_input_name(self):
        """Of the whole model `pixel_values` come first: PanoLLaVA's users write `model(pixels, stage="vision")`."""
        self.all_model_classes = (PanoramaModel,)
        super().test_model_main_input_name()


class PanoramaImageProcessorTester(images.ImageProcessingTester):
    def __init__(self, parent):
        super().__init__(parent, image_size=20, image_mean=[0.5, 0.4, 0.3], image_std=[0.5, 0.5, 0.4])

    def _get_image_processing_classes(self):
        return {"pil": PanoramaImageProcessor}

    def expected_output_image_shape(self, images):
        return (PanoramaImageProcessor().view_plan.num_views, 3, 20, 20)


class TestImageProcessor(images.ImageProcessingTestMixin, unittest.TestCase):
    image_processor_tester_class = PanoramaImageProcessorTester
    test_cast_dtype = True

    @unittest.skip("views have three channels; a fourth of a panorama is its alpha")
    def test_call_numpy_4_channels(self): ...

    @unittest.skip("views are sampled with OpenCV or torch, not resized with torchvision")
    def test_new_models_require_torchvision_backend(self): ...


class TestProcessor(processing.ProcessorTesterMixin, unittest.TestCase):
    processor_class = PanoramaProcessor

    @classmethod
    def _setup_image_processor(cls):
        return PanoramaImageProcessor(image_size=20, pole_caps=True)

    @classmethod
    def _setup_tokenizer(cls):
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<|end|>", "<|pad|>"]
        trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
        bpe.train_from_iterator(["lower newer upper older longer string"], trainer)
        return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|pad|>")

    @classmethod
    def prepare_processor_dict(cls):
        views = cls._setup_image_processor().view_plan.num_views
        return {"num_image_tokens": 2 * views, "image_tokens_per_view": [2] * views}

    def setUp(self):
        # The one option of its own that says whether an option arrived is `rescale_factor`, which means nothing here.
        arrives = {"init_time_kwargs": {"image_mean": [1.0, 1.0, 1.0]}}
        self.enterContext(mock.patch.dict(processing.MODALITY_TEST_SPECS["images"], arrives))

    def prepare_images_inputs(self, batch_size=None, nested=False):
        """Panoramas; those of the mixin are bands around the horizon, so partial."""
        if "model_input_names" in self._testMethodName:
            return super().prepare_images_inputs(batch_size, nested)
        panoramas = [Image.effect_noise((60, 30), 64).convert("RGB") for _ in range(batch_size or 1)]
        return panoramas[0] if batch_size is None else [[each] for each in panoramas] if nested else panoramas

    @unittest.skip("a template is given images by one name, `image`, whatever they were called")
    def test_chat_template_message_objects(self): ...

    def test_if_input_has_mismatching_tokens_and_mm_data(self):
        """An error, which says it in its own words."""
        with mock.patch.object(self, "assertRaisesRegex", lambda error, _: self.assertRaises(error)):
            super().test_if_input_has_mismatching_tokens_and_mm_data()


QUESTION = {"images": [transformers_tests.PANORAMA], "text": "<image>lower newer"}


class ImageTextToTextPipelineTests:
    """What the mixin asks for a task; the source distribution carries none."""

    def get_test_pipeline(self, model, tokenizer, image_processor, processor, dtype):
        return pipeline("image-text-to-text", model=model, processor=processor, dtype=dtype), [QUESTION]

    def run_pipeline_test(self, ask, examples):
        inputs = ask.processor(**examples[0], return_tensors="pt").to(ask.model.dtype)
        generated = ask.model.generate(**inputs)[0, inputs["input_ids"].shape[1] :]
        answer = ask.processor.decode(generated, skip_special_tokens=True)
        assert ask(**examples[0]) == [
            {"input_text": QUESTION["text"], "generated_text": QUESTION["text"] + answer},
        ]


class FeatureExtractionPipelineTests:
    def get_test_pipeline(self, model, tokenizer, image_processor, processor, dtype):
        return pipeline("feature-extraction", model=model, tokenizer=tokenizer, dtype=dtype), ["lower newer"]

    def run_pipeline_test(self, ask, examples):
        states = ask.model(**ask.tokenizer(examples[0], return_tensors="pt"))[0]
        torch.testing.assert_close(torch.tensor(ask(examples[0])), states.float())


class TestPipelines(pipelines.PipelineTesterMixin, unittest.TestCase):
    """LLaVA runs `any-to-any` as well, a pipeline that refuses to start without torchvision."""

    pipeline_model_mapping = {"image-text-to-text": PanoramaVLM, "feature-extraction": PanoramaModel}

    def setUp(self):
        folder = Path(self.enterContext(tempfile.TemporaryDirectory()))
        config, tokenizer = PanoramaModelTester(self).get_config(), TestProcessor._setup_tokenizer()
        processor = PanoramaProcessor.from_config(config, tokenizer)
        config.image_token_id, config.text_config.vocab_size = processor.image_token_id, len(tokenizer)
        model = PanoramaVLM(config)
        model.generation_config.update(max_new_tokens=4, pad_token_id=tokenizer.pad_token_id)
        for part in (model, model.model):
            part.save_pretrained(folder / "panorama_vlm" / type(part).__name__)
            processor.save_pretrained(folder / "panorama_vlm" / type(part).__name__)
        names = {"tokenizer_classes": ["PreTrainedTokenizerFast"], "processor_classes": ["PanoramaImageProcessor"]}
        tests = {
            "image-text-to-text": {"test": f"{__name__}.ImageTextToTextPipelineTests"},
            "feature-extraction": {"test": f"{__name__}.FeatureExtractionPipelineTests"},
        }
        for patch in (
            mock.patch.object(pipelines, "TRANSFORMERS_TINY_MODEL_PATH", str(folder)),
            mock.patch.object(pipelines, "tiny_model_summary", {"PanoramaVLM": names, "PanoramaModel": names}),
            mock.patch.dict(pipelines.pipeline_test_mapping, tests),
            mock.patch.dict(pipelines.PROCESSOR_MAPPING_NAMES, {"panorama_vlm": "PanoramaProcessor"}),
            mock.patch.object(transformers, "PanoramaProcessor", PanoramaProcessor, create=True),
            mock.patch.object(transformers, "PanoramaImageProcessor", PanoramaImageProcessor, create=True),
        ):
            self.enterContext(patch)
