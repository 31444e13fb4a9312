"""Which node is which client: nodes say who they are, and two may say the same.

Pure: no Flower, no waiting. An id belongs to the node that took part under it in the exchange
before, as long as that node is connected, so that nobody replaces a client that is there. When it
is gone, whoever comes with the id is the client come back: node ids change whenever a SuperNode
restarts without authentication. Where nobody was before, two nodes with one id are both refused,
as nothing tells which is right. Ids become names of files and folders, which some disks compare
without case, so ids that differ in case only count as one.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from pilot_flwr.errors import UpdateError
from pilot_flwr.server.state import Member

DIFFERENT = "`client-id` must be different at every node."


@dataclass(frozen=True)
class Present:
    """A client that answered, and the node at which it is."""

    member: Member
    node_id: int


@dataclass
class Register:
    """The clients of a run, and the node of each.

    Parameters
    ----------
    task_of : dict
        Task of every client that is known, by id. An id is known from the first time that it
        takes part, or from the start if the federation is configured.
    node_of : dict
        Node at which a client last took part.
    """

    task_of: dict[str, str] = field(default_factory=dict)
    node_of: dict[str, int] = field(default_factory=dict)

    def check(self, member: Member) -> None:
        """Say whether a member fits what is known of its id.

        Raises
        ------
        UpdateError
            The id is one that is known in other letters, or has another task.
        """
        for client, task in self.task_of.items():
            if client.casefold() == member.client.casefold() and client != member.client:
                raise UpdateError(
                    f"`client-id` is {member.client!r}, which differs in case only from "
                    f"{client!r}, a client of the run"
                )
            if client == member.client and task != member.task:
                raise UpdateError(
                    f"`task` is {member.task!r} but client {client!r} of the run has {task!r}"
                )

    def settle(
        self, claims: Mapping[int, Member], connected: Collection[int]
    ) -> tuple[dict[str, Present], dict[int, str]]:
        """Decide who is who, in one exchange.

        Parameters
        ----------
        claims : mapping
            Node → who it says it is; all of them passed `check`.
        connected : collection of int
            The nodes that are there now.

        Returns
        -------
        present : dict
            Client → it and its node.
        refused : dict
            Node → why it cannot take part.
        """
        present: dict[str, Present] = {}
        refused: dict[int, str] = {}
        by_id: dict[str, list[int]] = {}
        for node in sorted(claims):
            by_id.setdefault(claims[node].client.casefold(), []).append(node)
        for nodes in by_id.values():
            client = claims[nodes[0]].client
            holder = self._holder(client, claims, connected)
            if holder is not None:
                refused |= {node: _taken(client, holder) for node in nodes if node != holder}
                nodes = [node for node in nodes if node == holder]
            elif len(nodes) > 1:
                refused |= dict.fromkeys(nodes, _same(nodes, [claims[n].client for n in nodes]))
                continue
            for node in nodes:
                present[client] = Present(claims[node], node)
        return present, refused

    def _holder(
        self, client: str, claims: Mapping[int, Member], connected: Collection[int]
    ) -> int | None:
        """Return the node that took part as `client` before, unless it is gone or another now."""
        node = self.node_of.get(client)
        if node is None:
            return None
        if node in claims:
            return node if claims[node].client == client else None
        return node if node in connected else None

    def note(self, present: Mapping[str, Present]) -> None:
        """Remember who takes part in an exchange."""
        for client, one in present.items():
            self.task_of[client] = one.member.task
            self.node_of[client] = one.node_id


def _taken(client: str, old: int) -> str:
    return (
        f"Client {client!r} is at node {old}, which is still connected; {DIFFERENT} If this node "
        "replaces that one, it can take part once that one is gone."
    )


def _same(nodes: list[int], ids: list[str]) -> str:
    listed = ", ".join(map(str, nodes[:-1])) + f" and {nodes[-1]}"
    if len(set(ids)) == 1:
        word = "both" if len(nodes) == 2 else "all"
        return f"Nodes {listed} are {word} client {ids[0]!r}; {DIFFERENT}"
    which = ", ".join(f"{node} ({name!r})" for node, name in zip(nodes, ids, strict=True))
    return f"Nodes {which} have ids that differ in case only; {DIFFERENT}"
