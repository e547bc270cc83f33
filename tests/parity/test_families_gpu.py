"""Every family over our kernels on a GPU, against plain torch on the same device."""

import families_gpu
import pytest

from purelm.convert.registry import FAMILIES


@pytest.mark.gpu
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_and_decoding(family: str) -> None:
    assert families_gpu.wrong(families_gpu.check(family)) == []
