"""Three tokens from the core's own engine, in three steps. The README stops a debugger in each."""

from paged_ref.core.engine.llm import LLM
from paged_ref.core.engine.sampling import SamplingParams

llm = LLM(block_size=4, kv_cache_tokens=64, backend="reference")
(output,) = llm.generate("Four score and seven", SamplingParams(max_tokens=3))
print(output.outputs[0].text)
