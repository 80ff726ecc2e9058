from tests.megatron_lm.checkout import REPOSITORY

FILE = REPOSITORY / "docs" / "compatibility.md"


def render(recorded):
    return ""
