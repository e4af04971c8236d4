"""A teacher's distributions as a few sampled tokens a position: a small cache without bias.

Top-k logits are small but biased: what they leave out is never learned. Sampling from the teacher's own
distribution is not (Anshumann et al. 2025, arXiv 2503.16870). Here each position keeps S tokens: the most
likely ones surely, the others drawn in proportion to their probability p, so that a token is kept with
probability::

    kept = min(1, p / c)        c is the position's threshold: the sum of all `kept` is S

The draw is systematic (one random offset, equal steps along the cumulated probabilities), which keeps
exactly S tokens. A kept token stands for 1 / kept tokens: any sum over the vocabulary of f(p, q) with
f(0, q) known is estimated without bias by the kept tokens' f / kept (Horvitz and Thompson 1952).

With q the student's distribution, known in full:

- ``forward_kl``, ``skew_forward_kl``, ``skew_reverse_kl``, ``jensen_shannon`` and ``total_variation`` are
  such sums: loss and gradient are unbiased, for each position, over the draws. A cache is drawn once, so
  later epochs see the same draw.
- ``taid``: the target p_t is a ratio of two such sums. Its estimate tends to p_t as S grows but has a bias
  of the order of 1/S while t is below 1; at t = 1 it is ``forward_kl``.
- ``reverse_kl`` and ``adaptive_kl`` need log p of every token, ``decoupled_kd`` p of the label whether kept
  or not, ``curriculum_temperature`` p at other temperatures: they are refused.

Besides what every cache holds (``taid.cache``), its folder has ``sampled-00000.npy``, ...: ``[rows, T]``
records of ids (S, uint16 or uint32), log-probabilities (S, float32) and threshold (float32).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taid import objectives
from taid.cache import (
    SHARD_BYTES,
    BlockCache,
    data_digest,
    index_arrays,
    rows_per_shard,
    write_cache,
)
from taid.errors import TaidError
from taid.fused import CHUNK_SIZE, PLAIN_HEAD, HeadOptions, fused_objective
from taid.heads import head_options, head_weight, trim
from taid.teacher import model_digest, teacher_hidden_states

FORMAT = "taid-sampled-probabilities"
VERSION = 1


@dataclass(frozen=True)
class SampledProbabilities:
    """The kept tokens of some positions.

    Attributes:
        ids: ``[..., S]`` int64.
        log_p: ``[..., S]`` float32, the teacher's log-probabilities, of the whole vocabulary.
        threshold: ``[...]`` float32: a token was kept with probability min(1, p / threshold).
    """

    ids: Tensor
    log_p: Tensor
    threshold: Tensor

    def __getitem__(self, positions: Any) -> "SampledProbabilities":
        """The same of some of the positions."""
        return SampledProbabilities(self.ids[positions], self.log_p[positions], self.threshold[positions])


def sample_probabilities(log_p: Tensor, samples: int, offsets: Tensor) -> SampledProbabilities:
    """Keeps ``samples`` tokens of every position.

    Args:
        log_p: ``[N, V]`` log-probabilities, of which none may be NaN.
        samples: S; more than V means V.
        offsets: ``[N]`` uniform random numbers in [0, 1): all the randomness there is.
    """
    vocabulary_size = log_p.shape[-1]
    samples = min(samples, vocabulary_size)
    p = log_p.double().exp()
    top, top_ids = p.topk(samples, dim=-1)
    slots = torch.arange(samples, device=p.device)
    # thresholds[:, k]: what the others' mass gives each of the S - k draws when the k most likely are sure.
    # Summed from the smallest, so that little mass beside a nearly sure token is not lost to rounding.
    left_out = p.scatter(-1, top_ids, 0.0).sum(-1, keepdim=True)
    thresholds = (left_out + top.flip(-1).cumsum(-1).flip(-1)) / (samples - slots)
    enough = top <= thresholds
    enough[:, -1] = True
    sure = enough.int().argmax(-1, keepdim=True)
    threshold = thresholds.gather(-1, sure)
    others = p.scatter(-1, top_ids, torch.where(slots < sure, 0.0, top)).cumsum_(-1)
    step = others[:, -1:] / (samples - sure)
    points = (offsets.to(p).unsqueeze(-1) + slots - sure) * step
    drawn = torch.searchsorted(others, points.clamp_(min=0), right=True).clamp_(max=vocabulary_size - 1)
    ids = torch.where(slots < sure, top_ids, drawn)
    return SampledProbabilities(ids, log_p.gather(-1, ids), threshold.squeeze(-1).to(log_p))


class SampledTeacher:
    """Sampled probabilities that ``write_sampled_cache`` left on disk, looked up by block index.

    It has no hidden states and no head: only the objectives of ``SAMPLED_OBJECTIVES`` can be learned from
    it, and nothing can be evaluated against it.
    """

    def __init__(self, folder: Path | str, verify: bool = True):
        """
        Args:
            folder: a finished cache.
            verify: read every shard once and compare its SHA-256.

        Raises:
            TaidError: the folder is no finished cache, or a file of it is missing or damaged.
        """
        self._cache = BlockCache(folder, FORMAT, VERSION, "sampled", verify)
        self.folder, self.meta = self._cache.folder, self._cache.meta
        try:
            self.vocabulary_size = int(self.meta["vocabulary_size"])
            self.samples = int(self.meta["samples"])
            kept = record_type(self.samples, self.vocabulary_size)
        except (KeyError, ValueError, TypeError, OverflowError) as error:
            raise self._cache.incomplete(error) from None
        self._cache.require_type(kept)

    def sampled_probabilities(self, input_ids: Tensor, index: Tensor | None) -> SampledProbabilities:
        """Of every position ``[B, T]``, on ``input_ids``' device.

        Args:
            input_ids: ``[B, T]``.
            index: ``[B]``, each block's number in the training data.

        Raises:
            TaidError: no index is given, one is outside the cache, or the cached block of that index is
                not ``input_ids``.
        """
        records = self._cache.rows(input_ids, index)
        return SampledProbabilities(
            *(
                torch.from_numpy(np.ascontiguousarray(records[name]).astype(dtype)).to(input_ids.device)
                for name, dtype in (("ids", np.int64), ("log_p", np.float32), ("threshold", np.float32))
            )
        )


@torch.no_grad()
def write_sampled_cache(
    model: Any,
    token_blocks: np.ndarray,
    folder: Path | str,
    samples: int = 32,
    batch_size: int = 8,
    progress: Callable[[int, int], None] | None = None,
    *,
    position_ids: np.ndarray | None = None,
    vocabulary_size: int | None = None,
    seed: int = 0,
    teacher_digest: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    chunk_size: int = CHUNK_SIZE,
) -> None:
    """Runs the teacher over all blocks once and keeps a few sampled tokens of every position.

    A killed run goes on after its last complete shard when called again with the same arguments; a
    finished cache is left as it is. The draw depends on the seed and the block's number alone.

    Args:
        model: a `transformers` causal language model, on the device where it is to run.
        token_blocks: ``[N, T]`` integers; block i is looked up as index i.
        folder: the cache, made when missing.
        samples: tokens kept of a position.
        batch_size: blocks that the model sees at a time.
        progress: called with (blocks done, blocks in all) after every batch.
        position_ids: ``[N, T]``, where several documents share a block.
        vocabulary_size: rows of the head that teacher and student share; None: all.
        seed: of the draw.
        teacher_digest: identifies the teacher; None: SHA-256 over its weights (``model_digest``).
        shard_bytes: about how large a shard is.
        chunk_size: positions that are projected at a time.

    Raises:
        TaidError: the arguments are impossible, or the folder holds a cache of another teacher, other data
            or another draw.
    """
    folder = Path(folder)
    weight, options = head_weight(model), head_options(model)
    arrays = index_arrays(token_blocks, position_ids, weight.shape[0])
    tokens = arrays["tokens.npy"]
    vocabulary_size = vocabulary_size or weight.shape[0]
    if not 1 <= samples <= vocabulary_size:
        raise TaidError(f"samples is {samples}; it must lie between 1 and the {vocabulary_size} tokens.")
    weight, options = trim(weight, options, vocabulary_size)
    record = record_type(samples, vocabulary_size)
    rows = rows_per_shard(tokens.shape[1] * record.itemsize, batch_size, shard_bytes)
    identity = {
        "format": FORMAT,
        "version": VERSION,
        "teacher_digest": teacher_digest or model_digest(model),
        "data_digest": data_digest(arrays),
        "samples": samples,
        "vocabulary_size": vocabulary_size,
        "seed": seed,
        "shape": list(tokens.shape),
        "rows_per_shard": rows,
        "batch_size": batch_size,
    }

    def compute(blocks: slice) -> np.ndarray:
        hidden = teacher_hidden_states(model, arrays, blocks).flatten(0, 1)
        numbers = range(blocks.start, blocks.stop)
        offsets = torch.from_numpy(
            np.stack([np.random.default_rng([seed, number]).random(tokens.shape[1]) for number in numbers])
        ).flatten()
        records = np.empty(len(hidden), dtype=record)
        for start in range(0, len(hidden), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits = options.apply_((hidden[chunk] @ weight.T).float())
            kept = sample_probabilities(logits.log_softmax(-1), samples, offsets[chunk].to(logits.device))
            records["ids"][chunk] = kept.ids.cpu().numpy()
            records["log_p"][chunk] = kept.log_p.cpu().numpy()
            records["threshold"][chunk] = kept.threshold.cpu().numpy()
        return records.reshape(len(numbers), tokens.shape[1])

    write_cache(model, folder, identity, arrays, "sampled", compute, progress)


def record_type(samples: int, vocabulary_size: int) -> np.dtype:
    """What is stored of one position; its ``itemsize`` is the cache's bytes a token."""
    id_type = np.uint16 if vocabulary_size <= 2**16 else np.uint32
    return np.dtype(
        [("ids", id_type, (samples,)), ("log_p", np.float32, (samples,)), ("threshold", np.float32)]
    )


