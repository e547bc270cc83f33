"""Every broken checkpoint, through all of loading: one kind of error, nothing run or written."""

import os
import resource
import time
from pathlib import Path

import pytest
from audit import watched
from corpus import BROKEN, Broken, good

import purelm
from purelm.errors import LoadError


@pytest.fixture(scope="module", autouse=True)
def everything_imported(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The good checkpoint loads, and what loading imports late is imported."""
    folder = good(tmp_path_factory.mktemp("good"))
    purelm.load(folder, quantize="nf4")
    purelm.FastLanguageModel.from_pretrained(str(folder))


@pytest.mark.parametrize("case", BROKEN, ids=lambda case: case.name)
def test_loading_refuses(case: Broken, tmp_path: Path) -> None:
    folder = case.build(tmp_path / "broken")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with watched() as events, pytest.raises(LoadError) as caught:
        purelm.load(folder, quantize="nf4")
    assert time.process_time() - start < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 200 * 1024
    assert type(caught.value) is case.error
    assert len(str(caught.value)) < 4000
    # The folder itself, and then one file or one tensor, is named.
    assert str(tmp_path) in str(caught.value) or caught.value.tensor
    inside = os.path.realpath(folder)
    strange = [e for e in events if e[0] != "open" or not Path(e[1]).is_relative_to(inside)]
    assert strange == []
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "name",
    "pickle_only pickle_named_safetensors index_dot_dot weights_link_out config_no_model_type "
    "config_unknown_model_type tensor_missing tensor_extra tensor_shape cut_in_the_data".split(),
)
def test_from_pretrained_refuses(name: str, tmp_path: Path) -> None:
    (case,) = [case for case in BROKEN if case.name == name]
    folder = case.build(tmp_path / "broken")
    with watched() as events, pytest.raises(LoadError) as caught:
        purelm.FastLanguageModel.from_pretrained(str(folder))
    assert type(caught.value) is case.error
    inside = os.path.realpath(folder)
    assert [e for e in events if e[0] != "open" or not Path(e[1]).is_relative_to(inside)] == []
