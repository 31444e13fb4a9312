"""Server aggregation: task-aware adapter averaging and adaptive text-adapter aggregation (ATA).

Pure functions over named arrays (*states*, see :mod:`pilot_flwr.algorithm.arrays`). Results have
the container type and the dtype of the inputs. One exchange of the server::

    weights = adaptive_weights(pairwise_distances(loras), num_examples, num_neighbors)
    personal_loras = mix(loras, weights)
    task_adapters = task_aware_average(adapters, tasks, num_examples)

To add a rule for the LoRAs, write one pure function that returns a row-stochastic (K, K) matrix
and add a row to `LORA_RULES`; :func:`mix` does the passes over the parameters.
docs/how-to/add-aggregation-rule.md has the steps.

Source: Pilot (Xiong et al., AAAI 2025, arXiv 2501.13985), "Adaptive Text-Adapter Aggregation";
docs/explanation/method.md, section 4. Averages by examples: McMahan et al.,
"Communication-Efficient Learning of Deep Networks from Decentralized Data".
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from pilot_flwr.algorithm.arrays import (
    Array,
    Matrix,
    NamedArrays,
    centred_gram,
    check_states,
    combine,
    sketch,
)
from pilot_flwr.algorithm.neighbors import (
    check_distances,
    grouped_neighbors,
    inverse_distances,
    rank_others,
)
from pilot_flwr.config.schema import StrategyConfig
from pilot_flwr.errors import ConfigError, UpdateError

EVERYONE = "all-tasks"
"""Name of the group of all clients."""

SKETCH_SIZE = 8192
"""Number m of columns of a sketch."""

CANCELLATION = 1e-6
"""Below this share of G_kk + G_jj, too few of the 16 digits of G_kk + G_jj - 2 G_kj are left."""

_ROW_SUM_TOLERANCE = 1e-6


def pairwise_distances(states: Sequence[NamedArrays]) -> Matrix:
    """Compute the Euclidean distance between every two states, all tensors as one vector.

    ::

        d_kj = || S_k - S_j ||_2,   d_kj^2 = G_kk + G_jj - 2 G_kj,   G = D D^T,   D_k = S_k - S_0

    Parameters
    ----------
    states : sequence of state
        One per client, with the same names, shapes and dtypes.

    Returns
    -------
    ndarray of float64, shape (K, K)
        Symmetric, exactly 0 on the diagonal and between identical clients.

    Raises
    ------
    UpdateError
        No client, tensors that do not match, NaN or Inf.

    Notes
    -----
    Differences and products are float64. Pairs so close together, and so far from client 0, that
    G cancels are computed again relative to one of them: one more pass per such cluster.
    """
    check_states(states, range(len(states)))
    return unified(np.sqrt(_squared_distances(states)))


def sketched_distances(states: Sequence[NamedArrays], *, seed: Sequence[int]) -> Matrix:
    """Estimate :func:`pairwise_distances` from sketches with m = `SKETCH_SIZE` columns.

    ::

        d_kj = || Y_k - Y_j ||_2,   Y = C D,   D_k = S_k - S_0

    C is a CountSketch: every value is added to one of m columns with a random sign. For every
    pair of states that were chosen without knowledge of C::

        E d_kj^2 = || S_k - S_j ||^2,   Var d_kj^2 <= 2 / m || S_k - S_j ||^4

    so the relative standard error of d^2 is at most 1.6 %, and that of d about half as large. The
    relative error of d^2 exceeds x with probability at most 2 / (m x^2) (Chebyshev).

    Parameters
    ----------
    states : sequence of state
        One per client, with the same names, shapes and dtypes.
    seed : sequence of int
        Seed of C, which otherwise depends only on the states' layout.

    Returns
    -------
    ndarray of float64, shape (K, K)
        Symmetric, exactly 0 on the diagonal and between identical clients.

    Raises
    ------
    UpdateError
        As in :func:`pairwise_distances`.

    Notes
    -----
    Costs K P additions and K^2 m products instead of K^2 P, and the memory of K m float64.
    Source: Charikar, Chen, Farach-Colton, "Finding Frequent Items in Data Streams" (ICALP 2002);
    the variance: Weinberger et al., "Feature Hashing for Large Scale Multitask Learning"
    (ICML 2009), whose bound needs no more than independent signs and columns shared by two values
    with probability at most 1 / m.
    """
    check_states(states, range(len(states)))
    sketches = sketch(states, SKETCH_SIZE, np.random.default_rng(seed))
    return pairwise_distances([{"sketch": row} for row in sketches])


def adaptive_weights(
    distances: Matrix,
    num_examples: Sequence[float],
    num_neighbors: int | NDArray[np.bool_],
    *,
    self_weight: bool = True,
) -> Matrix:
    """Compute the ATA weights of every client from the distances between clients.

    ::

        N(k) = the M clients j != k with the smallest d_kj
        w_kj = (1 / d_kj) / sum_{m in N(k)} (1 / d_km)
        W_kk = n_k / Z_k,   W_kj = n_j w_kj / Z_k,   Z_k = n_k + sum_{j in N(k)} n_j w_kj

    At distance 0 the limit is taken: neighbours there share all of the w_kj equally. Ties go to
    the lower index, so callers sort clients by id to make runs comparable.

    Parameters
    ----------
    distances : ndarray, shape (K, K)
        Finite and not negative; the diagonal is ignored.
    num_examples : sequence of float
        n_k, positive and finite.
    num_neighbors : int or ndarray of bool, shape (K, K)
        M, at least 1; K or more means all other clients. Or whether j is in N(k), at least one.
    self_weight : bool
        Whether a client's own LoRA counts; without it W_kk = 0, an ablation.

    Returns
    -------
    ndarray of float64, shape (K, K)
        Row-stochastic; row k mixes client k's LoRA. [[1]] for K = 1.

    Raises
    ------
    ConfigError
        `num_neighbors` is below 1.
    UpdateError
        `distances` or `num_examples` are not as above.
    """
    fixed = isinstance(num_neighbors, int)
    if fixed and num_neighbors < 1:
        raise ConfigError(f"`strategy.num_neighbors` is {num_neighbors} but must be at least 1.")
    others = check_distances(distances)
    counts = _check_examples(num_examples, len(others))
    nearest = rank_others(others)[:, : num_neighbors if fixed else None]
    near = np.take_along_axis(others, nearest, axis=1)
    if not fixed:
        near[~np.take_along_axis(num_neighbors, nearest, axis=1)] = np.inf
    inverse = inverse_distances(near)
    weights: Matrix = np.zeros_like(others)
    np.put_along_axis(weights, nearest, inverse / inverse.sum(axis=1, keepdims=True), axis=1)
    np.fill_diagonal(weights, float(self_weight or len(others) == 1))
    weights *= counts
    weights /= weights.max(axis=1, keepdims=True)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def mix(
    states: Sequence[NamedArrays],
    weights: Matrix,
    *,
    allocate: Callable[[int], dict[str, Array]] | None = None,
) -> list[dict[str, Array]]:
    """Mix the states of all clients into one personalised state per client.

    ::

        S'_k = sum_j W_kj S_j

    A client's values affect only the rows that give it weight, however far away it lies.

    Parameters
    ----------
    states : sequence of state
        One per client, with the same names, shapes and dtypes.
    weights : ndarray, shape (K, K)
        Row-stochastic.
    allocate : callable, optional
        Returns a contiguous state with the layout of `states[0]` for the result of a client, given
        by index. Clients with equal rows of weights share the state of the first of them. By
        default, states are allocated in memory.

    Returns
    -------
    list of state
        K new states; clients with the same row of weights share one. Summed in float64 and
        rounded to the dtype once; identical bits of all clients are kept.

    Raises
    ------
    UpdateError
        No client, tensors that do not match, NaN or Inf, or weights that are not row-stochastic.
    """
    clients = range(len(states))
    check_states(states, clients)
    matrix = check_weights(weights, len(states))
    _, first, row_of = np.unique(matrix, axis=0, return_index=True, return_inverse=True)
    distinct = np.sort(first)
    place = None if allocate is None else lambda row: allocate(int(distinct[row]))
    results = combine(states, matrix[distinct], clients, place)
    return [results[place] for place in np.searchsorted(distinct, first[row_of.ravel()])]


def task_aware_average(
    adapters: Sequence[NamedArrays], tasks: Sequence[str], num_examples: Sequence[float]
) -> dict[str, dict[str, Array]]:
    """Average the task adapters of each task over that task's clients.

    ::

        A_t = sum_{k in K_t} n_k A_k / sum_{k in K_t} n_k

    Parameters
    ----------
    adapters : sequence of state
        One per client; tensors must match within a task.
    tasks : sequence of str
        The task of each client.
    num_examples : sequence of float
        n_k, positive and finite.

    Returns
    -------
    dict of str to state
        Task → average, in order of first occurrence. Callers keep the last adapter of a task
        without clients.

    Raises
    ------
    UpdateError
        No client, lengths that differ, tensors that do not match, NaN or Inf, or a wrong count.
    """
    counts = _check_examples(num_examples, len(adapters))
    if len(tasks) != len(adapters):
        raise UpdateError(f"There are {len(adapters)} adapters but {len(tasks)} tasks.")
    members: dict[str, list[int]] = {}
    for client, task in enumerate(tasks):
        members.setdefault(task, []).append(client)
    averages = {}
    for task, clients in members.items():
        states, shares = [adapters[k] for k in clients], counts[clients]
        check_states(states, clients)
        shares /= shares.max()
        (averages[task],) = combine(states, (shares / shares.sum())[None, :], clients)
    return averages


def weighted_average(
    states: Sequence[NamedArrays], num_examples: Sequence[float]
) -> dict[str, Array]:
    """Average states, each weighted by its number of examples (FedAvg).

    ::

        A = sum_k n_k A_k / sum_k n_k

    Parameters
    ----------
    states : sequence of state
        One per client, with the same names, shapes and dtypes.
    num_examples : sequence of float
        n_k, positive and finite.

    Returns
    -------
    state
        Summed in float64 and rounded to the dtype once.

    Raises
    ------
    UpdateError
        As in :func:`task_aware_average`.
    """
    return task_aware_average(states, [EVERYONE] * len(states), num_examples)[EVERYONE]


def group_weights(groups: Sequence[str], num_examples: Sequence[float]) -> Matrix:
    """Compute the weights of the mean over each client's group: FedAvg within groups.

    ::

        W_kj = n_j / sum_{m in G(k)} n_m   for j in G(k), the clients of k's group;  else 0

    Parameters
    ----------
    groups : sequence of str
        The group of each client: its task, or the same for all (FedAvg over all).
    num_examples : sequence of float
        n_k, positive and finite.

    Returns
    -------
    ndarray of float64, shape (K, K)
        Row-stochastic; rows of one group are equal.

    Raises
    ------
    UpdateError
        No client, or `num_examples` are not as above.
    """
    counts = _check_examples(num_examples, len(groups))
    names = np.array(groups)
    weights: Matrix = (names[:, None] == names[None, :]) * (counts / counts.max())
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


GroupOf = Callable[[str], str]
"""Maps a client's task to its averaging group."""

