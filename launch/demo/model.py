"""A small decoder-only transformer: the model of the default job.

RMSNorm before each part, rotary positions, SwiGLU, no biases, and by default one matrix for
embedding and output. Parameters are named as one would guess: `embed.weight`,
`blocks.0.attn.q.weight`, `blocks.0.mlp.gate.weight`, `norm.weight`, `lm_head.weight`.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from planaria.errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a transformer.

    Attributes:
        vocab_size: Number of tokens; 256 for bytes.
        dim: Width of the residual stream.
        layers: Number of blocks.
        heads: Number of attention heads; cuts `dim` into parts of even width.
        ffn_dim: Width of the feed-forward part.
        max_seq_len: Longest sequence that is accepted.
        dropout: Probability of dropping an element, of attention and of each part's output.
        tie_embeddings: Whether embedding and output share one matrix.
        rope_base: Base of the rotary frequencies.
        norm_eps: Added to the mean square in RMSNorm.
        seed: Seed of the initial parameters.
    """

    vocab_size: int = 256
    dim: int = 128
    layers: int = 4
    heads: int = 4
    ffn_dim: int = 384
    max_seq_len: int = 4096
    dropout: float = 0.0
    tie_embeddings: bool = True
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("vocab_size", "dim", "layers", "heads", "ffn_dim", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name} is {getattr(self, name)}: give 1 or more")
        if self.dim % (2 * self.heads):
            raise ConfigError(
                f"model.dim {self.dim} cannot be cut into {self.heads} heads of even width: give "
                f"a multiple of {2 * self.heads}"
            )
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"model.dropout is {self.dropout}: give 0 or more, below 1")


class Output(NamedTuple):
    """What the model returns.

    Attributes:
        logits: Float, (batch, seq, vocab_size).
        loss: Mean cross-entropy in nats per token, a scalar; None if there were no targets.
    """

    logits: Tensor
    loss: Tensor | None


class Transformer(nn.Module):
    """Predicts the next token at every position.

    Parameters are drawn from `config.seed` alone, whatever the state of torch's generators.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        self.init_weights()

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Output:
        """Runs the model.

        Args:
            tokens: Int64, (batch, seq), below `vocab_size`.
            targets: The token that follows each of `tokens`; same shape and dtype.

        Raises:
            ConfigError: The sequence is longer than `max_seq_len`.
        """
        length = tokens.shape[1]
        if length > self.config.max_seq_len:
            raise ConfigError(
                f"a sequence of {length} tokens: model.max_seq_len is {self.config.max_seq_len}"
            )
        rotation = rotary(length, self.config, tokens.device)
        x = self.dropout(self.embed(tokens))
        for block in self.blocks:
            x = block(x, rotation)
        logits = self.lm_head(self.norm(x))
        if targets is None:
            return Output(logits, None)
        return Output(logits, F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()))

    @torch.no_grad()
    def init_weights(self) -> None:
        """Draws all parameters; also for a model built on the meta device, after `to_empty`."""
        if self.config.tie_embeddings:
            # Here, because `to_empty` unties them.
            self.lm_head.weight = self.embed.weight
        generator = torch.Generator("cpu").manual_seed(self.config.seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                parameter.fill_(1.0)
                continue
            std = 0.02 if name.startswith(("embed.", "lm_head.")) else parameter.shape[1] ** -0.5
            if name.endswith((".out.weight", ".down.weight")):
                # Each block adds to the stream twice; keep its variance from growing with depth.
                std /= (2 * self.config.layers) ** 0.5
            # Drawn on the CPU, so that every device starts from the same numbers.
            drawn = torch.empty(parameter.shape, device="cpu")
            parameter.copy_(drawn.normal_(0.0, std, generator=generator))


class Block(nn.Module):
    """Attention, then the feed-forward part, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.dim, config.norm_eps)
        self.mlp = SwiGLU(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Maps (batch, seq, dim) to the same shape."""
        x = x + self.dropout(self.attn(self.attn_norm(x), rotation))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class Attention(nn.Module):
    """Causal multi-head self-attention with rotary positions."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.q = nn.Linear(config.dim, config.dim, bias=False)
        self.k = nn.Linear(config.dim, config.dim, bias=False)
        self.v = nn.Linear(config.dim, config.dim, bias=False)
        self.out = nn.Linear(config.dim, config.dim, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        """Maps (batch, seq, dim) to the same shape."""
        # (batch, seq, dim) -> (batch, heads, seq, width)
        q, k, v = (
            part(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(
            rotate(q, rotation),
            rotate(k, rotation),
            v,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=True,
        )
        return self.out(mixed.transpose(1, 2).flatten(-2))


class SwiGLU(nn.Module):
    """The gated feed-forward part (N. Shazeer, "GLU Variants Improve Transformer", 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps (batch, seq, dim) to the same shape."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def rotary(length: int, config: ModelConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns cosines and sines of the rotary angles (J. Su et al., "RoFormer", 2021).

    They are computed anew in each forward pass: cheap, and no buffer to save or to lose.

    Returns:
        Two float32 tensors, (length, head width / 2).
    """
    half = config.dim // config.heads // 2
    frequencies = config.rope_base ** (-torch.arange(half, device=device) / half)
    angles = torch.outer(torch.arange(length, device=device), frequencies)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turns the two halves of each head, as pairs, by the angle of its position."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)
