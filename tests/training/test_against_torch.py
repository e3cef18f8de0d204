"""The same weights in torch: gradients by its autograd, and the files in transformers. Needs the extra `compare`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support import small

from paged_ref.bench import training as benchmark
from paged_ref.training.activations import Keep
from paged_ref.training.checkpoint import hf_config, save_model
from paged_ref.training.corpus import train_tokenizer
from paged_ref.training.network import PackedBatch, loss_and_gradient
from paged_ref.training.optimizer import AdamW
from paged_ref.training.parameters import Parameters

torch = pytest.importorskip("torch", reason="the extra `compare` (torch, transformers) is not installed")
transformers = pytest.importorskip("transformers", reason="the extra `compare` is not installed")

from paged_ref.bench.torch_decoder import TorchDecoder, training_step  # noqa: E402  (it needs torch)

pytestmark = pytest.mark.compare


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("sizes", [{}, {"num_heads": 6, "num_kv_heads": 1, "head_size": 8}])
def test_gradients_agree_with_autograd(sizes: dict[str, int], dtype: str) -> None:
    """Each array to 1e-5 of its length. RoPE's angles are float32 on either side."""
    config = small.config(vocab_size=96, hidden_size=48, intermediate_size=80, max_position_embeddings=256, **sizes)
    weights, gradient = small.weights(config, dtype), Parameters(config, dtype)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(96, size=length) for length in (200, 200, 37, 2, 130)]  # several chunks of queries
    loss = loss_and_gradient(weights, gradient, PackedBatch.of(sequences), Keep())

    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**hf_config(config, np.float32)))
    model.to(getattr(torch, dtype))
    exported = {name: torch.tensor(array) for name, array in weights.export(dtype).items()}
    missing, unexpected = model.load_state_dict(exported, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])
    total = sum(len(ids) - 1 for ids in sequences)
    theirs = torch.zeros((), dtype=getattr(torch, dtype))
    for ids in sequences:
        logits = model(torch.tensor(ids[None, :-1])).logits[0]
        theirs = theirs + torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="sum") / total
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-5)
    found = gradient.export(dtype)
    for name, parameter in model.named_parameters():
        wanted = parameter.grad.numpy()
        assert np.linalg.norm(found[name] - wanted) <= 1e-5 * np.linalg.norm(wanted), name


def test_transformers_loads_what_is_saved(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["some text to learn from"], 270)
    config = small.config(vocab_size=270)
    save_model(tmp_path, small.weights(config), tokenizer, np.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = tokenizer.encode("some text")
    with torch.no_grad():
        loss = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item()
    ours = loss_and_gradient(small.weights(config), Parameters(config), PackedBatch.of([ids]), Keep())
    assert ours == pytest.approx(loss, rel=1e-5)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert fast("some text")["input_ids"] == ids


def test_the_opponent_of_the_benchmark_takes_the_same_steps() -> None:
    """Loss and weights after steps with AdamW."""
    config = small.config(vocab_size=96, hidden_size=48, intermediate_size=80, max_position_embeddings=64)
    weights = small.weights(config, "float32")
    tokens = np.random.default_rng(0).integers(96, size=(3, 33))
    assert benchmark.against_torch(weights, tokens, rounds=1) > 0  # raises RuntimeError where the losses differ

    model = TorchDecoder(weights)
    step = training_step(model, tokens, 1e-2, 0.1)
    gradient, ends = Parameters(config, "float32"), weights.num_in_matrices
    optimizers = [
        AdamW(weights.flat[:ends], gradient.flat[:ends], 0.1), AdamW(weights.flat[ends:], gradient.flat[ends:], 0.0)
    ]  # fmt: skip
    for number in (1, 2, 3):
        gradient.flat[:] = 0
        loss = loss_and_gradient(weights, gradient, PackedBatch.of(list(tokens)), Keep())
        for optimizer in optimizers:
            optimizer.step(1e-2, number)
        assert step() == pytest.approx(loss, rel=1e-4)
    np.testing.assert_allclose(model.weights["final_norm"].detach().numpy(), weights.final_norm, atol=1e-3)
