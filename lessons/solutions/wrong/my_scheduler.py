"""Wrong answers: of the solution, (what is wrong, its text, the text instead, what the message names)."""

WRONG = {
    "my_schedule": [
        (
            "no budget",
            "budget -= count\n                break",
            "break",
            "step",
        ),
        (
            "the whole prompt or nothing",
            "while waiting and budget and",
            "while waiting and budget >= waiting[0].num_uncomputed and",
            "step",
        ),
        (
            "one token each",
            "while waiting and budget and len(running) < most:\n"
            "        seq = waiting[0]\n        count = min(seq.num_uncomputed, budget)",
            "while waiting and budget and len(running) < most:\n"
            "        seq = waiting[0]\n        count = 1",
            "step 1 runs",
        ),
        ("no bound on the width", " and len(running) < most", "", "step"),
        (
            "only in groups",
            "while waiting and budget and",
            "while waiting and not running and budget and",
            "step 1 runs",
        ),
        (
            "the first gives way",
            "last = running.pop()",
            "last = running.pop(0)",
            "not in `running`",
        ),
        (
            "back to the end of the queue",
            "waiting.insert(0, last)",
            "waiting.append(last)",
            "step",
        ),
        (
            "goes on where it was",
            "last.num_computed = 0",
            "pass",
            "room for",
        ),
        ("keeps its blocks", "manager.free(last.seq_id)", "pass", "step"),
        (
            "nothing is moved",
            "running.append(waiting.pop(0))",
            "waiting.pop(0)",
            "not in `running`",
        ),
    ]
}
