"""What `grpo_sync.py` is about: additions as text, a model that learns them, and GRPO's loss.

Questions are integers, a hundred times the one summand plus the other. As text a question has 6
tokens ("47+38=") and its answer 3 ("085").
"""

import torch
from torch import Tensor

from planaria.launch.demo.model import ModelConfig, Transformer

PLUS, EQUALS, VOCABULARY = 10, 11, 12  # after the ten digits
PROMPT, ANSWER = 6, 3  # tokens


def new_model(dim: int) -> Transformer:
    return Transformer(ModelConfig(VOCABULARY, dim, layers=3, heads=4, ffn_dim=3 * dim))


def digits(numbers: Tensor, places: int) -> Tensor:
    return torch.stack([numbers // 10**p % 10 for p in reversed(range(places))], dim=1)


def prompts_of(questions: Tensor) -> Tensor:
    """Questions as tokens, int64 of shape (n, PROMPT)."""
    a, b, sign = questions // 100, questions % 100, torch.ones_like(questions)[:, None]
    return torch.cat([digits(a, 2), sign * PLUS, digits(b, 2), sign * EQUALS], dim=1)


def answers_of(questions: Tensor) -> Tensor:
    """What is right, (n, ANSWER): what text teaches, and what a reward is for."""
    return digits(questions // 100 + questions % 100, ANSWER)


@torch.no_grad()
def answer(
    model: Transformer, prompts: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Answers and their tokens' log-probabilities, (n, ANSWER) each; greedy without a generator."""
    text, found = prompts, []
    for _ in range(ANSWER):
        rows, at = torch.unique(text, dim=0, return_inverse=True)  # a group begins alike
        logp = model(rows).logits[:, -1].log_softmax(-1)[at]
        if generator is None:
            token = logp.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(logp.exp(), 1, generator=generator)
        found.append(logp.gather(1, token))
        text = torch.cat([text, token], dim=1)
    return text[:, PROMPT:], torch.cat(found, dim=1)


def share_right(model: Transformer, questions: Tensor, *, greedy: bool = False) -> float:
    """How many of these questions the model answers right, sampled or greedily."""
    generator = None if greedy else torch.Generator().manual_seed(0)
    given, _ = answer(model, prompts_of(questions), generator)
    return float((given == answers_of(questions)).all(1).float().mean())


def log_probabilities(model: Transformer, text: Tensor) -> Tensor:
    """Of the tokens of each answer, (n, ANSWER)."""
    logp = model(text[:, :-1]).logits[:, PROMPT - 1 :].log_softmax(-1)
    return logp.gather(2, text[:, PROMPT:, None])[..., 0]


def learn_from_text(
    model: Transformer, questions: Tensor, until: float, most: int, seed: int = 0
) -> float:
    """Supervised steps, `most` of them, until this share of sampled answers is right."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    right = 0.0
    for step in range(most):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 50)
        drawn = questions[torch.randint(len(questions), (128,), generator=generator)]
        optimizer.zero_grad()
        text = torch.cat([prompts_of(drawn), answers_of(drawn)], dim=1)
        (-log_probabilities(model, text).mean()).backward()
        optimizer.step()
        if step % 20 == 19:
            right = share_right(model, questions[:512])
            if right >= until:
                break
    return right


def grpo_loss(
    model: Transformer,
    text: Tensor,
    old: Tensor,
    rewards: Tensor,
    group: int,
    reference: Transformer | None = None,
    kl: float = 0.0,
) -> Tensor:
    """GRPO's clipped objective; groups whose rewards are all the same are left out.

    Args:
        model: The policy.
        text: Questions with their answers, (n, PROMPT + ANSWER); groups one after the other.
        old: What the rollouts gave the answers' tokens as log-probabilities, (n, ANSWER).
        rewards: Of each answer, (n,).
        group: Answers to a question.
        reference: The policy to stay close to, if `kl` says so.
        kl: Weight of the distance from it (J. Schulman's estimator k3).
    """
    grouped = rewards.view(-1, group)
    spread = grouped.std(1, keepdim=True)
    advantage = ((grouped - grouped.mean(1, keepdim=True)) / (spread + 1e-4)).flatten()
    kept = (spread > 0).repeat_interleave(group)
    # Equal answers of a group differ in nothing: they are computed once, and count as often.
    rows, at, times = torch.unique(text[kept], dim=0, return_inverse=True, return_counts=True)
    was, gain = torch.zeros(len(rows), ANSWER), torch.zeros(len(rows), 1)
    was[at], gain[at] = old[kept], advantage[kept][:, None]
    logp = log_probabilities(model, rows)
    ratio = (logp - was).exp()
    loss = -torch.minimum(ratio * gain, ratio.clamp(0.8, 1.25) * gain)
    if reference is not None and kl:
        with torch.no_grad():
            theirs = log_probabilities(reference, rows)
        loss = loss + kl * ((theirs - logp).exp() - (theirs - logp) - 1)
    return (loss.mean(1) * times).sum() / max(int(times.sum()), 1)
