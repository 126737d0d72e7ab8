"""The model card that saving writes: what the model is, how to load it, and how it was trained."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mixencoder.base.checkpoints.model_types import CLASS_NAMES, architecture_of
from mixencoder.base.configuration import EncoderConfig
from mixencoder.base.modeling import HeadedModel

CARD = "README.md"
_MARK = "<!-- written by mixencoder when it saved this checkpoint; a card without this line is kept -->"
_SETTINGS = ("steps", "batch_size", "learning_rate", "head_learning_rate", "negatives", "temperature", "bf16", "seed")
_STARTS = ("model", "backbone", "teacher")


def may_replace(folder: Path) -> bool:
    """Whether a folder has no model card, or one that this library wrote."""
    try:
        return _MARK in (folder / CARD).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return True
    except OSError:
        return False


def model_card(model: HeadedModel, record: str | None = None) -> str:
    """Return the model card of a model, in Markdown with the fields that the Hugging Face hub reads.

    Args:
        model: of any architecture.
        record: what `mixencoder train` wrote about the run, as JSON; None if there is none.
    """
    config = model.config
    name = CLASS_NAMES[architecture_of(config.model_type) or "mixencoder"]
    module = "mixencoder" if name == "MixEncoder" else "mixencoder.peers"
    task = "text-ranking" if config.heads[0] == "ranking" else "text-classification"
    call = (
        'model.rank("a query", ["a document", "another document"])'
        if task == "text-ranking"
        else 'model.predict([("a text", "another text")])'
    )
    lines = [
        "---", "library_name: mixencoder", f"pipeline_tag: {task}", "---", "", _MARK, "", f"# {name}", "",
        "```python", f"from {module} import {name}", "",
        f'model = {name}.from_pretrained("FOLDER OR HUB ID")', call, "```", "",
        *_table(("property", "value"), _properties(model, config)), "", "## Training", "",
        *_training(record),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _properties(model: HeadedModel, config: EncoderConfig) -> list[tuple[str, Any]]:
    backbone = config.backbone_config
    rows: list[tuple[str, Any]] = [
        ("encoder", f"{backbone.model_type}, {backbone.num_hidden_layers} layers, hidden size {config.hidden_size}"),
        ("parameters", f"{sum(parameter.numel() for parameter in model.parameters()):,}"),
        ("dtype", str(model.dtype).removeprefix("torch.")),
    ]
    for field in ("num_context_embeddings", "interaction_layers", "dual_term", "pooling", "similarity", "num_codes"):
        if hasattr(config, field):
            rows.append((field.replace("_", " "), getattr(config, field)))
    rows.append(("heads", config.heads))
    if config.class_numbers is not None:
        rows.append(("classes", list(config.class_numbers)))
    for field in ("max_query_length", "max_document_length"):
        if (limit := getattr(config, field)) is not None:
            rows.append((field.replace("_", " "), f"{limit} tokens"))
    if config.calibration is not None:
        rows.append(("probability", "sigmoid(score / {temperature:.4g} + {bias:.4g})".format(**config.calibration)))
    return rows


def _training(record: str | None) -> list[str]:
    try:
        fields = None if record is None else json.loads(record)
    except ValueError:
        fields = None
    if not isinstance(fields, dict):
        return ["This checkpoint holds no record of a training run."]
    settings, examples = fields.get("settings", {}), fields.get("examples", {})
    rows = [(entry["name"], entry["weight"], examples.get(entry["name"], "")) for entry in fields.get("data", [])]
    chosen = [(name, settings[name]) for name in (*_STARTS, *_SETTINGS) if settings.get(name) is not None]
    where = [fields.get("device"), fields.get("processor")]
    chosen.append(("seconds", f"{fields.get('seconds')} on {' '.join(str(part) for part in where if part)}"))
    chosen += [(f"version of {name}", found) for name, found in fields.get("versions", {}).items()]
    chosen += [(f"final {name}", value) for name, value in _final(fields.get("log", [])).items()]
    return [
        *_table(("data", "weight", "examples"), rows), "", *_table(("setting", "value"), chosen), "",
        "`training.json` holds all settings and the log.",
    ]  # fmt: skip


def _final(log: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the last loss in a log."""
    losses = [entry["loss"] for entry in log if "loss" in entry]
    return {"loss": losses[-1]} if losses else {}


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(map(_cell, row)) + " |" for row in cells]


def _cell(value: Any) -> str:
    """Return a value as one cell; names of data files may hold any character."""
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")