Estimate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, float]]
"""(log_p, log_q, log_weight), each [n, S] of the kept tokens -> what the objective makes of them:

- each token's share of the loss [n, S];
- q times the derivative of those shares by q [n, S];
- the rest of a position's loss, a constant: the sum of f(0, q) over the vocabulary.

log_weight is -log of the probability of having been kept.
"""


def fused_sampled_objective(
    name: str,
    student_hidden: Tensor,
    student_head_weight: Tensor,
    sampled: SampledProbabilities,
    *,
    mask: Tensor | None = None,
    student_head: HeadOptions = PLAIN_HEAD,
    chunk_size: int = CHUNK_SIZE,
    **arguments: Any,
) -> Tensor:
    """An objective of ``SAMPLED_OBJECTIVES`` estimated from sampled probabilities, in chunks.

    Args:
        name: a key of ``SAMPLED_OBJECTIVES``.
        student_hidden: ``[N, Hs]`` or ``[B, T, Hs]`` after the final norm.
        student_head_weight: ``[V, Hs]``, rows of the vocabulary that was sampled.
        sampled: of the same positions.
        mask: ``[N]`` or ``[B, T]``: positions that count; None: all.
        student_head: bias, scale and soft-capping.
        chunk_size: positions at a time.
        arguments: the objective's own, such as ``t`` or ``skew``, and ``fused_taid``'s ``target_entropy``.

    Raises:
        TaidError: the objective cannot be estimated from samples, or shapes do not fit together.
    """
    check_sampled_objective(name)
    estimate = SAMPLED_OBJECTIVES[name](**arguments)
    samples = sampled.ids.shape[-1]
    positions = student_hidden.shape[:-1]
    if sampled.ids.shape[:-1] != positions:
        raise TaidError(
            f"The sampled probabilities have positions {list(sampled.ids.shape[:-1])}, "
            f"the student's hidden states {list(positions)}."
        )

    def chunk_objective(student: Tensor, teacher: Tensor | None, ids: Tensor | None) -> tuple[Tensor, Tensor]:
        assert teacher is not None
        assert ids is not None
        log_p, threshold = teacher.to(student)[:, :samples], teacher.to(student)[:, samples:]
        log_weight = (threshold.log() - log_p).clamp_(min=0)
        log_q = torch.log_softmax(student, -1, out=student)
        loss, slope, rest = estimate(log_p, log_q.gather(-1, ids), log_weight)
        # The logits' gradient is q (s - <q, s>) with s the derivative by q; s is zero but at the kept tokens.
        gradient = log_q.exp_().mul_(-slope.sum(-1, keepdim=True)).scatter_add_(-1, ids, slope)
        return loss.sum() + rest * len(student), gradient

    return fused_objective(
        chunk_objective,
        student_hidden,
        student_head_weight,
        torch.cat([sampled.log_p, sampled.threshold.unsqueeze(-1)], dim=-1),
        None,
        labels=sampled.ids,
        mask=mask,
        student_head=student_head,
        chunk_size=chunk_size,
    )


