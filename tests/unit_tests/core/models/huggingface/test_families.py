"""The page on the exchange says which families there are."""

import re
from pathlib import Path

from megatron.core.models.huggingface.family import families

PAGE = Path(__file__).parents[5] / "docs/huggingface.md"


def test_the_table_of_the_page_is_that_of_the_data() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (\w+) \|$", PAGE.read_text(), re.M)
    assert rows == [
        (family.name, family.title, ", ".join(family.model_types), family.architecture)
        for family in families()
    ]
