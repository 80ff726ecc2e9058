"""A command line for every command, as its ``--help`` shows it."""

EXAMPLES = {
    "merge": "wsm merge --load RUN --save OUT --last 8 --decay 1-sqrt",
    "plan": "wsm plan --load RUN --save OUT --window-tokens 2B --decay ema",
    "sweep": "wsm sweep --load RUN --save OUT --window-iterations 4000,8000 --decay mean,ema",
    "select": "wsm select --manifest OUT/sweep.json --scores scores.csv --metric loss",
    "search": "wsm search --load RUN --save OUT --last 8 --eval './evaluate.sh {path}' --budget 40",
    "rescue": "wsm rescue --load RUN --save OUT --before 21500 --last 3",
    "report": "wsm report --manifest OUT/sweep.json --scores scores.csv --out report.html",
    "plot": "wsm plot sweep OUT/sweep.json --scores scores.csv --out sweep.png",
    "plot coefficients": "wsm plot coefficients --num 8 --decay mean,ema --out coefficients.svg",
    "plot run": "wsm plot run RUN --scores scores.csv --out run.png",
    "plot sweep": "wsm plot sweep OUT/sweep.json --scores scores.csv --out sweep.png",
    "plot trajectory": "wsm plot trajectory OUT --out trajectory.png",
    "list": "wsm list OUT",
    "coefficients": "wsm coefficients --decay mean,ema --num 8",
    "export": "wsm export OUT/iter_0012000 --format hf --save OUT-hf --tokenizer TOKENIZER",
    "inspect": "wsm inspect RUN",
    "verify": "wsm verify OUT --sources",
    "resume-check": "wsm resume-check OUT --against RUN",
}
"""By the command's name, and by its kind where it has some."""


def epilog(name: str) -> str:
    """The end of a command's help."""
    return f"example:\n  {EXAMPLES[name]}"
