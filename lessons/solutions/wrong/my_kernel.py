"""Wrong answers: of the solution, (what is wrong, its text, the text instead, what the message names)."""

READS = "elements of keys read, slot by slot"
BOUND = "is outside the shape"

WRONG = {
    "my_scores": [
        (
            "only the first tile",
            "range(thread, num_keys, num_threads)",
            "range(thread, num_threads)",
            "how often each element of the answer is written",
        ),
        (
            "a run for each thread",
            "range(thread, num_keys, num_threads)",
            "range(2 * thread, 2 * thread + 2)",
            BOUND,
        ),
        (
            "from the first slot on",
            "keys[start + key, d]",
            "keys[key, d]",
            "the answer",
        ),
        (
            "past the last key",
            "range(thread, num_keys, num_threads)",
            "range(thread, num_keys + 3, num_threads)",
            BOUND,
        ),
        (
            "one element of the head",
            "range(query.shape[0])",
            "range(1)",
            "the answer",
        ),
        (
            "every thread does all",
            "range(thread, num_keys, num_threads)",
            "range(num_keys)",
            "how often each element of the answer is written",
        ),
    ],
    "my_dense_attention": [
        (
            "no barrier after the scores",
            "cuda.syncthreads()  # all scores of the tile are there",
            "pass",
            "reads shared scores",
        ),
        (
            "no barrier before the next tile",
            "cuda.syncthreads()  # the next tile overwrites the scores",
            "pass",
            "reads shared scores[0], which thread (0, 0, 0) wrote, with no barrier between",
        ),
        (
            "a barrier that some never reach",
            "scores[thread] = score * scale",
            "scores[thread] = score * scale\n            cuda.syncthreads()",
            "does not reach",
        ),
        (
            "the sums are not shrunk",
            "total, mixed = total * shrink, mixed * shrink",
            "pass",
            "the answer",
        ),
        (
            "not scaled",
            "scores[thread] = score * scale",
            "scores[thread] = score",
            "the answer",
        ),
        (
            "not divided by the total",
            "mixed / total",
            "mixed",
            "the answer",
        ),
        (
            "a last tile that is taken as full",
            "min(num_threads, num_keys - tile)",
            "num_threads",
            "nan instead of",
        ),
        (
            "the scores of the tile before",
            "keys[start + tile + thread, d]",
            "keys[start + thread, d]",
            "the answer",
        ),
    ],
    "my_paged_attention": [
        (
            "the table of the first sequence",
            "block_tables[seq, key // block_size]",
            "block_tables[0, key // block_size]",
            "the answer",
        ),
        (
            "the offset forgotten",
            "block * block_size + key % block_size",
            "block * block_size",
            "the answer",
        ),
        (
            "no table",
            "block * block_size + key % block_size",
            "key",
            "the answer",
        ),
        (
            "a table entry taken for a slot",
            "block * block_size + key % block_size",
            "block",
            "the answer",
        ),
        (
            "the query head for the KV head",
            "keys[slot, kv_head, d]",
            "keys[slot, head, d]",
            BOUND,
        ),
        (
            "the length of the first sequence",
            "min(num_threads, seq_lens[seq] - tile)",
            "min(num_threads, seq_lens[0] - tile)",
            "the answer",
        ),
        (
            "no barrier before the slots are read",
            "cuda.syncthreads()  # all scores and slots of the tile are there",
            "pass",
            "reads shared scores[1], which no thread has written",
        ),
        (
            "the table is read again for the values",
            "values[slots[key], kv_head, thread]",
            "values[block_tables[seq, (tile + key) // block_size] * block_size + (tile + key) % block_size, kv_head, thread]",
            "entries of block_tables read",
        ),
    ],
}
