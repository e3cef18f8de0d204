"""The loop: it learns, stops and goes on to the same bits, and leaves files that others read."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import small

from paged_ref import LLM, SamplingParams
from paged_ref.core.device import to_host
from paged_ref.training.activations import Keep, Paged
from paged_ref.training.checkpoint import STATE, State, load_state, put, save_model, save_state
from paged_ref.training.corpus import encode, train_tokenizer
from paged_ref.training.parameters import Parameters
from paged_ref.training.trainer import Settings, Trainer, bits_per_byte, micro_batches

TEXT = ["one two three four five six seven", "red green blue", "a b c d e f g h i j k l m n o p q r s t u v w x y z"]
TOKENIZER = train_tokenizer(TEXT, 280)
CONFIG = small.config(vocab_size=280, hidden_size=32, intermediate_size=48, head_size=8, num_layers=2)


def trainer(activations: Any = None, **changes: Any) -> Trainer:
    how: dict[str, Any] = {"num_steps": 12, "batch_tokens": 60, "micro_tokens": 40, "warmup": 3, "learning_rate": 1e-2}
    return Trainer(CONFIG, Settings(**how | changes), encode(TOKENIZER, TEXT), activations or Keep())


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_small_text_is_learnt_by_heart(optimizer: str, tmp_path: Path) -> None:
    run = trainer(num_steps=80, dropout=0.0, optimizer=optimizer)
    first = run.step().loss
    assert first == pytest.approx(np.log(280), rel=0.02)  # it begins by knowing nothing
    before = bits_per_byte(run.weights, TOKENIZER, TEXT)
    while not run.done:
        last = run.step().loss
    assert last < 0.1 * first
    assert bits_per_byte(run.weights, TOKENIZER, TEXT) < 0.15 * before
    save_model(tmp_path, run.weights, TOKENIZER, np.float16)
    (output,) = LLM(tmp_path).generate("one two", SamplingParams(max_tokens=30))
    assert output.outputs[0].text == " three four five six seven"
    assert output.outputs[0].finish_reason == "stop"


def test_bits_per_byte_of_a_model_that_knows_nothing() -> None:
    weights = Parameters(CONFIG)  # all zero: each of the 280 tokens is as likely as any other
    num_tokens = sum(map(len, encode(TOKENIZER, TEXT)))
    wanted = num_tokens * np.log2(280) / sum(len(story.encode()) for story in TEXT)
    assert bits_per_byte(weights, TOKENIZER, TEXT) == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_stopped_goes_on_to_the_same_bits(optimizer: str, tmp_path: Path) -> None:
    whole, begun = trainer(optimizer=optimizer), trainer(optimizer=optimizer)
    for _ in range(12):
        whole.step()
    for _ in range(5):
        begun.step()
    save_state(tmp_path, begun.state({"a": 1}))
    for _ in range(2):
        begun.step()  # what is saved must not change with it
    # Somewhere else the activations may lie in pages.
    resumed = trainer(Paged(2**14, 2**10, CONFIG, 40), optimizer=optimizer)
    resumed.restore(load_state(tmp_path))
    assert len(resumed.losses) == 5
    while not resumed.done:
        resumed.step()
    assert resumed.losses == whole.losses
    np.testing.assert_array_equal(to_host(resumed.weights.flat), to_host(whole.weights.flat))


def test_the_seed_decides() -> None:
    losses = []
    for seed in (0, 0, 1):
        run = trainer(seed=seed)
        losses.append([run.step().loss for _ in range(2)])
    assert losses[0] == losses[1] != losses[2]


def test_parts_of_a_batch_are_never_larger_than_asked_but_hold_one_sequence() -> None:
    batch = [np.zeros(size + 1) for size in (3, 3, 3, 20, 1, 9)]
    sizes = [[len(ids) - 1 for ids in group] for group in micro_batches(batch, 10)]
    assert sizes == [[3, 3, 3], [20], [1, 9]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"num_steps": 0}, "num_steps is 0; at least 1 is needed"),
        ({"batch_tokens": -1}, "batch_tokens is -1; at least 1 is needed"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; a finite number above 0 is needed"),
        ({"learning_rate": float("nan")}, "learning_rate is nan; a finite number above 0 is needed"),
        ({"dropout": 1.0}, "dropout is 1.0; at least 0 and below 1 is needed"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; at least 0 is needed"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd'; known are 'adamw' and 'muon'"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Settings(**{"num_steps": 1, **changes})


def test_models_that_training_does_not_know_are_refused() -> None:
    with pytest.raises(ValueError, match="model_type is qwen2"):
        Parameters(small.config(model_type="qwen2"))
    with pytest.raises(ValueError, match="tie_word_embeddings is false"):
        Parameters(small.config(tie_word_embeddings=False))


def test_a_text_shorter_than_the_context_is_refused() -> None:
    config = small.config(vocab_size=280, max_position_embeddings=1000)
    with pytest.raises(
        ValueError, match="the text is too short: 67 tokens to learn from; more than a context of 1000 is needed"
    ):
        Trainer(config, Settings(num_steps=1), encode(TOKENIZER, TEXT), Keep())


def test_weights_go_out_and_come_back_under_the_names_of_hugging_face() -> None:
    config = small.config()
    weights, back = small.weights(config), Parameters(config)
    back.fill(weights.export(np.float32))
    np.testing.assert_array_equal(to_host(back.flat), to_host(weights.flat))


# --- files ---------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_the_file_before_is_whole(tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write itself fails, in a process of its own."""
    code = """
import resource, sys
from pathlib import Path
from paged_ref.training.checkpoint import put
path = Path(sys.argv[1])
put(path, b"before")
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    put(path, b"x" * 5000)
except ValueError as error:
    print(error)
"""
    path = tmp_path / "model"
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert run.stdout == f"{path} cannot be written: File too large\n"
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path], "what could not be finished is left behind"