def _forward_kl() -> Estimate:
    def estimate(log_p: Tensor, log_q: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, float]:
        p = (log_p + log_weight).exp()
        return -p * log_q, -p, 0.0

    return estimate


def _taid(t: float, target_entropy: Tensor | None = None) -> Estimate:
    objectives.check_share("t", t)

    def estimate(log_p: Tensor, log_q: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, float]:
        mixed = (1 - t) * log_q + t * log_p
        log_total = torch.logsumexp(mixed + log_weight, -1, keepdim=True)
        target = (mixed + log_weight - log_total).exp()
        if target_entropy is not None:
            target_entropy.sub_((target * (mixed - log_total)).sum())
        return -target * log_q, -target, 0.0

    return estimate


def _skew_forward_kl(skew: float = 0.1) -> Estimate:
    objectives.check_share("skew", skew)

    def estimate(log_p: Tensor, log_q: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, float]:
        p = (log_p + log_weight).exp()
        log_m = objectives.log_mixture(log_p, log_q, skew)
        return -p * log_m, -(1 - skew) * p * (log_q - log_m).exp(), 0.0

    return estimate


def _skew_reverse_kl(skew: float = 0.1) -> Estimate:
    if not 0 < skew <= 1:
        raise TaidError(
            f"skew is {skew}; with a sampled teacher cache it must be above 0 and at most 1, "
            "for without it the loss needs the probability of every token."
        )

    def estimate(log_p: Tensor, log_q: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, float]:
        # f(p, q) = q log(q / m) with m = (1 - s) p + s q, and f(0, q) = -q log s.
        log_m = objectives.log_mixture(log_q, log_p, skew)
        beyond = log_q - log_m + math.log(skew)
        weighted_q = (log_q + log_weight).exp()
        slope = weighted_q * (beyond + 1 - skew * (log_q - log_m).exp())
        return weighted_q * beyond, slope, -math.log(skew)

    return estimate


