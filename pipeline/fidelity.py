"""How far a file's next-token distributions are from the model's: the statistics of llama.cpp's
``perplexity --kl-divergence``, for any runtime. All in nats, float64, over teacher-forced positions."""

import numpy as np

BLOCK = 64
"""Positions in float64 at a time: 25 MB an array at a vocabulary of 49,152."""


def log_softmax(logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Natural log probabilities of logits ``[T, V]`` and the probabilities, float64."""
    log_p = logits.astype(np.float64)
    log_p -= log_p.max(axis=-1, keepdims=True)
    # The exponentials are nine tenths of the time of a comparison, so they are taken once.
    p = np.exp(log_p)
    total = p.sum(axis=-1, keepdims=True)
    log_p -= np.log(total)
    p /= total
    return log_p, p


class Fidelity:
    """Collects a few numbers a position, so that no ``[tokens, V]`` array of a whole text exists."""

    def __init__(self) -> None:
        self._kl: list[np.ndarray] = []
        self._same_top: list[np.ndarray] = []
        self._top_probability_difference: list[np.ndarray] = []
        self._loss_difference: list[np.ndarray] = []
        self._tops: list[np.ndarray] = []

    def add(self, reference: np.ndarray, logits: np.ndarray, next_ids: np.ndarray) -> None:
        """Adds positions.

        Args:
            reference: the model's logits ``[T, V]``, float32.
            logits: the file's logits ``[T, V]`` of the same tokens, float32.
            next_ids: the token that follows each position ``[T]``.

        Raises:
            ValueError: the shapes differ.
        """
        if reference.shape != logits.shape or len(next_ids) != len(logits):
            raise ValueError(
                f"logits {logits.shape}, reference {reference.shape} and {len(next_ids)} tokens do not match"
            )
        for start in range(0, len(next_ids), BLOCK):
            block = slice(start, start + BLOCK)
            self._add_block(reference[block], logits[block], np.asarray(next_ids[block]))

    def _add_block(self, reference: np.ndarray, logits: np.ndarray, next_ids: np.ndarray) -> None:
        # Logits that are no numbers must end in statistics that are none, which no gate lets pass.
        with np.errstate(invalid="ignore", over="ignore"):
            (log_p, p), (log_q, q) = log_softmax(reference), log_softmax(logits)
            top = log_p.argmax(-1)
            rows = np.arange(len(top))
            # Where p is 0 a term of the sum is 0, however small q is.
            terms = np.where(p > 0, p * (log_p - log_q), np.where(np.isnan(p + log_q), np.nan, 0.0))
            # Rounding can leave a tiny negative number where both are equal.
            self._kl.append(np.maximum(terms.sum(-1), 0.0))
            self._same_top.append(top == log_q.argmax(-1))
            self._top_probability_difference.append(q[rows, top] - p[rows, top])
            self._loss_difference.append(log_p[rows, next_ids] - log_q[rows, next_ids])
            other = log_q.argmax(-1)
            self._tops.append(np.stack([top, p[rows, top], other, q[rows, other]], axis=1))

    def worst(self, count: int) -> list[dict[str, float]]:
        """The positions at which the file is furthest from the model, furthest first.

        Returns:
            position (counted from 0 in the order of adding), kl, model_top and file_top, the ids of the most
            likely tokens, and their probabilities, model_probability and file_probability, each by its own
            model. Positions whose KL is no number are left out.
        """
        kl, tops = np.concatenate(self._kl), np.concatenate(self._tops)
        order = [place for place in np.argsort(-kl, kind="stable") if np.isfinite(kl[place])]
        return [
            {
                "position": int(place),
                "kl": float(kl[place]),
                "model_top": int(tops[place, 0]),
                "model_probability": float(tops[place, 1]),
                "file_top": int(tops[place, 2]),
                "file_probability": float(tops[place, 3]),
            }
            for place in order[:count]
        ]

    def statistics(self) -> dict[str, float]:
        """What the positions say together.

        Returns:
            tokens; mean_kl, median_kl, p99_kl, p999_kl, max_kl of KL(model || file); same_top, the share of
            positions with the same most likely token, with same_top_error, its binomial standard error;
            perplexity_ratio, the file's over the model's, with perplexity_ratio_error, its standard error by
            the delta method from the paired losses; top_probability_rms, the root mean square difference of
            the probability of the model's most likely token.

        Raises:
            ValueError: nothing was added.
        """
        if not self._kl:
            raise ValueError("no position was added, so there is nothing to tell")
        kl = np.concatenate(self._kl)
        difference = np.concatenate(self._loss_difference)
        top = np.concatenate(self._top_probability_difference)
        tokens = len(kl)
        same_top = float(np.concatenate(self._same_top).mean())
        with np.errstate(invalid="ignore", over="ignore"):
            ratio = float(np.exp(difference.mean()))
            spread = float(difference.std(ddof=1)) if tokens > 1 else 0.0
            return {
                "tokens": tokens,
                "mean_kl": float(kl.mean()),
                "median_kl": float(np.median(kl)),
                "p99_kl": float(np.quantile(kl, 0.99)),
                "p999_kl": float(np.quantile(kl, 0.999)),
                "max_kl": float(kl.max()),
                "same_top": same_top,
                "same_top_error": float(np.sqrt(same_top * (1 - same_top) / tokens)),
                "perplexity_ratio": ratio,
                "perplexity_ratio_error": ratio * spread / float(np.sqrt(tokens)),
                "top_probability_rms": float(np.sqrt((top**2).mean())),
            }
