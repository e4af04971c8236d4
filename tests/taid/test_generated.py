"""Text that the student writes: drawn from its own distribution, judged alone, the same after a resume."""

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments

from taid import DistillationTrainer, LiveTeacher, StudentGenerations, TaidError, TokenBlockDataset
from taid.generated import Continuation, as_batch, continue_beginnings, draw_replayed
from taid.trainer import prediction_targets

VOCABULARY, LENGTH, END = 24, 12, 3


def small_model(seed: int, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.4,
            attention_dropout=dropout,
        )
    )
    model.generation_config.eos_token_id = END
    return model


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trainer_of(folder, generations, teacher=None, student_seed=0, **changes) -> DistillationTrainer:
    blocks = np.random.default_rng(0).integers(4, VOCABULARY, (16, LENGTH), dtype=np.int32)
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **changes,
    }
    return DistillationTrainer(
        small_model(student_seed, dropout=0.2),
        TrainingArguments(**settings),
        TokenBlockDataset(blocks),
        teacher or LiveTeacher(small_model(1)),
        generations=generations,
        eval_dataset=TokenBlockDataset(blocks[:4]),
    )


def test_the_next_token_follows_the_students_distribution():
    student = small_model(0).train()
    prompt = torch.tensor([5, 9, 7])
    rows = 20_000
    written = continue_beginnings(student, prompt.expand(rows, 3).clone(), None, 2, seed=1)
    assert all(entry.prompt_tokens == 2 and entry.ids[:2] == (5, 9) for entry in written)
    counts = np.bincount([entry.ids[2] for entry in written], minlength=VOCABULARY)
    with torch.no_grad():
        expected = student.eval()(prompt[None, :2]).logits[0, -1].double().softmax(-1).numpy() * rows
    seen = expected > 5
    statistic = ((counts - expected)[seen] ** 2 / expected[seen]).sum()
    # The chi-square distribution's mean is its degrees of freedom, its variance twice that.
    assert statistic < seen.sum() + 5 * np.sqrt(2 * seen.sum()), statistic


def test_texts_end_with_the_end_of_sequence_and_sampling_leaves_torch_alone():
    student = small_model(0).train()
    blocks = torch.randint(4, VOCABULARY, (64, 40), generator=torch.Generator().manual_seed(0))
    state = torch.random.get_rng_state()
    written = continue_beginnings(student, blocks, None, 4, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert student.training
    ended = [entry for entry in written if END in entry.ids]
    assert ended
    assert all(entry.ids.index(END) == len(entry.ids) - 1 for entry in ended)
    assert all(len(entry.ids) == 40 for entry in written if END not in entry.ids)
    assert written == continue_beginnings(student, blocks, None, 4, seed=1)
    assert written != continue_beginnings(student, blocks, None, 4, seed=2)


def test_beginnings_are_of_one_document():
    student = small_model(0)
    blocks = torch.full((2, LENGTH), 5)
    positions = torch.stack([torch.arange(LENGTH), torch.arange(LENGTH)])
    positions[1, 3:] = torch.arange(LENGTH - 3)
    assert {entry.prompt_tokens for entry in continue_beginnings(student, blocks, positions, 8, seed=0)} == {
        3
    }


def test_the_loss_is_on_what_was_written():
    batch = as_batch([Continuation((5, 6, 7, 8), 2), Continuation((5, 6, 3), 2)], torch.device("cpu"))
    labels, mask = prediction_targets(batch)
    assert mask.tolist() == [[False, True, True], [False, True, False]]
    assert labels[mask].tolist() == [7, 8, 3]


def test_gkd_mixes_by_share():
    mix = StudentGenerations(share=0.25)
    sources = [mix.source(draw, progress=0.9) for draw in np.linspace(0, 1, 1000, endpoint=False)]
    assert sources.count("written") == 250
    assert sources.count("data") == 750


def test_distillm_grows_with_the_held_out_loss_and_replays():
    adaptive = StudentGenerations(share=0.0, adaptive=True, capacity=4)
    adaptive.observe(2.0)
    adaptive.observe(2.05)
    assert adaptive.share == 0
    for loss in (2.1, 2.25, 2.3, 2.4):
        adaptive.observe(loss)
    # 2.1 and 2.25 each rise by the tolerance over the reference, 2.3 does not rise far enough above 2.25.
    assert adaptive.share == pytest.approx(0.3)
    assert adaptive.reference == 2.4
    assert adaptive.source(0.29, progress=0.9) == "written", "nothing to replay yet"
    adaptive.keep([Continuation((number, 1), 1) for number in range(6)])
    assert [entry.ids[0] for entry in adaptive.replay] == [2, 3, 4, 5], "the oldest go first"
    draws = np.linspace(0, 1, 1000, endpoint=False)
    for progress in (0.0, 0.5, 0.9):
        sources = [adaptive.source(draw, progress) for draw in draws]
        assert sources.count("data") == pytest.approx(700, abs=1)
        assert sources.count("written") == pytest.approx(300 * (1 - progress), abs=1)
    assert len(set(draw_replayed(adaptive.replay, 4, [0]))) == 4


@pytest.mark.parametrize("adaptive", [False, True])
def test_resume_ends_in_the_same_weights(tmp_path, adaptive):
    def generations():
        return StudentGenerations(share=0.7, prompt_tokens=4, adaptive=adaptive, capacity=3)

    whole = trainer_of(tmp_path, generations())
    whole.train()
    resumed = trainer_of(tmp_path / "resumed", generations(), student_seed=7)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert whole.generations.state_dict() == resumed.generations.state_dict()
    assert len(whole.generations.replay) == (3 if adaptive else 0)
    without = trainer_of(tmp_path / "without", None)
    without.train()
    assert any(
        not torch.equal(left, right)
        for left, right in zip(whole.model.parameters(), without.model.parameters(), strict=True)
    )
    with pytest.raises(TaidError, match="knows no generations"):
        trainer_of(tmp_path / "other", generations()).train(
            resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-4")
        )


def test_evaluation_in_training_moves_the_share_and_outside_does_not(tmp_path):
    trainer = trainer_of(
        tmp_path,
        StudentGenerations(share=0.0, adaptive=True, tolerance=-10.0),
        eval_strategy="steps",
        eval_steps=2,
        eval_on_start=True,
    )
    trainer.train()
    assert trainer.generations.share == pytest.approx(0.3), "the first of four evaluations is the reference"
    trainer.evaluate()
    assert trainer.generations.share == pytest.approx(0.3)


def test_text_of_the_student_needs_a_live_teacher(tmp_path):
    class Cached:
        vocabulary_size = VOCABULARY

    with pytest.raises(TaidError, match="LiveTeacher"):
        trainer_of(tmp_path, StudentGenerations(), teacher=Cached())


@pytest.mark.parametrize(
    "setting", [{"share": 1.5}, {"share_step": -1.0}, {"prompt_tokens": 0}, {"capacity": 0}]
)
def test_impossible_settings(setting):
    with pytest.raises(TaidError, match=next(iter(setting))):
        StudentGenerations(**setting)
