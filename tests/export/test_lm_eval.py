"""lm-eval runs on an export as it comes, with a tokenizer and a task that the test makes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import runs
from tests.reference import RUNS
from wsm_megatron.export.job import export
from wsm_megatron.export.options import ExportConfig

pytest.importorskip("lm_eval")
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


def test_lm_eval_runs_on_an_export(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    source = RUNS / runs.MAIN / "iter_0000008"
    tokenizer = write_tokenizer(tmp_path / "tokenizer")
    folder = export(ExportConfig(load=source, save=tmp_path / "hf", tokenizer=tokenizer)).path
    questions = write_task(tmp_path / "task")
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu"]
    command += ["--model_args", f"pretrained={folder},dtype=float32", "--tasks", "made"]
    command += ["--include_path", str(tmp_path / "task"), "--output_path", str(tmp_path / "out")]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = (tmp_path / "out").rglob("results*.json")
    accuracy = json.loads(results.read_text())["results"]["made"]["acc,none"]

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([text for text, _ in questions])).logits[:, -1, 1:5]
    right = sum(
        int(row.argmax()) == label for row, (_, label) in zip(logits, questions, strict=True)
    )
    assert accuracy == pytest.approx(right / QUESTIONS)
    assert 0 < right < QUESTIONS
