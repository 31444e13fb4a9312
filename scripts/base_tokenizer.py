"""The chat template and the tokenizer of the base models that this repository makes."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pilot_flwr.data.examples import IMAGE_MARKER

SPECIAL_TOKENS = ["<pad>", "<s>", "</s>", IMAGE_MARKER]

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- set parts = message['content'] -%}
{%- if parts is string -%}{%- set parts = [{'type': 'text', 'text': parts}] -%}{%- endif -%}
{%- if message['role'] == 'user' -%}{{ 'USER: ' }}
{%- elif message['role'] == 'assistant' -%}{{ 'ASSISTANT: ' }}
{%- elif message['role'] != 'system' -%}
{{ raise_exception("message role '" + message['role'] + "' is not system, user or assistant") }}
{%- endif -%}
{%- for part in parts if part['type'] == 'image' -%}{{ '<image>\\n' }}{%- endfor -%}
{%- for part in parts if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}
{{ '</s>' if message['role'] == 'assistant' else ' ' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ 'ASSISTANT:' }}{%- endif -%}
"""


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, min_frequency: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on texts."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", core.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<s>",  # nosec B106  # a text token, not a secret
        eos_token="</s>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE_MARKER},
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
