"""Your scheduler: lesson 11 grades this file.

One rule plans every step: a sequence runs until its computed tokens catch
up with its tokens. Which sequence begins, waits or gives way follows from
the order of arrival. You write `my_schedule`; it runs a trace of requests
step by step, and each step is compared with the package's own plan.

Grade: paged-ref lesson --grade my_scheduler.py
"""

from paged_ref.core.memory.block_pool import OutOfBlocks
from paged_ref.lesson import todo


def my_schedule(running, waiting, manager, budget, most):
    """Plan one step: a list of (sequence, number of tokens).

    running, waiting  lists of sequences, by arrival; move sequences from
                      one to the other as you plan
    budget            tokens that a step may compute
    most              sequences that may run at the same time

    A sequence has `seq_id`, `tokens` (a list), `num_computed` (tokens whose
    K and V are in the cache) and `num_uncomputed`, the difference. What you
    plan is computed after the call: num_computed grows by itself.

    The manager is the paged one:
      manager.admit(seq.seq_id, seq.tokens, seq.max_slots)  begins it, empty
      manager.append([(seq.seq_id, count)])                 makes room
      manager.free(seq.seq_id)                              takes all back
    The first two raise OutOfBlocks, and change nothing, without room.

    1. Each running sequence, the earliest first, gets as many tokens as it
       is behind, and no more than the budget has left (with nothing left,
       it is not in the plan). While there is no room, the last of `running`
       gives way: free its blocks, set its num_computed to 0, and put it in
       front of `waiting`. A sequence may have to give way itself.
    2. Then the first of `waiting` begins, and the next, while the budget
       lasts, fewer than `most` run and the manager admits it. The first
       that is refused ends the step: none overtakes it.
    """
    todo("20 lines")
