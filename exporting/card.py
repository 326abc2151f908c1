"""The model card: README.md beside exported weights, with the facts of the run."""

from pathlib import Path
from typing import Any

from conf.identity import flat
from model import GPTConfig
from setting import as_word
from terminal import escaped

PAGE = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- nanohydra
---

# {name}

A language model trained with nanohydra.

| | |
|---|---|
{rows}

{checked}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("FOLDER")
model = AutoModelForCausalLM.from_pretrained("FOLDER"{trust})
ids = tokenizer("The", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=50)[0]))
```
"""


def model_card(name: str, config: GPTConfig, class_name: str, state: dict[str, Any],
               parameters: int, checked: str) -> str:
    """The content of README.md. Paths of the training machine are left out."""
    # The facts, as a table.
    settings = flat(state["settings"])
    val_loss = state["val_loss"]
    facts = {
        "class": class_name,
        "parameters": f"{parameters:,}",
        "layers, width, heads": f"{config.n_layer}, {config.n_embd}, {config.n_head}",
        "context": f"{config.block_size:,} tokens",
        "vocabulary": f"{config.vocab_size:,} tokens ({settings.get('data.tokenizer')})",
        "text": training_text(settings),
        "steps": f"{state['step']:,} of {state['max_steps']:,}",
        "optimizer": f"{settings.get('optim.optimizer')}, learning rate "
                     f"{as_word(settings.get('optim.lr'))}",
        "validation loss": "not evaluated" if val_loss is None else f"{val_loss:.4f} nats a token",
    }
    rows = [f"| {key} | {plain(value)} |" for key, value in facts.items()]

    # The page: front matter, title, table, check, and how to use the model.
    trust = ", trust_remote_code=True" if config.ngrams > 1 else ""
    return PAGE.format(name=plain(name), rows="\n".join(rows), checked=checked, trust=trust)


def training_text(settings: dict[str, Any]) -> str:
    """The training text without the folders of its path."""
    if settings.get("data.mix"):
        return "a mixture of several sources"
    source = settings.get("data.source")
    name = settings.get("data.hub_name") or Path(str(settings.get("data.path", ""))).name
    return f"{source}: {name}" if name else f"{source}"


def plain(text: str) -> str:
    """A text of a run in one cell of a table, without Markdown."""
    shown = escaped(str(text), keep="")
    for letter in "\\|`<>[]*_#":
        shown = shown.replace(letter, f"\\{letter}")
    return shown
