"""The model card of an exported model: where it comes from, how it scored, how to load it."""

from dataclasses import replace
from typing import Literal

import peft
import torch
import transformers

from pilot_flwr import __version__
from pilot_flwr.config import to_yaml
from pilot_flwr.metrics.table import METRICS
from pilot_flwr.results.runs import Personal, Run, last_scores
from pilot_flwr.settings.pilot import RunConfig

Merged = Literal["", "plain", "wide"]
"""How the model was merged: not at all, into transformers' own class, or into a wider one."""

_LOAD: dict[Merged, str] = {
    "": """In this folder, with torch, transformers and peft:

```python
from modeling_pilot import load
model, processor = load(".")
```

`load(folder, base)` takes the base model from another place than `connector.json` names; more
arguments go to its `from_pretrained` (`device_map`, `dtype`, `quantization_config`). Every key of
every file is checked. `lora/` is in peft's own format. The connector replaces the base's
projector, so neither part does what was trained without the other.""",
    "plain": """A plain Hugging Face checkpoint:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(".")
processor = AutoProcessor.from_pretrained(".")
```""",
    "wide": """The projector's hidden layer is twice as wide as transformers' own class takes
(it ties that width to `text_config.hidden_size`), so the class is in this folder, in
`modeling_wide.py`; read it before you trust it:

```python
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(".", trust_remote_code=True)
processor = AutoProcessor.from_pretrained(".")
```""",
}

_QUANTIZED = """The model was tuned on a base in 4 bit (NF4, double quantization, vision tower and
projector left out); `load` takes the base as it is stored. To have the base that it was tuned on,
give `load` the same `quantization_config`."""


def model_card(run: Run, who: Personal, *, stage: int, merged: Merged = "", dtype: str = "") -> str:
    """Return the card as Markdown.

    Parameters
    ----------
    run : Run
        Where the model comes from.
    who : Personal
        Whose model it is.
    stage : int
        Its architecture.
    merged : {"", "plain", "wide"}
        How it was merged.
    dtype : str
        Precision of a merged checkpoint.
    """
    base, recorded = run.config.model, replace(run.recorded, run=RunConfig())
    parts = [
        _front_matter(base.path),
        f"# {run.config.name}: {who.name}",
        _what(run, who, stage),
        *([f"Merged from the unquantised base, in {dtype}."] if merged else []),
        "## Load",
        _LOAD[merged],
        *([_QUANTIZED] if base.quantization != "none" and not merged else []),
        "## Prompts",
        _prompts(run, who),
        "## Scores in the run",
        _scores(run, who),
        "## Licence",
        f"The base model `{base.path}` has its own licence, which holds for what is made from it; "
        "so may the training data. The code in this folder is under Apache 2.0.",
        "## Versions",
        f"pilot-flwr {__version__}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__} at the time of this export.",
        "## The run's configuration",
        f"```yaml\n{to_yaml(recorded).strip()}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(base: str) -> str:
    lines = [f"base_model: {base}"] if base.count("/") == 1 and not base.startswith("/") else []
    tags = "tags: [federated-learning, pilot, llava]"
    return "\n".join(
        ["---", *lines, "library_name: transformers", "pipeline_tag: image-text-to-text", tags]
        + ["---"]
    )


def _what(run: Run, who: Personal, stage: int) -> str:
    exchange = run.checkpoint.server_round
    paper = (
        f"tuned by pilot-flwr (Pilot: Xiong et al., AAAI 2025, arXiv 2501.13985) with the method "
        f"`{run.recorded.strategy.name}`"
    )
    base = f"`{run.config.model.path}`"
    if who.private is None:
        return (
            f"{base}, {paper}: the consensus model of task `{who.task}` after exchange {exchange}. "
            "It has the task's averaged adapter and the mean LoRA of the task's clients, and "
            "nothing that is private to a client."
        )
    first = "stage 1 (ψ_t + ψ_s)" if run.config.model.client_adapter else "stage 1 (ψ_t)"
    architecture = first if stage == 1 else "stage 2 (CT-MoA)"
    warning = (
        " **It holds adapters that never left the client during the run; adapters can leak "
        "information about the data they were trained on.**"
    )
    return (
        f"{base}, {paper}: the personalised model of client `{who.name}`, task `{who.task}`, after "
        f"exchange {exchange}, in {architecture}." + ("" if who.private.empty else warning)
    )


def _prompts(run: Run, who: Personal) -> str:
    data, lines = run.config.data, ["The base model's own chat template."]
    if suffix := run.prompt_suffix(who.task):
        lines.append(f"Every question of the task ended with a line of its own: `{suffix}`.")
    if run.config.model.system_prompt:
        lines.append(
            f"Every conversation began with the system prompt `{run.config.model.system_prompt}`."
        )
    if data.image_aspect_ratio == "pad":
        lines.append("Images were padded to a square in the image processor's mean colour.")
    lines.append("The run's scores are of greedy answers (`do_sample=False`).")
    lines.append(
        "In a conversation of several turns, every answer was followed by the tokenizer's end "
        "token, also where the template leaves it out."
    )
    return " ".join(lines)


def _scores(run: Run, who: Personal) -> str:
    rows = [event for event in last_scores(run) if event["task"] == who.task]
    if who.client is not None:
        rows = [event for event in rows if event["client"] == who.client.id]
    if not rows:
        return "None were recorded."
    lines = ["| client | metric | test examples | score |", "|---|---|---|---|"]
    for event in rows:
        metric = METRICS[event["metric"]]
        title = metric.title + (" (approximate)" if metric.approximate() else "")
        lines.append(
            f"| {event['client']} | {title} | {event['examples']} | {event['score']:.3f} |"
        )
    text = "\n".join(lines)
    if who.private is None:
        text += "\n\nThese are of the clients' personalised models, not of this consensus model."
    return text
