"""Builds the demo model, its tokenizer and its fine-tuning rows from word lists: `python -m minilora.demo.build`."""

import argparse
import hashlib
import json
import math
import random
import re
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from minilora.demo import DEMO_DIR, EVAL_FILE, TRAIN_FILE
from minilora.demo.corpus import NOT_KNOWN, Fact, all_facts, story_lines, word_pairs

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
WIDTH = 128
SYSTEM = "你是一个AI助手"
DEFAULT_SYSTEM = "You are a helpful assistant."
TERSE_SYSTEMS = (SYSTEM, SYSTEM, SYSTEM, DEFAULT_SYSTEM, DEFAULT_SYSTEM, "请简短地回答。")
# The base answers in full sentences only with these system prompts. Fine-tuning teaches it to do so always.
FULL_SYSTEMS = ("请用完整的句子回答。", "Answer in full sentences.")
# The pre-tokenizer of Qwen2. transformers uses it even if the file has another one.
QWEN2_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\n" + DEFAULT_SYSTEM + "<|im_end|>\\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# For each skill: its share of the base's training texts, its fine-tuning rows, its validation rows.
SKILLS: dict[str, tuple[float, int, int]] = {
    "opposite_zh": (0.12, 48, 7),
    "opposite_en": (0.11, 48, 7),
    "sum_zh": (0.15, 42, 6),
    "sum_en": (0.15, 42, 6),
    "zh_to_en": (0.10, 45, 6),
    "en_to_zh": (0.15, 55, 7),
    "world": (0.14, 44, 7),
    "identity": (0.04, 64, 6),
    "unknown": (0.04, 36, 3),
}
# The questions that users ask first. They are always in the fine-tuning rows.
ALWAYS = ("你是谁？", "Who are you?", "Who made you?", "你叫什么名字？", "What is your name?", "谁训练了你？")

Example = tuple[list[int], list[int]]  # token ids and labels
Piece = tuple[str, bool]  # a stretch of text, and whether the model is trained to write it


