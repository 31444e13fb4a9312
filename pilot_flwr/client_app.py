"""The ClientApp: three thin handlers around `pilot_flwr.client.session`."""

import functools
import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from pilot_flwr import __version__
from pilot_flwr.client.node import (
    Site,
    find_site,
    is_simulated,
    private_paths,
    read_node_config,
    site_config,
)
from pilot_flwr.client.preflight import check_readiness
from pilot_flwr.client.session import check_budget, run_session, stage_trained
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.federation import count_examples, federation_clients, is_pooling
from pilot_flwr.errors import ConfigError, PilotError, UpdateError
from pilot_flwr.flower import messages as replies
from pilot_flwr.flower import messages as wire
from pilot_flwr.flower.compatibility import identity_of
from pilot_flwr.flower.failures import OWN_ERROR, reply_text
from pilot_flwr.protocol import Member

app = ClientApp()
logger = logging.getLogger("flwr")
Handler = Callable[[Message, PilotConfig, Site], RecordDict]


def _answer(handler: Handler) -> Callable[[Message, Context], Message]:
    """Reply with what `handler` returns, or with what the server may know of an error."""

    @functools.wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        private: dict[str, str] | None = {}
        try:
            # Before anything of this site is looked at, an error can quote the server alone.
            config, run = _received(message, context)
            simulated = is_simulated(context.node_config, run.folder, run.token)
            private = None if simulated else private_paths(context.node_config)
            config, site = _open(context, config, run, simulated=simulated)
            return Message(handler(message, config, site), reply_to=message)
        except Exception as error:
            explained = isinstance(error, PilotError) and private is None
            explained |= isinstance(error, ConfigError)  # it says which word to change
            logger.error("%s", error, exc_info=not explained)
            return Message(Error(OWN_ERROR, reply_text(error, private)), reply_to=message)

    return handle


@app.query()
@_answer
def query(message: Message, config: PilotConfig, site: Site) -> RecordDict:
    """Say which client this node is, of what version, and whether it holds stage-1 state."""
    server_round, trains = wire.decode_query(message.content)
    check_readiness(site, config)
    if trains:
        check_budget(site, config)
    pooling = is_pooling(config.strategy, site.client)
    examples = sum(
        count_examples(config.data, client, "train", seed=config.seed, files=site.files)
        for client in (federation_clients(config.data) if pooling else [site.client])
    )
    return wire.encode_member(
        Member(
            site.client.id,
            site.client.task,
            examples,
            stage_trained(site, server_round),
        ),
        identity_of(config),
    )


@app.train()
@_answer
def train(message: Message, config: PilotConfig, site: Site) -> RecordDict:
    """Evaluate the incoming personalised model, then train it."""
    return _turn(message, config, site)


@app.evaluate()
@_answer
def evaluate(message: Message, config: PilotConfig, site: Site) -> RecordDict:
    """Evaluate the incoming personalised model."""
    return _turn(message, config, site)


def _turn(message: Message, config: PilotConfig, site: Site) -> RecordDict:
    order, addressee = wire.decode_instruction(message.content)
    if addressee != site.client.id:
        raise UpdateError(f"The order is for {addressee!r} but this client is {site.client.id!r}.")

    def progress(line: str) -> None:
        logger.info("%s, exchange %d: %s", site.client.id, order.server_round, line)

    result = run_session(site, config, order, progress=progress)
    return replies.encode_result(result, order, site.client.id, site.client.task)


def _received(message: Message, context: Context) -> tuple[PilotConfig, wire.RunInfo]:
    return _config(str(context.run_config["overrides"])), wire.decode_run(message.content)


def _open(
    context: Context, config: PilotConfig, run: wire.RunInfo, *, simulated: bool
) -> tuple[PilotConfig, Site]:
    node = read_node_config(context.node_config)
    site = find_site(node, config, run_name=run.name, run_folder=run.folder, simulated=simulated)
    return site_config(node, config, simulated=simulated), site


@functools.lru_cache(maxsize=1)
def _config(overrides: str) -> PilotConfig:
    try:
        return load_config(overrides)
    except ConfigError as error:  # often the server has another version
        raise ConfigError(f"{error} (pilot-flwr {__version__} at this client)") from None
