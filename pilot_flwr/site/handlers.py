"""Answer the three kinds of messages that a client receives: query, train and evaluate.

A query is answered in the process of Flower's ClientApp; so are the other messages, except at a
warm site, where the service's worker answers them (`pilot_flwr.site.service`).
"""

import functools
import logging
from typing import Literal

from flwr.app import Context, Error, RecordDict

from pilot_flwr import __version__
from pilot_flwr.client.node import Site, find_site, is_simulated, site_config
from pilot_flwr.client.node_config import private_paths, read_node_config
from pilot_flwr.client.preflight import check_readiness
from pilot_flwr.config.loading import load_config
from pilot_flwr.config.schema import PilotConfig
from pilot_flwr.data.federation import declared_examples
from pilot_flwr.errors import ConfigError, PilotError, UpdateError
from pilot_flwr.flower.client_key import client_key, fingerprint, prove, public_key, statement
from pilot_flwr.flower.codec import Allocate
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

Kind = Literal["query", "train", "evaluate"]
Answer = RecordDict | Error
logger = logging.getLogger("flwr")


def answer(
    kind: Kind, content: RecordDict, context: Context, *, allocate: Allocate = bytearray
) -> Answer:
    """Return the content of the reply, or an error that discloses nothing private.

    `allocate` provides the memory of the reply's arrays.
    """
    try:
        config = _config(context)
        run, node_config = decode_run(content), context.node_config
        simulated = is_simulated(node_config, run.folder, run.token)
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
        if kind == "query":
            return _query(content, config, site)
        return _run(content, config, site, allocate)
    except Exception as error:
        return failure(error, content, context)


def failure(error: Exception, content: RecordDict, context: Context) -> Error:
    """Log an error with all its details; return the part that the server may see."""
    private: dict[str, str] | None = {}
    constant = False
    try:
        constant = _config(context).privacy.enabled
        run = decode_run(content)
        simulated = is_simulated(context.node_config, run.folder, run.token)
        constant = constant and not simulated
        private = None if simulated else private_paths(context.node_config)
    except Exception as unreadable:  # quotes only the server's own input
        if str(unreadable) != str(error):
            logger.error("%s", error, exc_info=error)
        error = unreadable
    expected = PilotError if private is None else ConfigError  # needs no traceback
    logger.error("%s", error, exc_info=None if isinstance(error, expected) else error)
    return Error(OWN_ERROR, PRIVATE_ERROR) if constant else encode_error(error, private)


def _query(content: RecordDict, config: PilotConfig, site: Site) -> RecordDict:
    """Report which client this node is, its version, and whether it holds stage-1 state."""
    server_round, trains, nonce = decode_query(content)
    check_readiness(site, config)
    if trains:
        site.check_budget(config.privacy)
    client = site.client
    examples = declared_examples(config, client, files=site.files)
    stage = site.private_store.stage(before=server_round)
    member = Member(client.id, client.task, examples, stage, site.lora_rank)
    proof = None
    if site.key_file is not None:
        key = client_key(site.key_file, create=site.key_file == site.default_key)
        logger.info("%s: this client's key is %s", client.id, fingerprint(public_key(key)))
        run = decode_run(content)
        proof = prove(key, statement(run, server_round, nonce, site.node_id, member))
    return encode_member(member, identity_of(config), proof)


def _run(content: RecordDict, config: PilotConfig, site: Site, allocate: Allocate) -> RecordDict:
    """Evaluate the incoming personalised model, then train it if the instruction says so."""
    from pilot_flwr.client.session import run_session  # imports torch

    instruction, addressee = decode_instruction(content)
    if addressee != site.client.id:
        raise UpdateError(
            f"The instruction is for {addressee!r} but this client is {site.client.id!r}."
        )
    number = instruction.server_round
    progress = functools.partial(logger.info, "%s, exchange %d: %s", site.client.id, number)
    result = run_session(site, config, instruction, progress=progress)
    return encode_result(result, instruction, site.client.id, site.client.task, allocate=allocate)


def _config(context: Context) -> PilotConfig:
    try:
        return _load(str(context.run_config["overrides"]))
    except ConfigError as error:  # often because of another version
        raise ConfigError(f"{error} (pilot-flwr {__version__} at this client)") from None


_load = functools.lru_cache(maxsize=1)(load_config)
