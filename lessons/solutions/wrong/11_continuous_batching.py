def my_plan__no_budget(behind, budget):
    return list(enumerate(behind))


def my_plan__whole_or_not_at_all(behind, budget):
    chunks = []
    for seq, missing in enumerate(behind):
        if missing <= budget:
            chunks.append((seq, missing))
            budget -= missing
    return chunks


def my_plan__the_budget_is_for_each(behind, budget):
    return [
        (seq, min(missing, budget)) for seq, missing in enumerate(behind)
    ]


def my_plan__one_token_each(behind, budget):
    return [(seq, 1) for seq in range(len(behind))][:budget]


def my_plan__the_shortest_first(behind, budget):
    chunks = []
    for seq in sorted(range(len(behind)), key=lambda seq: behind[seq]):
        chunks.append((seq, min(behind[seq], budget)))
        budget -= chunks[-1][1]
    return sorted((seq, count) for seq, count in chunks if count)
