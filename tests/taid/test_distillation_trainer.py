"""The trainer: same numbers whatever the accumulation, resume to the bit, no movement in evaluation."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainingArguments

from taid import (
    AdaptiveInterpolation,
    CachedTeacher,
    DistillationTrainer,
    LiveTeacher,
    TaidError,
    TokenBlockDataset,
    drop_layers,
    evaluate_distillation,
    freeze_embeddings,
    last_complete_checkpoint,
    objectives,
    write_hidden_state_cache,
)
from taid.trainer import collate_blocks, prediction_targets

BLOCKS, LENGTH, VOCABULARY = 24, 16, 96


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_model(seed: int, hidden_size: int = 32, layers: int = 2, dropout: float = 0.0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
            initializer_range=0.3,
            attention_dropout=dropout,
        )
    )


@pytest.fixture(scope="module")
def token_blocks() -> np.ndarray:
    return np.random.default_rng(0).integers(0, VOCABULARY, (BLOCKS, LENGTH), dtype=np.int32)


@pytest.fixture(scope="module")
def loss_mask() -> np.ndarray:
    """Very different numbers of learned tokens per block: a mean of means would be another number."""
    mask = np.zeros((BLOCKS, LENGTH), dtype=np.int32)
    for row in range(BLOCKS):
        mask[row, 1 : 2 + row % (LENGTH - 1)] = 1
    return mask


@pytest.fixture(scope="module")
def teacher() -> LiveTeacher:
    return LiveTeacher(small_model(1, hidden_size=48))


def arguments(folder: Path, **changes) -> TrainingArguments:
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        **changes,
    }
    return TrainingArguments(**settings)


def interpolation() -> AdaptiveInterpolation:
    """An alpha so large that t follows the losses and not the linear floor."""
    return AdaptiveInterpolation(t_start=0.2, t_end=1.0, alpha=0.8, beta=0.5)


def logged(trainer: DistillationTrainer, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def train(folder: Path, dataset, teacher, **changes) -> DistillationTrainer:
    trainer = DistillationTrainer(
        small_model(0), arguments(folder, **changes), dataset, teacher, interpolation=interpolation()
    )
    trainer.train()
    return trainer


def test_accumulation_and_batch_size_give_the_same_run(tmp_path, token_blocks, loss_mask, teacher):
    dataset = TokenBlockDataset(token_blocks, loss_mask=loss_mask)
    whole = train(tmp_path / "a", dataset, teacher, per_device_train_batch_size=4)
    parts = train(
        tmp_path / "b", dataset, teacher, per_device_train_batch_size=1, gradient_accumulation_steps=4
    )
    assert len(logged(whole, "t")) == 6
    assert logged(parts, "t") == pytest.approx(logged(whole, "t"), rel=1e-5)
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-4)
    floor = [0.2 + 0.8 * step / 6 for step in range(2, 6)]
    assert all(t > below + 0.01 for t, below in zip(logged(whole, "t")[2:], floor, strict=True)), (
        "t must depend on the losses, or this test shows nothing"
    )
    for left, right in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_t_follows_the_logged_losses(tmp_path, token_blocks, teacher):
    trainer = train(tmp_path, TokenBlockDataset(token_blocks), teacher)
    expected = interpolation()
    trajectory = []
    for step, loss in enumerate(logged(trainer, "loss"), start=1):
        trajectory.append(expected.t)
        expected.update(loss, step, 6)
    assert logged(trainer, "t") == pytest.approx(trajectory, rel=1e-6)
    assert trainer.interpolation.t == pytest.approx(expected.t, rel=1e-6)
    assert all(value > 0 for value in logged(trainer, "tokens_per_second"))
    assert len(logged(trainer, "learning_rate")) == 6


def test_loss_and_gradient_are_the_reference_objectives(tmp_path, token_blocks, loss_mask, teacher):
    dataset = TokenBlockDataset(token_blocks[:4], loss_mask=loss_mask[:4])
    batch = collate_blocks([dataset[number] for number in range(4)])
    student = small_model(0)
    trainer = DistillationTrainer(
        student, arguments(tmp_path), dataset, teacher, interpolation=interpolation(), chunk_size=5
    )
    loss = trainer.compute_loss(student, batch)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()
    reference = objectives.taid(
        student(batch["input_ids"]).logits[:, :-1],
        teacher.model(batch["input_ids"]).logits[:, :-1],
        torch.from_numpy(loss_mask[:4, 1:]),
        t=0.2,
    )
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-5, atol=1e-6)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("objective", ["forward_kl", "reverse_kl", "decoupled_kd", "adaptive_kl"])
def test_every_objective_lowers_its_loss(tmp_path, token_blocks, teacher, objective):
    trainer = DistillationTrainer(
        small_model(0),
        arguments(tmp_path, max_steps=12, lr_scheduler_type="constant"),
        TokenBlockDataset(token_blocks[:2]),
        teacher,
        objective,
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0]
    assert not logged(trainer, "t")


def test_the_temperature_learns_and_resumes(tmp_path, token_blocks, teacher):
    """CTKD's parameter moves with the optimizer, and a resumed run ends at the same one."""
    settings = {"save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}

    def make(folder: str, **changes) -> DistillationTrainer:
        return DistillationTrainer(
            small_model(0),
            arguments(tmp_path / folder, **{**settings, **changes}),
            TokenBlockDataset(token_blocks),
            teacher,
            "curriculum_temperature",
        )

    whole = make("whole")
    whole.train()
    temperatures = logged(whole, "temperature")
    assert temperatures[0] == pytest.approx(1 + 20 / (1 + math.exp(-1)))
    # The reversal is zero in the first step; from the second on the temperature ascends or descends.
    assert len(set(temperatures[2:])) == len(temperatures[2:])
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert torch.equal(resumed.temperature_parameter, whole.temperature_parameter)
    for left, right in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right)
    once = make("once", gradient_accumulation_steps=1, per_device_train_batch_size=4)
    once.train()
    assert logged(once, "temperature") == pytest.approx(temperatures, rel=1e-5)
    other = DistillationTrainer(
        small_model(0), arguments(tmp_path / "taid"), TokenBlockDataset(token_blocks), teacher, "forward_kl"
    )
    assert other.temperature() is None


