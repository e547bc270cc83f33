"""Every switch of every family is thrown by a parity case, or it is said why none can."""

import pytest
from family_cases import FAMILIES
from switches import NOT_THROWN, table, why_not


@pytest.mark.parametrize("family", FAMILIES)
def test_every_switch_is_thrown(family: str) -> None:
    thrown = table(family)
    assert len(thrown) >= 8
    missing = [f for f, case in thrown.items() if case is None and why_not(family, f) is None]
    assert not missing, f"no case of {family} in family_cases.py throws {', '.join(missing)}"
    # A reason that a case has overtaken is to be deleted.
    overtaken = [f for f, case in thrown.items() if case and f"{family}.{f}" in NOT_THROWN]
    assert not overtaken


def test_reasons_are_of_fields_that_are_read() -> None:
    read = {family: table(family) for family in FAMILIES}
    for name in NOT_THROWN:
        family, _, field = name.rpartition(".")
        assert field in read[family] if family else any(field in one for one in read.values())
