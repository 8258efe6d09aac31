"""The default job's transformer."""

import math
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from planaria.errors import ConfigError
from planaria.launch.demo.model import ModelConfig, Transformer, rotary, rotate

TINY = ModelConfig(vocab_size=32, dim=16, layers=2, heads=2, ffn_dim=24, max_seq_len=12)


def tokens(batch: int = 3, length: int = 10, vocab: int = 32) -> torch.Tensor:
    return torch.randint(vocab, (batch, length), generator=torch.Generator().manual_seed(1))


def test_parameters_are_named_plainly() -> None:
    names = {
        name for name, _ in Transformer(replace(TINY, tie_embeddings=False)).named_parameters()
    }
    parts = ["attn_norm", "attn.q", "attn.k", "attn.v", "attn.out"]
    parts += ["mlp_norm", "mlp.gate", "mlp.up", "mlp.down"]
    assert names == {"embed.weight", "norm.weight", "lm_head.weight"} | {
        f"blocks.{i}.{part}.weight" for i in range(2) for part in parts
    }
    assert not list(Transformer(TINY).buffers())


def test_embedding_and_output_share_one_matrix_if_asked() -> None:
    tied, untied = Transformer(TINY), Transformer(replace(TINY, tie_embeddings=False))
    assert tied.lm_head.weight is tied.embed.weight
    assert untied.lm_head.weight is not untied.embed.weight
    assert "lm_head.weight" in tied.state_dict()
    count = [sum(p.numel() for p in model.parameters()) for model in (tied, untied)]
    assert count[1] - count[0] == 32 * 16


def test_the_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, x, y = Transformer(TINY), tokens(), tokens().roll(1)
    plain = model(x)
    assert plain.loss is None
    assert plain.logits.shape == (3, 10, 32)
    scored = model(x, y)
    assert torch.equal(scored.logits, plain.logits)
    picked = plain.logits.log_softmax(-1).gather(-1, y[..., None])
    assert torch.allclose(scored.loss, -picked.mean())
    # It starts out knowing nothing.
    assert abs(scored.loss.item() - math.log(32)) < 0.1


def test_a_prediction_depends_on_the_past_alone() -> None:
    model, x = Transformer(TINY), tokens()
    changed = x.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 32
    before, after = model(x).logits, model(changed).logits
    assert torch.equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any(-1).all()


def test_rotation_shows_distances_and_keeps_lengths() -> None:
    config = replace(TINY, dim=32)
    x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    q, k = rotate(x[:, None].expand(2, 40, 16), rotary(40, config, torch.device("cpu")))
    assert torch.allclose(q.norm(dim=-1), x[0].norm().expand(40), rtol=1e-4)
    scores = q @ k.T
    for distance in (0, 1, 7):
        row = scores.diagonal(-distance)
        assert torch.allclose(row, row[0].expand(len(row)), atol=1e-3)
    assert not torch.isclose(scores[5, 5], scores[6, 5])


def test_initial_parameters_depend_on_the_seed_alone() -> None:
    def drawn(seed: int, state: int) -> list[torch.Tensor]:
        torch.manual_seed(state)
        random.seed(state)
        return list(Transformer(replace(TINY, seed=seed)).state_dict().values())

    first, same, other = drawn(5, 0), drawn(5, 1), drawn(6, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert sum(torch.equal(a, b) for a, b in zip(first, other, strict=True)) == 5  # the norms


def test_it_can_be_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = Transformer(TINY)
    assert model.embed.weight.is_meta
    model.to_empty(device="cpu")
    model.init_weights()
    assert model.lm_head.weight is model.embed.weight
    assert torch.equal(model(tokens()).logits, Transformer(TINY)(tokens()).logits)


def test_dropout_acts_in_training_only() -> None:
    model, x = Transformer(replace(TINY, dropout=0.5)), tokens()
    assert not torch.equal(model(x).logits, model(x).logits)
    model.eval()
    assert torch.equal(model(x).logits, Transformer(TINY)(x).logits)


def test_it_learns() -> None:
    config = replace(TINY, vocab_size=16)
    model, x = Transformer(config), tokens(batch=8, vocab=16)
    optim = torch.optim.AdamW(model.parameters(), lr=1e-2)
    # The token two places back: it takes attention, positions and the feed-forward part.
    y = F.pad(x, (2, 0))[:, :-2]
    losses = []
    for _ in range(80):
        optim.zero_grad()
        loss = model(x, y).loss
        loss.backward()
        optim.step()
        losses.append(loss.item())
    assert losses[0] > 2.5
    assert losses[-1] < 0.2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 10}, "model.dim 10 .* 2 heads of even width: give a multiple of 4"),
        ({"layers": 0}, "model.layers is 0"),
        ({"ffn_dim": -1}, "model.ffn_dim is -1"),
        ({"dropout": 1.0}, "model.dropout is 1.0"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **change)


def test_a_long_sequence_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"13 tokens: model\.max_seq_len is 12"):
        Transformer(TINY)(tokens(length=13))
