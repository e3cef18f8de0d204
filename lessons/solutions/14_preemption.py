def my_victims(blocks, free, needed):
    victims = []
    while free < needed:
        victims.append(len(blocks) - 1 - len(victims))
        free += blocks[victims[-1]]
    return victims