def test_a_place_that_is_no_directory_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written: "):
        put(tmp_path / "file" / "model", b"")


@pytest.mark.parametrize("damage", ["missing", "cut", "empty"])
def test_a_state_that_is_missing_or_broken_is_one_sentence(tmp_path: Path, damage: str) -> None:
    save_state(tmp_path, State({}, 3, {"weights": np.zeros(5)}))
    path = tmp_path / STATE
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: 20 if damage == "cut" else 0])
    with pytest.raises(ValueError, match="there is no run to continue" if damage == "missing" else "is not a run's"):
        load_state(tmp_path)


def test_any_flipped_bit_of_a_state_is_refused(tmp_path: Path) -> None:
    run = trainer()
    run.step()
    save_state(tmp_path, run.state({"name": "x", "seed": 1}))
    path, rng = tmp_path / STATE, np.random.default_rng(0)
    whole = path.read_bytes()
    for position in (*range(0, 600, 7), *rng.integers(len(whole), size=100).tolist()):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is not a run's state: ") as caught:
            load_state(tmp_path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert load_state(tmp_path).run == {"name": "x", "seed": 1}


@pytest.mark.parametrize(
    ("run", "reason"),
    [("[" * 1000 + "]" * 1000, "not JSON: nested more than 100 deep at column 101"), ("5", "run is a int; "),
     ('{"a": 1' + "0" * 400 + "}", "not JSON: a number that needs more than 64 bits at column 7"), ("{", "not JSON: ")],
    ids=["nested", "number", "huge", "cut"],
)  # fmt: skip
def test_a_run_that_is_no_json_object_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: str, reason: str
) -> None:
    monkeypatch.setattr(json, "dumps", lambda value: run)
    save_state(tmp_path, State({}, 3, {"weights": np.zeros(5)}))
    with pytest.raises(ValueError, match=f"is not a run's state: {reason}"):
        load_state(tmp_path)


def test_a_state_without_a_checksum_says_so(tmp_path: Path) -> None:
    save_file({"weights": np.zeros(5)}, tmp_path / STATE, metadata={"run": "{}", "step": "3"})
    with pytest.raises(ValueError, match="it has no checksum, so an earlier version wrote it; begin the run anew"):
        load_state(tmp_path)


def test_a_state_that_is_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / STATE)
    with pytest.raises(ValueError, match="it is a pipe or a device; a regular file is needed"):
        load_state(tmp_path)


def test_the_config_says_what_the_weights_are(tmp_path: Path) -> None:
    save_model(tmp_path, trainer().weights, TOKENIZER, np.float16)
    hf = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (hf["torch_dtype"], hf["vocab_size"], hf["eos_token_id"]) == ("float16", 280, 0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_that_is_no_number_stops_the_run_before_a_weight_moves(optimizer: str) -> None:
    run = trainer(learning_rate=1e30, warmup=0, optimizer=optimizer)
    run.step()
    before = to_host(run.weights.flat).copy()
    with pytest.raises(
        ValueError, match=r"step 2 has a loss of .*; learning_rate is 1e\+30, and a lower one is needed"
    ):
        run.step()
    np.testing.assert_array_equal(to_host(run.weights.flat), before)


def test_weights_that_are_no_numbers_are_not_written(tmp_path: Path) -> None:
    run = trainer()
    run.weights.flat[3] = np.nan
    with pytest.raises(ValueError, match=r"weights has 1 of \d+ numbers that are NaN or inf; they are not written"):
        run.state({})
    with pytest.raises(ValueError, match=r"embed_tokens\.weight in float32 has 1 of 8960 numbers that are NaN or inf"):
        save_model(tmp_path, run.weights, TOKENIZER, np.float32)
    with pytest.raises(ValueError, match="the stories have a loss of nan"):
        bits_per_byte(run.weights, TOKENIZER, TEXT)
    run.weights.flat[3] = 70_000.0  # float16 ends at 65,504
    with pytest.raises(ValueError, match=r"embed_tokens\.weight in float16 has 1 of 8960 numbers"):
        save_model(tmp_path, run.weights, TOKENIZER, np.float16)
    assert not (tmp_path / "model.safetensors").exists()
