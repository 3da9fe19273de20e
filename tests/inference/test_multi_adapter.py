"""Several adapters on one base: switched, disabled, compared; equal to each loaded alone. PEFT both ways."""

import gc
import io
import shutil
import sys

import pytest
import torch
from conftest import IDS, logits, save_random_adapter

from minilora import cli
from minilora.adapters import format as adapter_format
from minilora.config import TARGET_GROUPS
from minilora.data.formats import Turn
from minilora.errors import AdapterError
from minilora.inference import generate
from minilora.inference.multi_adapter import Adapters, named_folders
from minilora.lora import lora_layers
from minilora.models.fingerprint import fingerprint
from minilora.utils.device import memory_bytes

ATTENTION, MLP = TARGET_GROUPS["attn"], TARGET_GROUPS["mlp"]
KINDS = {  # (targets, rank, alpha, rslora): different in everything
    "attn": (ATTENTION, 4, 8, False),
    "mlp": (MLP, 2, 6, True),
    "few": (("q_proj", "down_proj"), 8, 8, False),
}


@pytest.fixture
def folders(load_tiny, tiny_folder, tmp_path):
    """An adapter of each kind, with a system prompt of its own, and the logits of base + adapter, loaded alone."""
    found = {}
    for seed, (name, (targets, rank, alpha, rslora)) in enumerate(KINDS.items()):
        folder = tmp_path / name / "adapter"
        folder.parent.mkdir()
        settings = {"prompt": f"You are {name}.", "seed": seed, "std": 0.2, "rslora": rslora}
        save_random_adapter(load_tiny(), folder, tiny_folder, targets, rank, alpha, **settings)
        alone = load_tiny()
        adapter_format.load(alone, folder, fingerprint(alone))
        found[name] = (folder, logits(alone))
    return found


@pytest.fixture
def several(folders, load_tiny):
    adapters = Adapters(load_tiny())
    for name, (folder, _) in folders.items():
        adapters.load(name, folder)
    return adapters


def test_each_answers_as_if_it_were_loaded_alone(folders, several, load_tiny):
    """Of different ranks, scales and targets: what one changes and the other does not is disabled."""
    base = logits(load_tiny())
    assert several.names == list(KINDS)
    assert several.active == "few"  # the last one loaded
    for name in ("attn", "few", "mlp", "attn"):
        several.use(name)
        assert torch.equal(logits(several.model), folders[name][1])
        assert (folders[name][1] - base).abs().max() > 0.1
    several.use(None)
    assert torch.equal(logits(several.model), base)


def test_switched_100_times_outputs_are_the_same_and_memory_does_not_grow(folders, several):
    def tensors():
        gc.collect()
        return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())

    several.use("attn")
    logits(several.model)
    num_tensors, num_bytes = tensors(), memory_bytes(torch.device("cpu"))
    for turn in range(100):
        name = ("attn", "mlp")[turn % 2]
        several.use(name)
        assert torch.equal(logits(several.model), folders[name][1])
    assert tensors() == num_tensors
    assert memory_bytes(torch.device("cpu")) - num_bytes < 8 * 2**20
    assert len(lora_layers(several.model)) == 14


def test_disabled_is_the_base_and_what_was_active_comes_back(folders, several, load_tiny):
    base = logits(load_tiny())
    several.use("mlp")
    with several.disabled():
        assert torch.equal(logits(several.model), base)
        assert several.active is None
    assert several.active == "mlp"
    assert torch.equal(logits(several.model), folders["mlp"][1])
    with pytest.raises(ZeroDivisionError), several.disabled():
        raise ZeroDivisionError
    assert torch.equal(logits(several.model), folders["mlp"][1])


def test_the_base_stays_who_it_is(several, load_tiny):
    assert fingerprint(several.model) == fingerprint(load_tiny())
    assert not any(param.requires_grad for name, param in several.model.named_parameters() if "base_layer" in name)


def test_mistakes_are_named_and_change_nothing(folders, several, load_tiny, tmp_path):
    several.use("mlp")
    with pytest.raises(AdapterError, match="no adapter 'mpl'; loaded: attn, mlp, few"):
        several.use("mpl")
    with pytest.raises(AdapterError, match="already an adapter 'attn'"):
        several.load("attn", folders["few"][0])
    with pytest.raises(AdapterError, match="is no adapter"):
        several.load("none", tmp_path / "none")
    shutil.copytree(folders["few"][0], tmp_path / "run" / "adapter")
    with pytest.raises(AdapterError, match=r"is no adapter: .* Its adapter is .*run/adapter\."):
        several.load("run", tmp_path / "run")
    other = load_tiny()
    with torch.no_grad():
        other.model.embed_tokens.weight.mul_(2)
    with pytest.raises(AdapterError, match="another base"):
        Adapters(other).load("attn", folders["attn"][0])
    assert not lora_layers(other)
    with pytest.raises(AdapterError, match="without an adapter"):
        Adapters(several.model)
    assert several.active == "mlp"
    assert several.names == list(KINDS)
    assert torch.equal(logits(several.model), folders["mlp"][1])


def test_names_come_from_the_run_or_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = ["runs/mine/adapter", "runs/mine/best", "exported", "old=runs/yours/adapter"]
    assert {name: str(folder) for name, folder in named_folders(given).items()} == {
        "mine": "runs/mine/adapter",
        "mine/best": "runs/mine/best",
        "exported": "exported",
        "old": "runs/yours/adapter",
    }
    with pytest.raises(AdapterError, match="both named 'mine'"):
        named_folders(["a/mine/adapter", "b/mine/adapter"])
    (tmp_path / "rate=1e-3").mkdir()
    assert list(named_folders(["rate=1e-3"])) == ["rate=1e-3"]


