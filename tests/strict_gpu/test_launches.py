"""What a decode step asks of the GPU, counted on the stand-in: launches and waits, array code included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from paged_ref.core.device import on_gpu

TESTS = Path(__file__).resolve().parent.parent
pytest.importorskip("numba_cuda", reason="numba-cuda makes the kernels (extra test, cuda12 or cuda13)")
pytestmark = pytest.mark.skipif(on_gpu, reason="a GPU is in use")

STEP = """
import json
from strict_gpu import order
from paged_ref import LLM, SamplingParams
llm = LLM("tiny", **{options})
for prompt in ("Four score and seven years ago our", "Once upon a time"):
    llm.add_request(prompt, SamplingParams(max_tokens=9, ignore_eos=True))
for _ in range(3):
    llm.step()
if {with_prompt}:
    llm.add_request("The cat", SamplingParams(max_tokens=9))
order.work.clear()
order.waits.clear()
llm.step()
print(json.dumps([dict(order.work), sum(order.waits.values()), len(llm.engine.model.layers)]))
"""


def decode_step(with_prompt: bool = False, **options: Any) -> tuple[dict[str, int], int, int]:
    """Operations by name, the host's waits, and the layers of the model, in a step that decodes for two sequences."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])}
    code = "import strict_gpu; strict_gpu.install()" + STEP.format(options=options, with_prompt=with_prompt)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    work, waits, layers = json.loads(done.stdout)
    return {name: count for name, count in work.items() if count}, waits, layers


@pytest.mark.parametrize("manager", ["paged", "standard"])
def test_nine_launches_a_layer_and_one_wait_a_step(manager: str) -> None:
    """Ten where sequences are split, as a region of the standard manager is for its length alone."""
    work, waits, layers = decode_step(manager=manager)
    assert work.pop("flash_combine", 0) == (layers if manager == "standard" else 0)
    of_layers = {name: count // layers for name, count in work.items() if count >= layers}
    assert of_layers == {
        "matmul": 4, "turn_and_write_kernel": 1, "flash_attention": 1, "add_norm_kernel": 2, "gated_kernel": 1,
    }  # fmt: skip
    beside = sum(work.values()) - layers * sum(of_layers.values())
    assert beside <= 13, work
    assert waits == 1


def test_a_prompt_beside_them_takes_one_more() -> None:
    """Eleven with sequences that are split: attention over prompts is a launch of its own."""
    work, waits, layers = decode_step(manager="standard", with_prompt=True)
    assert work["flash_attention"] == 2 * layers
    assert sum(count // layers for count in work.values()) == 11
    assert waits == 1
