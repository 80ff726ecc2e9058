"""lm-eval with a tokenizer and a task that are made here: nothing is fetched."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest
import torch

TASK = """\
task: made
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_choice: [t1, t2, t3, t4]
doc_to_target: "{{{{label}}}}"
metric_list: [{{metric: acc}}]
"""
WORDS = 100
QUESTIONS = 24


def interpreter() -> str:
    """A Python that has lm-eval: this one, or the one that ``LM_EVAL_PYTHON`` names."""
    if "LM_EVAL_PYTHON" in os.environ:
        return os.environ["LM_EVAL_PYTHON"]
    if importlib.util.find_spec("lm_eval") is None:
        pytest.skip("lm-eval is not installed, nor does LM_EVAL_PYTHON name a Python that has it")
    return sys.executable


def environment(folder: Path) -> dict[str, str]:
    """Of a process that may ask nobody for anything."""
    return os.environ | {
        "HF_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def write_tokenizer(folder: Path) -> Path:
    """A word is a token: ``t7`` is 7."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"t{n}": n for n in range(WORDS - 1)} | {"</s>": WORDS - 1}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", unk_token="</s>", pad_token="</s>"
    )
    fast.save_pretrained(folder)
    return folder


def write_task(folder: Path) -> list[tuple[list[int], int]]:
    """Questions of three tokens, and which of four tokens is right."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(5)
    questions = [
        (torch.randint(5, WORDS - 1, (3,), generator=generator).tolist(), n % 4)
        for n in range(QUESTIONS)
    ]
    lines = [
        json.dumps({"text": " ".join(f"t{n}" for n in text), "label": label})
        for text, label in questions
    ]
    (folder / "data.jsonl").write_text("\n".join(lines))
    (folder / "made.yaml").write_text(TASK.format(data=folder / "data.jsonl"))
    return questions


def accuracy(export: Path, questions: list[tuple[list[int], int]]) -> float:
    """What transformers gets right."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(export, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([text for text, _ in questions])).logits[:, -1, 1:5]
    right = sum(
        int(row.argmax()) == label for row, (_, label) in zip(logits, questions, strict=True)
    )
    return right / len(questions)
