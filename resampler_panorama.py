"""Resamplers: the tokens of one view, from the vision tower's width and grid to the model's.

A resampler keeps the tokens on a grid over the view, so that each of them still has a ray. To add one: subclass
:class:`Resampler`, say in `output_grid` what grid comes out, and put it into `RESAMPLERS`; the configuration takes
its name from there.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.configuration_utils import PretrainedConfig


def start_at(layer: nn.Linear, start: float | str) -> nn.Linear:
    """Says how a linear layer [out, in] starts, for :func:`initialize_start`; gives the layer back.

    Args:
        start: a standard deviation >= 0 of normal weights (0 for a branch that adds nothing yet), or `"isometry"`:
            orthogonal weights (Saxe, McClelland, Ganguli 2014, arXiv:1312.6120), scaled so that features of mean 0 and
            deviation 1 stay so, and a norm behind them changes nothing. They keep all angles where out >= in; where
            the layer narrows, they project onto a random subspace, which keeps them approximately (Johnson,
            Lindenstrauss 1984).
    """
    layer.panorama_start = start  # type: ignore[assignment]  # any attribute of a module is a tensor to mypy
    return layer


def initialize_start(layer: nn.Module) -> bool:
    """Gives a layer marked by :func:`start_at`, or a Mamba mixer, its weights, and tells whether it is one. As all
    of `init`, it leaves alone what was loaded."""
    if hasattr(layer, "init_mamba2_weights"):  # as Mamba2PreTrainedModel does, which is not there
        mixer: Any = layer
        mixer.init_mamba2_weights()
        init.kaiming_uniform_(mixer.conv1d.weight, a=5**0.5)
        init.zeros_(mixer.conv1d.bias)
        return True
    if isinstance(layer, UnitOffsetNorm):
        init.zeros_(layer.weight)
        return True
    start = getattr(layer, "panorama_start", None)
    if start is None or not isinstance(layer, nn.Linear):
        return False
    if start == "isometry":
        init.copy_(layer.weight, _isometry_like(layer.weight).to(layer.weight.dtype))
    else:
        init.normal_(layer.weight, std=start)
    if layer.bias is not None:
        init.zeros_(layer.bias)
    return True


def _isometry_like(weight: torch.Tensor) -> torch.Tensor:
    """Random orthogonal weights [rows, columns], float32, that give a mean of 0 to what has one."""
    rows, columns = weight.shape
    result = torch.empty_like(weight, dtype=torch.float32)  # there is no QR in half precision
    init.orthogonal_(result, gain=max(1.0, rows / columns) ** 0.5)
    # What all inputs have in common goes where all outputs have it: Householder's reflection of the one onto the other.
    normal = F.normalize(result.sum(1), dim=0) - torch.full_like(result[:, 0], rows**-0.5)
    normal = F.normalize(normal, dim=0)
    return result - 2 * torch.outer(normal, normal @ result)


class UnitOffsetNorm(nn.Module):
    """The root mean square norm of Gemma, whose weights are kept as their distance from one, [..., D] -> [..., D]."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """In float32, whatever the tokens are in."""
        normed = F.rms_norm(tokens.float(), self.weight.shape, eps=self.eps)
        return (normed * (1 + self.weight.float())).type_as(tokens)


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

    @staticmethod
    def output_width(config: PretrainedConfig, input_dimension: int) -> int | None:
        """D_latent, where it follows from the tower's width; `None` where it may be any."""
        return None

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, S', D_latent]."""
        raise NotImplementedError


def _blocks_of(config: PretrainedConfig) -> tuple[int, int]:
    """The grid of `resampler_pool` x `resampler_pool` blocks of tokens. Raises `ValueError` where they do not fill the
    tower's grid."""
    rows, columns = config.vision_grid
    pool = config.resampler_pool
    if rows % pool or columns % pool:
        raise ValueError(
            f"resampler_pool must divide the tower's grid of {rows} x {columns} tokens, got {pool}. "
            "Typical value: 2; a larger image_size gives a larger grid"
        )
    return rows // pool, columns // pool


def _queries_of(config: PretrainedConfig) -> tuple[int, int]:
    """The square grid of `resampler_queries`. Raises `ValueError` where they are no square, or more than the tower's
    tokens, and where the heads do not divide the width."""
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


