"""The table: versions of Megatron-LM × configurations × plugin, offline merge, resume.

    table.py      rows, columns, resumes across versions: data
    cell.py       runs one row with one version
    promises.py   what a cell promises, against references of its own
    ranks.py      launches whose ranks are forked from a process that has imported Megatron
    records.py    the results, a line each: results.jsonl
    page.py       docs/compatibility.md, made of them
    __main__.py   the command: python -m tests.megatron_lm.matrix --trees DIR

``tests/megatron_lm/test_matrix.py`` runs the same rows for the checkout in ``MEGATRON_LM_DIR``.
"""
