"""Wrong answers: of the solution, (what is wrong, its text, the text instead, what the message names)."""

WRONG = {
    "MyCache": [
        (
            "no table in slots",
            "table[p // size] * size + p % size for p in positions",
            "p for p in positions",
            "position 0 of sequence 0 (slot 0) is lost",
        ),
        (
            "slots are floats",
            "table[p // size] * size + p % size for p in positions",
            "table[p // size] * size / 1 + p % size for p in positions",
            "9 ints are expected",
        ),
        (
            "one slot too many",
            "range(first, first + count)",
            "range(first, first + count + 1)",
            "9 ints are expected",
        ),
        (
            "admit returns nothing",
            "return 0",
            "return None",
            "an int is expected",
        ),
        (
            "append returns nothing",
            "return copies",
            "return None",
            "a list of Transfer is expected",
        ),
        (
            "a block for each append",
            "while len(table) * self.block_size < length + count:",
            "for _ in range(1):",
            "operation 2, append([(0, 9)])",
        ),
        (
            "blocks never come back",
            "self.free_blocks.append(block)",
            "pass",
            "free(0)",
        ),
        (
            "the length of a freed sequence stays",
            "del self.lengths[seq_id]",
            "pass",
            "sequence 0 has ended, and its length or table, 9, is still there",
        ),
        (
            "freed while another table has it",
            "if not self.ref_count[block]:",
            "if True:",
            "free(0)",
        ),
        (
            "the count is not set",
            "self.ref_count[block] = 1",
            "pass",
            "free",
        ),
        (
            "admits without room",
            "if needed > len(self.free_blocks):",
            "if False:",
            "admit(1, range(0, 5)",
        ),
        (
            "no spare blocks",
            "needed += self.blocks_for(spare)",
            "pass",
            "admit(1, range(0, 9), 99, 4)",
        ),
        (
            "spare blocks of an empty cache",
            "if self.tables:",
            "if True:",
            "admit(0, range(0, 16), 99, 8)",
        ),
        (
            "a refusal that keeps the blocks",
            "self.tables, self.free_blocks = tables, free_blocks",
            "pass",
            "refused (OutOfBlocks)",
        ),
        (
            "a refusal that keeps the lengths",
            "self.lengths, self.ref_count = kept",
            "self.ref_count = kept[1]",
            "append",
        ),
        (
            "writes into a shared block",
            "if inside and self.ref_count[table[-1]] > 1:",
            "if False:",
            "copied: 0",
        ),
        (
            "copies always",
            "if inside and self.ref_count[table[-1]] > 1:",
            "if inside:",
            "copied: 1",
        ),
        (
            "copies a full block, too",
            "inside = count and length % self.block_size",
            "inside = count and length",
            "copied: 1",
        ),
        (
            "the copy is not said",
            'copies.append(Transfer("copy", old, table[-1]))',
            "pass",
            "lost",
        ),
        (
            "the old block keeps its count",
            "self.ref_count[old] -= 1",
            "pass",
            "copied: 1",
        ),
        (
            "a fork counts nothing",
            "self.ref_count[block] += 1",
            "pass",
            "copied: 0",
        ),
        (
            "one table for two",
            "self.tables[child_id] = self.tables[parent_id].copy()",
            "self.tables[child_id] = self.tables[parent_id]",
            "sequence",
        ),
    ]
}
