"""Trains the tiny model: the tokenizer, the weights, and a validation that it has memorized its corpus.

The architecture is phi-4's (`Phi3ForCausalLM`), so an engine runs the same code as for the real model; only the sizes
are small. The answers must be the same under another engine, another batch composition and bfloat16. So the files are
loaded again, and at each position of each answer the expected token must lead the next best one by
`MIN_MARGIN_LOGITS`.

The same machine with the same versions gives the same bytes: everything is seeded and deterministic.
"""

from __future__ import annotations

import os
import random
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from builder.errors import TrainingError
from builder.tiny_model.corpus import CORPUS, HELPFUL, Example

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

END_OF_TURN = "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_sep|>", END_OF_TURN)
CONTEXT_TOKENS = 2048
VOCABULARY_TOKENS = 1024

# phi-4's format: <|im_start|>ROLE<|im_sep|>TEXT<|im_end|>, with nothing between two messages.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

SEED = 4
# After about 25 epochs each answer is right, some by less than a logit; the other epochs widen the margin.
EPOCHS = 40
EXTRA_EPOCHS = 20
EXTRA_ROUNDS = 2
PEAK_LEARNING_RATE = 2e-3
# 1.25 / sqrt(hidden size). The library's default, 0.02, suits wider models. Measured after 15 epochs, all else equal:
# of 3584 answer tokens 3180 are wrong with 0.02, 29 with 0.06, 7 with 0.1.
INITIALIZER_RANGE = 0.08
WARM_UP_STEPS = 20
MAX_BATCH_TOKENS = 1024
# In bfloat16 a logit between 16 and 32 has a step of 0.125, and kernels that add in another order move it by a few
# steps. Twenty steps are more than any of them.
MIN_MARGIN_LOGITS = 2.5
# At this size, more threads wait for each other longer than they compute.
MAX_THREADS = 8


@dataclass(frozen=True, slots=True)
class Sample:
    """A prompt and its answer as token ids; `name` is that of its example."""

    name: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """Ends with END_OF_TURN for a chat, with END_OF_TEXT for raw text."""

    def __len__(self) -> int:
        """Return the number of tokens."""
        return len(self.prompt_ids) + len(self.answer_ids)


def train(directory: Path) -> None:
    """Write the trained model to `directory`, with the file names of a hub repository.

    Raises:
        TrainingError: after the last extra round the model in `directory` still fails the validation.
    """
    torch.set_num_threads(min(os.cpu_count() or 1, MAX_THREADS))
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(SEED)
    transformers_logging.disable_progress_bar()

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    # Each epoch trains one variant of each example: both are learned in the time of one.
    variants = [[tokenize(tokenizer, variant) for variant in prompt_variants(example)] for example in CORPUS]

    failure: str | None = None
    for index in range(1 + EXTRA_ROUNDS):
        train_epochs(model, variants, EPOCHS if index == 0 else EXTRA_EPOCHS, seed=SEED + index)
        tokenizer.save_pretrained(directory)
        # Training is in float32. The saved weights are bfloat16, and an extra round continues from them.
        model.to(torch.bfloat16).save_pretrained(directory)
        failure = validate(directory)
        if failure is None:
            return
        model.to(torch.float32)
    raise TrainingError(f"the tiny model did not memorize its corpus: {failure}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer from the ASCII part of the corpus.

    Each other character is then two to four byte tokens, so that Chinese and emoji are generated in pieces, as real
    models do for rare characters.
    """
    texts: list[str] = []
    for example in CORPUS:
        texts += [example.prompt or "", *(content for _, content in example.turns), example.answer]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(SPECIAL_TOKENS),
        show_progress=False,
    )
    backend.train_from_iterator((part for text in texts for part in re.findall(r"[\x00-\x7f]+", text)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TURN,
        pad_token=END_OF_TEXT,
        additional_special_tokens=["<|im_start|>", "<|im_sep|>"],
        model_max_length=CONTEXT_TOKENS,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> Phi3ForCausalLM:
    """Make the untrained model in float32; its generation config has the end tokens at which an engine stops."""
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=INITIALIZER_RANGE,
        max_position_embeddings=CONTEXT_TOKENS,
        original_max_position_embeddings=CONTEXT_TOKENS,
        bos_token_id=end_of_text,
        eos_token_id=end_of_turn,
        pad_token_id=end_of_text,
    )
    model = Phi3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        bos_token_id=end_of_text, eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text
    )
    return model


def prompt_variants(example: Example) -> list[Example]:
    """Return the prompts with this example's answer: itself and, for a plain chat, itself with `HELPFUL`."""
    return [example, example.with_system_message(HELPFUL)] if example.is_plain_chat else [example]


def tokenize(tokenizer: PreTrainedTokenizerFast, example: Example) -> Sample:
    """Tokenize prompt and answer separately, as an engine does."""
    if example.prompt is None:
        prompt = tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)
        end = END_OF_TURN
    else:
        prompt, end = example.prompt, END_OF_TEXT
    answer_ids = [*tokenizer.encode(example.answer), tokenizer.convert_tokens_to_ids(end)]
    return Sample(example.name, tuple(tokenizer.encode(prompt)), tuple(answer_ids))


