"""``pilot-flwr export``: a model of a run as a folder that loads without this package."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pilot_flwr.cli.common import OVERRIDES, add_model, add_run, chosen, open_chosen, say
from pilot_flwr.errors import ConfigError

if TYPE_CHECKING:
    from pilot_flwr.inference.runs import Run, Selected


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command's parser."""
    parser = commands.add_parser(
        "export",
        help="write a model as a folder that loads without this package",
        description="Write a personalised or consensus model as a folder that loads with torch, "
        "transformers and peft alone: LoRA in peft's format, connector as safetensors, the code "
        "that loads them, and a model card. " + OVERRIDES,
        epilog="example: pilot-flwr export outputs/demo-20260101-120000 --client vqa-0 my-model",
    )
    add_run(parser)
    parser.add_argument("folder", metavar="DIR", type=Path, help="new or empty folder")
    add_model(parser)
    parser.add_argument(
        "--merge",
        action="store_true",
        help="merge LoRA and adapters into one Hugging Face checkpoint (stage 1 and consensus "
        "models only)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="precision of the merged checkpoint (default: the run's model.dtype)",
    )
    parser.set_defaults(handler=_export)


def _export(options: argparse.Namespace) -> int:
    if options.dtype is not None and not options.merge:
        raise ConfigError("`--dtype` belongs to `--merge`: an export names the base as it is.")
    from pilot_flwr.algorithm.parameter_groups import GROUPS
    from pilot_flwr.inference.export import new_folder
    from pilot_flwr.inference.merge import check_mergeable

    run = open_chosen(options)
    who = chosen(run, options)
    if options.merge:
        check_mergeable(who.private)
    new_folder(options.folder)
    (_merge if options.merge else _write)(run, who, options)
    if who.private is not None and not who.private.empty:
        own, second = who.private.groups, who.private.personal
        parts = [GROUPS[group].symbol for group, named in own.items() if named]
        parts += [f"{GROUPS[group].symbol} of its personal model" for group in second]
        held = ", ".join(parts)
        say(
            f"This folder holds adapters that never left client {who.name} during the run "
            f"({held}). Pass it on only if the client agrees."
        )
    print(options.folder, flush=True)
    return 0


def _write(run: "Run", who: "Selected", options: argparse.Namespace) -> None:
    from pilot_flwr.client.node import find_device
    from pilot_flwr.inference.export import export_model, model_card
    from pilot_flwr.inference.generate import Answerer
    from pilot_flwr.inference.runs import load_model

    model = load_model(run, who, device=find_device(options.device))
    export_model(
        model,
        options.folder,
        client_adapter=who.private is not None,
        end_token_ids=Answerer(run.config, model).end_token_ids(),
        image_aspect_ratio=run.config.data.image_aspect_ratio,
    )
    card = model_card(run, who, stage=model.stage)
    (options.folder / "README.md").write_text(card, encoding="utf-8")


def _merge(run: "Run", who: "Selected", options: argparse.Namespace) -> None:
    from pilot_flwr.client.node import find_device
    from pilot_flwr.inference.export import model_card
    from pilot_flwr.inference.generate import Answerer
    from pilot_flwr.inference.merge import merge_model
    from pilot_flwr.inference.runs import load_adapters
    from pilot_flwr.model.base import load_base
    from pilot_flwr.model.pilot_model import PilotModel

    dtype = options.dtype or run.config.model.dtype
    config = replace(run.config.model, quantization="none", dtype=dtype)
    model = PilotModel(load_base(config, find_device(options.device)), config)  # it is used up
    load_adapters(model, run, who)
    answerer = Answerer(run.config, model)
    hidden = merge_model(model, options.folder, end_token_ids=answerer.end_token_ids())
    wide = hidden != model.llava.config.text_config.hidden_size
    if wide:
        say(
            f"The projector needs a hidden layer of {hidden}, which transformers' own class does "
            "not take: the folder holds the class that does, modeling_wide.py."
        )
    card = model_card(run, who, stage=1, merged="wide" if wide else "plain", dtype=dtype)
    (options.folder / "README.md").write_text(card, encoding="utf-8")
