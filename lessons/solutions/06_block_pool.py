from paged_ref.core.memory.block_pool import OutOfBlocks


def my_allocate(free, ref_count):
    if not free:
        raise OutOfBlocks
    block_id = free.pop()
    ref_count[block_id] = 1
    return block_id