def test_the_divergence_can_move_t(tmp_path, token_blocks, teacher):
    """With that signal t follows KL(p_t‖q), computed anew here from the model of each step."""
    seen = []
    trainer = DistillationTrainer(
        small_model(0),
        arguments(tmp_path, gradient_accumulation_steps=2),
        TokenBlockDataset(token_blocks),
        teacher,
        interpolation=AdaptiveInterpolation(t_start=0.2, alpha=0.8, beta=0.5, signal="divergence"),
    )
    compute_loss = trainer.compute_loss

    def record(model, inputs, *rest, **keywords):
        with torch.no_grad():
            student = model(inputs["input_ids"]).logits[:, :-1].double()
            mixed = torch.lerp(
                student, teacher.model(inputs["input_ids"]).logits[:, :-1].double(), trainer.interpolation.t
            ).log_softmax(-1)
            seen.append(float((mixed.exp() * (mixed - student.log_softmax(-1))).sum(-1).mean()))
        return compute_loss(model, inputs, *rest, **keywords)

    trainer.compute_loss = record
    trainer.train()
    expected = AdaptiveInterpolation(t_start=0.2, alpha=0.8, beta=0.5)
    trajectory = []
    for step in range(6):
        trajectory.append(expected.t)
        expected.update((seen[2 * step] + seen[2 * step + 1]) / 2, step + 1, 6)
    assert logged(trainer, "t") == pytest.approx(trajectory, rel=1e-5)