ADAPTER_GROUPS: dict[str, GroupOf] = {"task": lambda task: task, "global": lambda task: EVERYONE}
"""Averaging groups of task adapters, by `strategy.adapters`."""


class LoraRule(NamedTuple):
    """An aggregation rule for LoRAs.

    Attributes
    ----------
    weights : callable
        Maps distances (K, K), tasks, examples and settings to row-stochastic weights (K, K).
    owner : callable
        Maps a client and its task to the owner of its LoRA: the client, or a group, whose clients
        share one LoRA even if they did not reply.
    exact : bool
        Whether the residual of :mod:`pilot_flwr.algorithm.fedex_lora` is added to the frozen base.
    """

    weights: Callable[[Matrix, Sequence[str], Sequence[float], StrategyConfig], Matrix]
    owner: Callable[[str, str], str]
    exact: bool = False


def _mean_over(group_of: GroupOf) -> LoraRule:
    return LoraRule(
        lambda distances, tasks, examples, config: group_weights(
            [group_of(task) for task in tasks], examples
        ),
        lambda client, task: group_of(task),
    )


def _adaptive(
    distances: Matrix, tasks: Sequence[str], examples: Sequence[float], config: StrategyConfig
) -> Matrix:
    neighbors: int | NDArray[np.bool_] = config.num_neighbors
    if config.neighbors == "grouped":
        neighbors = grouped_neighbors(distances)
    return adaptive_weights(distances, examples, neighbors, self_weight=config.self_weight)


