"""Text out: a batch answers as its prompts do one by one, and as the plain greedy loop does."""

import pytest
import torch
from conftest import CPU

from minilora import demo, generate, model
from minilora.data import ChatMarkup, Turn
from minilora.errors import AdapterError, DataError
from minilora.generate import Sampling, Speaker, answer

PROMPTS = [
    "你是谁？",
    "Who made you?",
    "Give the opposite.\npush",
    "猫是什么？",
    "How do you say heart in Chinese?",
    "“大”的反义词是什么？",
    "你叫什么？",
    "1",
]
GREEDY = Sampling(max_new_tokens=24)


@pytest.fixture(scope="module")
def speaker(request):
    """The demo model in fp32; where it is being built anew (or has not been), a test of it cannot run."""
    if not (demo.DEMO_DIR / "model.safetensors").exists():
        pytest.skip("the demo model is not there: python -m minilora.demo.build")
    return generate.load_speaker(
        str(demo.DEMO_DIR), None, dtype="float32", device="cpu", system_prompt="你是一个AI助手"
    )


@pytest.fixture
def tiny(tiny_folder, load_tiny):
    tokenizer = model.load_tokenizer(tiny_folder)
    return Speaker(load_tiny(), tokenizer, ChatMarkup(tokenizer), "")


def asked(prompts):
    return [[Turn("user", prompt)] for prompt in prompts]


@torch.no_grad()
def plain_greedy(speaker, prompt, limit):
    """The definition: the whole sequence anew for each token, no cache, no padding, until <|im_end|>."""
    ids = speaker.markup.prompt_ids([Turn("user", prompt)], speaker.system_prompt)
    new = []
    while len(new) < limit:
        token = int(speaker.model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token in (speaker.markup.end, speaker.tokenizer.pad_token_id):
            return new, True
        new.append(token)
    return new, False


def test_a_batch_answers_as_one_by_one(speaker):
    lengths = {len(speaker.markup.prompt_ids(turns, speaker.system_prompt)) for turns in asked(PROMPTS)}
    assert len(lengths) > 3  # so that there is padding
    together = answer(speaker, asked(PROMPTS), GREEDY)
    assert together == [answer(speaker, [turns], GREEDY)[0] for turns in asked(PROMPTS)]
    assert len(set(together)) > 4


def test_answers_are_those_of_the_plain_greedy_loop_and_stop_at_the_end_token(speaker):
    texts, ended = [], []
    for prompt in PROMPTS:
        tokens, stopped = plain_greedy(speaker, prompt, GREEDY.max_new_tokens)
        texts.append(speaker.tokenizer.decode(tokens).strip())
        ended.append(stopped)
    found = answer(speaker, asked(PROMPTS), GREEDY)
    assert found == texts
    assert any(ended)
    assert not any("<|" in text for text in found)


def test_random_weights_too(tiny):
    """Without trained habits: the tiny model's answers run to the limit, padding would change them at once."""
    sampling = Sampling(max_new_tokens=8)
    expected = [tiny.tokenizer.decode(plain_greedy(tiny, prompt, 8)[0]).strip() for prompt in PROMPTS]
    assert answer(tiny, asked(PROMPTS), sampling) == expected


def test_generation_stops_at_the_end_token_and_drops_it(tiny, monkeypatch):
    """A model made to say <|im_end|> fourth, whatever it is asked."""
    original, calls = tiny.model.forward, [0]

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        calls[0] += 1
        output.logits[..., tiny.markup.end] = 1e4 if calls[0] >= 4 else -1e4
        output.logits[..., tiny.tokenizer.pad_token_id] = -1e4
        return output

    monkeypatch.setattr(tiny.model, "forward", forward)
    texts = answer(tiny, asked(PROMPTS[:3]), Sampling(max_new_tokens=50))
    assert calls[0] == 4
    assert not any("<|" in text for text in texts)


def test_what_streams_is_the_answer(speaker):
    pieces = []
    (text,) = answer(speaker, asked(PROMPTS[:1]), GREEDY, on_text=pieces.append)
    assert "".join(pieces).strip() == text
    assert len(pieces) > 1


@pytest.mark.parametrize("over", [0, 1])
def test_a_prompt_that_is_too_long_is_a_clear_error(tiny, over):
    limit = tiny.model.config.max_position_embeddings
    prompt = "river " * 300
    length = len(tiny.markup.prompt_ids([Turn("user", prompt)], ""))
    sampling = Sampling(max_new_tokens=limit - length + over)
    assert 0 < sampling.max_new_tokens < limit
    if over:
        with pytest.raises(DataError) as error:
            answer(tiny, asked([prompt]), sampling)
        assert f"the prompt has {length:,} tokens" in str(error.value)
        assert f"{limit - sampling.max_new_tokens:,}" in str(error.value)
    else:
        assert len(answer(tiny, asked([prompt]), sampling)) == 1  # the longest that fits does


def test_sampling_with_one_choice_is_greedy_and_depends_on_the_seed_otherwise(tiny):
    greedy = answer(tiny, asked(PROMPTS[:2]), Sampling(max_new_tokens=6))
    assert answer(tiny, asked(PROMPTS[:2]), Sampling(max_new_tokens=6, temperature=0.7, top_k=1)) == greedy

    def sampled(seed):
        torch.manual_seed(seed)
        return answer(tiny, asked(PROMPTS[:2]), Sampling(max_new_tokens=6, temperature=1.5))

    assert sampled(1) == sampled(1)
    assert sampled(1) != sampled(2)


def test_probing_leaves_the_mode_as_it_was(tiny):
    ids = [5, 6, 7]
    for training in (True, False):
        tiny.model.train(training)
        logits = generate.probe_logits(tiny.model, ids)
        assert tiny.model.training is training
    assert logits.shape == (3, tiny.model.config.vocab_size)
    assert not logits.requires_grad


def test_a_speaker_without_a_model_is_refused():
    with pytest.raises(AdapterError, match="--model"):
        generate.load_speaker(None, None, device=str(CPU))