def test_control_needs_no_teacher(tmp_path, token_blocks):
    student = small_model(0)
    trainer = DistillationTrainer(
        student, arguments(tmp_path), TokenBlockDataset(token_blocks), objective="cross_entropy"
    )
    batch = collate_blocks([trainer.train_dataset[0]])
    expected = student(batch["input_ids"], labels=batch["input_ids"]).loss
    torch.testing.assert_close(trainer.compute_loss(student, batch), expected, rtol=1e-5, atol=1e-6)
    trainer.train()
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_resume_ends_in_the_same_weights(tmp_path, token_blocks, teacher, accumulation):
    dataset = TokenBlockDataset(token_blocks)
    settings = {
        "gradient_accumulation_steps": accumulation,
        "save_strategy": "steps",
        "save_steps": 3,
        "max_steps": 8,
    }

    def make(folder: str) -> DistillationTrainer:
        return DistillationTrainer(
            # Dropout makes the random state part of the result.
            small_model(0, dropout=0.2),
            arguments(tmp_path / folder, **settings),
            dataset,
            teacher,
            interpolation=interpolation(),
        )

    whole = make("whole")
    whole.train()
    # Resumes from step 3 of the same run, in a new trainer with other weights in memory.
    resumed = make("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 8
    for (name, left), right in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(left, right), name
    assert resumed.interpolation.state_dict() == whole.interpolation.state_dict()
    assert logged(resumed, "t") == logged(whole, "t")
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert logged(resumed, "tokens") == logged(whole, "tokens")
    assert sorted(path.name for path in (tmp_path / "whole" / "checkpoint-3").glob("*.safetensors"))


def test_resume_after_the_last_step_gives_its_weights(tmp_path, token_blocks, teacher):
    """A run killed between training and what follows it."""
    dataset = TokenBlockDataset(token_blocks)
    settings = {"save_strategy": "steps", "save_steps": 6, "lr_scheduler_type": "constant"}
    whole = train(tmp_path, dataset, teacher, **settings)
    again = DistillationTrainer(
        small_model(7), arguments(tmp_path, **settings), dataset, teacher, interpolation=interpolation()
    )
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    for left, right in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert logged(again, "loss") == logged(whole, "loss")


@pytest.mark.parametrize("objective", ["taid", "cross_entropy"])
def test_a_loss_that_is_no_number_stops_the_run(tmp_path, token_blocks, teacher, objective):
    student = small_model(0)
    trainer = DistillationTrainer(
        student, arguments(tmp_path), TokenBlockDataset(token_blocks), teacher, objective
    )
    with torch.no_grad():
        student.model.norm.weight[0] = math.nan
    with pytest.raises(TaidError, match="loss of step 1 is nan"):
        trainer.train()


def test_resume_survives_callbacks_made_anew(tmp_path, token_blocks, teacher):
    dataset = TokenBlockDataset(token_blocks)
    settings = {"save_strategy": "steps", "save_steps": 2, "restore_callback_states_from_checkpoint": True}
    whole = train(tmp_path, dataset, teacher, **settings)
    resumed = DistillationTrainer(
        small_model(0), arguments(tmp_path, **settings), dataset, teacher, interpolation=interpolation()
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.interpolation.state_dict() == whole.interpolation.state_dict()


def test_resume_refuses_other_settings(tmp_path, token_blocks, teacher):
    dataset = TokenBlockDataset(token_blocks)
    train(tmp_path, dataset, teacher, save_strategy="steps", save_steps=3)
    other = DistillationTrainer(
        small_model(0), arguments(tmp_path), dataset, teacher, interpolation=AdaptiveInterpolation()
    )
    with pytest.raises(TaidError, match="t_start"):
        other.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_incomplete_checkpoints_are_passed_over(tmp_path, token_blocks, teacher):
    assert last_complete_checkpoint(tmp_path) is None
    train(tmp_path, TokenBlockDataset(token_blocks), teacher, save_strategy="steps", save_steps=2)
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-6"
    state = tmp_path / "checkpoint-6" / "trainer_state.json"
    state.write_text(state.read_text()[:100])
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-2"


def test_evaluation_moves_nothing(tmp_path, token_blocks, teacher):
    dataset = TokenBlockDataset(token_blocks)
    plain = train(tmp_path / "a", dataset, teacher)
    evaluated = DistillationTrainer(
        small_model(0),
        arguments(tmp_path / "b", eval_strategy="steps", eval_steps=1),
        dataset,
        teacher,
        interpolation=interpolation(),
        eval_dataset=TokenBlockDataset(token_blocks[:4]),
    )
    evaluated.train()
    before = evaluated.interpolation.state_dict()
    metrics = evaluated.evaluate()
    assert evaluated.interpolation.state_dict() == before
    assert evaluated.interpolation.state_dict() == plain.interpolation.state_dict()
    for left, right in zip(plain.model.parameters(), evaluated.model.parameters(), strict=True):
        assert torch.equal(left, right)
    assert len(logged(evaluated, "eval_kl_teacher_student")) == 7
    assert metrics["eval_tokens"] == 4 * (LENGTH - 1)


def test_cached_teacher_trains_as_the_live_one(tmp_path, token_blocks, teacher):
    write_hidden_state_cache(teacher.model, token_blocks, tmp_path / "cache", batch_size=2)
    dataset = TokenBlockDataset(token_blocks)
    live = train(tmp_path / "a", dataset, teacher)
    cached = train(tmp_path / "b", dataset, CachedTeacher(tmp_path / "cache"))
    assert logged(cached, "loss") == pytest.approx(logged(live, "loss"), rel=1e-4)
    assert logged(cached, "t") == pytest.approx(logged(live, "t"), rel=1e-4)
    with pytest.raises(TaidError, match="other tokens"):
        train(
            tmp_path / "c",
            TokenBlockDataset(token_blocks[::-1].copy()),
            CachedTeacher(tmp_path / "cache"),
        )


def test_evaluation_against_numpy(token_blocks, teacher):
    student = small_model(0)
    measured = evaluate_distillation(student, teacher, token_blocks[:5], batch_size=2, chunk_size=7)
    input_ids = torch.from_numpy(token_blocks[:5]).long()
    with torch.no_grad():
        log_q = student(input_ids).logits[:, :-1].double().log_softmax(-1).numpy()
        log_p = teacher.model(input_ids).logits[:, :-1].double().log_softmax(-1).numpy()
    labels = token_blocks[:5, 1:, None].astype(np.int64)
    assert measured["tokens"] == 5 * (LENGTH - 1)
    expected = {
        "student_cross_entropy": -np.take_along_axis(log_q, labels, -1).mean(),
        "teacher_cross_entropy": -np.take_along_axis(log_p, labels, -1).mean(),
        "kl_teacher_student": (np.exp(log_p) * (log_p - log_q)).sum(-1).mean(),
        "kl_student_teacher": (np.exp(log_q) * (log_q - log_p)).sum(-1).mean(),
        "same_top": (log_p.argmax(-1) == log_q.argmax(-1)).mean(),
    }
    for name, value in expected.items():
        assert measured[name] == pytest.approx(value, rel=1e-5), name
    same = evaluate_distillation(teacher.model, teacher, token_blocks[:2])
    assert same["kl_teacher_student"] == pytest.approx(0, abs=1e-6)
    assert same["same_top"] == 1


def test_positions_that_count():
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8, 9, 4]]),
        "labels": torch.tensor([[5, -100, 7, 8, 9, 4]]),
        "position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0]]),
    }
    labels, mask = prediction_targets(batch)
    # 6 is not learned, 8 begins a document, 4 is padding.
    assert mask.tolist() == [[False, True, False, True, False]]
    assert labels.tolist() == [[0, 7, 0, 9, 0]]


