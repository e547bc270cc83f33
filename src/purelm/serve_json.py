"""JSON that strangers write: clients, and models."""

import json
from typing import Any


def read(text: str | bytes) -> Any:
    """Its value; raises ValueError for what is not JSON, is nested too deeply, or says halves of
    surrogate pairs, which tokenizers and answers cannot write.
    """
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value
