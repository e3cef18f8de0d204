def my_plan(behind, budget):
    chunks = []
    for seq, missing in enumerate(behind):
        chunks.append((seq, min(missing, budget)))
        budget -= chunks[-1][1]
    return [(seq, count) for seq, count in chunks if count]
