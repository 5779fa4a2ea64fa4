"""Skip tests of confined programs on hosts that cannot confine them."""

import pytest

from rlhf.errors import UserError
from rlhf.reward_models.code_runner import CodeRunner


def _can_confine() -> bool:
    try:
        CodeRunner()
    except UserError:
        return False
    return True


needs_confinement = pytest.mark.skipif(
    not _can_confine(), reason="this host cannot confine programs"
)
