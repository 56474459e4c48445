"""PanoramaVLM: a vision-language model for 360-degree panoramas, native to the Hugging Face Hub."""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)
from transformers.pipelines import PIPELINE_REGISTRY

from .configuration_panorama import PIPELINE_TASK, PanoramaConfig
from .geometry_panorama import View, ViewPlan
from .image_processing_panorama import PanoramaImageProcessor
from .modeling_panorama import PanoramaModel, PanoramaVLM
from .outputs_panorama import GenerationOutput, PanoramaFeatures, TrainingStageOutput, VisionStageOutput
from .pipeline_panorama import PanoramaPipeline
from .processing_panorama import PanoramaProcessor

__version__ = "2.0.0.dev0"
__all__ = [
    "GenerationOutput",
    "PanoramaConfig",
    "PanoramaFeatures",
    "PanoramaImageProcessor",
    "PanoramaModel",
    "PanoramaPipeline",
    "PanoramaProcessor",
    "PanoramaVLM",
    "TrainingStageOutput",
    "View",
    "ViewPlan",
    "VisionStageOutput",
]

# Where the package is installed its own classes are used, and no remote code has to be trusted.
AutoConfig.register(PanoramaConfig.model_type, PanoramaConfig, exist_ok=True)
AutoModel.register(PanoramaConfig, PanoramaVLM, exist_ok=True)
AutoModelForCausalLM.register(PanoramaConfig, PanoramaVLM, exist_ok=True)
AutoModelForImageTextToText.register(PanoramaConfig, PanoramaVLM, exist_ok=True)
AutoModelForMultimodalLM.register(PanoramaConfig, PanoramaVLM, exist_ok=True)
AutoImageProcessor.register(PanoramaConfig, PanoramaImageProcessor, exist_ok=True)
AutoProcessor.register(PanoramaConfig, PanoramaProcessor, exist_ok=True)
PIPELINE_REGISTRY.register_pipeline(PIPELINE_TASK, PanoramaPipeline, AutoModelForImageTextToText)