LORA_RULES: dict[str, LoraRule] = {
    "adaptive": LoraRule(_adaptive, lambda client, task: client),
    "task": _mean_over(ADAPTER_GROUPS["task"]),
    "global": _mean_over(ADAPTER_GROUPS["global"]),
    "exact": _mean_over(ADAPTER_GROUPS["global"])._replace(exact=True),
}
"""Aggregation rules for LoRAs, by `strategy.lora`."""


def unified(distances: Matrix) -> Matrix:
    """Return distances in which identical clients share a row: rounding then decides no tie."""
    original = (distances == 0).argmax(axis=1)
    shared: Matrix = distances[np.ix_(original, original)]
    return shared


def check_weights(weights: Matrix, clients: int) -> Matrix:
    """Return mixing weights with rows that sum to 1; raise `UpdateError` if they are far off."""
    matrix = np.asarray(weights, dtype=np.float64)
    if matrix.shape != (clients, clients):
        raise UpdateError(f"The weights of {clients} clients have shape {matrix.shape}.")
    if not np.all(matrix >= 0) or np.any(np.abs(matrix.sum(axis=1) - 1) > _ROW_SUM_TOLERANCE):
        raise UpdateError("The weights must not be negative, and each row must sum to 1.")
    normalized: Matrix = matrix / matrix.sum(axis=1, keepdims=True)
    return normalized


