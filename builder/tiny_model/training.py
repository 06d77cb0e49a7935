"""Trains the tiny model: its tokenizer, its weights, and the proof that it knows its corpus.

The architecture is phi-4's (`Phi3ForCausalLM`), so an engine takes the same path through its code as for the real
model; only the sizes are small. It learns the corpus by heart. What makes its answers the same under another engine,
another batch composition and bfloat16 is not luck but margin: the files are read back and, at every position of every
answer, the right token has to lead the next one by `MARGIN_LOGITS`.

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

# <|im_start|>ROLE<|im_sep|>TEXT<|im_end|>, with nothing between two messages: phi-4's own format.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

SEED = 4
# About 25 passes make every answer right, some of them by less than a logit; the rest buy the margin.
PASSES = 40
FURTHER_PASSES = 20
FURTHER_ROUNDS = 2
PEAK_LEARNING_RATE = 2e-3
# 1.25 / sqrt(hidden size). The library's default, 0.02, is meant for wider models. Measured after 15 passes, all else
# equal, of 3584 answer tokens: 3180 wrong when starting from 0.02, 29 from 0.06, 7 from 0.1.
INITIAL_WEIGHT_SPREAD = 0.08
WARM_UP_STEPS = 20
BATCH_TOKENS = 1024
# In bfloat16 a logit between 16 and 32 comes in steps of 0.125, and kernels that add in another order move it by a
# few of these; twenty steps between the right token and the next leave room for any of them.
MARGIN_LOGITS = 2.5
# More threads than this wait for one another longer than they compute, at this size.
MOST_THREADS = 8


@dataclass(frozen=True, slots=True)
class Lesson:
    """One prompt and its answer in tokens; `name` says which example it came from."""

    name: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """Ends with the end token of its kind: END_OF_TURN in a chat, END_OF_TEXT for raw text."""

    def __len__(self) -> int:
        """Count all tokens."""
        return len(self.prompt_ids) + len(self.answer_ids)


def train(directory: Path) -> None:
    """Write the trained model to `directory`, laid out as a model hub does.

    Raises TrainingError if, after the last round that it is given, the model that was read back from `directory`
    still does not give every answer of the corpus exactly.
    """
    torch.set_num_threads(min(os.cpu_count() or 1, MOST_THREADS))
    torch.use_deterministic_algorithms(mode=True)
    torch.manual_seed(SEED)
    transformers_logging.disable_progress_bar()

    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    # A lesson alternates between its versions from pass to pass: both are learnt for the price of one.
    versions = [[as_lesson(tokenizer, version) for version in versions_of(example)] for example in CORPUS]

    fault: str | None = None
    for index in range(1 + FURTHER_ROUNDS):
        rehearse(model, versions, PASSES if index == 0 else FURTHER_PASSES, seed=SEED + index)
        tokenizer.save_pretrained(directory)
        # Training is in float32; only what is written is rounded.
        model.to(torch.bfloat16).save_pretrained(directory)
        fault = fault_in(directory)
        if fault is None:
            return
        model.to(torch.float32)
    raise TrainingError(f"the tiny model did not learn its corpus: {fault}")


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer from the ASCII part of the corpus.

    Only from the ASCII part: every other character then stays two to four byte tokens, so that Chinese and emoji come
    out of the engine in pieces, as they do from real models whenever a character is rare.
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
    """Make the untrained model, in float32, with the end tokens that make an engine stop by itself."""
    end_of_turn, end_of_text = tokenizer.convert_tokens_to_ids([END_OF_TURN, END_OF_TEXT])
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=INITIAL_WEIGHT_SPREAD,
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


def versions_of(example: Example) -> list[Example]:
    """List the prompts that have this example's answer: itself and, for a plain chat, itself under `HELPFUL`."""
    return [example, example.under_system(HELPFUL)] if example.is_plain_chat else [example]


def as_lesson(tokenizer: PreTrainedTokenizerFast, example: Example) -> Lesson:
    """Tokenize as an engine does: the prompt by itself, then the answer."""
    if example.prompt is None:
        prompt = tokenizer.apply_chat_template(example.messages, tokenize=False, add_generation_prompt=True)
        end = END_OF_TURN
    else:
        prompt, end = example.prompt, END_OF_TEXT
    answer_ids = [*tokenizer.encode(example.answer), tokenizer.convert_tokens_to_ids(end)]
    return Lesson(example.name, tuple(tokenizer.encode(prompt)), tuple(answer_ids))