class IdentityResampler(Resampler):
    """The tower's tokens as they are: no weights, and the tower's width."""

    @staticmethod
    def output_width(config: PretrainedConfig, input_dimension: int) -> int | None:
        """The tower's."""
        return input_dimension

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, S, D_vision]."""
        return tokens


class PixelShuffleResampler(Resampler):
    """The tokens of each `resampler_pool` x `resampler_pool` block side by side in one, row by row: no weights, and
    fewer, wider tokens, as Idefics3, SmolVLM and InternVL have them (space to depth, Shi et al. 2016,
    arXiv:1609.05158)."""

    def __init__(self, config: PretrainedConfig, input_dimension: int):
        super().__init__(config, input_dimension)
        self.pool = config.resampler_pool

    @staticmethod
    def output_grid(config: PretrainedConfig) -> tuple[int, int]:
        """One token a block. Raises `ValueError` where the blocks do not fill the grid."""
        return _blocks_of(config)

    @staticmethod
    def output_width(config: PretrainedConfig, input_dimension: int) -> int | None:
        """The tower's, for each token of a block."""
        return input_dimension * config.resampler_pool**2

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, S / pool^2, D_vision * pool^2]."""
        rows, columns = self.input_grid
        pool = self.pool
        grid = tokens.reshape(len(tokens), rows // pool, pool, columns // pool, pool, -1)
        return grid.transpose(2, 3).flatten(3).flatten(1, 2)


class _FeedForward(nn.Sequential):
    """`resampler_depth` linear layers with GELU between them, and a norm before and after: towers differ in scale.

    With `resampler_skip` a linear layer leads past them, an isometry at the start, when the layers add nothing: what
    comes out is what came in, normalised and turned, and training can only add to what the tower knows. A single layer
    needs none, and is an isometry itself.
    """

    def __init__(self, config: PretrainedConfig, input_dimension: int, depth: int):
        width = config.latent_dimension
        linear = [nn.Linear(input_dimension, width), *(nn.Linear(width, width) for _ in range(depth - 1))]
        layers: list[nn.Module] = [nn.LayerNorm(input_dimension), linear[0]]
        for layer in linear[1:]:
            layers += [nn.GELU(), layer]
        super().__init__(*layers, nn.LayerNorm(width))
        if config.resampler_skip:
            start_at(linear[-1], "isometry" if depth == 1 else 0.0)
        if config.resampler_skip and depth > 1:
            self.skip = start_at(nn.Linear(input_dimension, width, bias=False), "isometry")

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[..., D_vision] -> [..., D_latent]."""
        before, *layers, after = (module for name, module in self.named_children() if name != "skip")
        tokens = hidden = before(tokens)
        for layer in layers:
            hidden = layer(hidden)
        return after(hidden + self.skip(tokens) if hasattr(self, "skip") else hidden)


class MLPResampler(Resampler):
    """Each token for itself; the grid stays."""

    def __init__(self, config: PretrainedConfig, input_dimension: int):
        super().__init__(config, input_dimension)
        self.layers = _FeedForward(config, input_dimension, config.resampler_depth)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, S, D_latent]."""
        return self.layers(tokens)  # [N, S, D_latent]


class MLPV1Resampler(Resampler):
    """The MLP of PanoLLaVA v1.0, for its weights: `resampler_depth` linear layers, behind each but the last a layer
    norm (`"inner"` of `resampler_norms`) and GELU, nothing leading past them, and no norm at the end; `"input"` puts
    one in front. The grid stays."""

    def __init__(self, config: PretrainedConfig, input_dimension: int):
        super().__init__(config, input_dimension)
        hidden = config.resampler_hidden or max(input_dimension, config.latent_dimension)
        widths = [input_dimension] + [hidden] * (config.resampler_depth - 1)
        norms = "inner" in config.resampler_norms
        layers: list[nn.Module] = []
        for width in widths[:-1]:
            layers += [nn.Linear(width, hidden), *([nn.LayerNorm(hidden)] if norms else []), nn.GELU()]
        self.before = nn.LayerNorm(input_dimension) if "input" in config.resampler_norms else nn.Identity()
        self.layers = nn.Sequential(*layers, nn.Linear(widths[-1], config.latent_dimension))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, S, D_latent]."""
        return self.layers(self.before(tokens))