def test_documents_of_a_block_do_not_see_each_other(teacher):
    input_ids = torch.randint(0, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(0))
    position_ids = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]])
    together = teacher.hidden_states(input_ids, position_ids=position_ids)
    alone = teacher.hidden_states(input_ids[:, 4:])
    torch.testing.assert_close(together[:, 4:], alone, rtol=1e-4, atol=1e-5)


def test_frozen_embeddings_stay(tmp_path, token_blocks, teacher):
    student = freeze_embeddings(drop_layers(small_model(0, layers=3), [0, 2]))
    before = student.get_input_embeddings().weight.clone()
    layer_before = student.model.layers[0].mlp.up_proj.weight.clone()
    DistillationTrainer(student, arguments(tmp_path), TokenBlockDataset(token_blocks), teacher).train()
    assert torch.equal(student.get_output_embeddings().weight, before)
    assert not torch.equal(student.model.layers[0].mlp.up_proj.weight, layer_before)


def test_padded_teacher_rows_are_trimmed(tmp_path, token_blocks):
    torch.manual_seed(5)
    padded = small_model(1)
    padded.resize_token_embeddings(VOCABULARY + 32)
    student = small_model(0)
    trainer = DistillationTrainer(
        student, arguments(tmp_path), TokenBlockDataset(token_blocks), LiveTeacher(padded), "forward_kl"
    )
    batch = collate_blocks([trainer.train_dataset[0]])
    expected = objectives.forward_kl(
        student(batch["input_ids"]).logits[:, :-1],
        padded(batch["input_ids"]).logits[:, :-1, :VOCABULARY],
        torch.ones(1, LENGTH - 1),
    )
    torch.testing.assert_close(trainer.compute_loss(student, batch), expected, rtol=1e-5, atol=1e-6)