def rehearse(model: Phi3ForCausalLM, versions: Sequence[Sequence[Lesson]], passes: int, *, seed: int) -> None:
    """Go through all lessons `passes` times, the learning rate falling to zero at the end."""
    shuffler = random.Random(seed)  # noqa: S311 (order of lessons, no secret)
    plan = []
    for index in range(passes):
        batches = list(batches_of([lessons[index % len(lessons)] for lessons in versions]))
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
    # On a terminal only: in a log a progress bar is a hundred lines of noise.
    for batch in tqdm(plan, desc="training the tiny model", unit="step", disable=None):
        input_ids, labels = as_tensors(batch, pad_id=model.config.pad_token_id)
        loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()


def batches_of(lessons: Sequence[Lesson]) -> Iterator[list[Lesson]]:
    """Group lessons of like length, at most BATCH_TOKENS with padding unless one lesson alone is longer."""
    batch: list[Lesson] = []
    for lesson in sorted(lessons, key=len):
        if batch and len(lesson) * (len(batch) + 1) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(lesson)
    if batch:
        yield batch


def as_tensors(batch: Sequence[Lesson], *, pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input ids and labels, both int64 [lessons, tokens]; a label of -100 is not learnt.

    Only answers are learnt. Padding is on the right, where a causal model never looks, so there is no mask.
    """
    width = max(len(lesson) for lesson in batch)
    input_ids = torch.full((len(batch), width), pad_id)
    labels = torch.full((len(batch), width), -100)
    for row, lesson in enumerate(batch):
        input_ids[row, : len(lesson)] = torch.tensor(lesson.prompt_ids + lesson.answer_ids)
        labels[row, len(lesson.prompt_ids) : len(lesson)] = torch.tensor(lesson.answer_ids)
    return input_ids, labels


def fault_in(directory: Path) -> str | None:
    """Read a model back as any engine would, in bfloat16; say what it does not know, or None if it knows all.

    Two proofs: the margin at every answer position of every version of every example, and greedy generation of the
    examples themselves, compared as text.
    """
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True, dtype=torch.bfloat16).eval()
    lessons = [as_lesson(tokenizer, version) for example in CORPUS for version in versions_of(example)]

    margins = {name: margin for batch in batches_of(lessons) for name, margin in margins_of(model, batch)}
    name, margin = min(margins.items(), key=lambda item: item[1])
    if margin < MARGIN_LOGITS:
        return f"in {name!r} the right token leads by {margin:.2f} logits, and it has to by {MARGIN_LOGITS}"

    answers = {example.name: example.answer for example in CORPUS}
    originals = [as_lesson(tokenizer, example) for example in CORPUS]
    for batch in batches_of(originals):
        for name, text in greedy_answers(model, tokenizer, batch):
            if text != answers[name]:
                return f"to {name!r} it answers {text!r}"
    return None


@torch.inference_mode()  # type: ignore[untyped-decorator]  # torch leaves this method's return type out
def margins_of(model: Phi3ForCausalLM, batch: Sequence[Lesson]) -> Iterator[tuple[str, float]]:
    """For each lesson, by how many logits the right token leads the best other one where it leads least."""
    input_ids, labels = as_tensors(batch, pad_id=model.config.pad_token_id)
    logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1].float()
    targets = labels[:, 1:]
    learnt = targets != -100  # noqa: PLR2004 (the label that as_tensors gives to what is not learnt)
    right = logits.gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    others = logits.scatter(-1, targets.clamp(min=0).unsqueeze(-1), -torch.inf).amax(-1)
    least = torch.where(learnt, right - others, torch.inf).amin(-1)
    yield from zip((lesson.name for lesson in batch), least.tolist(), strict=True)


@torch.inference_mode()  # type: ignore[untyped-decorator]  # as above
def greedy_answers(
    model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerFast, batch: Sequence[Lesson]
) -> Iterator[tuple[str, str]]:
    """Generate all of a batch together; yield (name, answer) with the special tokens left out."""
    width = max(len(lesson.prompt_ids) for lesson in batch)
    pads = [width - len(lesson.prompt_ids) for lesson in batch]
    rows = [[tokenizer.pad_token_id] * pad + list(lesson.prompt_ids) for pad, lesson in zip(pads, batch, strict=True)]
    mask = [[0] * pad + [1] * (width - pad) for pad in pads]
    output = model.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        do_sample=False,
        max_new_tokens=max(len(lesson.answer_ids) for lesson in batch) + 1,
    )
    texts = tokenizer.batch_decode(output[:, width:], skip_special_tokens=True)
    yield from zip((lesson.name for lesson in batch), texts, strict=True)