class AveragePoolResampler(Resampler):
    """The mean of each `resampler_pool` x `resampler_pool` block of tokens, then an MLP; with `resampler_depth` 0 the
    mean alone, of the tower's width."""

    def __init__(self, config: PretrainedConfig, input_dimension: int):
        super().__init__(config, input_dimension)
        self.pool = config.resampler_pool
        depth = config.resampler_depth
        self.layers = _FeedForward(config, input_dimension, depth) if depth else nn.Identity()

    @staticmethod
    def output_grid(config: PretrainedConfig) -> tuple[int, int]:
        """One token a block. Raises `ValueError` where the blocks do not fill the grid."""
        return _blocks_of(config)

    @staticmethod
    def output_width(config: PretrainedConfig, input_dimension: int) -> int | None:
        """The tower's where there is no MLP."""
        return None if config.resampler_depth else input_dimension

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
        self.input = _FeedForward(config, input_dimension, 1)
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
        layers = [Idefics2PerceiverLayer(layer_config, i) for i in range(config.resampler_depth)]
        if config.resampler_skip:  # they have skips of their own, and add nothing at the start
            for layer in layers:
                start_at(layer.self_attn.o_proj, 0.0)
                start_at(layer.mlp.down_proj, 0.0)
        self.layers = nn.ModuleList(layers)
        self.norm = Idefics2RMSNorm(config.latent_dimension)

    @staticmethod
    def output_grid(config: PretrainedConfig) -> tuple[int, int]:
        """The grid of the queries. Raises `ValueError` where they are no square, or more than the tower's tokens."""
        return _queries_of(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, S', D_latent]."""
        context = self.input(tokens)  # [N, S, D_latent]
        grid = context.transpose(1, 2).unflatten(2, self.input_grid)
        latents = F.adaptive_avg_pool2d(grid, self.query_grid).flatten(2).transpose(1, 2) + self.queries.weight
        for layer in self.layers:
            latents = layer(latents, context)  # [N, S', D_latent]
        return self.norm(latents)


class QFormerResampler(Resampler):
    """`resampler_queries` latents that attend to each other and to all tokens of the view: the Q-Former of BLIP-2 (Li
    et al. 2023, arXiv:2301.12597), without text; its layers, of which every second attends to the view, beginning with
    the first, are transformers'.

    The queries lie on a grid as those of :class:`PerceiverResampler` do; BLIP-2's are learned vectors alone, which
    look nowhere.
    """

    def __init__(self, config: PretrainedConfig, input_dimension: int):
        from transformers.models.blip_2.configuration_blip_2 import Blip2QFormerConfig
        from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerLayer

        super().__init__(config, input_dimension)
        width = config.latent_dimension
        self.query_grid = self.output_grid(config)
        self.input = _FeedForward(config, input_dimension, 1)
        layer_config = Blip2QFormerConfig(
            hidden_size=width,
            encoder_hidden_size=width,
            num_attention_heads=config.resampler_heads,
            intermediate_size=4 * width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            use_qformer_text_input=False,
            attn_implementation="sdpa",
        )
        self.queries = nn.Embedding(config.resampler_queries, width)
        self.norm = nn.LayerNorm(width, eps=layer_config.layer_norm_eps)
        layers = [Blip2QFormerLayer(layer_config, i) for i in range(config.resampler_depth)]
        if config.resampler_skip:  # they have skips of their own, and add nothing at the start
            for layer in layers:
                start_at(layer.attention.output.dense, 0.0)
                start_at(layer.output_query.dense, 0.0)
                if layer.has_cross_attention:
                    start_at(layer.crossattention.output.dense, 0.0)
        self.layers = nn.ModuleList(layers)

    @staticmethod
    def output_grid(config: PretrainedConfig) -> tuple[int, int]:
        """The grid of the queries. Raises `ValueError` where they are no square, or more than the tower's tokens."""
        return _queries_of(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, queries, D_latent]."""
        context = self.input(tokens)  # [N, S, D_latent]
        grid = context.transpose(1, 2).unflatten(2, self.input_grid)
        latents = F.adaptive_avg_pool2d(grid, self.query_grid).flatten(2).transpose(1, 2) + self.queries.weight
        latents = self.norm(latents)
        for layer in self.layers:
            latents = layer(latents, encoder_hidden_states=context, query_length=latents.shape[1])
        return latents


class CAbstractorResampler(Resampler):
    """Convolutions over the grid, the mean of each `resampler_pool` x `resampler_pool` block, and convolutions again:
    the C-Abstractor of Honeybee (Cha et al. 2024, arXiv:2312.06742), which keeps what lies beside what.

    `resampler_depth` blocks before and as many behind; they are ConvNeXt's (7 x 7 depthwise, then an MLP), where
    Honeybee has RegNet's, which timm has and transformers has not without its batch statistics.
    """

    def __init__(self, config: PretrainedConfig, input_dimension: int):
        from transformers.models.convnext.configuration_convnext import ConvNextConfig
        from transformers.models.convnext.modeling_convnext import ConvNextLayer

        super().__init__(config, input_dimension)
        width = config.latent_dimension
        self.pool = config.resampler_pool
        self.input = _FeedForward(config, input_dimension, 1)
        layer_config = ConvNextConfig(layer_scale_init_value=0.0)  # no scale: the last layer of a block starts at 0
        blocks = [ConvNextLayer(layer_config, width) for _ in range(2 * config.resampler_depth)]
        if config.resampler_skip:
            for block in blocks:
                start_at(block.pwconv2, 0.0)
        self.before = nn.Sequential(*blocks[: config.resampler_depth])
        self.behind = nn.Sequential(*blocks[config.resampler_depth :])
        self.norm = nn.LayerNorm(width)

    @staticmethod
    def output_grid(config: PretrainedConfig) -> tuple[int, int]:
        """One token a block. Raises `ValueError` where the blocks do not fill the grid."""
        return _blocks_of(config)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, S / pool^2, D_latent]."""
        grid = self.input(tokens).transpose(1, 2).unflatten(2, self.input_grid)  # [N, D_latent, rows, columns]
        grid = self.behind(F.avg_pool2d(self.before(grid), self.pool))
        return self.norm(grid.flatten(2).transpose(1, 2))


class _BiMambaLayer(nn.Module):
    """What two state spaces add that read the tokens in opposite directions, [N, S, D] -> [N, S, D]."""

    def __init__(self, layer_config: PretrainedConfig, add_nothing: bool):
        from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer, Mamba2RMSNorm

        super().__init__()
        self.norm = Mamba2RMSNorm(layer_config.hidden_size, eps=layer_config.layer_norm_epsilon)
        self.onward = Mamba2Mixer(layer_config, 0, initialize_mixer_weights=False)  # `initialize_start` does it
        self.reverse = Mamba2Mixer(layer_config, 0, initialize_mixer_weights=False)
        if add_nothing:
            start_at(self.onward.out_proj, 0.0)
            start_at(self.reverse.out_proj, 0.0)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D] -> [N, S, D]."""
        normed = self.norm(tokens)
        return tokens + self.onward(normed) + self.reverse(normed.flip(1)).flip(1)


class BiMambaResampler(Resampler):
    """`resampler_depth` layers of two selective state spaces each, one reading the tokens of the view row by row and
    one from the end, as Vision Mamba does (Zhu et al. 2024, arXiv:2401.09417) and PanoLLaVA's resampler of this name.
    The grid stays; the cost grows with the tokens, not with their square.

    The mixers are those of transformers' Mamba-2 (Dao, Gu 2024, arXiv:2405.21060), of state 64, convolution 4 and twice
    the width. Where their kernels are not installed they run as products of matrices in plain torch; those of the first
    Mamba would go token by token, with a gradient of the size of all tokens for each.
    """

    def __init__(self, config: PretrainedConfig, input_dimension: int):
        from transformers.models.mamba2.configuration_mamba2 import Mamba2Config

        super().__init__(config, input_dimension)
        width = config.latent_dimension
        self.input = _FeedForward(config, input_dimension, 1)
        head = math.gcd(2 * width, 64)
        layer_config = Mamba2Config(
            hidden_size=width,
            expand=2,
            head_dim=head,
            num_heads=2 * width // head,
            n_groups=1,
            state_size=64,
            chunk_size=64,
            num_hidden_layers=1,
        )
        depth = range(config.resampler_depth)
        self.layers = nn.Sequential(*(_BiMambaLayer(layer_config, config.resampler_skip) for _ in depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[N, S, D_vision] -> [N, S, D_latent]."""
        return self.norm(self.layers(self.input(tokens)))


RESAMPLERS: dict[str, type[Resampler]] = {
    "mlp": MLPResampler,
    "mlp_v1": MLPV1Resampler,
    "avg_pool": AveragePoolResampler,
    "identity": IdentityResampler,
    "pixel_shuffle": PixelShuffleResampler,
    "perceiver": PerceiverResampler,
    "qformer": QFormerResampler,
    "c_abstractor": CAbstractorResampler,
    "bimamba": BiMambaResampler,
}
