"""How far a file's next-token distributions are from the model's: the statistics of llama.cpp's
``perplexity --kl-divergence``, for any runtime. All in nats, float64, over teacher-forced positions."""

from typing import Any

import numpy as np


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural log probabilities of logits ``[T, V]``, float64."""
    shifted = logits.astype(np.float64)
    shifted -= shifted.max(axis=-1, keepdims=True)
    shifted -= np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return shifted


class Fidelity:
    """Collects positions chunk by chunk, so that no ``[tokens, V]`` array of a whole text exists."""

    def __init__(self) -> None:
        self._kl: list[np.ndarray] = []
        self._same_top: list[np.ndarray] = []
        self._top_probability_difference: list[np.ndarray] = []
        self._reference_loss: list[np.ndarray] = []
        self._loss: list[np.ndarray] = []

    def add(self, reference: np.ndarray, logits: np.ndarray, next_ids: np.ndarray) -> None:
        """Adds positions.

        Args:
            reference: the model's logits ``[T, V]``.
            logits: the file's logits ``[T, V]`` of the same tokens.
            next_ids: the token that follows each position ``[T]``.
        """
        log_p, log_q = log_softmax(reference), log_softmax(logits)
        top = log_p.argmax(-1)
        rows = np.arange(len(top))
        # KL(p || q); rounding can leave a tiny negative number where both are equal.
        self._kl.append(np.maximum((np.exp(log_p) * (log_p - log_q)).sum(-1), 0.0))
        self._same_top.append(top == log_q.argmax(-1))
        self._top_probability_difference.append(np.exp(log_q[rows, top]) - np.exp(log_p[rows, top]))
        self._reference_loss.append(-log_p[rows, next_ids])
        self._loss.append(-log_q[rows, next_ids])

    def statistics(self) -> dict[str, Any]:
        """Mean, median, 99 %, 99.9 % and largest KL(model || file); share of positions with the same most
        likely token and its binomial standard error; perplexity of the file over the model's, with the
        standard error of its logarithm taken from the paired losses (delta method); root mean square
        difference of the top token's probability; number of tokens."""
        kl = np.concatenate(self._kl)
        same = np.concatenate(self._same_top)
        difference = np.concatenate(self._loss) - np.concatenate(self._reference_loss)
        top = np.concatenate(self._top_probability_difference)
        tokens = len(kl)
        share = float(same.mean())
        ratio = float(np.exp(difference.mean()))
        spread = float(difference.std(ddof=1)) if tokens > 1 else 0.0
        return {
            "tokens": tokens,
            "mean_kl": float(kl.mean()),
            "median_kl": float(np.median(kl)),
            "p99_kl": float(np.quantile(kl, 0.99)),
            "p999_kl": float(np.quantile(kl, 0.999)),
            "max_kl": float(kl.max()),
            "same_top": share,
            "same_top_error": float(np.sqrt(share * (1 - share) / tokens)),
            "perplexity_ratio": ratio,
            "perplexity_ratio_error": ratio * spread / float(np.sqrt(tokens)),
            "top_probability_rms": float(np.sqrt((top**2).mean())),
        }