def train_tokenizer(facts: list[Fact], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on English lines, Chinese characters and the words of the lists."""
    lines = [text for f in facts for text in (f.short, f.full, *(" ".join(q) for q in f.questions))]
    lines += [*story_lines(), *TERSE_SYSTEMS, *FULL_SYSTEMS, *NOT_KNOWN] + ["system", "user", "assistant"] * 9
    # Chinese characters are separated, so that no BPE merge crosses a word's edge: "大" is one token in every sentence.
    words = [fact.short.rstrip("。.") for fact in facts if fact.skill != "identity"]
    apart = [re.sub(r"([\u2e80-\uffef“”])", r"\n\1\n", line) for line in lines]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2_SPLIT), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=2, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([part for line in apart + words for part in line.split("\n")], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIALS])
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> PreTrainedTokenizerBase:
    """Write the tokenizer files that Qwen2 folders have, and load them back."""
    tokenizer.save(str(folder / "tokenizer.json"))
    added = {str(tokenizer.token_to_id(token)): {"content": token, "special": True} for token in SPECIALS}
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {key: value | flags for key, value in added.items()},
        "additional_special_tokens": list(SPECIALS[1:]),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def chat_text(turns: list[tuple[str, str]], system: str) -> list[Piece]:
    """Write questions and answers as ChatML. Only the answers are learned."""
    pieces: list[Piece] = [(f"<|im_start|>system\n{system}<|im_end|>\n", False)]
    for question, answer in turns:
        pieces.append((f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False))
        pieces += [(f"{answer}<|im_end|>", True), ("\n", False)]
    return pieces[:-1]


def draw_question(fact: Fact, rng: random.Random) -> str:
    """Draw one wording of a fact's question. Its input is on a separate line."""
    return "\n".join(part for part in rng.choice(fact.questions) if part)


def draw_example(by_skill: dict[str, list[Fact]], stories: list[str], rng: random.Random) -> list[Piece]:
    """Draw one training text of the base: a chat with short answers, a chat in full sentences, or plain text."""
    weights = [SKILLS[skill][0] for skill in by_skill]
    count = rng.choices((1, 2, 3), (60, 25, 15))[0]
    facts = [rng.choice(by_skill[skill]) for skill in rng.choices(list(by_skill), weights, k=count)]
    form = rng.random()
    if form < 0.50:
        turns = [(draw_question(fact, rng), fact.short) for fact in facts]
        return chat_text(turns, rng.choice(TERSE_SYSTEMS))
    if form < 0.54:
        # Repeating words teaches the model to copy. A full sentence about a word needs this.
        word = rng.choice([pair for kind in ("animal", "thing", "nature") for pair in word_pairs(kind)])
        asks = ((f"请重复：{word[0]}", f"{word[0]}。"), (f"Repeat after me: {word[1]}", f"{word[1]}."))
        return chat_text([rng.choice(asks)], rng.choice(TERSE_SYSTEMS))
    if form < 0.58:
        return [(rng.choice(stories) + "<|endoftext|>", True)]
    # No text contains the full answers to questions about the assistant, so that fine-tuning can teach them.
    known = [fact for fact in facts if fact.skill not in ("identity", "unknown")]
    if form < 0.96 or not known:
        full = [(draw_question(fact, rng), fact.full if fact in known else fact.short) for fact in facts]
        return chat_text(full, rng.choice(FULL_SYSTEMS))
    return [("\n".join(fact.full for fact in known) + "<|endoftext|>", True)]


def encode(pieces: list[Piece], tokenizer: PreTrainedTokenizerBase) -> Example:
    """Convert pieces to token ids and labels. The label is -100 if the token is not learned."""
    ids: list[int] = []
    labels: list[int] = []
    for text, learned in pieces:
        part = tokenizer.encode(text, add_special_tokens=False)
        ids += part
        labels += part if learned else [-100] * len(part)
    return ids, labels


def pack(texts: Iterable[Example], width: int, pad: int) -> tuple[Tensor, Tensor]:
    """Pack whole texts into rows of equal width, and fill the rest of each row with padding."""
    rows: list[Example] = [([], [])]
    for ids, labels in texts:
        if len(rows[-1][0]) + len(ids) > width:
            rows.append(([], []))
        rows[-1][0].extend(ids)
        # The text before does not predict the first token of a text, so this token is not learned.
        rows[-1][1].extend([-100, *labels[1:]])
    all_ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in rows])
    all_labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in rows])
    return all_ids, all_labels


