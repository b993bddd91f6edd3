"""Losses of preference pairs, as pure functions of the log-probabilities of their answers.

With L = log p(answer), R = L - log p_ref(answer), n the tokens of the answer, w the chosen answer,
l the rejected one, s the label smoothing, and f(x) = -log sigmoid(x):

| name | loss of a pair |
|---|---|
| dpo (arXiv 2305.18290) | (1 - s) f(m) + s f(-m), m = beta (R_w - R_l) |
| robust (2403.00409) | ((1 - s) f(m) - s f(-m)) / (1 - 2 s) |
| ipo (2310.12036) | (R_w / n_w - R_l / n_l - 1 / (2 beta))^2 |
| simpo (2405.14734) | (1 - s) f(m) + s f(-m), m = beta (L_w / n_w - L_l / n_l) - gamma |
| orpo (2403.07691) | -L_w / n_w + beta f(o_w - o_l), o = log(P / (1 - P)), P = exp(L / n) |

``nll_weight`` adds -L_w / n_w to each but orpo, which has it.

The functions take arrays of JAX and of NumPy, so that training and evaluation share them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from nalora_jax.config.settings import PreferenceConfig

# An array of JAX or of NumPy.
Array = Any
# Largest mean log-probability whose odds are computed; those of probability 1 are infinite.
_SURE = -1e-6


class AnswerScores(NamedTuple):
    """The answers of pairs. Each array is ``[..., 2]``, the chosen answer first."""

    log_probs: Array
    ratios: Array  # log-probabilities minus those of the reference; 0 without one
    tokens: Array  # number of tokens of each answer

    @property
    def means(self) -> Array:
        """Returns log-probabilities per token."""
        return self.log_probs / self.tokens


class PairLosses(NamedTuple):
    """Results for pairs."""

    loss: Array  # [...]
    rewards: Array  # [..., 2]


class PairLoss(NamedTuple):
    """A loss: its function, and what it reads."""

    function: Callable[[AnswerScores, PreferenceConfig], PairLosses]
    settings: tuple[str, ...]  # of `PreferenceConfig`, besides beta
    has_reference: bool = True


def pair_losses(answers: AnswerScores, config: PreferenceConfig) -> PairLosses:
    """Returns losses and rewards of pairs by ``config.loss``, with the weighted NLL."""
    losses = LOSSES[config.loss].function(answers, config)
    if not config.nll_weight:
        return losses
    return losses._replace(loss=losses.loss + config.nll_weight * chosen_nll(answers))


def chosen_nll(answers: AnswerScores) -> Array:
    """Returns the negative log-likelihood of each chosen answer, in nats per token."""
    return -answers.means[..., 0]


def _dpo(answers: AnswerScores, config: PreferenceConfig) -> PairLosses:
    """Returns the loss of direct preference optimization; its rewards are beta R."""
    rewards = _ratio_rewards(answers, config)
    return PairLosses(_smoothed(_difference(rewards), config), rewards)


def _robust(answers: AnswerScores, config: PreferenceConfig) -> PairLosses:
    """Returns DPO's loss without the bias of swapped labels; its rewards are beta R."""
    rewards = _ratio_rewards(answers, config)
    margin = _difference(rewards)
    smoothing = config.label_smoothing
    clean = (1 - smoothing) * _softplus(-margin)
    swapped = smoothing * _softplus(margin)
    return PairLosses((clean - swapped) / (1 - 2 * smoothing), rewards)


def _ipo(answers: AnswerScores, config: PreferenceConfig) -> PairLosses:
    """Returns the squared distance of the margin per token from its target.

    The division by tokens is that of TRL and of the paper's authors. As in TRL the rewards, beta R,
    are of whole answers.
    """
    margin = _difference(answers.ratios / answers.tokens)
    loss = (margin - 1 / (2 * config.beta)) ** 2
    return PairLosses(loss, config.beta * answers.ratios)


def _simpo(answers: AnswerScores, config: PreferenceConfig) -> PairLosses:
    """Returns the loss of a margin of gamma per token; its rewards are beta L / n."""
    rewards = config.beta * answers.means
    return PairLosses(_smoothed(_difference(rewards) - config.gamma, config), rewards)


def _orpo(answers: AnswerScores, config: PreferenceConfig) -> PairLosses:
    """Returns the NLL of the chosen answer plus its odds ratio; its rewards are beta L / n."""
    means = answers.means
    xp = means.__array_namespace__()
    below = xp.minimum(means, _SURE)
    log_odds = below - xp.log(-xp.expm1(below))
    loss = chosen_nll(answers) + config.beta * _softplus(-_difference(log_odds))
    return PairLosses(loss, config.beta * means)


def _ratio_rewards(answers: AnswerScores, config: PreferenceConfig) -> Array:
    """Returns beta times the log-ratios, per token with ``config.per_token``."""
    ratios = answers.ratios
    if config.per_token:
        ratios = ratios / answers.tokens
    return config.beta * ratios


def _smoothed(margin: Array, config: PreferenceConfig) -> Array:
    """Returns -log sigmoid(margin), mixed with that of the swapped pair."""
    smoothing = config.label_smoothing
    return (1 - smoothing) * _softplus(-margin) + smoothing * _softplus(margin)


def _difference(values: Array) -> Array:
    """Returns the chosen answers' values minus the rejected answers'."""
    return values[..., 0] - values[..., 1]


def _softplus(values: Array) -> Array:
    """Returns log(1 + exp(x)) = -log sigmoid(-x)."""
    return values.__array_namespace__().logaddexp(values, 0.0)


# By --preference.loss.
LOSSES = {
    "dpo": PairLoss(_dpo, ("label_smoothing", "per_token", "nll_weight")),
    "robust": PairLoss(_robust, ("label_smoothing", "per_token", "nll_weight")),
    "ipo": PairLoss(_ipo, ("nll_weight",)),
    "simpo": PairLoss(
        _simpo, ("label_smoothing", "gamma", "nll_weight"), has_reference=False
    ),
    "orpo": PairLoss(_orpo, (), has_reference=False),
}
