"""How a `generate` call chooses tokens beyond one at a time, from transformers' keywords."""

from typing import Any

from ..errors import ArgumentError
from ..nn.beam import BeamSearch
from .generation_rules import Setting


def beams_of(setting: Setting, *, samples: bool, copies: int, streamer: Any) -> BeamSearch | None:
    """setting(name, default) says what a keyword is; None where no beams are asked for.

    Raises ArgumentError, and NotImplementedError for sampled beams.
    """
    beams = setting("num_beams", 1)
    if beams == 1:
        return None
    if samples:
        raise NotImplementedError(
            f"num_beams={beams} with do_sample=True (sampled beams) does not work yet; pass "
            "do_sample=False or num_beams=1"
        )
    if streamer is not None:
        raise ArgumentError(
            f"num_beams is {beams}: which tokens an answer has is known when the search has ended, "
            "so none can be streamed; leave out the streamer or num_beams"
        )
    return BeamSearch(
        beams=beams,
        answers=copies,
        length_penalty=setting("length_penalty", 1.0),
        early_stopping=setting("early_stopping", False),
        renormalize=bool(setting("renormalize_logits", False)),
    )
