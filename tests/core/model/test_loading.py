"""The embedded checkpoint, and the same files from a directory of the caller's."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from paged_ref.core.model.llama import Llama
from paged_ref.core.model.loading import TINY, load


def test_tiny_is_the_embedded_checkpoint() -> None:
    checkpoint = load("tiny")
    config = checkpoint.config
    assert set(load().weights) == set(checkpoint.weights)
    assert checkpoint.weights["model.embed_tokens.weight"].shape == (config.vocab_size, config.hidden_size)
    assert all(0 <= i < config.vocab_size for i in checkpoint.tokenizer.encode("Once upon a time"))
    assert len(config.eos_token_ids) == 1
    Llama(config, checkpoint.weights)


def test_a_directory_with_the_same_files_is_the_same_checkpoint(tmp_path: Path) -> None:
    for path in TINY.iterdir():
        shutil.copy(path, tmp_path)
    for directory in (tmp_path, str(tmp_path)):
        checkpoint = load(directory)
        assert checkpoint.config == load().config
        for name, array in load().weights.items():
            np.testing.assert_array_equal(checkpoint.weights[name], array)
        assert checkpoint.tokenizer.encode("The cat") == load().tokenizer.encode("The cat")
