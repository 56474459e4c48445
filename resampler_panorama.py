"""Resamplers: the tokens of one view, from the vision tower's width and grid to the model's.

A resampler keeps the tokens on a grid over the view, so that each of them still has a ray. To add one: subclass
:class:`Resampler`, say in `output_grid` what grid comes out, and put it into `RESAMPLERS`; the configuration takes
its name from there.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from transformers.configuration_utils import PretrainedConfig


class Resampler(nn.Module):
    """[N, S, D_vision] -> [N, S', D_latent], S and S' being the cells of the grids before and after.

    Args:
        config: the model's :class:`PanoramaConfig`; `config.vision_grid` is the grid that comes in.
        input_dimension: D_vision.
    """

    def __init__(self, config: PretrainedConfig, input_dimension: int):
        super().__init__()
        self.input_grid = config.vision_grid

    @staticmethod
    def output_grid(config: PretrainedConfig) -> tuple[int, int]:
        """(rows, columns) after resampling. Raises `ValueError` where the grid does not fit."""
        return config.vision_grid

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, S', D_latent]."""
        raise NotImplementedError


def _feed_forward(input_dimension: int, output_dimension: int, depth: int) -> nn.Sequential:
    """`depth` linear layers with GELU between them, and a norm before and after: towers differ in scale."""
    layers: list[nn.Module] = [nn.LayerNorm(input_dimension), nn.Linear(input_dimension, output_dimension)]
    for _ in range(depth - 1):
        layers += [nn.GELU(), nn.Linear(output_dimension, output_dimension)]
    return nn.Sequential(*layers, nn.LayerNorm(output_dimension))


class MLPResampler(Resampler):
    """Each token for itself; the grid stays."""

    def __init__(self, config: PretrainedConfig, input_dimension: int):
        super().__init__(config, input_dimension)
        self.layers = _feed_forward(input_dimension, config.latent_dimension, config.resampler_depth)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, S, D_latent]."""
        return self.layers(tokens)  # [N, S, D_latent]


class AveragePoolResampler(Resampler):
    """The mean of each `resampler_pool` x `resampler_pool` block of tokens, then an MLP."""

    def __init__(self, config: PretrainedConfig, input_dimension: int):
        super().__init__(config, input_dimension)
        self.pool = config.resampler_pool
        self.layers = _feed_forward(input_dimension, config.latent_dimension, config.resampler_depth)

    @staticmethod
    def output_grid(config: PretrainedConfig) -> tuple[int, int]:
        """One token a block. Raises `ValueError` where the blocks do not fill the grid."""
        rows, columns = config.vision_grid
        pool = config.resampler_pool
        if rows % pool or columns % pool:
            raise ValueError(
                f"resampler_pool must divide the tower's grid of {rows} x {columns} tokens, got {pool}. "
                "Typical value: 2; a larger image_size gives a larger grid"
            )
        return rows // pool, columns // pool

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, S', D_latent]."""
        grid = tokens.transpose(1, 2).unflatten(2, self.input_grid)  # [N, D_vision, rows, columns]
        pooled = F.avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)  # [N, S', D_vision]
        return self.layers(pooled)  # [N, S', D_latent]


class PerceiverResampler(Resampler):
    """`resampler_queries` latents that attend to all tokens of the view (Jaegle et al. 2021, Perceiver).

    The queries lie on a square grid of their own: each starts as the mean of the tokens of its cell plus a learned
    vector, so that a query, too, has a direction. The layers are those of Idefics2's resampler.
    """

    def __init__(self, config: PretrainedConfig, input_dimension: int):
        from transformers.models.idefics2.configuration_idefics2 import Idefics2PerceiverConfig
        from transformers.models.idefics2.modeling_idefics2 import Idefics2PerceiverLayer, Idefics2RMSNorm

        super().__init__(config, input_dimension)
        self.query_grid = self.output_grid(config)
        self.input = _feed_forward(input_dimension, config.latent_dimension, 1)
        layer_config = Idefics2PerceiverConfig(
            hidden_size=config.latent_dimension,
            resampler_n_latents=config.resampler_queries,
            resampler_depth=config.resampler_depth,
            resampler_n_heads=config.resampler_heads,
            resampler_head_dim=config.latent_dimension // config.resampler_heads,
            num_key_value_heads=config.resampler_heads,
            attn_implementation="sdpa",
        )
        self.queries = nn.Embedding(config.resampler_queries, config.latent_dimension)
        self.layers = nn.ModuleList([Idefics2PerceiverLayer(layer_config, i) for i in range(config.resampler_depth)])
        self.norm = Idefics2RMSNorm(config.latent_dimension)

    @staticmethod
    def output_grid(config: PretrainedConfig) -> tuple[int, int]:
        """The grid of the queries. Raises `ValueError` where they are no square, or more than the tower's tokens."""
        side = round(config.resampler_queries**0.5)
        rows, columns = config.vision_grid
        if side * side != config.resampler_queries or side > min(rows, columns):
            raise ValueError(
                f"resampler_queries must be a square number of at most {min(rows, columns) ** 2}, "
                f"got {config.resampler_queries}. Typical value: 64"
            )
        if config.latent_dimension % config.resampler_heads:
            raise ValueError(
                f"resampler_heads must divide latent_dimension={config.latent_dimension}, "
                f"got {config.resampler_heads}. Typical value: 8"
            )
        return side, side

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, S', D_latent]."""
        context = self.input(tokens)  # [N, S, D_latent]
        grid = context.transpose(1, 2).unflatten(2, self.input_grid)
        latents = F.adaptive_avg_pool2d(grid, self.query_grid).flatten(2).transpose(1, 2) + self.queries.weight
        for layer in self.layers:
            latents = layer(latents, context)  # [N, S', D_latent]
        return self.norm(latents)


RESAMPLERS: dict[str, type[Resampler]] = {
    "mlp": MLPResampler,
    "avg_pool": AveragePoolResampler,
    "perceiver": PerceiverResampler,
}
