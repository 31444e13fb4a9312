"""Draw the clients of an exchange from those available (docs/explanation/method.md, section 3).

`StrategyConfig.num_drawn` sets their number. A draw depends on the run's seed, the exchange and the
available clients alone, so a resumed run draws the same clients. To sample otherwise, write a
function like `draw` and a value of `strategy.sampling`.
"""

from collections import Counter
from collections.abc import Mapping

import numpy as np


def draw(
    task_of: Mapping[str, str], size: int, *, stratified: bool, seed: int, exchange: int
) -> set[str]:
    """Draw `size` of the available clients, whose tasks are `task_of`, without replacement.

    All clients are equally likely; if `stratified`, all clients of a task are, and every task has
    its number of `seats`, so that at least one client per task is drawn even if `size` is smaller.
    """
    generator = np.random.default_rng([seed, exchange])
    clients = sorted(task_of)
    order = [clients[index] for index in generator.permutation(len(clients))]
    if not stratified:
        return set(order[:size])
    tasks = sorted(set(task_of.values()))
    ties = [tasks[index] for index in generator.permutation(len(tasks))]
    available = Counter(task_of.values())
    number = seats({task: available[task] for task in ties}, size)
    return {
        client
        for task in tasks
        for client in [client for client in order if task_of[client] == task][: number[task]]
    }


def seats(available: Mapping[str, int], size: int) -> dict[str, int]:
    """Divide `size` among tasks in proportion to their available clients, at least one each.

    Each further seat goes to the task that is farthest below its share; ties go to the first one.
    """
    total = sum(available.values())
    number = dict.fromkeys(available, 1)
    for _ in range(min(size, total) - len(number)):
        below = {t: n * size - number[t] * total for t, n in available.items() if number[t] < n}
        number[max(below, key=lambda task: below[task])] += 1
    return number
