"""Damaged and hostile checkpoints: every outcome is a clean refusal or the right bits.

    python -m tests.fuzz --seeds 10000 [--first 0] [--only metadata] [--keep FOLDER]

A seed makes one input: a real run, copied and changed by one mutation (two for every fifth seed).
A forked process with limits on time and memory, watched by an audit hook, merges it, and verifies
what was merged and the changed checkpoint itself. What is published is compared with a float64
merge of what PyTorch loads of the sources; see :mod:`.oracle`.
"""
