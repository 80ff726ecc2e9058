"""What lies beside the weights: the model's config, how to generate, the tokenizer."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from wsm_megatron.checkpoint.reader import read_file
from wsm_megatron.checkpoint.side_files import Files
from wsm_megatron.checkpoint.writer import write_file
from wsm_megatron.errors import UsageError
from wsm_megatron.export.model_args import ModelArgs
from wsm_megatron.export.table import Family
from wsm_megatron.storage.json_file import read_json

CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"
_TOKENIZER = re.compile(
    r"(added_tokens|special_tokens_map|tokenizer|tokenizer_config|vocab|chat_template)\.json"
    r"|.*\.(model|tiktoken|jinja)|merges\.txt|vocab\.txt|(configuration|modeling|tokenization)_.*\.py"
)
"""Files of a tokenizer, and the code of models that bring their own."""
_SPECIAL = ("bos_token", "eos_token", "pad_token")


class Tokenizer:
    """A folder of a Hugging Face tokenizer; what is asked of it is read, nothing is run.

    Raises ``UsageError`` where the folder holds none.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        if not folder.is_dir():
            raise UsageError(f"--tokenizer {folder}: no such folder")
        self.names = sorted(
            path.name for path in folder.iterdir() if _TOKENIZER.fullmatch(path.name)
        )
        if not any(name.startswith("token") or name.endswith(".model") for name in self.names):
            raise UsageError(
                f"--tokenizer {folder}: neither tokenizer.json nor another tokenizer's files there"
            )

    def size(self) -> int | None:
        """Tokens, those added later included; None where ``tokenizer.json`` does not say it."""
        ids = self._ids()
        return max(ids.values()) + 1 if ids else None

    def special_ids(self) -> dict[str, int]:
        """Ids of the tokens for beginning, end and padding, as far as they are named."""
        ids, found = self._ids(), {}
        config = self._json("tokenizer_config.json")
        for name in _SPECIAL:
            token = config.get(name)
            content = token.get("content") if isinstance(token, dict) else token
            if content in ids:
                found[f"{name}_id"] = ids[content]
        return found

    def generation_config(self) -> bytes | None:
        """Its own, where it has one."""
        path = self.folder / GENERATION_FILE
        return read_file(path) if path.is_file() else None

    def copy(self, directory: Path) -> Files:
        """Copy its files, durably; the copies."""
        return {
            name: write_file(directory / name, read_file(self.folder / name)) for name in self.names
        }

    def _ids(self) -> dict[str, int]:
        contents = self._json("tokenizer.json")
        vocabulary = (contents.get("model") or {}).get("vocab") or {}
        if isinstance(vocabulary, list):  # of a unigram model: token and score
            vocabulary = {token: n for n, (token, _) in enumerate(vocabulary)}
        added = contents.get("added_tokens") or []
        return {**vocabulary, **{one["content"]: one["id"] for one in added}}

    def _json(self, name: str) -> dict[str, Any]:
        path = self.folder / name
        contents = read_json(path) if path.is_file() else {}
        if not isinstance(contents, dict):
            raise UsageError(f"{path} is no tokenizer's")
        return contents


def model_config(
    family: Family, args: ModelArgs, dtype: torch.dtype | None, special: Mapping[str, int]
) -> dict[str, Any]:
    """``config.json``.

    Args:
        dtype: of the weights; None where they have several.
        special: ids of tokens. What is not there is null: a library's default is another model's.
    """
    name = None if dtype is None else str(dtype).removeprefix("torch.")
    ids = {f"{token}_id": special.get(f"{token}_id") for token in _SPECIAL}
    own = family.config(args) | ids | ({} if name is None else {"torch_dtype": name})
    return {
        "architectures": [family.architecture],
        "model_type": family.name,
        **dict(sorted(own.items())),
    }


def write_beside(
    directory: Path, config: Mapping[str, Any] | None, tokenizer: Tokenizer | None
) -> Files:
    """Write configs and copy the tokenizer, durably.

    Args:
        config: None where the names are Megatron's, which no such config goes with.
    """
    files: Files = {}
    if tokenizer is not None:
        files |= tokenizer.copy(directory)
    if config is None:
        return files
    files[CONFIG_FILE] = write_file(directory / CONFIG_FILE, as_json(config))
    generation = None if tokenizer is None else tokenizer.generation_config()
    if generation is None:
        ids = {
            name: config[name] for name in map("{}_id".format, _SPECIAL) if config[name] is not None
        }
        generation = as_json({"_from_model_config": True, **ids})
    files[GENERATION_FILE] = write_file(directory / GENERATION_FILE, generation)
    return files


def as_json(contents: Mapping[str, Any]) -> bytes:
    return (json.dumps(contents, indent=2) + "\n").encode()