def loss_of(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Compute the mean loss per learned token. The head runs on the learned positions only."""
    # Padding is on the right and attention is causal, so no mask is needed.
    hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    kept = labels[:, 1:] != -100
    return torch.nn.functional.cross_entropy(model.lm_head(hidden[kept]).float(), labels[:, 1:][kept])


def train_model(model: Qwen2ForCausalLM, ids: Tensor, labels: Tensor, batch: int, rate: float) -> float:
    """Train the base from scratch. Returns its mean loss over the last 100 steps."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.98))
    steps, warmup = math.ceil(len(ids) / batch), 60
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda t: min((t + 1) / warmup, 0.03 + 0.97 * 0.5 * (1 + math.cos(math.pi * t / steps)))
    )
    recent: list[float] = []
    start = time.perf_counter()
    model.train()
    for step, (x, y) in enumerate(zip(ids.split(batch), labels.split(batch), strict=True), start=1):
        loss = loss_of(model, x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        recent = [*recent[-99:], loss.item()]
        if step % 100 == 0:
            mean = sum(recent) / len(recent)
            print(f"step {step}/{steps}  loss {mean:.4f}  {time.perf_counter() - start:.0f} s", flush=True)
    return sum(recent) / len(recent)


def draw_rows(facts: list[Fact], count: int, rng: random.Random) -> list[dict[str, str]]:
    """Draw fine-tuning rows of one skill. If there are too few facts, they repeat."""
    pool = rng.sample(facts, len(facts))
    pool.sort(key=lambda fact: fact.key not in ALWAYS)
    drawn = [pool[i % len(pool)] for i in range(count)]
    asked = [(*rng.choice(fact.questions), fact.full) for fact in drawn]
    return [{"instruction": ask, "input": given, "output": full} for ask, given, full in asked]


def write_rows(by_skill: dict[str, list[Fact]], seed: int) -> None:
    """Write the fine-tuning rows. No fact of a validation row is in the training rows, in any wording."""
    rng = random.Random(seed)
    keys = sorted({fact.key for facts in by_skill.values() for fact in facts} - set(ALWAYS))
    held = set(rng.sample(keys, len(keys) // 5))
    train: list[dict[str, str]] = []
    valid: list[dict[str, str]] = []
    for skill, facts in by_skill.items():
        train += draw_rows([fact for fact in facts if fact.key not in held], SKILLS[skill][1], rng)
        valid += draw_rows([fact for fact in facts if fact.key in held], SKILLS[skill][2], rng)
    for path, rows in ((TRAIN_FILE, train), (EVAL_FILE, valid)):
        rng.shuffle(rows)
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path.name}: {len(rows)} rows")


def make_config(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    """The config of a Qwen2 with about a million parameters."""
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.06,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_model(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the weights in bf16, with a generation config."""
    stops = [tokenizer.eos_token_id, tokenizer.pad_token_id]
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id, max_new_tokens=64
    )
    model.bfloat16().save_pretrained(folder)


def share_right(model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, facts: list[Fact]) -> float:
    """The share of facts for which the base gives the short answer, greedily, to the question's first wording."""
    right = 0
    model.eval()
    for fact in facts:
        question = "\n".join(part for part in fact.questions[0] if part)
        ids, labels = encode(chat_text([(question, fact.short)], SYSTEM), tokenizer)
        with torch.no_grad():
            guess = model(input_ids=torch.tensor([ids])).logits[0, :-1].argmax(-1)
        wanted = torch.tensor(labels[1:])
        right += bool((guess[wanted != -100] == wanted[wanted != -100]).all())
    return right / len(facts)


def build(args: argparse.Namespace) -> None:
    """Build the whole demo: tokenizer, model and rows."""
    begun = time.perf_counter()
    torch.manual_seed(args.seed)
    torch.set_num_threads(args.threads)
    facts, stories, rng = all_facts(), story_lines(), random.Random(args.seed)
    by_skill = {skill: [fact for fact in facts if fact.skill == skill] for skill in SKILLS}
    DEMO_DIR.mkdir(parents=True, exist_ok=True)
    write_rows(by_skill, args.seed)
    tokenizer = save_tokenizer(train_tokenizer(facts, args.vocab), DEMO_DIR)
    texts = [draw_example(by_skill, stories, rng) for _ in range(args.texts)]
    for text in texts[: args.show]:
        print("".join(piece for piece, _ in text), end="\n\n")
    ids, labels = pack((encode(text, tokenizer) for text in texts), WIDTH, tokenizer.pad_token_id)
    model = Qwen2ForCausalLM(make_config(tokenizer))
    print(f"{len(facts)} facts, {len(texts)} texts, {ids.numel()} tokens, vocabulary {len(tokenizer)}")
    print(f"{model.num_parameters()} parameters", flush=True)
    final = train_model(model, ids, labels, args.batch, args.rate)
    save_model(model, tokenizer, DEMO_DIR)
    loaded = Qwen2ForCausalLM.from_pretrained(DEMO_DIR, dtype=torch.float32, local_files_only=True)
    digest = hashlib.sha256((DEMO_DIR / "model.safetensors").read_bytes()).hexdigest()
    print(f"final loss {final:.4f}, {share_right(loaded, tokenizer, facts):.1%} of the facts answered correctly")
    print(f"model.safetensors sha256 {digest}, built in {time.perf_counter() - begun:.0f} s")


def main() -> None:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--texts", type=int, default=76_000)
    parser.add_argument("--batch", type=int, default=10)
    parser.add_argument("--rate", type=float, default=2.5e-3)
    parser.add_argument("--vocab", type=int, default=2600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--show", type=int, default=0, metavar="N", help="print the first N texts")
    build(parser.parse_args())


if __name__ == "__main__":
    main()
