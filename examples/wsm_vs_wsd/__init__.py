"""WSM against WSD: does merging do what a decay does, when, and how much of it?

Real megatron-core on CPU ranks, real text, paired seeds. ``python -m examples.wsm_vs_wsd --help``.

    profile.py       Profile: sizes, from seconds (ci) to a night
    plan.py          the arms of a profile, in the order of priority
    queue.py         which arm is next; results as JSON files, so that every run can be resumed
    worker.py        a rank that works off the queue
    bench.py         the trainings of a rank: weights out and in, held-out losses
    text.py          training, validation and test text, noise, another text to fine-tune on
    points.py        the weights along a run, and merges of them
    names.py         how the models that are compared are called
    stable.py        the arm that trains at a constant LR
    branch.py        arms that go on from a checkpoint: decays, constant LR, fine-tuning
    merges.py        arms that merge what a stable run left
    theory.py        the distance between a merge and a decay
    progress.py      how far it is, and how long it will take
    statistics.py    paired differences and their t-intervals
    record.py        commit, hardware and command of a run; all results as one piece of data
    results.py       what the data says, by model and seed
    tables.py, more_tables.py, figures.py, claims.py, page.py    docs/evidence.md, from the data
    gpu.sh           the main comparison with pretrain_gpt.py on one GPU
"""