def _squared_distances(states: Sequence[NamedArrays]) -> Matrix:
    """Return the squared distances, with a relative error of about 1e-9."""
    gram = centred_gram(states)
    norms = gram.diagonal()
    scale = norms[:, None] + norms[None, :]
    squared: Matrix = scale - (gram + gram.T)
    np.fill_diagonal(squared, 0)
    cancelled = squared < CANCELLATION * scale
    np.fill_diagonal(cancelled, False)
    # Client 0 is the origin and never cancels, so the recursion ends.
    for cluster in _components(cancelled):
        squared[np.ix_(cluster, cluster)] = _squared_distances([states[k] for k in cluster])
    return squared


def _components(linked: NDArray[np.bool_]) -> list[list[int]]:
    """Return the connected components with at least two members of a symmetric relation."""
    if not linked.any():
        return []
    from scipy.sparse import csgraph  # slow to import, and seldom needed

    count, labels = csgraph.connected_components(linked, directed=False)
    order = np.argsort(labels, kind="stable")
    groups = np.split(order, np.searchsorted(labels[order], np.arange(1, count)))
    return [group.tolist() for group in groups if len(group) > 1]


def _check_examples(num_examples: Sequence[float], clients: int) -> Matrix:
    counts = np.array(num_examples, dtype=np.float64)
    if clients == 0:
        raise UpdateError("There is no client to aggregate.")
    if counts.shape != (clients,):
        raise UpdateError(f"There are {clients} clients but {counts.size} numbers of examples.")
    for client, count in enumerate(counts):
        if not (np.isfinite(count) and count > 0):
            raise UpdateError(
                f"client {client}: the number of examples is {count:g} but must be positive and "
                "finite."
            )
    return counts
