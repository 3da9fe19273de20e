"""Defines the row formats: the fields of a row, and the conversation that a row stands for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from minilora.data.jsonl import _json_type

ROLES = ("system", "user", "assistant")
FORMATS: dict[str, tuple[str, ...]] = {  # all rows of a file have the fields of one format
    "messages": ("messages",),
    "prompt/completion": ("prompt", "completion"),
    "instruction/output": ("instruction", "output"),
}
_REMOVE = "Remove it, or leave such rows out."
_THOUGHT = "Write it into the answer as <think>...</think>, or remove it."
NOT_READ_YET = {  # fields that change the meaning of a row or a message, and what the user can do about them
    "history": "Write its turns into 'messages'.",
    **dict.fromkeys(("reasoning_content", "reasoning", "thinking"), _THOUGHT),
    **dict.fromkeys(("tools", "tool_calls", "functions", "function_call"), _REMOVE),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios", "chat_template_kwargs"), _REMOVE),
}
LEARNED_OR_NOT = ("weight", "train", "loss")  # fields of a message: 1 (true) if it is learned, else 0 (false)
OPTIONAL: dict[str, tuple[str, ...]] = {"instruction/output": ("input",)}  # `system` is optional in every format


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation: who speaks and what is said."""

    role: str
    content: str


@dataclass(frozen=True)
class Row:
    """The conversation of one line of a file, with the 1-based number of that line."""

    line: int
    turns: tuple[Turn, ...]


class Question(NamedTuple):
    """A conversation up to the last answer of a row, and that answer."""

    turns: tuple[Turn, ...]
    reference: str


def detect_format(row: dict[str, Any]) -> str:
    """The format whose fields this row has. Raises ValueError if it has the fields of no format."""
    for name, needed in FORMATS.items():
        if all(key in row for key in needed):
            return name
    possible = "; ".join(" + ".join(needed) for needed in FORMATS.values())
    raise ValueError(f"the fields are {', '.join(map(repr, row)) or 'none'}; the needed fields are {possible}")


def to_turns(row: dict[str, Any], format: str) -> tuple[Turn, ...]:
    """The conversation of a row. Raises ValueError if it is not one, or has a field that changes its meaning."""
    _check_meaning(row)
    system = _text(row, "system", optional=True)
    if format == "messages":
        turns = list(_messages(row["messages"]) if "messages" in row else _missing("messages"))
        if system and turns[0].role == "system":
            raise ValueError("there is a 'system' field and a system message: give only one")
    elif format == "prompt/completion":
        turns = [Turn("user", _text(row, "prompt")), Turn("assistant", _text(row, "completion"))]
    else:
        asked, extra = _text(row, "instruction"), _text(row, "input", optional=True)
        turns = [Turn("user", f"{asked}\n{extra}" if extra else asked), Turn("assistant", _text(row, "output"))]
    return (Turn("system", system), *turns) if system else tuple(turns)


def _check_meaning(fields: dict[str, Any]) -> None:
    """Raise ValueError if a row or a message has a non-empty field that changes its meaning."""
    for key, advice in NOT_READ_YET.items():
        value = fields.get(key)
        if value and not (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null")):
            raise ValueError(f"the field {key!r} changes what this row means and is not read yet. {advice}")


def _text(row: dict[str, Any], key: str, optional: bool = False) -> str:
    value = row.get(key)
    if optional and (value is None or (isinstance(value, str) and not value.strip())):
        return ""
    if key not in row:
        _missing(key)
    if not isinstance(value, str):
        raise ValueError(f"{key!r} must be a text, this is {_json_type(value)}")
    if not value.strip():
        raise ValueError(f"{key!r} is empty")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError(f"{key!r} holds half of a surrogate pair, which is no character") from None
    return value


def _missing(key: str) -> Any:
    raise ValueError(f"the field {key!r} is missing")


def _messages(messages: Any) -> Iterator[Turn]:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a list of turns, this is {_json_type(messages) if messages else 'empty'}")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise ValueError(f"message {number} must be an object, this is {_json_type(message)}")
        role = message.get("role")
        if role not in ROLES:
            raise ValueError(f"message {number} has the role {role!r}; the roles are {', '.join(ROLES)}")
        if role == "system" and number > 1:
            raise ValueError(f"message {number} is a system turn; only the first message may be one")
        try:
            _check_meaning(message)
            for key in LEARNED_OR_NOT:
                if message.get(key) not in (None, "", int(role == "assistant")):
                    raise ValueError(f"the field {key!r} changes what is learned and is not read yet. {_REMOVE}")
            yield Turn(role, _text(message, "content"))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from None
    if not any(message["role"] == "assistant" for message in messages):
        raise ValueError("no assistant turn: there is nothing to learn")


def question_of(row: Row) -> Question | None:
    """The last question of a row and its answer. None if no user turn comes before the last answer."""
    last = max(i for i, turn in enumerate(row.turns) if turn.role == "assistant")
    if last == 0 or row.turns[last - 1].role != "user":
        return None
    return Question(row.turns[:last], row.turns[last].content)