# ---------------------------------------------------------------------------------------- chat


@pytest.fixture
def chat(folders, monkeypatch, capsys):
    """A function: what a chat with these lines typed says; for each answer (turns, system prompt, layers adapted)."""
    asked, loaded = [], []
    really, load = generate.answer, generate.load_model

    def answer(chat_model, turns_of, sampling, on_text=None):
        enabled = {name for name, layer in lora_layers(chat_model.model).items() if layer.enabled}
        asked.append(([*turns_of[0]], chat_model.system_prompt, len(enabled)))
        return really(chat_model, turns_of, sampling, on_text)

    monkeypatch.setattr(generate, "answer", answer)
    monkeypatch.setattr(generate, "load_model", lambda *args: loaded.append(args) or load(*args))

    def talk(lines, *flags):
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        given = [word for name in ("attn", "mlp") for word in ("--adapter", str(folders[name][0]))]
        assert cli.main(["chat", *given, "--max_new_tokens", "6", "--dtype", "float32", *flags]) == 0
        assert len(loaded) == 1  # the base is loaded once, whatever is switched
        return capsys.readouterr(), asked

    return talk


def test_chat_switches_and_compares_with_the_base(chat):
    lines = ["/base", "hello", "/base", "/adapter", "/adapter mlp", "and now?", "/adapter mpl", "/base", "/quit"]
    message, asked = chat(lines)
    assert [layers for _, _, layers in asked] == [8, 0, 6, 0]  # attn, base, mlp, base
    assert [prompt for _, prompt, _ in asked] == ["You are attn."] * 2 + ["You are mlp."] * 2
    turns = [[(turn.role, turn.content) for turn in turns] for turns, _, _ in asked]
    assert turns[1] == turns[0] == [("user", "hello")]
    assert [role for role, _ in turns[2]] == ["user", "assistant", "user"]
    assert turns[3] == turns[2]  # the last prompt again; what the base said is not remembered
    assert "adapters: [attn] mlp" in message.out
    assert "adapters: attn [mlp]" in message.out
    errors = message.err.splitlines()
    assert "nothing has been asked yet" in errors
    assert "there is no adapter 'mpl'; loaded: attn, mlp" in errors


def test_in_chat_a_mistyped_command_is_no_prompt(chat):
    message, asked = chat(["/Base", "/foo bar", "/usr/bin is a folder", "/quit"])
    assert [turns[-1].content for turns, _, _ in asked] == ["/usr/bin is a folder"]
    assert message.err.splitlines()[-2:] == [
        f"there is no {command}; possible are /adapter NAME, /base, /new, /quit" for command in ("/Base", "/foo")
    ]


def test_in_chat_a_given_system_prompt_stays(chat):
    _, asked = chat(["hello", "/adapter mlp", "hello"], "--system_prompt", "Be brief.")
    assert [prompt for _, prompt, _ in asked] == ["Be brief."] * 2
    assert asked[1][0][0] == Turn("user", "hello")


def test_chat_without_an_adapter(monkeypatch, capsys, tiny_folder):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/adapter\n/adapter x\nhello\n/base\n"))
    assert cli.main(["chat", "--model", str(tiny_folder), "--max_new_tokens", "4", "--dtype", "float32"]) == 0
    captured = capsys.readouterr()
    assert "adapters: none" in captured.out
    assert "there is no adapter 'x'; loaded: none" in captured.err
    first, second = (part.strip() for part in captured.out.split("you> ")[3:5])
    assert first == second != ""


# ---------------------------------------------------------------------------------------- PEFT, there and back


def train_a_step(model):
    """One AdamW step on the loss of IDS over what the model trains; returns the loss."""
    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-2)
    loss = model.train()(IDS, labels=IDS).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


@pytest.mark.parametrize(
    ("targets", "rslora"), [(ATTENTION, False), (MLP, True), (ATTENTION + MLP, True)], ids=["attn", "mlp-rs", "all-rs"]
)
def test_an_adapter_of_peft_goes_on_training_here_and_back_again(targets, rslora, load_tiny, tiny_folder, tmp_path):
    """Each side goes on where the other left off: equal logits after each step, a falling loss."""
    from peft import LoraConfig, PeftModel, get_peft_model

    settings = LoraConfig(r=4, lora_alpha=6, target_modules=list(targets), use_rslora=rslora, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    theirs = get_peft_model(load_tiny(), settings)
    losses = [train_a_step(theirs)]
    theirs.save_pretrained(tmp_path / "theirs")

    ours = load_tiny()
    config = adapter_format.load(ours, tmp_path / "theirs", fingerprint(ours))
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=1e-5)
    losses.append(train_a_step(ours))
    adapter_format.save(tmp_path / "ours", ours, config, {})

    reloaded = PeftModel.from_pretrained(load_tiny(), tmp_path / "ours", is_trainable=True)
    torch.testing.assert_close(logits(reloaded), logits(ours), rtol=0, atol=1e-5)
    losses.append(train_a_step(reloaded))
    reloaded.save_pretrained(tmp_path / "again")

    last = load_tiny()
    adapter_format.load(last, tmp_path / "again", fingerprint(last))
    torch.testing.assert_close(logits(last), logits(reloaded), rtol=0, atol=1e-5)
    losses.append(train_a_step(last))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] - losses[-1] > 0.01
