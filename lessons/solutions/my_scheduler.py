"""The scheduler of lesson 11: one way to write it."""

from paged_ref.core.memory.block_pool import OutOfBlocks


def my_schedule(running, waiting, manager, budget, most):
    plan = []
    for seq in list(running):
        count = min(seq.num_uncomputed, budget)
        while seq in running and count:
            try:
                manager.append([(seq.seq_id, count)])
                plan.append((seq, count))
                budget -= count
                break
            except OutOfBlocks:
                last = running.pop()
                manager.free(last.seq_id)
                last.num_computed = 0
                waiting.insert(0, last)
    while waiting and budget and len(running) < most:
        seq = waiting[0]
        count = min(seq.num_uncomputed, budget)
        try:
            manager.admit(seq.seq_id, seq.tokens, seq.max_slots)
        except OutOfBlocks:
            break
        manager.append([(seq.seq_id, count)])
        running.append(waiting.pop(0))
        plan.append((seq, count))
        budget -= count
    return plan
