"""Our side of other trainers."""

import pytest

# These libraries warn of each other's old names.
OLD_NAMES = [
    pytest.mark.filterwarnings(f"default::{kind}")
    for kind in ("FutureWarning", "DeprecationWarning", "UserWarning")
]