def _jensen_shannon(teacher_weight: float = 0.1) -> Estimate:
    objectives.check_share("teacher_weight", teacher_weight)
    share = 1 - teacher_weight

    def estimate(log_p: Tensor, log_q: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, float]:
        if share in (0.0, 1.0):
            return torch.zeros_like(log_p), torch.zeros_like(log_p), 0.0
        # f(p, q) = w p log(p / m) + (1 - w) q log(q / m), and f(0, q) = -(1 - w) q log(1 - w).
        log_m = objectives.log_mixture(log_p, log_q, teacher_weight)
        beyond = share * (log_q - log_m + math.log(share))
        weighted_p, weighted_q = (log_p + log_weight).exp(), (log_q + log_weight).exp()
        loss = teacher_weight * weighted_p * (log_p - log_m) + weighted_q * beyond
        return loss, weighted_q * beyond, -share * math.log(share)

    return estimate


def _total_variation() -> Estimate:
    def estimate(log_p: Tensor, log_q: Tensor, log_weight: Tensor) -> tuple[Tensor, Tensor, float]:
        # f(p, q) = |p - q| / 2, and f(0, q) = q / 2.
        weighted_p, weighted_q = (log_p + log_weight).exp(), (log_q + log_weight).exp()
        loss = 0.5 * ((weighted_p - weighted_q).abs() - weighted_q)
        return loss, 0.5 * weighted_q * ((log_q - log_p).sign() - 1), 0.5

    return estimate


SAMPLED_OBJECTIVES: dict[str, Callable[..., Estimate]] = {
    "forward_kl": _forward_kl,
    "taid": _taid,
    "skew_forward_kl": _skew_forward_kl,
    "skew_reverse_kl": _skew_reverse_kl,
    "jensen_shannon": _jensen_shannon,
    "total_variation": _total_variation,
}
"""Names of the objectives that can be learned from sampled probabilities."""


def check_sampled_objective(name: str) -> None:
    """
    Raises:
        TaidError: the objective cannot be estimated from sampled probabilities.
    """
    if name not in SAMPLED_OBJECTIVES:
        raise TaidError(
            f"The objective {name} needs more of the teacher than sampled probabilities; use a live "
            f"teacher or a hidden-state cache, or one of {', '.join(SAMPLED_OBJECTIVES)}."
        )