def test_saved_student_loads(tmp_path, token_blocks, teacher):
    trainer = train(tmp_path, TokenBlockDataset(token_blocks), teacher)
    trainer.save_model(str(tmp_path / "student"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    input_ids = torch.from_numpy(token_blocks[:1]).long()
    with torch.no_grad():
        assert torch.equal(loaded(input_ids).logits, trainer.model.eval()(input_ids).logits)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "nothing"}, "no objective 'nothing'"),
        ({"teacher": None}, "needs a teacher"),
        ({"objective": "forward_kl", "interpolation": AdaptiveInterpolation()}, "no interpolation"),
        ({"vocabulary_size": 1000}, "vocabulary_size 1000"),
    ],
)
def test_bad_arguments(tmp_path, token_blocks, teacher, changes, message):
    with pytest.raises(TaidError, match=message):
        DistillationTrainer(
            **{
                "model": small_model(0),
                "args": arguments(tmp_path),
                "train_dataset": TokenBlockDataset(token_blocks),
                "teacher": teacher,
                **changes,
            }
        )


def test_bad_data(tmp_path, token_blocks, teacher):
    with pytest.raises(TaidError, match="at least one block"):
        TokenBlockDataset(np.zeros((0, 4), dtype=np.int32))
    with pytest.raises(TaidError, match="loss_mask has shape"):
        TokenBlockDataset(token_blocks, loss_mask=np.ones((1, 1)))
    with pytest.raises(TaidError, match="differ in length"):
        collate_blocks([{"input_ids": [1, 2]}, {"input_ids": [1]}])
    with pytest.raises(TaidError, match="No token"):
        evaluate_distillation(small_model(0), teacher, token_blocks, loss_mask=np.zeros_like(token_blocks))


def test_state_is_in_the_checkpoint_as_json(tmp_path, token_blocks, teacher):
    trainer = train(tmp_path, TokenBlockDataset(token_blocks), teacher, save_strategy="steps", save_steps=6)
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    stored = state["stateful_callbacks"]["InterpolationCallback"]
    assert stored["interpolation"] == trainer.interpolation.state_dict()
