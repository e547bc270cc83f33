"""Waiting for a device before a clock is read."""


def finished(cuda: bool) -> None:
    """Return when everything queued on the GPU is done; at once where there is none."""
    import torch

    if cuda:
        torch.cuda.synchronize()