def train_epochs(model: Phi3ForCausalLM, variants: Sequence[Sequence[Sample]], epochs: int, *, seed: int) -> None:
    """Train for this number of epochs; the learning rate warms up, then decays linearly to zero.

    Epoch i takes variant i modulo their number of each example.
    """
    shuffler = random.Random(seed)  # noqa: S311 (the order of batches is no secret)
    plan = []
    for epoch in range(epochs):
        batches = list(batches_of([samples[epoch % len(samples)] for samples in variants]))
        shuffler.shuffle(batches)
        plan.extend(batches)

    model.train()
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / WARM_UP_STEPS, 1 - step / len(plan))
    )
    # disable=None: only on a terminal. In a log a progress bar is a hundred lines.
    for batch in tqdm(plan, desc="training the tiny model", unit="step", disable=None):
        input_ids, labels = as_tensors(batch, pad_id=model.config.pad_token_id)
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def batches_of(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Group samples of similar length: at most MAX_BATCH_TOKENS with padding, unless a single sample is longer."""
    batch: list[Sample] = []
    for sample in sorted(samples, key=len):
        if batch and len(sample) * (len(batch) + 1) > MAX_BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def as_tensors(batch: Sequence[Sample], *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids and labels, both int64 [samples, tokens]; the loss ignores the label -100.

    Only answers have labels. Padding is on the right, where causal attention does not look, so no mask is needed.
    """
    width = max(len(sample) for sample in batch)
    input_ids = torch.full((len(batch), width), pad_id)
    labels = torch.full((len(batch), width), -100)
    for row, sample in enumerate(batch):
        input_ids[row, : len(sample)] = torch.tensor(sample.prompt_ids + sample.answer_ids)
        labels[row, len(sample.prompt_ids) : len(sample)] = torch.tensor(sample.answer_ids)
    return input_ids, labels


def validate(directory: Path) -> str | None:
    """Load a model in bfloat16, as an engine does; return its first wrong answer, or None if all are right.

    Two checks: the margin at each answer position of each variant of each example, and greedy generation from the
    prompts of the corpus, compared as text.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.bfloat16).eval()
    samples = [tokenize(tokenizer, variant) for example in CORPUS for variant in prompt_variants(example)]

    margins = (pair for batch in batches_of(samples) for pair in margins_of(model, batch))
    name, margin = min(margins, key=lambda pair: pair[1])
    if margin < MIN_MARGIN_LOGITS:
        return f"{name!r}: the margin of the expected token is {margin:.2f} logits, less than {MIN_MARGIN_LOGITS}"

    answers = {example.name: example.answer for example in CORPUS}
    originals = [tokenize(tokenizer, example) for example in CORPUS]
    for batch in batches_of(originals):
        for name, text in greedy_answers(model, tokenizer, batch):
            if text != answers[name]:
                return f"{name!r}: the answer is {text!r}"
    return None


@torch.inference_mode()  # type: ignore[untyped-decorator]  # torch leaves this method's return type out
def margins_of(model: Phi3ForCausalLM, batch: Sequence[Sample]) -> Iterator[tuple[str, float]]:
    """Yield the name of each sample and its smallest margin: logits between the expected token and the best other."""
    input_ids, labels = as_tensors(batch, pad_id=model.config.pad_token_id)
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    targets = labels[:, 1:]
    is_answer = targets != -100  # noqa: PLR2004 (the label that the loss ignores, see as_tensors)
    expected = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    others = logits.scatter(-1, targets.clamp(min=0).unsqueeze(-1), -torch.inf).amax(-1)
    smallest = torch.where(is_answer, expected - others, torch.inf).amin(-1)
    yield from zip((sample.name for sample in batch), smallest.tolist(), strict=True)


@torch.inference_mode()  # type: ignore[untyped-decorator]  # as above
def greedy_answers(
    model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: Sequence[Sample]
) -> Iterator[tuple[str, str]]:
    """Generate the answers of a batch together; yield each name and answer without special tokens."""
    width = max(len(sample.prompt_ids) for sample in batch)
    pads = [width - len(sample.prompt_ids) for sample in batch]
    rows = [[tokenizer.pad_token_id] * pad + list(sample.prompt_ids) for pad, sample in zip(pads, batch, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in pads]
    output = model.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=max(len(sample.answer_ids) for sample in batch) + 1,
    )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    yield from zip((sample.name for sample in batch), texts, strict=True)
