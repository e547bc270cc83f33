"""Host memory that a GPU copies to and from beside its computation."""

import warnings

import torch


def like(t: torch.Tensor) -> torch.Tensor:
    """Memory for a copy of `t` on the host, pinned; where none can be pinned any more, pageable,
    with a warning: copies then hold up the computation.
    """
    try:
        return torch.empty_like(t, device="cpu", pin_memory=True)
    except RuntimeError as problem:
        warnings.warn(
            f"no {t.nbytes:,} bytes of host memory could be pinned ({problem}): copies between it "
            "and the GPU hold up the computation; free host memory or raise the limit of locked "
            "memory (use_gradient_checkpointing=True and False send no residuals there)",
            RuntimeWarning,
            stacklevel=2,
        )
        return torch.empty_like(t, device="cpu")
