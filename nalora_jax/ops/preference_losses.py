"""Losses of preferences, as pure functions of the log-probabilities of their answers.

With L = log p(answer), R = L - log p_ref(answer), n the tokens of the answer, w the chosen answer,
l the rejected one, s the label smoothing, and f(x) = -log sigmoid(x):

| name | loss of a pair |
|---|---|
| dpo (arXiv 2305.18290) | (1 - s) f(m) + s f(-m), m = beta (R_w - R_l) |
| robust (2403.00409) | ((1 - s) f(m) - s f(-m)) / (1 - 2 s) |
| ipo (2310.12036) | (R_w / n_w - R_l / n_l - 1 / (2 beta))^2 |
| simpo (2405.14734) | (1 - s) f(m) + s f(-m), m = beta (L_w / n_w - L_l / n_l) - gamma |
| orpo (2403.07691) | -L_w / n_w + beta f(o_w - o_l), o = log(P / (1 - P)), P = exp(L / n) |
| kto (2402.01306), of a record | D sigmoid(-d), d = beta (R - K) if the answer is desirable |
| | U sigmoid(d) if it is not |

K is the mean log-ratio of answers to other prompts, at least 0, without a gradient; D and U are
weights.

``nll_weight`` adds -L_w / n_w to each but orpo, which has it, and kto.

``weighted`` (WPO, arXiv 2406.11827) multiplies the loss of a pair by v_w v_l in training. v is the
geometric mean over the tokens of an answer of p(token) / sum p^2, and has no gradient. It is large
for answers that the policy could have written itself.

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


class Labels(NamedTuple):
    """Labels of answers without pairs, and figures of all answers in the batch."""

    desirable: Array  # 1 for desirable answers, 0 for others; [...]
    share: Array  # share of desirable answers
    divergence: Array  # K: mean log-ratio of answers to other prompts, at least 0


class AnswerScores(NamedTuple):
    """The answers of pairs. Each array is ``[..., 2]``, the chosen answer first.

    Without pairs the first answer is a record's own, and the second one that of another prompt.
    """

    log_probs: Array
    ratios: Array  # log-probabilities minus those of the reference; 0 without one
    tokens: Array  # number of tokens of each answer
    labels: Labels | None = None  # of losses without pairs
    weights: Array | None = None  # of pairs, [...]; None: 1

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
    has_pairs: bool = True  # False: of records with one answer and a label


def pair_losses(answers: AnswerScores, config: PreferenceConfig) -> PairLosses:
    """Returns losses and rewards of pairs by ``config.loss``, with the weighted NLL."""
    losses = LOSSES[config.loss].function(answers, config)
    loss = losses.loss
    if config.nll_weight:
        loss = loss + config.nll_weight * chosen_nll(answers)
    if answers.weights is not None:
        loss = loss * answers.weights
    return losses._replace(loss=loss)


def pair_weights(alignments: Array, tokens: Array) -> Array:
    """Returns the weights of pairs for ``weighted``, ``[...]``.

    As in TRL they are not limited: a pair of which both answers are the likeliest ones weighs
    more than 1.

    Args:
      alignments: log p - log sum p^2, summed over the tokens of each answer, ``[..., 2]``.
      tokens: number of tokens of each answer, ``[..., 2]``.
    """
    means = alignments / tokens
    xp = means.__array_namespace__()
    return xp.exp(xp.sum(means, axis=-1))


def chosen_nll(answers: AnswerScores) -> Array:
    """Returns the negative log-likelihood of each chosen answer, in nats per token.

    With labels the mean of the results is that over desirable answers.
    """
    nll = -answers.means[..., 0]
    if answers.labels is None:
        return nll
    return nll * _class_weights(answers.labels)[..., 0]


def label_figures(desirable: Array, ratios: Array, real: Array) -> Labels:
    """Returns the labels of a batch with their share and the divergence of the policy.

    The divergence is estimated as in TRL: by the mean log-ratio of answers that were written for
    another prompt.

    Args:
      desirable: 1 for desirable answers, 0 for others, ``[...]``.
      ratios: log-ratios ``[..., 2]``, those of answers to other prompts second.
      real: 1 for records, 0 for padding, ``[...]``.
    """
    xp = ratios.__array_namespace__()
    count = xp.maximum(xp.sum(real), 1.0)
    divergence = xp.sum(real * ratios[..., 1]) / count
    share = xp.sum(real * desirable) / count
    return Labels(desirable, share, xp.maximum(divergence, 0.0))


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


def _kto(answers: AnswerScores, config: PreferenceConfig) -> PairLosses:
    """Returns Kahneman-Tversky's loss of records with a label.

    The rewards are beta R of desirable answers and of others. Each is 0 for answers of the other
    class and scaled, so that means over all records are those of a class, as TRL logs them.
    """
    labels = answers.labels
    assert labels is not None
    ratios = answers.ratios[..., 0]
    desirable = labels.desirable
    # The distance from the divergence, positive where the label is met.
    distance = config.beta * (2 * desirable - 1) * (ratios - labels.divergence)
    weight = config.desirable_weight * desirable
    weight = weight + config.undesirable_weight * (1 - desirable)
    xp = ratios.__array_namespace__()
    loss = weight * xp.exp(-_softplus(distance))
    rewards = config.beta * ratios[..., None] * _class_weights(labels)
    return PairLosses(loss, rewards)


def _class_weights(labels: Labels) -> Array:
    """Returns weights ``[..., 2]`` that turn a mean over records into that over each class."""
    desirable = labels.desirable
    xp = desirable.__array_namespace__()
    others = 1 - labels.share
    # Of a class without records every numerator is 0.
    tiny = 1e-9
    first = desirable / xp.maximum(labels.share, tiny)
    second = (1 - desirable) / xp.maximum(others, tiny)
    return xp.stack([first, second], axis=-1)


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
    "dpo": PairLoss(_dpo, ("label_smoothing", "per_token", "nll_weight", "weighted")),
    "robust": PairLoss(
        _robust, ("label_smoothing", "per_token", "nll_weight", "weighted")
    ),
    "ipo": PairLoss(_ipo, ("nll_weight", "weighted")),
    "simpo": PairLoss(
        _simpo, ("label_smoothing", "gamma", "nll_weight"), has_reference=False
    ),
    "orpo": PairLoss(_orpo, (), has_reference=False),
    "kto": PairLoss(_kto, ("desirable_weight", "undesirable_weight"), has_pairs=False),
}
