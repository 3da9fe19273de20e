"""The chat templates of the Qwen models as their makers publish them, from the files of the installed TRL."""

import importlib.util
from pathlib import Path

from minilora import demo

FILES = {"qwen2.5": "qwen2_5.jinja", "qwen3": "qwen3.jinja", "qwen3-2507": "qwen3_instruct_2507.jinja"}
MODELS = ("qwen2", *FILES)


def template(model: str) -> str:
    """The chat template of one of MODELS. That of Qwen2, which TRL does not have, is the demo model's own."""
    if model == "qwen2":
        return (demo.DEMO_DIR / "chat_template.jinja").read_text("utf-8")
    found = importlib.util.find_spec("trl")  # its files are read, it is not imported
    assert found is not None, "the tests read TRL's chat templates: pip install -r requirements-dev.txt"
    return (Path(found.origin or "").parent / "chat_templates" / FILES[model]).read_text("utf-8")
