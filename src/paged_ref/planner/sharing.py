"""How much memory sharing saves: samples of one prompt, and beams (Kwon et al. 2023, §6.3, Fig. 15).

The paper's measure: blocks saved, divided by the blocks that there would be without sharing, mean over the run.
"""

from __future__ import annotations

from ..core.engine.scheduler import Scheduler, StepPlan
from ..core.engine.sequence import Group, Sequence
from ..core.memory.block_pool import BlockPool
from ..core.memory.paged import PagedManager
from ..core.memory.usage import Snapshot
from ..extras.sampling_params import SamplingParams
from ..extras.step_records import StepRecord
from ..llm import LLM
from .engine_run import token_ids
from .traces import RequestTrace, clipped

MAX_SEQUENCES = 256  # that run at the same time
SAMPLE_EVERY = 4  # steps


class Saving:
    """Adds up what sharing saves in a pool."""

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self.saved = self.needed = 0

    def sample(self, snapshot: Snapshot) -> None:
        self.saved += snapshot.shared
        self.needed += snapshot.shared + self.num_slots - snapshot.free - snapshot.cached

    @property
    def share(self) -> float:
        """Of the slots that separate copies would need: the share that is saved."""
        return self.saved / self.needed if self.needed else 0.0


def samples_saving(trace: RequestTrace, num_samples: int, *, block_size: int = 16) -> float:
    """Each request draws `num_samples` outputs of its length, through the real scheduler and manager.

    There is no model: which blocks are shared does not depend on the tokens. The pool is ample, so that no group is
    preempted: a preempted group would begin anew again and again, and a young group shares more.
    """
    longest = max(each.num_tokens for each in trace.requests)
    manager = PagedManager(BlockPool(MAX_SEQUENCES * (longest // block_size + 2)), block_size)
    scheduler = Scheduler(manager, max_batch_tokens=2048, max_batch_seqs=MAX_SEQUENCES)
    saving = Saving(manager.num_slots)
    to_fork = _queue_groups(scheduler, trace, num_samples)
    steps = 0
    while scheduler.waiting or scheduler.running:
        plan = scheduler.schedule()
        steps += 1
        for seq, count in plan.chunks:
            seq.num_computed += count
        if steps % SAMPLE_EVERY == 0:
            saving.sample(manager.snapshot())
        _sample_tokens(scheduler, plan, to_fork)
    return saving.share


def _queue_groups(scheduler: Scheduler, trace: RequestTrace, num_samples: int) -> dict[int, list[Sequence]]:
    """Queue a group for each request; return the samples that are forked later, by their leader's seq_id."""
    to_fork: dict[int, list[Sequence]] = {}
    for number, request in enumerate(trace.requests):
        seqs = [
            Sequence(seq_id, [0] * request.prompt_len, request.prompt_len, request.num_tokens)
            for seq_id in range(number * num_samples, (number + 1) * num_samples)
        ]
        scheduler.add(Group(seqs[:1], num_samples))
        to_fork[seqs[0].seq_id] = seqs[1:]
    return to_fork


def _sample_tokens(scheduler: Scheduler, plan: StepPlan, to_fork: dict[int, list[Sequence]]) -> None:
    """One more token for each sequence that has caught up. As in the engine, the other samples of a prompt are forked
    when its last token is computed."""
    groups = {seq.seq_id: group for group in scheduler.running for seq in group.seqs}
    for seq, _ in plan.chunks:
        if seq.num_uncomputed:
            continue
        group = groups[seq.seq_id]
        siblings = to_fork.pop(seq.seq_id, [])
        for sibling in siblings:
            scheduler.fork(group, seq, sibling)
        for each in (seq, *siblings):
            each.tokens.append(0)
            if len(each.tokens) >= each.max_len:
                scheduler.finish(group, each)


def beams_saving(trace: RequestTrace, beam_width: int, *, block_size: int = 16) -> float:
    """Each request is a beam search of the embedded model on a prompt of random tokens. The model decides which beams
    go on, and so what they share; no output ends early at an end of text."""
    num_slots = sum(each.num_tokens + block_size for each in trace.requests) * beam_width
    num_slots += -num_slots % block_size
    saving = Saving(num_slots)

    def sample(record: StepRecord) -> None:
        saving.sample(record.snapshot)

    llm = LLM("tiny", kv_cache_tokens=num_slots, block_size=block_size, on_step=sample, max_batch_tokens=2048)
    for number, request in enumerate(clipped(trace, llm.max_model_len).requests):
        prompt = token_ids(request.prompt_len, (), 1, number, llm.config.vocab_size)
        llm.add_request(prompt, SamplingParams(max_tokens=request.output_len, beam_width=beam_width, ignore_eos=True))
    while llm.has_unfinished:
        llm.step()
    return saving.share
