"""What a type checker knows of the outputs; `make types` checks this file."""

from typing import assert_type

import torch

from ..modeling_panorama import PanoramaVLM, TrainingStageOutput, VisionStageOutput


def outputs_by_stage(model: PanoramaVLM, pixels: torch.Tensor, ids: torch.Tensor) -> None:
    assert_type(model(pixels, stage="vision"), VisionStageOutput)
    assert_type(model(pixels, ids, stage="resampler"), TrainingStageOutput)
    assert_type(model(pixels, ids, stage="finetune"), TrainingStageOutput)
    assert_type(model(pixels, ids), TrainingStageOutput)
    assert_type(model.forward(pixels, stage="vision"), VisionStageOutput)
    assert_type(model(pixels, stage="vision").vicreg_raw, torch.Tensor | None)
