"""Options for contexts longer than the device: wrong ones are refused with argument, value and bound."""

from __future__ import annotations

import re
from typing import Any

import pytest
from support.driving import Engine

from paged_ref.interop.checkpoints import load

CONFIG = load("tiny").config
PER_BLOCK = CONFIG.num_layers * CONFIG.num_kv_heads  # pages
CONTEXT = CONFIG.max_position_embeddings

REFUSED = [
    ({"device_blocks": 0}, "device_blocks is 0; at least 1 is needed"),
    ({"device_blocks": 2, "host_blocks": -1}, "host_blocks is -1; at least 0 is needed"),
    ({"device_blocks": 2, "staging_pages": 0}, "staging_pages is 0; at least 1 is needed, a page of one layer"),
    (
        {"device_blocks": 1, "staging_pages": PER_BLOCK},
        f"device_blocks is 1, which is {PER_BLOCK} pages; with {PER_BLOCK}",
    ),
    ({"device_blocks": 2, "attend": 0}, "attend is 0; 'all', a budget of at least 1 block, or a share above 0"),
    ({"device_blocks": 2, "attend": 0.0}, "attend is 0.0;"),
    ({"device_blocks": 2, "attend": 1.5}, "attend is 1.5;"),
    ({"device_blocks": 2, "attend": "some"}, "attend is 'some';"),
    ({"device_blocks": 2, "evict": "mru"}, "evict is 'mru'; known are lru, sliding, relevance"),
    ({"device_blocks": 2, "full_layers": -1}, "full_layers is -1; 0 to the model's"),
    ({"device_blocks": 2, "full_layers": CONFIG.num_layers + 1}, f"the model's {CONFIG.num_layers} layers are allowed"),
    ({"device_blocks": 2, "block_size": 0}, "block_size is 0; at least 1"),
    ({"device_blocks": 2, "kv_cache_tokens": 64}, "kv_cache_tokens is 64, and device_blocks is 2"),
    ({"device_blocks": 2, "manager": "standard"}, "manager is 'standard', and device_blocks is 2"),
    ({"device_blocks": 2, "prefix_cache": True}, "prefix_cache is True, and device_blocks is 2"),
    ({"host_blocks": 8}, "host_blocks is 8, and device_blocks is not given"),
    ({"attend": 0.1}, "attend is 0.1, and device_blocks is not given"),
    ({"device_blocks": 2, "max_model_len": CONTEXT + 1}, f"1 to the model's context of {CONTEXT} is allowed"),
    ({"device_blocks": 2, "max_model_len": 0, "beyond_context": True}, "max_model_len is 0"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=lambda x: str(x)[:40])
def test_what_cannot_be_is_refused_in_one_sentence(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        Engine("tiny", **options)
    assert "\n" not in str(refused.value)
