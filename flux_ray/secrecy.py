"""What looks like a secret, by its name.

Gives:  `is_secret`.
Knows:  such values are written nowhere, and users' rewards get them only where reward.env names them.
"""

from __future__ import annotations

import re

WORDS = re.compile(r"(^|_)(api_?key|key|token|secret|(pg)?passw(or)?d|credential)s?(_|$)", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Of an environment variable.

    >>> is_secret("HF_TOKEN"), is_secret("OPENAI_API_KEY"), is_secret("TOKENIZERS_PARALLELISM")
    (True, True, False)
    """
    return bool(WORDS.search(name))
