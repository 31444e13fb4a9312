"""What a run's method does with what clients send, in words: from its settings alone.

To word a new rule of aggregation, add it to `_LORA_USE` and `_MIXED`, and to `server_lines`.
"""

from collections.abc import Sequence

from pilot_flwr.model.parameters import Sharing
from pilot_flwr.report.gather import Exchange
from pilot_flwr.settings.pilot import PilotConfig
from pilot_flwr.settings.strategy import StrategyConfig
from pilot_flwr.wording import count

SYMBOLS = {
    "lora": "Θ_l is the LoRA",
    "own_task_adapter": "ψ_t a task adapter",
    "client_adapter": "ψ_s the client adapter",
    "cross_task_adapters": "ψ_c the cross-task adapters",
    "router": "φ the router",
    "residual": (
        "R what averaging the factors A and B leaves out of the average of their products B A, "
        "which the server sends and clients add to the frozen base (FedEx-LoRA)"
    ),
}
"""What the symbols stand for, by groups of parameters and parts of messages."""

_LORA_USE = {
    "task": "the server takes the mean over a task's clients, weighted by their examples.",
    "global": "the server takes the mean over all clients, weighted by their examples.",
    "exact": "the server takes the mean over all clients, weighted by their examples.",
}

_MIXED = {
    "adaptive": "",
    "task": " All clients of a task get the same, and a share is that of the training examples.",
    "global": " All clients get the same, and a share is that of the training examples.",
    "exact": (
        " All clients get the same, and a share is that of the training examples. It is the share "
        "of the factors A and B; what their means leave out of the mean of the products B A is "
        "sent beside them, as R."
    ),
}


def symbols(names: Sequence[str]) -> str:
    """Say what the symbols of groups of parameters and of parts of messages stand for."""
    return ", ".join(words for name, words in SYMBOLS.items() if name in names) + "."


def sharing_of(config: PilotConfig) -> Sharing:
    """Return what of a client's parameters is trained and sent."""
    return Sharing.of(config.strategy.sharing, config.train.lora_matrices)


def partly_sent(config: PilotConfig) -> str:
    """Return the matrix of the LoRA that is sent, if clients train another one as well."""
    sharing = sharing_of(config)
    sent = [matrix for matrix in sharing.trained_lora if matrix in sharing.lora]
    return "".join(sent) if len(sent) < len(sharing.trained_lora) else ""


def nothing_to_compare(config: PilotConfig) -> str:
    """Say why there are no LoRAs of several clients."""
    strategy = config.strategy
    if strategy.trained_by == "pooled":
        return (
            "One client trains on the data of all (`strategy.trained_by` is 'pooled'), so there "
            "are no LoRAs of several clients."
        )
    if strategy.trained_by == "nobody":
        return "Nothing is trained (`strategy.trained_by` is 'nobody'), so no LoRA is sent."
    if strategy.sharing.lora == "none":
        return "The clients send no LoRA (`strategy.sharing.lora` is 'none')."
    return "In no exchange were there LoRAs of several clients."


def distance_words(config: PilotConfig) -> str:
    """Say what of the LoRAs is compared, and what the server does with the distances."""
    strategy = config.strategy
    what = f"the matrices {_sent(config)} of " * bool(_sent(config))
    words = (
        f"Euclidean distance ‖Θ_l,k − Θ_l,j‖₂ between {what}the LoRAs that the clients sent, "
        "before the server aggregated them: the darker, the closer. All panels have the same "
        "colours for the same distance. "
    )
    if strategy.lora == "adaptive":
        words += (
            f"The server mixes for each client the LoRAs of {_neighbours(strategy)}, each weighted "
            "by its number of examples, and a neighbour by the inverse of this distance as well."
        )
    else:
        words += f"This method does not use them: {_LORA_USE[strategy.lora]}"
    return words + _personal(config)


def mixing_words(config: PilotConfig) -> str:
    """Say what a row of the mixing weights is."""
    strategy, sent = config.strategy, _sent(config)
    adam = strategy.server_optimizer.name == "adam"
    words = "A row is the LoRA that the server sends to a client in the next exchange, and says of "
    if adam:
        words = "A row is what the server makes of the LoRAs for a client, and says of "
    words += (
        "whose LoRAs it is made: the shares of a row sum to 1. White is no share at all, and the "
        "darker, the more."
    )
    words += _MIXED[strategy.lora]
    if adam:
        words += (
            " It is not sent itself: the server's own LoRA makes a step of Adam towards it "
            "(FedAdam), and that is sent."
        )
    if sent:
        other = "B" if sent == "A" else "A"
        trained = other in sharing_of(config).trained_lora
        fate = "stays with its client" if trained else "stays as drawn"
        words += f" Only the matrices {sent} are sent and mixed: {other} {fate}."
    return words + _personal(config)


def server_lines(strategy: StrategyConfig, exchange: Exchange) -> list[str]:
    """Say what the server did in an exchange, from what its aggregation told."""
    if not (exchange.tasks or exchange.weights):
        return ["no aggregation"]
    adam = strategy.server_optimizer.name == "adam"
    if strategy.trained_by == "pooled" and not adam:
        return ["takes what the one client trained"]
    verb = "steps by Adam:" if adam else "averages"
    lines = []
    if exchange.tasks:
        lines.append(f"{verb} ψ_t {_members(list(exchange.tasks.values()))}")
    if exchange.weights and strategy.lora == "adaptive":
        others = sorted({len({*shares} - {own}) for own, shares in exchange.weights.items()})
        mixes = "steps by Adam: mixes of" if adam else "mixes"
        with_others = "–".join(map(str, others))
        lines.append(f"{mixes} {len(exchange.weights)} Θ_l, each with {with_others} others")
    elif exchange.weights:
        matrices = {"A": "A of ", "B": "B of "}.get(strategy.sharing.lora, "")
        groups = {tuple(sorted(shares)) for shares in exchange.weights.values()}
        rest = ", the rest in R" if strategy.lora == "exact" else ""
        lines.append(f"{verb} {matrices}Θ_l {_members(sorted(groups))}{rest}")
    return lines


def _members(groups: Sequence[Sequence[str]]) -> str:
    if len(groups) == 1:
        return f"of {count(len(groups[0]), 'client')}"
    sizes = ", ".join(str(len(group)) for group in groups)
    most = 10  # characters, for which there is room in the time line
    return f"per task, of {sizes} clients" if len(sizes) <= most else f"in {len(groups)} tasks"


def _neighbours(strategy: StrategyConfig) -> str:
    own = "the client itself and " if strategy.self_weight else ""
    return f"{own}its nearest clients (at most {strategy.num_neighbors:,})"


def _sent(config: PilotConfig) -> str:
    """Return the one matrix of the LoRA that is sent, empty if both are."""
    sent = sharing_of(config).lora
    return sent if len(sent) == 1 else ""


def _personal(config: PilotConfig) -> str:
    if not config.train.ditto.enabled:
        return ""
    return (
        " All this is of the shared model: a client is scored by its personal model v, which is "
        "drawn to the shared one and never sent (Ditto)."
    )
