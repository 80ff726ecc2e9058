"""A command line for every command, as its ``--help`` shows it."""

EXAMPLES = {
    "merge": "wsm merge --load RUN --save OUT --last 8 --decay 1-sqrt",
    "plan": "wsm plan --load RUN --save OUT --window-tokens 2B --decay ema",
    "sweep": "wsm sweep --load RUN --save OUT --window-iterations 4000,8000 --decay mean,ema",
    "select": "wsm select --manifest OUT/sweep.json --scores scores.csv --metric loss",
    "search": "wsm search --load RUN --save OUT --last 8 --eval './evaluate.sh {path}' --budget 40",
    "coefficients": "wsm coefficients --decay mean,ema --num 8",
    "export": "wsm export OUT/iter_0012000 --format hf --save OUT-hf --tokenizer TOKENIZER",
    "inspect": "wsm inspect RUN",
    "verify": "wsm verify OUT --sources",
    "resume-check": "wsm resume-check OUT --against RUN",
}
"""By the command's name."""
