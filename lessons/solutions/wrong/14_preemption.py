def my_victims__one_is_enough(blocks, free, needed):
    return [len(blocks) - 1] if free < needed else []


def my_victims__the_earliest(blocks, free, needed):
    victims = []
    while free < needed and len(victims) + 1 < len(blocks):
        victims.append(len(victims) + 1)
        free += blocks[victims[-1]]
    return victims


def my_victims__the_largest(blocks, free, needed):
    victims = []
    for seq in sorted(range(1, len(blocks)), key=lambda s: -blocks[s]):
        if free < needed:
            victims.append(seq)
            free += blocks[seq]
    return victims


def my_victims__one_too_many(blocks, free, needed):
    victims = []
    while free <= needed and len(victims) + 1 < len(blocks):
        victims.append(len(blocks) - 1 - len(victims))
        free += blocks[victims[-1]]
    return victims


def my_victims__the_first_too(blocks, free, needed):
    victims = []
    for seq in range(len(blocks)):
        if free < needed:
            victims.append(seq)
            free += blocks[seq]
    return victims
