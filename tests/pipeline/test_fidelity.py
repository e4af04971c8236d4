"""Fidelity statistics against torch in float64 and against their definitions."""

import numpy as np
import pytest
import torch

from pipeline.fidelity import Fidelity, log_softmax


def random_logits(tokens: int, vocabulary: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 3, (tokens, vocabulary)).astype(np.float32)


@pytest.fixture(scope="module")
def pair() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    reference = random_logits(300, 97, 0)
    logits = reference + 0.3 * random_logits(300, 97, 1)
    return reference, logits, np.random.default_rng(2).integers(0, 97, 300)


def test_statistics_equal_torch_in_float64(pair) -> None:
    reference, logits, following = pair
    fidelity = Fidelity()
    fidelity.add(reference, logits, following)
    statistics = fidelity.statistics()
    log_p = torch.from_numpy(reference).double().log_softmax(-1)
    log_q = torch.from_numpy(logits).double().log_softmax(-1)
    kl = torch.nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)
    assert statistics["tokens"] == 300
    assert statistics["mean_kl"] == pytest.approx(kl.mean().item(), rel=1e-12)
    assert statistics["median_kl"] == pytest.approx(kl.quantile(0.5).item(), rel=1e-12)
    assert statistics["p99_kl"] == pytest.approx(kl.quantile(0.99).item(), rel=1e-12)
    assert statistics["p999_kl"] == pytest.approx(kl.quantile(0.999).item(), rel=1e-12)
    assert statistics["max_kl"] == pytest.approx(kl.max().item(), rel=1e-12)
    same = (log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item()
    assert 0 < same < 1
    assert statistics["same_top"] == pytest.approx(same)
    assert statistics["same_top_error"] == pytest.approx((same * (1 - same) / 300) ** 0.5)
    targets = torch.from_numpy(following)
    ratio = (
        torch.nn.functional.nll_loss(log_q, targets) - torch.nn.functional.nll_loss(log_p, targets)
    ).exp()
    assert statistics["perplexity_ratio"] == pytest.approx(ratio.item(), rel=1e-12)
    top = log_p.argmax(-1, keepdim=True)
    change = log_q.gather(-1, top).exp() - log_p.gather(-1, top).exp()
    assert statistics["top_probability_rms"] == pytest.approx(change.square().mean().sqrt().item(), rel=1e-12)


def test_worst_positions_are_those_of_torch(pair) -> None:
    reference, logits, following = pair
    fidelity = Fidelity()
    for start in (0, 100):  # in two pieces, as rows come
        part = slice(start, start + (100 if start == 0 else 200))
        fidelity.add(reference[part], logits[part], following[part])
    log_p = torch.from_numpy(reference).double().log_softmax(-1)
    log_q = torch.from_numpy(logits).double().log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    values, places = kl.topk(4)
    worst = fidelity.worst(4)
    assert [entry["position"] for entry in worst] == places.tolist()
    for entry, value, place in zip(worst, values, places, strict=True):
        assert entry["kl"] == pytest.approx(value.item())
        for name, logs in (("model", log_p), ("file", log_q)):
            top = logs[place].max(-1)
            assert entry[f"{name}_top"] == top.indices.item()
            assert entry[f"{name}_probability"] == pytest.approx(top.values.exp().item())


def test_perplexity_ratio_error_is_the_spread_over_resamples(pair) -> None:
    """The bootstrap knows nothing of the delta method."""
    reference, logits, following = pair
    fidelity = Fidelity()
    fidelity.add(reference, logits, following)
    rows = np.arange(300)
    difference = log_softmax(reference)[0][rows, following] - log_softmax(logits)[0][rows, following]
    draws = np.random.default_rng(3).integers(0, 300, (4000, 300))
    ratios = np.exp(difference[draws].mean(-1))
    assert fidelity.statistics()["perplexity_ratio_error"] == pytest.approx(ratios.std(), rel=0.06)


def test_chunks_do_not_matter(pair) -> None:
    reference, logits, following = pair
    whole, parts = Fidelity(), Fidelity()
    whole.add(reference, logits, following)
    for start in range(0, 300, 37):
        part = slice(start, start + 37)
        parts.add(reference[part], logits[part], following[part])
    assert parts.statistics() == pytest.approx(whole.statistics(), rel=1e-12)


def test_a_file_against_itself_is_the_floor(pair) -> None:
    reference, _, following = pair
    fidelity = Fidelity()
    fidelity.add(reference, reference.copy(), following)
    statistics = fidelity.statistics()
    assert statistics["max_kl"] == statistics["top_probability_rms"] == 0
    assert statistics["same_top"] == statistics["perplexity_ratio"] == 1
    assert statistics["same_top_error"] == statistics["perplexity_ratio_error"] == 0


def test_a_shift_of_all_logits_changes_nothing(pair) -> None:
    reference, _, following = pair
    fidelity = Fidelity()
    fidelity.add(reference, reference + np.float32(64), following)
    assert fidelity.statistics()["max_kl"] < 1e-9


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_logits_that_are_no_numbers_give_no_number(pair, broken: float) -> None:
    reference, logits, following = pair
    logits = logits.copy()
    logits[5, 5] = broken
    fidelity = Fidelity()
    fidelity.add(reference, logits, following)
    statistics = fidelity.statistics()
    assert not statistics["mean_kl"] <= 1e9
    assert not statistics["perplexity_ratio"] <= 1e9


def test_a_token_ruled_out_costs_only_where_the_model_wants_it() -> None:
    reference = np.array([[0.0, 0.0, -np.inf]], dtype=np.float32)
    fidelity = Fidelity()
    fidelity.add(reference, reference, np.array([0]))
    assert fidelity.statistics()["mean_kl"] == 0
    fidelity = Fidelity()
    fidelity.add(np.zeros((1, 3), np.float32), reference, np.array([0]))
    assert fidelity.statistics()["mean_kl"] == np.inf


def test_shapes_that_do_not_match_and_nothing_at_all_are_errors() -> None:
    with pytest.raises(ValueError, match="do not match"):
        Fidelity().add(random_logits(4, 8, 0), random_logits(4, 9, 0), np.zeros(4, int))
    with pytest.raises(ValueError, match="nothing to tell"):
        Fidelity().statistics()
