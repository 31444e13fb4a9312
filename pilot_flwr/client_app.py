"""The ClientApp: three thin handlers around `pilot_flwr.client.session`."""

import functools
import logging
from collections.abc import Callable

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from pilot_flwr import __version__
from pilot_flwr.client.node import Site, find_site, is_simulated, site_config
from pilot_flwr.client.node_config import private_paths, read_node_config
from pilot_flwr.client.preflight import check_readiness
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.federation import declared_examples
from pilot_flwr.errors import ConfigError, PilotError, UpdateError
from pilot_flwr.flower.client_key import client_key, fingerprint, prove, public_key, statement
from pilot_flwr.flower.compatibility import identity_of
from pilot_flwr.flower.messages import (
    OWN_ERROR,
    PRIVATE_ERROR,
    decode_instruction,
    decode_query,
    decode_run,
    encode_error,
    encode_member,
    encode_result,
)
from pilot_flwr.protocol import Member

app = ClientApp()
logger = logging.getLogger("flwr")
Handler = Callable[[Message, PilotConfig, Site], RecordDict]


def _answer(handler: Handler) -> Callable[[Message, Context], Message]:
    """Reply with the handler's result, or with an error that discloses nothing private."""

    @functools.wraps(handler)
    def handle(message: Message, context: Context) -> Message:
        private: dict[str, str] | None = {}
        constant = False
        try:
            # Until the node config is read, an error can only quote the server's own input.
            config = _config(str(context.run_config["overrides"]))
            constant = config.privacy.enabled
            run, node_config = decode_run(message.content), context.node_config
            simulated = is_simulated(node_config, run.folder, run.token)
            constant = constant and not simulated
            private = None if simulated else private_paths(node_config)
            node = read_node_config(node_config)
            site = find_site(
                node,
                config,
                run_name=run.name,
                run_folder=run.folder,
                simulated=simulated,
                flower_run=str(context.run_id),
                node_id=context.node_id,
            )
            config = site_config(node, config, simulated=simulated)
            return Message(handler(message, config, site), reply_to=message)
        except Exception as error:
            expected = PilotError if private is None else ConfigError  # needs no traceback
            logger.error("%s", error, exc_info=not isinstance(error, expected))
            reply = Error(OWN_ERROR, PRIVATE_ERROR) if constant else encode_error(error, private)
            return Message(reply, reply_to=message)

    return handle


@app.query()
@_answer
def query(message: Message, config: PilotConfig, site: Site) -> RecordDict:
    """Report which client this node is, its version, and whether it holds stage-1 state."""
    server_round, trains, nonce = decode_query(message.content)
    check_readiness(site, config)
    if trains:
        site.check_budget(config.privacy)
    client = site.client
    examples = declared_examples(config, client, files=site.files)
    stage = site.private_store.stage(before=server_round)
    member = Member(client.id, client.task, examples, stage)
    proof = None
    if site.key_file is not None:
        key = client_key(site.key_file, create=site.key_file == site.default_key)
        logger.info("%s: this client's key is %s", client.id, fingerprint(public_key(key)))
        run = decode_run(message.content)
        proof = prove(key, statement(run, server_round, nonce, site.node_id, member))
    return encode_member(member, identity_of(config), proof)


@app.train()
@_answer
def train(message: Message, config: PilotConfig, site: Site) -> RecordDict:
    """Evaluate the incoming personalised model, then train it."""
    return _run(message, config, site)


@app.evaluate()
@_answer
def evaluate(message: Message, config: PilotConfig, site: Site) -> RecordDict:
    """Evaluate the incoming personalised model."""
    return _run(message, config, site)


def _run(message: Message, config: PilotConfig, site: Site) -> RecordDict:
    from pilot_flwr.client.session import run_session  # imports torch

    instruction, addressee = decode_instruction(message.content)
    if addressee != site.client.id:
        raise UpdateError(
            f"The instruction is for {addressee!r} but this client is {site.client.id!r}."
        )

    number = instruction.server_round
    progress = functools.partial(logger.info, "%s, exchange %d: %s", site.client.id, number)
    result = run_session(site, config, instruction, progress=progress)
    return encode_result(result, instruction, site.client.id, site.client.task)


@functools.lru_cache(maxsize=1)
def _config(overrides: str) -> PilotConfig:
    try:
        return load_config(overrides)
    except ConfigError as error:  # often because of another version
        raise ConfigError(f"{error} (pilot-flwr {__version__} at this client)") from None
