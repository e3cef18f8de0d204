from paged_ref.core.memory.block_pool import OutOfBlocks


def my_allocate__takes_from_the_wrong_end(free, ref_count):
    if not free:
        raise OutOfBlocks
    block_id = free.pop(0)
    ref_count[block_id] = 1
    return block_id


def my_allocate__forgets_the_count(free, ref_count):
    if not free:
        raise OutOfBlocks
    return free.pop()


def my_allocate__leaves_it_on_the_list(free, ref_count):
    if not free:
        raise OutOfBlocks
    ref_count[free[-1]] = 1
    return free[-1]


def my_allocate__says_none_when_there_is_none(free, ref_count):
    if not free:
        return None
    block_id = free.pop()
    ref_count[block_id] = 1
    return block_id
